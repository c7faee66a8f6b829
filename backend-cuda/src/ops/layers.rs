//! All layers of a decode step in one kernel: the launch of `layers.cu`, or of `layers_fp8.cu` where keys and values are kept in fp8.
//!
//! ```text
//!   64 multiprocessors   multiply   … layer i, first half ───────│ layer i, second half ────│ layer i + 1, first half ─ …
//!   the others           attend     … layer i, second half ──│ layer i + 1, first half ──│ layer i + 1, second half ─ …
//! ```
//!
//! Half of a device's multiprocessors keep its memory busy with the keys and values that they attend to, so the others multiply
//! meanwhile: o, gate and up, down, and the next layer's queries, keys and values. The rows come in two halves ([`Part`]), so that one is
//! attended to while the other is multiplied. At the ends there is nothing beside which to multiply: queries, keys and values of the first
//! layer come from that product's own kernel, for all rows, and so do the products of the last one for the second half, on all
//! multiprocessors.
//!
//! 1. Blocks wait for each other, by counters in memory. So all of them must run at once: each has a multiprocessor to itself, and the
//!    launch is cooperative, so that no block begins before there is room for all.
//! 2. A half's attention waits for its queries, which its products in the layer before end with, and its products wait for its attention.
//!    All blocks take both in one order, by layer and half: so what is first of all that is left waits for nothing that is left.
//! 3. The kernel's parameter has all layers' tensor maps and addresses in it: nothing of it is kept on the device.
//!
//! Invariant: what a row becomes is to the bit what the kernels of single operations make of it.

use minisgl_core::backend::{Purpose, Step};
use minisgl_core::batch::StepShape;
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_core::spec::{Attention, Bias, DecoderSpec, Dims, LayerSpec, Mixer, WeightFormat};

mod args;
pub(super) mod blocks;
#[cfg(test)]
mod simulated;

use args::{
    Args, HALF_ROWS_MAX, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS_MAX, LayerArgs, Maps,
    PAGE_SIZE, gathered,
};
use blocks::{MULTIPLY, SHARED};

use super::attention::HalfWork;
use super::described::Launch;
use super::halves::{Halves, Part};
use super::operands::{Buffers, Layer, SEGMENT, rows_from};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::tensor_map::TensorMap;

/// Multiprocessors from which on it was found to pay.
const MULTIPROCESSORS_MIN: u32 = 132;

/// Rows of a tile of activations are padded to a multiple of this.
const PADDING: u32 = 16;
/// Words of counters of a step, and of each layer, which has two phases (`layers_flags.cuh`).
const FLAG_WORDS: [usize; 2] = [16, 128];

/// The kernel, for one model.
#[derive(Debug)]
pub struct LayersKernel {
    kernel: Kernel,
    grid: Grid,
    /// See [`Args::sums`] and [`Args::flags`].
    sums: Address,
    flags: Address,
}

impl LayersKernel {
    /// Fewer rows have too little to attend to. And they may be drafts, which see keys of their own step: the kernel takes what lies
    /// before a row's newest leaf for older than the step.
    const ROWS_MIN: u32 = Halves::ROWS_MIN;
    const ROWS_MAX: u32 = 2 * HALF_ROWS_MAX;

    /// Looks the kernel up, if the model is one that it is for and the device has room for all of its blocks at once.
    pub fn new(
        gpu: &mut Gpu,
        spec: &DecoderSpec,
        format: KvFormat,
        limits: &Limits,
    ) -> Result<Option<LayersKernel>, CudaError> {
        let (multiprocessors, hopper) = (gpu.properties().multiprocessors, gpu.properties().hopper);
        if !hopper || gpu.link.is_some() || !Self::suits(spec, limits.page_size, multiprocessors) {
            return Ok(None);
        }
        let [module, name] = Self::kernel_of(format);
        let kernel = gpu.modules().kernel(module, name, SHARED)?;
        let grid = blocks::grid(multiprocessors, format);
        if gpu.launcher().clusters_at_once(&kernel, grid)? < multiprocessors / 2 {
            return Ok(None);
        }
        let flag_bytes = (FLAG_WORDS[0] + FLAG_WORDS[1] * spec.layers.len()) * 4;
        let flags = gpu.allocate(Purpose::Scratch, flag_bytes)?;
        gpu.zero(flags, flag_bytes)?;
        let sums =
            gpu.allocate(Purpose::Scratch, (2 * 2 * HIDDEN.div_ceil(SEGMENT) * HALF_ROWS_MAX * 8) as usize)?;
        Ok(Some(LayersKernel { kernel, grid, sums, flags }))
    }

    /// Module and name, by how keys and values are kept.
    fn kernel_of(format: KvFormat) -> [&'static str; 2] {
        if format == KvFormat::Fp8 {
            ["layers_fp8", "divided_layers_fp8"]
        } else {
            ["layers", "divided_layers"]
        }
    }

    /// Is it for such a model, with pages of so many tokens, on so many multiprocessors?
    pub(super) fn suits(spec: &DecoderSpec, page_size: u32, multiprocessors: u32) -> bool {
        let Dims { hidden, heads, kv_heads, head_dim, intermediate, .. } = spec.dims;
        let sizes = [hidden, heads, kv_heads, head_dim, intermediate, page_size];
        let plain = |layer: &LayerSpec| {
            let Mixer::Attention(Attention { bias, window, .. }) = layer.mixer else { return false };
            bias == Bias::None && window.is_none() && layer.experts().is_none()
        };
        sizes == [HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, PAGE_SIZE]
            && multiprocessors >= MULTIPROCESSORS_MIN
            && spec.weights == WeightFormat::Bf16
            && spec.kv != Some(KvFormat::F32)
            && spec.layers.len() <= LAYERS_MAX
            && spec.layers.iter().all(plain)
    }

