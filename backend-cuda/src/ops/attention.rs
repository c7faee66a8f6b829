//! Paged attention: launches of `attention.cu`, and the plan that divides a step's work.
//!
//! ```text
//!   decode    plan: count, then segments (some leaves of a row)            a block takes a segment and a kv head, again and again
//!             a divided step has a plan for each half, one behind the other
//!   prefill   plan: count, then pieces (an item of a row's tokens, and     a block takes a piece and a kv head, again and again
//!             all that it sees, or what it sees of a span)
//! ```
//!
//! A step's decode rows and its prefill rows are launched one after the other, each with its own plan and scratch, and only
//! where there are any.
//!
//! Grids depend on the step's shape and on fixed capacities only, so that a recorded step fits any lengths: a step fills
//! the device once (each half of a divided one, half of it). Portable prefill blocks take one item and head each, and as many
//! are launched as the step's tokens may need at most; none is split.
//!
//! Invariant: the same query over the same keys and values gives the same bits, in whichever kind of row and batch.

mod plan;
mod split;

use minisgl_core::backend::{Dims, KvLayer, Purpose, Step};
use minisgl_core::batch::{Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_kernels::attention::{LEAF, Prefill, Set, TILE};

use plan::DecodePlanner;
use split::Splitter;

use crate::device::Cuda;
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::ops::gemm::SmShare;
use crate::ops::halves::Part;
use crate::tensor_map::TensorMap;

/// The kernels for one model's heads, and their scratch.
#[derive(Debug)]
pub struct Attention {
    decode: Kernel,
    prefill: Kernel,
    set: Set,
    /// Which set the kernels are of.
    hopper: bool,
    heads: Heads,
    /// Positions that a token sees, [`NO_WINDOW`] of them where all.
    window: u32,
    /// For a step that is not divided, and for each half of one that is.
    whole: DecodePlanner,
    half: DecodePlanner,
    /// For decode rows: of the whole step or its first half, and of the second.
    scratch: [Scratch; 2],
    splitter: Splitter,
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
    /// Bytes for pieces of split items. A portion of 512 tokens behind 16 thousand takes 38 MiB of Qwen3-0.6B's heads.
    const BYTES: usize = 64 << 20;
    /// Words of `arrived` of a place: one a warp that attends.
    const WARPS: usize = 12;

    fn new(cuda: &mut Cuda, splitter: &Splitter, prefill: &Prefill) -> Result<Kept, CudaError> {
        let words = splitter.places() * Kept::WARPS;
        let states = cuda.allocate(Purpose::Scratch, (splitter.places() * prefill.kept).max(1))?;
        let arrived = cuda.allocate(Purpose::Scratch, (words + 1) * 4)?;
        cuda.zero(arrived, (words + 1) * 4)?;
        Ok(Kept { states, arrived, turns: arrived.offset(words * 4) })
    }
}

/// Wider than any sequence; the kernels add it to positions.
const NO_WINDOW: u32 = 1 << 30;

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
    fn new(cuda: &mut Cuda, heads: Heads, planner: &DecodePlanner, rows: u32) -> Result<Scratch, CudaError> {
        let partial_bytes = planner.partials as usize * heads.items() as usize * heads.partial_bytes();
        let arrived_count = rows * heads.items();
        let arrived_bytes = (arrived_count as usize + 1) * 4;
        let arrived = cuda.allocate(Purpose::Scratch, arrived_bytes)?;
        cuda.zero(arrived, arrived_bytes)?;
        Ok(Scratch { partials: cuda.allocate(Purpose::Scratch, partial_bytes)?, arrived, arrived_count })
    }

    /// Where blocks count the turns that they have taken.
    fn turns(&self) -> Address {
        self.arrived.offset(self.arrived_count as usize * 4)
    }
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

/// How a model's query heads share its key and value heads.
#[derive(Clone, Copy, Debug)]
struct Heads {
    head_dim: u32,
    kv_heads: u32,
    /// Query heads of a key and value head.
    group: u32,
    /// Key and value heads that a decode block takes at once.
    at_once: u32,
}

impl Heads {
    /// Of a model that `supports.rs` lets through, for Hopper's kernels or the portable ones.
    fn new(dims: &Dims, hopper: bool) -> Heads {
        let Dims { head_dim, heads, kv_heads, .. } = *dims;
        let group = heads / kv_heads;
        // Two heads of 64 dims keep a block's warps as busy as one of 128, where a product's eight columns hold their queries.
        let two = hopper && head_dim == 64 && kv_heads.is_multiple_of(2) && [2, 4].contains(&group);
        Heads { head_dim, kv_heads, group, at_once: if two { 2 } else { 1 } }
    }

    /// Items of a row in a decode step: a key and value head with up to eight of its query heads, or two with all of theirs.
    fn items(self) -> u32 {
        self.kv_heads / self.at_once * self.group.div_ceil(8)
    }

    /// Items that `tokens` tokens in `rows` rows make at most in a prefill step.
    fn items_max(self, prefill: &Prefill, tokens: u32, rows: u32) -> u32 {
        tokens / prefill.item_tokens(self.group) + rows
    }

    /// Bytes of a token's queries.
    fn q_row_bytes(self) -> usize {
        (self.kv_heads * self.group * self.head_dim) as usize * 2
    }

    /// Bytes of a partial result: o, m and l of the queries of an item, in pairs.
    fn partial_bytes(self) -> usize {
        let pairs = (self.at_once * self.group.min(8)).div_ceil(2) as usize;
        pairs * (self.head_dim as usize / 2 + 1) * 16
    }
}

impl Attention {
    /// Looks the kernels up and allocates scratch for steps within `limits`. All layers have the same window, or none.
    pub fn new(
        cuda: &mut Cuda,
        dims: &Dims,
        window: Option<u32>,
        limits: &Limits,
    ) -> Result<Attention, CudaError> {
        let (hopper, multiprocessors) = (cuda.properties().hopper, cuda.properties().multiprocessors);
        let heads = Heads::new(dims, hopper);
        let window = window.map_or(NO_WINDOW, |window| window.min(NO_WINDOW));
        let tiles = u64::from(limits.running) * u64::from(limits.sequence.div_ceil(TILE));
        if tiles * u64::from(heads.items()) > u64::from(u32::MAX) {
            return Err(CudaError::Unsupported(
                "the attention kernels count a step's work in 32 bits: lower --max-running or --max-seq-len"
                    .into(),
            ));
        }
        let set = Set::new(hopper, heads.head_dim, heads.at_once);
        let decode = match (heads.head_dim, heads.at_once, window == NO_WINDOW) {
            (64, 1, true) => "attention_decode_64",
            (64, 1, false) => "attention_decode_window_64",
            (64, _, true) => "attention_decode_64x2",
            (64, _, false) => "attention_decode_window_64x2",
            (_, _, true) => "attention_decode_128",
            (_, _, false) => "attention_decode_window_128",
        };
        let prefill = if heads.head_dim == 64 { "attention_prefill_64" } else { "attention_prefill_128" };
        let half_rows = limits.running.div_ceil(2);
        let whole = DecodePlanner::new(
            multiprocessors * set.decode_blocks,
            heads,
            window,
            limits,
            limits.running,
            SmShare::Whole,
        );
        let half = DecodePlanner::new(multiprocessors, heads, window, limits, half_rows, SmShare::Half);
        let of_piece = set.prefill.kept * heads.kv_heads as usize;
        let splitter = Splitter {
            blocks: multiprocessors,
            kv_heads: heads.kv_heads,
            item_tokens: set.prefill.item_tokens(heads.group),
            window,
            pieces: Kept::BYTES.checked_div(of_piece).unwrap_or(0) as u32,
        };
        let kept = Kept::new(cuda, &splitter, &set.prefill)?;
        Ok(Attention {
            decode: cuda.modules().kernel("attention", decode, set.decode_shared)?,
            prefill: cuda.modules().kernel("attention", prefill, set.prefill.shared)?,
            set,
            hopper,
            heads,
            window,
            whole,
            half,
            scratch: [
                Scratch::new(cuda, heads, &whole, limits.running)?,
                Scratch::new(cuda, heads, &half, half_rows)?,
            ],
            splitter,
            kept,
        })
    }

    /// Words of the plan of the largest step within `limits`.
    pub fn plan_words(&self, limits: &Limits) -> usize {
        let items = self.heads.items_max(&self.set.prefill, limits.step_tokens() as u32, limits.running);
        self.decode_plan_words() + self.splitter.words(items)
    }

    /// Words of the plan of the largest step of decode rows; that of prefill rows lies behind them.
    fn decode_plan_words(&self) -> usize {
        self.whole.words().max(2 * self.half.words())
    }

    /// Divides a step's work, or that of its halves. `rows` are the step's, padding included.
    pub fn plan(&self, shape: StepShape, divided: bool, rows: &[Row], words: &mut [u32]) {
        let (decode_words, prefill_words) = words.split_at_mut(self.decode_plan_words());
        let decode_rows = &rows[..shape.decode_rows as usize];
        if divided {
            let (first, second) = decode_rows.split_at(Part::First.tokens(shape).len());
            let (first_words, second_words) = decode_words.split_at_mut(self.half.words());
            self.half.plan(first, first_words);
            self.half.plan(second, second_words);
        } else if shape.decode_rows > 0 {
            self.whole.plan(decode_rows, decode_words);
        }
        if shape.prefill_rows > 0 {
            self.splitter.plan(rows, shape.decode_rows, prefill_words);
        }
    }

    /// Causal attention of each of the part's tokens over its slot's pages: from q `[tokens, q_width]` of the step to
    /// `out`, the same shape. The step was planned as divided if the part is a half.
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
        if step.shape.decode_rows > 0 {
            self.attend_decode(launcher, part, operands)?;
        }
        match (step.shape.prefill_rows, self.hopper) {
            (0, _) => Ok(()),
            (_, true) => self.attend_hopper(launcher, operands),
            (_, false) => self.attend_portable(launcher, operands),
        }
    }

    fn attend_decode(&self, launcher: &Launcher, part: Part, operands: Operands) -> Result<(), CudaError> {
        let Operands { step, q, kv, out } = operands;
        let (planner, index, other) = match part {
            Part::Whole => (&self.whole, 0, None),
            Part::First => (&self.half, 0, Some(1)),
            Part::Second => (&self.half, 1, Some(0)),
        };
        let plan_of = |index: usize| step.layout.plan + index * self.half.words();
        let other_of =
            |other: usize| (step.batch.address().offset(4 * plan_of(other)), self.scratch[other].turns());
        let (other_plan, other_taken) = other.map_or((Address::NULL, Address::NULL), other_of);
        let row_bytes = self.heads.q_row_bytes() * part.tokens(step.shape).start as usize;
        let [q, out] = [q, out].map(|rows| rows.address().offset(row_bytes));
        let grid =
            Grid::new(planner.blocks, self.set.decode_threads).shared(self.set.decode_shared).dependent();
        let Heads { kv_heads, group, .. } = self.heads;
        let Scratch { partials, arrived, arrived_count } = &self.scratch[index];
        launcher.launch(
            &self.decode,
            grid,
            [
                &step.batch,
                &(plan_of(index) as u32),
                &step.page_table,
                &step.table_width,
                &step.page_size.trailing_zeros(),
                &kv_heads,
                &group,
                &q,
                &kv.k,
                &kv.v,
                &out,
                partials,
                arrived,
                arrived_count,
                &other_plan,
                &other_taken,
                &self.window,
            ],
        )
    }

    /// Turns of a step's prefill rows: items that their tokens may make at most, for each key and value head.
    fn turns_max(&self, shape: StepShape) -> u32 {
        let items = self.heads.items_max(&self.set.prefill, shape.prefill_tokens(), shape.prefill_rows);
        items * self.heads.kv_heads
    }

    /// First word of the prefill rows' plan in the batch.
    fn prefill_plan(&self, step: &Step<Buffer>) -> u32 {
        (step.layout.plan + self.decode_plan_words()) as u32
    }

    fn attend_hopper(&self, launcher: &Launcher, operands: Operands) -> Result<(), CudaError> {
        let Operands { step, q, kv, out } = operands;
        let Prefill { part_queries, threads, shared, .. } = self.set.prefill;
        let Heads { head_dim, kv_heads, group, .. } = self.heads;
        let head_dim = head_dim as usize;
        let queries = [step.shape.tokens as usize, (kv_heads * group) as usize, head_dim];
        let pages = |pages: Buffer| {
            let rows = pages.bytes() / (KvFormat::Bf16.element_bytes() * head_dim);
            TensorMap::pages(pages.address(), rows, head_dim, step.page_size.min(LEAF))
        };
        launcher.launch(
            &self.prefill,
            Grid::new(self.splitter.blocks, threads).shared(shared).dependent(),
            [
                &step.batch,
                &self.prefill_plan(step),
                &(step.layout.rows as u32),
                &step.page_table,
                &step.table_width,
                &step.page_size.trailing_zeros(),
                &kv_heads,
                &group,
                &TensorMap::queries(q.address(), queries, part_queries / group, group)?,
                &pages(kv.k)?,
                &pages(kv.v)?,
                &out,
                &self.kept.states,
                &self.kept.arrived,
                &self.kept.turns,
                &self.window,
            ],
        )
    }

    fn attend_portable(&self, launcher: &Launcher, operands: Operands) -> Result<(), CudaError> {
        let Operands { step, q, kv, out } = operands;
        let Prefill { threads, shared, .. } = self.set.prefill;
        let Heads { kv_heads, group, .. } = self.heads;
        launcher.launch(
            &self.prefill,
            Grid::new(self.turns_max(step.shape), threads).shared(shared),
            [
                &step.batch,
                &self.prefill_plan(step),
                &(step.layout.rows as u32),
                &step.page_table,
                &step.table_width,
                &step.page_size.trailing_zeros(),
                &kv_heads,
                &group,
                &q,
                &kv.k,
                &kv.v,
                &out,
                &self.window,
            ],
        )
    }
}
