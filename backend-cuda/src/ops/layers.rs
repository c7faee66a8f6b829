//! All layers of a decode step in one kernel: the launch of `layers.cu`, or of `layers_fp8.cu` where keys and values are kept in fp8.
//!
//! ```text
//!   64 multiprocessors   multiply   … layer i, first half ───────│ layer i, second half ────│ layer i + 1, first half ─ …
//!   the others           attend     … layer i, second half ──│ layer i + 1, first half ──│ layer i + 1, second half ─ …
//! ```
//!
//! Half of a device's multiprocessors keep its memory busy with the keys and values that they attend to, so the others multiply
//! meanwhile: o, gate and up, down, and the next layer's queries, keys and values. The rows come in two halves ([`Part`]), so that one is
//! attended to while the other is multiplied. Queries, keys and values of the first layer come from that product's own kernel, for
//! all rows.
//!
//! 1. Blocks wait for each other, by counters in memory. So all of them must run at once: each has a multiprocessor to itself, and the
//!    launch is cooperative, so that no block begins before there is room for all.
//! 2. A half's attention waits for its queries, which its products in the layer before end with, and its products wait for its attention.
//!    All blocks take both in one order, by layer and half: so what is first of all that is left waits for nothing that is left.
//! 3. The kernel's parameter has all layers' tensor maps and addresses in it: nothing of it is kept on the device.
//!
//! Invariant: what a row becomes is to the bit what the kernels of single operations make of it.

use minisgl_core::backend::{LayerWeights, MlpWeights, Purpose, Step};
use minisgl_core::batch::StepShape;
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_core::spec::{Attention, Bias, DecoderSpec, Dims, LayerSpec, Mixer, WeightFormat};

use super::attention::HalfWork;
use super::explain::Launch;
use super::halves::{Halves, Part};
use super::{Buffers, Layer, rows_from};
use crate::device::Cuda;
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::param::plain_params;
use crate::tensor_map::TensorMap;
use crate::weight::Weight;

/// Layers that the kernel's parameter has room for.
const LAYERS_MAX: usize = 32;
/// Bytes of a block's shared memory: a multiprocessor has room for one such.
const SHARED: u32 = 231_424;
/// Threads of a block, where keys and values are kept in bf16, and in fp8; and groups of its warps that take turns in attending.
const THREADS: [u32; 2] = [384, 512];
const GROUPS: [u32; 2] = [2, 3];
/// Blocks that multiply; as many at least attend.
const MULTIPLY: u32 = 64;
/// Multiprocessors from which on it was found to pay.
const MULTIPROCESSORS_MIN: u32 = 132;

/// The only sizes that the kernel is compiled for.
const HIDDEN: u32 = 1024;
const HEADS: u32 = 16;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
const INTERMEDIATE: u32 = 3072;
const PAGE_SIZE: u32 = 16;
/// Tokens of a half that the sums' room is for.
const HALF_ROWS_MAX: u32 = 128;

/// Rows of a tile of activations are padded to a multiple of this.
const PADDING: u32 = 16;
/// Words of counters of a step, and of each layer: each has 32 bytes to itself.
const FLAG_WORDS: [usize; 2] = [16, 80];

/// A layer, as `layers_args.cuh` declares it.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
struct LayerArgs {
    qkv: TensorMap,
    o: TensorMap,
    gate_up: TensorMap,
    down: TensorMap,
    /// Its pages.
    k: Address,
    v: Address,
    /// `[head_dim]`, or null.
    q_norm: Address,
    k_norm: Address,
    /// `[positions, head_dim / 2]` (cos, sin), or null.
    rope: Address,
    reserved: [u64; 3],
}

