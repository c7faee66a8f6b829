//! Paged attention: launches of `attention.cu`, and the plan that divides a step's work.
//!
//! ```text
//!   decode    plan: count, then segments (some leaves of a row)            a block takes a segment and a kv head, again and again
//!             a divided step has a plan for each half, one behind the other
//!             (where multiprocessors are divided, `layers.rs` launches what reads it)
//!   prefill   plan: count, then pieces (an item of a row's tokens, and     a block takes a piece and a kv head, again and again
//!             all that it sees, or what it sees of a span)
//! ```
//!
//! A step's prefill rows and its decode rows are launched one after the other, each with its own plan and scratch, and only
//! where there are any. On Hopper they share the device: few tokens keep few multiprocessors busy, and those wait for tensor cores,
//! while half of all are enough to keep memory busy with decode rows:
//!
//! ```text
//!   multiprocessors   ├── prefill rows: as many as have turns, half if that is enough ──┼─ decode rows ─┤ o …
//!                     ├── decode rows: the others ─────────────────────────────────────────────────────┤
//! ```
//!
//! Where it is not enough, prefill rows have all. Decode rows' blocks come as those of prefill rows end, and take whichever turn is
//! next, the first one too: so no multiprocessor waits while there is work.
//!
//! Grids depend on the step's shape and on fixed capacities only, so that a recorded step fits any lengths: a step fills
//! the device once (each half of a divided one, half of it). Portable prefill blocks take one item and head each, and as many
//! are launched as the step's tokens may need at most; none is split.
//!
//! Invariant: the same query over the same keys and values gives the same bits, in whichever kind of row and batch.

mod cuts;
mod heads;
mod params;
mod plan;
mod planner;
mod segment;
mod split;

use minisgl_core::backend::{Dims, KvLayer, Purpose, Step};
use minisgl_core::batch::{Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_kernels::attention::{LEAF, Prefill};

use heads::Heads;
use params::{DecodeParams, KeptPages, PortablePrefillParams, PrefillParams};
use plan::DecodePlanner;
pub(super) use planner::Planner;
use split::Splitter;

use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::ops::halves::{Division, Part};
use crate::param::Param;
use crate::tensor_map::TensorMap;

/// The kernels for one model's heads, and their scratch.
#[derive(Debug)]
pub struct Attention {
    decode: Kernel,
    prefill: Kernel,
    planner: Planner,
    /// For decode rows: of the whole step or its first half, and of the second.
    scratch: [Scratch; 2],
    kept: Kept,
}

/// Where prefill blocks keep the states of spans.
#[derive(Clone, Copy, Debug)]
struct Kept {
    /// As `attention_prefill.cuh` lays them out.
    states: Address,
    /// Words: how many of a warp's spans are kept at a place; and how many turns blocks have taken. Zero between launches.
    arrived: Address,
    /// Where blocks count the turns.
    turns: Address,
}

impl Kept {
    /// Words of `arrived` of a place: one a warp that attends.
    const WARPS: usize = 12;

    fn new(gpu: &mut Gpu, splitter: &Splitter, prefill: &Prefill) -> Result<Kept, CudaError> {
        let words = splitter.places() * Kept::WARPS;
        let states = gpu.allocate(Purpose::Scratch, (splitter.places() * prefill.kept).max(1))?;
        let arrived = gpu.allocate(Purpose::Scratch, (words + 1) * 4)?;
        gpu.zero(arrived, (words + 1) * 4)?;
        Ok(Kept { states, arrived, turns: arrived.offset(words * 4) })
    }
}

/// What a decode launch has to itself.
#[derive(Clone, Copy, Debug)]
struct Scratch {
    /// `[partials, items of a row]` partial results.
    partials: Address,
    /// `[rows, items of a row]` words: how many of a row's partials are there; and how many turns blocks have taken.
    /// Zero between launches.
    arrived: Address,
    /// Words of `arrived` in front of the turns.
    arrived_count: u32,
}

impl Scratch {
    /// For `rows` rows cut by `planner`.
    fn new(gpu: &mut Gpu, heads: Heads, planner: &DecodePlanner, rows: u32) -> Result<Scratch, CudaError> {
        let partial_bytes = planner.partials as usize * heads.items() as usize * heads.partial_bytes();
        let arrived_count = rows * heads.items();
        let arrived_bytes = (arrived_count as usize + 1) * 4;
        let arrived = gpu.allocate(Purpose::Scratch, arrived_bytes)?;
        gpu.zero(arrived, arrived_bytes)?;
        Ok(Scratch { partials: gpu.allocate(Purpose::Scratch, partial_bytes)?, arrived, arrived_count })
    }

    /// Where blocks count the turns that they have taken.
    fn turns(&self) -> Address {
        self.arrived.offset(self.arrived_count as usize * 4)
    }
}

/// What a half of a step of decode rows has to itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct HalfWork {
    /// First word of its plan in the batch.
    pub(super) plan: u32,
    /// See [`Scratch`].
    pub(super) partials: Address,
    pub(super) arrived: Address,
}

