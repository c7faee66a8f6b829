//! cuBLASLt, where the machine has it: the yardstick of our multiplications. Nothing else uses it.
//!
//! `out[rows, outputs] = x[rows, inputs] · weights[outputs, inputs]ᵀ`, row-major, which is what cuBLASLt, thinking in columns, calls
//! `weightsᵀ · x`. All are bf16, or both operands e4m3, with no scales. The heuristics are asked for their best guesses, each is timed, and the
//! quickest taken.

use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use minisgl_core::backend::{Device, Element, Purpose, Queue};
use minisgl_cuda::{Address, Cuda, CudaError, Launcher};

use crate::timer::{PerfOptions, perf_cuda};

const WORKSPACE_BYTES: usize = 64 << 20;
/// Guesses that are asked for and timed.
const GUESSES: usize = 8;

/// A multiplication's sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    /// Are both operands e4m3?
    pub(crate) fp8: bool,
}

impl Shape {
    pub(crate) fn flops(&self) -> f64 {
        2.0 * self.rows as f64 * self.outputs as f64 * self.inputs as f64
    }
}

/// The library, opened.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Address,
}

/// A multiplication that the library is ready to do.
pub(crate) struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    /// Of the weights, x and out.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    guesses: Vec<sys::cublasLtMatmulHeuristicResult_t>,
    chosen: usize,
}

fn named(error: CublasError) -> CudaError {
    CudaError::Driver { operation: "multiplying with cuBLASLt", cause: format!("{:?}", error.0) }
}

impl Blas {
    /// Opens the library; `None` where the machine lacks it.
    pub(crate) fn open(cuda: &mut Cuda) -> Result<Option<Blas>, CudaError> {
        // SAFETY: opens the library and closes it again.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let workspace = cuda.alloc(Purpose::Scratch, Element::Word, WORKSPACE_BYTES / 4)?.address();
        Ok(Some(Blas { handle: result::create_handle().map_err(named)?, workspace }))
    }

    /// The quickest of the library's guesses for a shape; `None` where it has none.
    pub(crate) fn best(
        &self,
        cuda: &mut Cuda,
        shape: Shape,
        weights: Address,
        x: Address,
        out: Address,
    ) -> Result<Option<Plan>, CudaError> {
        let mut plan = self.plan(shape)?;
        let options = PerfOptions { repetitions: 3, ..PerfOptions::default() };
        let mut least = f64::INFINITY;
        let mut quickest = None;
        for guess in 0..plan.guesses.len() {
            plan.chosen = guess;
            let timed =
                perf_cuda(cuda, &options, |launcher, _| self.multiply(launcher, &plan, weights, x, out));
            // A guess that does not run on this device is no candidate.
            let Ok(timing) = timed else { continue };
            if timing.mean_ms < least {
                (least, quickest) = (timing.mean_ms, Some(guess));
            }
        }
        plan.chosen = quickest.unwrap_or(0);
        Ok(quickest.map(|_| plan))
    }

    /// Enqueues the multiplication.
    pub(crate) fn multiply(
        &self,
        launcher: &Launcher,
        plan: &Plan,
        weights: Address,
        x: Address,
        out: Address,
    ) -> Result<(), CudaError> {
        let (one, zero) = (1.0f32, 0.0f32);
        let [weights_layout, x_layout, out_layout] = plan.layouts;
        let pointer = |address: Address| address.number() as *mut c_void;
        // SAFETY: handle, description, layouts and algorithm are alive; the matrices have the sizes of the plan; the
        // workspace is as large as the heuristics were told.
        let status = unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                pointer(weights),
                weights_layout,
                pointer(x),
                x_layout,
                pointer(out),
                out_layout,
                pointer(out),
                out_layout,
                &plan.guesses[plan.chosen].algo,
                pointer(self.workspace),
                WORKSPACE_BYTES,
                launcher.stream(Queue::Compute).cast(),
            )
        };
        status.map_err(named)
    }

    fn plan(&self, shape: Shape) -> Result<Plan, CudaError> {
        let layout = |kind, rows: usize, cols: usize| {
            let (rows, cols) = (rows as u64, cols as u64);
            result::create_matrix_layout(kind, rows, cols, rows as i64).map_err(named)
        };
        let Shape { rows, outputs, inputs, fp8 } = shape;
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        let operand = if fp8 { sys::cudaDataType::CUDA_R_8F_E4M3 } else { bf16 };
        let mut plan = Plan {
            description: result::create_matmul_desc(
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType::CUDA_R_32F,
            )
            .map_err(named)?,
            layouts: [
                layout(operand, inputs, outputs)?,
                layout(operand, inputs, rows)?,
                layout(bf16, outputs, rows)?,
            ],
            guesses: Vec::new(),
            chosen: 0,
        };
        let transposed = 1i32;
        // SAFETY: the description is alive; one integer is read.
        unsafe {
            result::set_matmul_desc_attribute(
                plan.description,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        }
        .map_err(named)?;
        plan.guesses = self.guesses(&plan)?;
        Ok(plan)
    }

    fn guesses(&self, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulHeuristicResult_t>, CudaError> {
        let preference = result::create_matmul_pref().map_err(named)?;
        let bytes = WORKSPACE_BYTES;
        let [weights, x, out] = plan.layouts;
        // SAFETY: a heuristic result is plain numbers, for which zeros are values.
        let mut guesses: [sys::cublasLtMatmulHeuristicResult_t; GUESSES] = unsafe { std::mem::zeroed() };
        let mut found = 0;
        // SAFETY: everything passed is alive, and `guesses` has room for as many as are asked for.
        let asked = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.handle,
                    plan.description,
                    weights,
                    x,
                    out,
                    out,
                    preference,
                    GUESSES as i32,
                    guesses.as_mut_ptr(),
                    &mut found,
                )
                .result()
            })
            .and_then(|()| result::destroy_matmul_pref(preference))
        };
        match asked {
            Ok(()) => Ok(guesses[..found as usize].to_vec()),
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(Vec::new()),
            Err(error) => Err(named(error)),
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once. An error has nobody to go to.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once. Errors have nobody to go to.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