    /// Is it for steps of this shape?
    pub(super) fn takes(shape: StepShape) -> bool {
        shape.is_decode() && (Self::ROWS_MIN..=Self::ROWS_MAX).contains(&shape.decode_rows)
    }

    /// Its launch, for halves of so many turns.
    pub(super) fn explained(multiprocessors: u32, format: KvFormat, turns: &str) -> Launch {
        let [_, kernel] = Self::kernel_of(format);
        let (grid, attend) = (blocks::grid(multiprocessors, format), multiprocessors / 2 * 2 - MULTIPLY);
        let work = format!(
            "{MULTIPLY} blocks multiply one half of the rows while {attend} attend to the other: {turns} turns a layer"
        );
        Launch { what: "layers", kernel, grid, work }
    }

    /// All layers of a step, but for the first one's queries, keys and values, and what the second half's products make of what the last one
    /// attended to: the residual stream of the first half becomes theirs.
    pub(super) fn launch<'a>(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        layers: impl Iterator<Item = Layer<'a>>,
        buffers: &Buffers,
        work: [HalfWork; 2],
        norm_eps: f32,
    ) -> Result<(), CudaError> {
        let halves = [Part::First, Part::Second].map(|part| part.tokens(step.shape));
        let rows = halves.clone().map(|half| half.len() as u32);
        let padded = rows[0].next_multiple_of(PADDING);
        let map = |buffer: Buffer, width: u32| {
            let of = |half: usize| {
                let rows = rows_from(buffer, width as usize, halves[half].start);
                TensorMap::rows_of_bf16(rows.address, rows.there as usize, width as usize, padded / 2)
            };
            Ok::<_, CudaError>([of(0)?, of(1)?])
        };
        let maps = Maps {
            attended: map(buffers.attended, HEADS * HEAD_DIM)?,
            residual: map(buffers.residual, HIDDEN)?,
            activated: map(buffers.activated, INTERMEDIATE)?,
        };
        let of_layers = layers.map(|layer| LayerArgs::of(&layer));
        let (layers, count) = gathered(of_layers)?;
        let args = Args {
            layers,
            batch: step.batch.address(),
            page_table: step.page_table.address(),
            q: buffers.q.address(),
            attended: buffers.attended.address(),
            activated: buffers.activated.address(),
            residual: buffers.residual.address(),
            sums: self.sums,
            partials: work.map(|half| half.partials),
            arrived: work.map(|half| half.arrived),
            flags: self.flags,
            count,
            rows,
            padded,
            plan_offset: work.map(|half| half.plan),
            tokens_offset: step.layout.tokens as u32,
            table_width: step.table_width,
            norm_eps,
            reserved: [0; 15],
        };
        launcher.launch(&self.kernel, self.grid, [&args, &maps])
    }
}

#[cfg(test)]
mod tests {
    use minisgl_core::spec::Rope;
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::threads_of;

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for (format, threads) in [KvFormat::Bf16, KvFormat::Fp8].into_iter().zip(blocks::THREADS) {
            let [_, kernel] = LayersKernel::kernel_of(format);
            assert_eq!(threads_of(HOPPER, kernel), threads, "{kernel}");
        }
    }

    fn small() -> DecoderSpec {
        let (heads, kv_heads, head_dim) = (HEADS, KV_HEADS, HEAD_DIM);
        let (hidden, intermediate) = (HIDDEN, INTERMEDIATE);
        let dims =
            Dims { layers: 28, hidden, heads, kv_heads, head_dim, intermediate, vocab: 512, norm_eps: 1e-6 };
        let attention = Attention { rope: Some(Rope::plain(1e6, head_dim)), ..Attention::plain() };
        DecoderSpec::uniform(dims, LayerSpec { mixer: Mixer::Attention(attention), ..LayerSpec::plain() })
    }

    #[test]
    fn other_models_and_other_steps_are_run_otherwise() {
        let spec = small();
        assert!(LayersKernel::suits(&spec, 16, 132));
        assert!(LayersKernel::suits(&DecoderSpec { kv: Some(KvFormat::Fp8), ..small() }, 16, 132));
        assert!(!LayersKernel::suits(&spec, 64, 132) && !LayersKernel::suits(&spec, 16, 114));
        let wide = DecoderSpec { dims: Dims { intermediate: 4096, ..spec.dims }, ..small() };
        let deep = DecoderSpec::uniform(Dims { layers: 40, ..spec.dims }, spec.layers[0]);
        let windowed = Attention { window: Some(512), ..Attention::plain() };
        let windowed = LayerSpec { mixer: Mixer::Attention(windowed), ..spec.layers[0] };
        let mut one_windowed = small();
        one_windowed.layers[3] = windowed;
        for other in [wide, deep, one_windowed] {
            assert!(!LayersKernel::suits(&other, 16, 132));
        }
        assert!([40, 256].into_iter().all(|rows| LayersKernel::takes(StepShape::decode(rows))));
        assert!(![32, 264].into_iter().any(|rows| LayersKernel::takes(StepShape::decode(rows))));
        let mixed = StepShape { decode_rows: 63, prefill_rows: 1, ..StepShape::decode(64) };
        assert!(!LayersKernel::takes(mixed));
    }
}