/// All layers, and what they have in common.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
struct Args {
    layers: [LayerArgs; LAYERS_MAX],
    batch: Address,
    page_table: Address,
    /// Of the whole step, `[tokens, …]`, as in [`Buffers`].
    q: Address,
    attended: Address,
    activated: Address,
    residual: Address,
    /// `[halves, o and down, hidden / 64, tokens of a half]` pairs of f32.
    sums: Address,
    /// By half, as the decode attention's.
    partials: [Address; 2],
    arrived: [Address; 2],
    /// Zero between launches.
    flags: Address,
    /// How many layers there are.
    count: u32,
    /// Of each half, padding rows included.
    rows: [u32; 2],
    /// Those of the first, padded.
    padded: u32,
    /// First words of the halves' plans in the batch,
    plan_offset: [u32; 2],
    /// and of the step's tokens.
    tokens_offset: u32,
    table_width: u32,
    norm_eps: f32,
    reserved: [u32; 15],
}

/// What is multiplied, by half: how the copy engine fetches all tokens by 64 columns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Maps {
    attended: [TensorMap; 2],
    residual: [TensorMap; 2],
    activated: [TensorMap; 2],
}

plain_params!(Args, Maps);

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
        cuda: &mut Cuda,
        spec: &DecoderSpec,
        format: KvFormat,
        limits: &Limits,
    ) -> Result<Option<LayersKernel>, CudaError> {
        let (multiprocessors, hopper) = (cuda.properties().multiprocessors, cuda.properties().hopper);
        if !hopper || cuda.link.is_some() || !Self::suits(spec, limits.page_size, multiprocessors) {
            return Ok(None);
        }
        let [module, name] = Self::kernel_of(format);
        let kernel = cuda.modules().kernel(module, name, SHARED)?;
        let grid = Self::grid_on(multiprocessors, format);
        if cuda.launcher().clusters_at_once(&kernel, grid)? < multiprocessors / 2 {
            return Ok(None);
        }
        let flag_bytes = (FLAG_WORDS[0] + FLAG_WORDS[1] * spec.layers.len()) * 4;
        let flags = cuda.allocate(Purpose::Scratch, flag_bytes)?;
        cuda.zero(flags, flag_bytes)?;
        let sums = cuda.allocate(Purpose::Scratch, (2 * 2 * HIDDEN / 64 * HALF_ROWS_MAX * 8) as usize)?;
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

    /// Groups of warps that take turns in attending.
    pub(super) fn attenders(multiprocessors: u32, format: KvFormat) -> u32 {
        GROUPS[usize::from(format == KvFormat::Fp8)]
            * (multiprocessors / 2 * 2).saturating_sub(MULTIPLY).max(1)
    }

    /// A block a multiprocessor, in pairs.
    pub(super) fn grid_on(multiprocessors: u32, format: KvFormat) -> Grid {
        let (blocks, threads) = (multiprocessors / 2 * 2, THREADS[usize::from(format == KvFormat::Fp8)]);
        Grid::new(blocks, threads).cluster(2).shared(SHARED).dependent().cooperative()
    }

    /// Its launch, for halves of so many turns.
    pub(super) fn explained(multiprocessors: u32, format: KvFormat, turns: &str) -> Launch {
        let [_, kernel] = Self::kernel_of(format);
        let (grid, attend) = (Self::grid_on(multiprocessors, format), multiprocessors / 2 * 2 - MULTIPLY);
        let work = format!(
            "{MULTIPLY} blocks multiply one half of the rows while {attend} attend to the other: {turns} turns a layer"
        );
        Launch { what: "layers", kernel, grid, work }
    }

    /// All layers of a step, but for the first one's queries, keys and values: the residual stream becomes theirs.
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

/// All of them, and how many; what is behind the last is the last again.
fn gathered(
    layers: impl Iterator<Item = Result<LayerArgs, CudaError>>,
) -> Result<([LayerArgs; LAYERS_MAX], u32), CudaError> {
    let mut all: Option<[LayerArgs; LAYERS_MAX]> = None;
    let mut count = 0;
    for layer in layers {
        let layer = layer?;
        let all = all.get_or_insert([layer; LAYERS_MAX]);
        *all.get_mut(count).ok_or(CudaError::NotReserved)? = layer;
        count += 1;
    }
    all.map(|all| (all, count as u32)).ok_or(CudaError::NotReserved)
}

impl LayerArgs {
    /// A pair of blocks shares 64 rows of o or down, two of qkv a head, so that what they exchange is what the last step of a warp's sum
    /// of squares adds: each has every second pair of rows.
    fn of(layer: &Layer) -> Result<LayerArgs, CudaError> {
        let Layer { weights, rope, kv, .. } = layer;
        let LayerWeights { qkv, o, q_norm, k_norm, mlp: MlpWeights::Dense { gate_up, down }, .. } = weights
        else {
            return Err(CudaError::NotReserved); // the weights are those of the spec that was reserved
        };
        let pairs = |w: &Weight, boxes| TensorMap::pairs_of_rows(w.address(), w.rows(), w.cols(), boxes);
        let address = |weight: &Option<Weight>| weight.map_or(Address::NULL, |weight| weight.address());
        Ok(LayerArgs {
            qkv: pairs(qkv, [1, 32])?,
            o: pairs(o, [1, 16])?,
            gate_up: pairs(gate_up, [2, 24])?,
            down: pairs(down, [1, 16])?,
            k: kv.k.address(),
            v: kv.v.address(),
            q_norm: address(q_norm),
            k_norm: address(k_norm),
            rope: rope.map_or(Address::NULL, |table| table.address()),
            reserved: [0; 3],
        })
    }
}

#[cfg(test)]
mod tests {
    use minisgl_core::spec::Rope;
    use minisgl_core::tensor::splitmix64;
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::{assert_declared, constant, threads_of};

    const FILE: &str = "hopper/layers_args.cuh";

    #[test]
    fn the_host_and_the_kernel_declare_the_same() {
        let files = &[FILE];
        assert_declared!(
            files,
            "Layer",
            LayerArgs { qkv, o, gate_up, down, k, v, q_norm, k_norm, rope, reserved }
        );
        assert_declared!(files, "LayerMaps", Maps { attended, residual, activated });
        assert_declared!(
            files,
            "Layers",
            Args {
                layers,
                batch,
                page_table,
                q,
                attended,
                activated,
                residual,
                sums,
                partials,
                arrived,
                flags,
                count,
                rows,
                padded,
                plan_offset,
                tokens_offset,
                table_width,
                norm_eps,
                reserved,
            }
        );
        let sizes =
            ["HIDDEN", "HEADS", "KV_HEADS", "HEAD_DIM", "MLP", "PAGE"].map(|name| constant(FILE, name));
        assert_eq!(sizes, [HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, PAGE_SIZE]);
        let launched = ["LAYERS_MAX", "LAYERS_SHARED", "MULTIPLIERS", "HALF_ROWS"];
        let declared = launched.map(|name| constant(FILE, name));
        assert_eq!(declared, [LAYERS_MAX as u32, SHARED, MULTIPLY, HALF_ROWS_MAX]);
        for (format, threads) in [KvFormat::Bf16, KvFormat::Fp8].into_iter().zip(THREADS) {
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

    /// The products of a half in a layer, and blocks that have a part in each.
    const PRODUCTS: usize = 4;

    /// A device whose blocks do what `layers_flags.cuh` says, a step at a time, in any order.
    struct Simulated {
        phases: usize,
        /// Of each half, in a layer.
        turns: [usize; 2],
        taken: usize,
        /// Of each phase, the turns that are attended to; of each phase and product, the blocks that ended it.
        done: Vec<usize>,
        ended: Vec<[usize; PRODUCTS]>,
        /// Of each phase and turn, how often it was attended to.
        attended: Vec<Vec<u32>>,
    }

    /// Who attends has taken turns, and has fetched what is old of the later ones; who multiplies is at a product of a phase.
    enum Block {
        Attends { ahead: usize, turns: std::collections::VecDeque<(usize, usize)> },
        Multiplies { at: usize, phase: usize, product: usize },
    }

    impl Simulated {
        /// The phase and turn of a ticket.
        fn turn(&self, ticket: usize) -> (usize, usize) {
            let (layer, turn) =
                (ticket / (self.turns[0] + self.turns[1]), ticket % (self.turns[0] + self.turns[1]));
            match turn.checked_sub(self.turns[0]) {
                None => (2 * layer, turn),
                Some(turn) => (2 * layer + 1, turn),
            }
        }

        fn can_attend(&self, phase: usize, parts: [usize; PRODUCTS]) -> bool {
            phase < 2 || self.ended[phase - 2][PRODUCTS - 1] == parts[PRODUCTS - 1]
        }

        /// Something that the block does; `None` where it waits or has ended.
        fn go_on(&mut self, block: &mut Block, parts: [usize; PRODUCTS], random: u64) -> Option<()> {
            match block {
                Block::Attends { ahead, turns } => {
                    let next = self.turn(self.taken);
                    // The warp that fetches takes turns ahead of those that read, whatever the flags say.
                    if turns.len() <= *ahead
                        && next.0 < self.phases
                        && (random.is_multiple_of(2) || turns.is_empty())
                    {
                        self.taken += 1;
                        turns.push_back(next);
                        return Some(());
                    }
                    let (phase, turn) = *turns.front()?;
                    if !self.can_attend(phase, parts) {
                        return None;
                    }
                    turns.pop_front();
                    self.attended[phase][turn] += 1;
                    self.done[phase] += 1;
                    Some(())
                }
                Block::Multiplies { at, phase, product } => {
                    if *phase == self.phases {
                        return None;
                    }
                    let is_last_layer = *phase + 2 >= self.phases;
                    let has_part = *at < parts[*product] && !(*product == PRODUCTS - 1 && is_last_layer);
                    if has_part {
                        let ready = match *product {
                            0 => self.done[*phase] == self.turns[*phase % 2],
                            later => self.ended[*phase][later - 1] == parts[later - 1],
                        };
                        if !ready {
                            return None;
                        }
                        self.ended[*phase][*product] += 1;
                    }
                    (*phase, *product) = match *product + 1 {
                        PRODUCTS => (*phase + 1, 0),
                        next => (*phase, next),
                    };
                    Some(())
                }
            }
        }
    }

    #[test]
    fn blocks_that_wait_for_each_other_in_any_order_end_with_every_turn_attended_to_once() {
        for draw in 0..400 {
            let random = |i: u64, below: u64| splitmix64(draw << 24 | i) % below;
            let (layers, multiply) = (1 + random(0, 4) as usize, 1 + random(1, 8) as usize);
            // Some products have parts for fewer blocks than there are. A second half may be padding alone.
            let parts = [2, 3, 4, 5].map(|i| 1 + random(i, multiply as u64) as usize);
            let mut device = Simulated {
                phases: 2 * layers,
                turns: [1 + random(6, 40) as usize, random(7, 40) as usize],
                taken: 0,
                done: vec![0; 2 * layers],
                ended: vec![[0; PRODUCTS]; 2 * layers],
                attended: Vec::new(),
            };
            device.attended = (0..2 * layers).map(|phase| vec![0; device.turns[phase % 2]]).collect();
            let attend = (0..1 + random(8, 12))
                .map(|i| Block::Attends { ahead: random(20 + i, 4) as usize, turns: Default::default() });
            let multiply = (0..multiply).map(|at| Block::Multiplies { at, phase: 0, product: 0 });
            let mut blocks: Vec<Block> = attend.chain(multiply).collect();
            for step in 100.. {
                let first = random(step, blocks.len() as u64) as usize;
                let all = blocks.len();
                let went = (0..all).any(|i| {
                    device
                        .go_on(&mut blocks[(first + i) % all], parts, random(step << 4 | 1, 1 << 20))
                        .is_some()
                });
                if !went {
                    break;
                }
            }
            assert!(device.attended.iter().flatten().all(|times| *times == 1), "a turn is lost, or all wait");
            for block in &blocks {
                match block {
                    Block::Attends { turns, .. } => assert!(turns.is_empty()),
                    Block::Multiplies { phase, .. } => assert_eq!(*phase, device.phases),
                }
            }
        }
    }
}