/// What a launch works on.
#[derive(Clone, Copy)]
struct Operands<'a> {
    step: &'a Step<Buffer>,
    /// `[tokens, q_width]`.
    q: Buffer,
    kv: KvLayer<Buffer>,
    /// `[tokens, q_width]`.
    out: Buffer,
}

impl Attention {
    /// Looks the kernels up and allocates scratch for steps within `limits`. All layers have the same window, or none. Keys and
    /// values are kept in bf16 or, on Hopper, in fp8, whose rows are permuted as `fp8_rows.cuh` says.
    pub fn new(
        gpu: &mut Gpu,
        dims: &Dims,
        window: Option<u32>,
        format: KvFormat,
        limits: &Limits,
    ) -> Result<Attention, CudaError> {
        let (hopper, multiprocessors) = (gpu.properties().hopper, gpu.properties().multiprocessors);
        let planner = Planner::new(hopper, multiprocessors, dims, window, format, limits)?;
        let Planner { heads, whole, half, splitter, .. } = planner;
        let [decode, prefill] = planner.kernels();
        let module = if planner.fp8 { "attention_fp8" } else { "attention" };
        let kept = Kept::new(gpu, &splitter, &planner.set.prefill)?;
        Ok(Attention {
            decode: gpu.modules().kernel(module, decode, planner.set.decode_shared)?,
            prefill: gpu.modules().kernel(module, prefill, planner.set.prefill.shared)?,
            scratch: [
                Scratch::new(gpu, heads, &whole, limits.running)?,
                Scratch::new(gpu, heads, &half, Planner::half_rows(limits))?,
            ],
            planner,
            kept,
        })
    }

    /// Words of the plan of the largest step within `limits`.
    pub fn plan_words(&self, limits: &Limits) -> usize {
        self.planner.words(limits)
    }

    /// Divides a step's work, or that of its halves. `rows` are the step's, padding included.
    pub fn plan(&self, shape: StepShape, division: Division, rows: &[Row], words: &mut [u32]) {
        self.planner.plan(shape, division, rows, words);
    }

    /// Causal attention of each of the part's tokens over its slot's pages: from q `[tokens, q_width]` of the step to
    /// `out`, the same shape. The step was planned as divided if the part is a half. Of fp8, prefill rows attend to the codes that are
    /// in the wide pages, [`KvLayer::wide`].
    pub fn attend(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        part: Part,
        q: Buffer,
        kv: KvLayer<Buffer>,
        out: Buffer,
    ) -> Result<(), CudaError> {
        let operands = Operands { step, q, kv, out };
        match (step.shape.prefill_rows, self.planner.hopper) {
            (0, _) => {}
            (_, true) => self.attend_hopper(launcher, operands)?,
            (_, false) => self.attend_portable(launcher, operands)?,
        }
        match step.shape.decode_rows {
            0 => Ok(()),
            _ => self.attend_decode(launcher, part, operands),
        }
    }

    /// The halves' plans and scratch, for a kernel that attends to both on multiprocessors of its own.
    pub(super) fn halves(&self, step: &Step<Buffer>) -> [HalfWork; 2] {
        [0, 1].map(|index| {
            let plan = (step.layout.plan + index * self.planner.attenders.words()) as u32;
            let Scratch { partials, arrived, .. } = self.scratch[index];
            HalfWork { plan, partials, arrived }
        })
    }

