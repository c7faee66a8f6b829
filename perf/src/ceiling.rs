//! What the device can do at best, measured: the yardstick of every row.

use minisgl_core::backend::{Device, Element, Purpose};
use minisgl_cuda::{Cuda, CudaError, Grid};

use crate::cublaslt::{Blas, Shape};
use crate::random::random;
use crate::timer::{PerfOptions, perf_cuda};

/// Bytes that the bandwidth is measured over, unless the memory is smaller: many times any L2 cache.
const READ_BYTES: usize = 2 << 30;
/// Side of the square matrices that the multiplication rate is measured with.
const MATMUL_SIDE: usize = 8192;

/// Measured ceilings.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes a second that a kernel reads which does nothing else.
    pub read_bytes_s: f64,
    /// bf16 operations a second of a large square multiplication by cuBLASLt; `None` where the machine lacks it.
    pub matmul_flop_s: Option<f64>,
}

impl Ceilings {
    /// Measures them.
    ///
    /// # Errors
    /// Those of the device.
    pub fn measure(cuda: &mut Cuda) -> Result<Ceilings, CudaError> {
        let mark = cuda.mark();
        let measured = Ok(Ceilings { read_bytes_s: read_rate(cuda)?, matmul_flop_s: matmul_rate(cuda)? });
        cuda.free_after(mark)?;
        measured
    }
}

fn read_rate(cuda: &mut Cuda) -> Result<f64, CudaError> {
    let bytes = READ_BYTES.min(cuda.memory()?.free as usize / 4) / 16 * 16;
    let words = cuda.alloc(Purpose::Scratch, Element::Word, bytes / 4)?;
    let sink = cuda.alloc(Purpose::Scratch, Element::Word, 1)?;
    cuda.clear(words)?;
    let kernel = cuda.modules().kernel("perf", "read_all", 0)?;
    let grid = Grid::new(cuda.properties().multiprocessors * 2, 1024);
    let count = (bytes / 16) as u64;
    let timing = perf_cuda(cuda, &PerfOptions::default(), |launcher, _| {
        // SAFETY: the kernel reads the words, and writes the sink's one.
        unsafe { launcher.launch_raw(&kernel, grid, [&words, &count, &sink]) }
    })?;
    Ok(bytes as f64 / (timing.mean_ms * 1e-3))
}

fn matmul_rate(cuda: &mut Cuda) -> Result<Option<f64>, CudaError> {
    let shape = Shape { rows: MATMUL_SIDE, outputs: MATMUL_SIDE, inputs: MATMUL_SIDE, fp8: false };
    let Some(blas) = Blas::open(cuda)? else { return Ok(None) };
    let matrix = |cuda: &mut Cuda, seed| random(cuda, MATMUL_SIDE, MATMUL_SIDE, seed);
    let (weights, x) = (matrix(cuda, 1)?, matrix(cuda, 2)?);
    let out = cuda.alloc(Purpose::Scratch, Element::Activation, MATMUL_SIDE * MATMUL_SIDE)?;
    let Some(best) = blas.best(cuda, shape, weights.address(), x.address(), out.address())? else {
        return Ok(None);
    };
    let timing = perf_cuda(cuda, &PerfOptions::default(), |launcher, _| {
        blas.multiply(launcher, &best, weights.address(), x.address(), out.address())
    })?;
    Ok(Some(shape.flops() / (timing.mean_ms * 1e-3)))
}