    fn attend_decode(&self, launcher: &Launcher, part: Part, operands: Operands) -> Result<(), CudaError> {
        let Operands { step, q, kv, out } = operands;
        let (planner, index, other) = match part {
            Part::Whole => (&self.planner.whole, 0, None),
            Part::First => (&self.planner.half, 0, Some(1)),
            Part::Second => (&self.planner.half, 1, Some(0)),
        };
        let plan_of = |index: usize| at(step, step.layout.plan + index * self.planner.half.words());
        let other_of = |other: usize| (plan_of(other), self.scratch[other].turns());
        let (other_plan, other_taken) = other.map_or((Address::NULL, Address::NULL), other_of);
        let row_bytes = self.planner.heads.q_row_bytes() * part.tokens(step.shape).start as usize;
        let [q, out] = [q, out].map(|rows| rows.address().offset(row_bytes));
        let grid = self.planner.decode_grid(planner);
        let Heads { kv_heads, group, .. } = self.planner.heads;
        let Scratch { partials, arrived, arrived_count } = self.scratch[index];
        let params = DecodeParams {
            plan: plan_of(index),
            page_table: step.page_table.address(),
            q,
            k: kv.k.address(),
            v: kv.v.address(),
            out,
            partials,
            arrived,
            other_plan,
            other_taken,
            arrived_count,
            table_width: step.table_width,
            page_shift: step.page_size.trailing_zeros(),
            kv_heads,
            group,
            window: self.planner.window,
        };
        launcher.launch(&self.decode, grid, [&params])
    }

    /// Where the prefill rows' plan begins in the batch.
    fn prefill_plan(&self, step: &Step<Buffer>) -> Address {
        at(step, step.layout.plan + self.planner.decode_words())
    }

    fn attend_hopper(&self, launcher: &Launcher, operands: Operands) -> Result<(), CudaError> {
        let Operands { step, q, kv, out } = operands;
        let part_queries = self.planner.set.prefill.part_queries;
        let Heads { head_dim, kv_heads, group, .. } = self.planner.heads;
        let head_dim = head_dim as usize;
        let queries = [step.shape.tokens as usize, (kv_heads * group) as usize, head_dim];
        let pages = |pages: Buffer| {
            let rows = pages.bytes() / (KvFormat::Bf16.element_bytes() * head_dim);
            TensorMap::pages(pages.address(), rows, head_dim, step.page_size.min(LEAF))
        };
        let [k, v] = kv.wide.unwrap_or([kv.k, kv.v]);
        let params = PrefillParams {
            plan: self.prefill_plan(step),
            rows: at(step, step.layout.rows),
            page_table: step.page_table.address(),
            out: out.address(),
            kept: self.kept.states,
            arrived: self.kept.arrived,
            taken: self.kept.turns,
            table_width: step.table_width,
            page_shift: step.page_size.trailing_zeros(),
            kv_heads,
            group,
            window: self.planner.window,
        };
        let queries = TensorMap::queries(q.address(), queries, part_queries / group, group)?;
        let (grid, k, v) = (self.planner.prefill_grid(step.shape), pages(k)?, pages(v)?);
        let maps = [&params as &dyn Param, &queries, &k, &v];
        match kv.wide {
            None => launcher.launch(&self.prefill, grid, maps),
            Some(_) => {
                let kept = KeptPages { k: kv.k.address(), v: kv.v.address() };
                let [params, q, k, v] = maps;
                launcher.launch(&self.prefill, grid, [params, q, k, v, &kept])
            }
        }
    }

    fn attend_portable(&self, launcher: &Launcher, operands: Operands) -> Result<(), CudaError> {
        let Operands { step, q, kv, out } = operands;
        let Heads { kv_heads, group, .. } = self.planner.heads;
        let params = PortablePrefillParams {
            plan: self.prefill_plan(step),
            rows: at(step, step.layout.rows),
            page_table: step.page_table.address(),
            q: q.address(),
            k: kv.k.address(),
            v: kv.v.address(),
            out: out.address(),
            table_width: step.table_width,
            page_shift: step.page_size.trailing_zeros(),
            kv_heads,
            group,
            window: self.planner.window,
        };
        launcher.launch(&self.prefill, self.planner.prefill_grid(step.shape), [&params])
    }
}

/// A word of the step's batch.
fn at(step: &Step<Buffer>, word: usize) -> Address {
    step.batch.address().offset(4 * word)
}
