//! Paged attention: launches of `attention.cu`, and the plan that divides a step's work.
//!
//! ```text
//!   decode    plan: tiles of 16 tokens in the rows before, then the sum        every warp takes an equal share
//!   prefill   plan: count, then (row, first token) an item, longest first      every block takes an item and a kv head
//! ```
//!
//! Grids depend on the step's shape and on fixed capacities only, so that a recorded step fits any lengths: a decode
//! step always fills the device once, a prefill step launches as many blocks as its tokens may need at most.
//!
//! Invariant: the same query over the same keys and values gives the same bits, in whichever phase and batch.

use std::cmp::Reverse;

use minisgl_core::backend::{Dims, KvLayer, Purpose, Step};
use minisgl_core::batch::{Phase, Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_kernels::attention::{COLUMNS, LEAF, PREFILL_THREADS, Set, TILE};

use crate::device::Cuda;
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};

/// Memory for the parts of sequences that several warps share; more would let longer shares be cut anywhere.
const PARTIAL_BYTES_MAX: usize = 64 << 20;

/// The kernels for one model's heads, and their scratch.
#[derive(Debug)]
pub struct Attention {
    decode: Kernel,
    prefill: Kernel,
    set: Set,
    /// Blocks of a decode launch.
    blocks: u32,
    heads: Heads,
    /// `[warps, slots]` partial results of decode.
    partials: Address,
    /// `[rows, items of a row]` words: leaves that are in `partials`. Zero between launches.
    arrived: Address,
    /// Partials that a warp has room for.
    slots: u32,
    /// The slot of padding rows.
    dummy: u32,
}

/// How a model's query heads share its key and value heads.
#[derive(Clone, Copy, Debug)]
struct Heads {
    head_dim: u32,
    kv_heads: u32,
    /// Query heads of a key and value head.
    group: u32,
}

impl Heads {
    fn new(dims: &Dims) -> Result<Heads, CudaError> {
        let Dims { head_dim, heads, kv_heads, .. } = *dims;
        if head_dim != 64 && head_dim != 128 {
            return Err(CudaError::Unsupported(format!(
                "head_dim {head_dim} is not supported by the attention kernels; they take 64 and 128"
            )));
        }
        let group = heads / kv_heads;
        if group == 0 || group > COLUMNS {
            return Err(CudaError::Unsupported(format!(
                "{heads} query heads over {kv_heads} key and value heads are not supported by the attention kernels; \
                 they take 1 to {COLUMNS} query heads for each"
            )));
        }
        Ok(Heads { head_dim, kv_heads, group })
    }

    /// Items of a row in a decode step: a key and value head with up to eight of its query heads.
    fn items(self) -> u32 {
        self.kv_heads * self.group.div_ceil(8)
    }

    /// Tokens of an item in a prefill step.
    fn item_tokens(self) -> u32 {
        COLUMNS / self.group
    }

    /// Items that `tokens` tokens in `rows` rows make at most in a prefill step.
    fn items_max(self, tokens: u32, rows: u32) -> u32 {
        tokens / self.item_tokens() + rows
    }

    /// Bytes of a partial result: o, m and l of the queries of an item, in pairs.
    fn partial_bytes(self) -> usize {
        let pairs = self.group.min(8).div_ceil(2) as usize;
        pairs * (self.head_dim as usize / 2 + 1) * 16
    }
}

impl Attention {
    /// Looks the kernels up and allocates scratch for steps within `limits`.
    pub fn new(cuda: &mut Cuda, dims: &Dims, limits: &Limits) -> Result<Attention, CudaError> {
        let heads = Heads::new(dims)?;
        let tiles = u64::from(limits.running) * u64::from(limits.sequence.div_ceil(TILE));
        if tiles * u64::from(heads.items()) > u64::from(u32::MAX) {
            return Err(CudaError::Unsupported(
                "the attention kernels count a step's work in 32 bits: lower --max-running or --max-seq-len"
                    .into(),
            ));
        }
        let hopper = cuda.properties().hopper;
        let set = Set::new(hopper, heads.head_dim);
        let (decode, prefill) = match heads.head_dim {
            64 => ("attention_decode_64", "attention_prefill_64"),
            _ => ("attention_decode_128", "attention_prefill_128"),
        };
        let blocks = cuda.properties().multiprocessors;
        let warps = (blocks * set.decode_warps) as usize;
        let room = PARTIAL_BYTES_MAX / (warps * heads.partial_bytes());
        let slots = (limits.sequence.div_ceil(LEAF) as usize).min(room).max(2);
        let arrived_bytes = (limits.running * heads.items()) as usize * 4;
        let arrived = cuda.allocate(Purpose::Scratch, arrived_bytes)?;
        cuda.zero(arrived, arrived_bytes)?;
        Ok(Attention {
            decode: cuda.modules().kernel("attention", decode, set.decode_shared)?,
            prefill: cuda.modules().kernel("attention", prefill, set.prefill_shared)?,
            set,
            blocks,
            heads,
            partials: cuda.allocate(Purpose::Scratch, warps * slots * heads.partial_bytes())?,
            arrived,
            slots: slots as u32,
            dummy: limits.running,
        })
    }

    /// Words of the plan of the largest step within `limits`.
    pub fn plan_words(&self, limits: &Limits) -> usize {
        let items = self.heads.items_max(limits.step_tokens() as u32, limits.running);
        (1 + limits.running as usize).max(1 + 2 * items as usize)
    }

    /// Divides a step's work. `rows` are the step's, padding included.
    pub fn plan(&self, shape: StepShape, rows: &[Row], words: &mut [u32]) {
        match shape.phase {
            Phase::Decode => plan_decode(self.dummy, rows, words),
            Phase::Prefill => plan_prefill(self.heads.item_tokens(), rows, words),
        }
    }

    /// Causal attention of each token over its slot's pages: from q `[tokens, q_width]` to `out`, the same shape.
    pub fn attend(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        q: Buffer,
        kv: KvLayer<Buffer>,
        out: Buffer,
    ) -> Result<(), CudaError> {
        let (plan, rows) = (step.layout.plan as u32, step.layout.rows as u32);
        let page_shift = step.page_size.trailing_zeros();
        let Heads { kv_heads, group, .. } = self.heads;
        let (batch, table, width) = (&step.batch, &step.page_table, &step.table_width);
        match step.shape.phase {
            Phase::Decode => launcher.launch(
                &self.decode,
                Grid::new(self.blocks, self.set.decode_warps * 32).shared(self.set.decode_shared).dependent(),
                [
                    batch,
                    &plan,
                    &rows,
                    table,
                    width,
                    &page_shift,
                    &kv_heads,
                    &group,
                    &q,
                    &kv.k,
                    &kv.v,
                    &out,
                    &self.partials,
                    &self.arrived,
                    &self.slots,
                ],
            ),
            Phase::Prefill => launcher.launch(
                &self.prefill,
                Grid::new(
                    self.heads.items_max(step.shape.tokens, step.shape.rows) * kv_heads,
                    PREFILL_THREADS,
                )
                .shared(self.set.prefill_shared)
                .dependent(),
                [batch, &plan, &rows, table, width, &page_shift, &kv_heads, &group, &q, &kv.k, &kv.v, &out],
            ),
        }
    }
}

/// The tiles in the rows before each row, and in all. Padding rows, which come last and have slot `dummy`, get none:
/// nobody wants their output, and a warp that was given many rows of one token would be the last to end.
fn plan_decode(dummy: u32, rows: &[Row], words: &mut [u32]) {
    let mut tiles = 0;
    words[0] = 0;
    for (row, word) in rows.iter().zip(&mut words[1..]) {
        tiles += if row.slot == dummy { 0 } else { row.kv_len.div_ceil(TILE) };
        *word = tiles;
    }
}

/// The rows cut into items of `tokens` tokens, those that see most positions first: a short one fills a gap at the end.
fn plan_prefill(tokens: u32, rows: &[Row], words: &mut [u32]) {
    let (count, items) = words.split_at_mut(1);
    let items: &mut [[u32; 2]] = bytemuck::cast_slice_mut(items_of_two(items));
    let mut filled = 0;
    for (index, row) in rows.iter().enumerate() {
        for first in (0..row.tokens).step_by(tokens as usize) {
            items[filled] = [index as u32, first];
            filled += 1;
        }
    }
    count[0] = filled as u32;
    items[..filled].sort_unstable_by_key(|[index, first]| {
        let row = &rows[*index as usize];
        Reverse(row.position + (first + tokens).min(row.tokens))
    });
}

/// The words that make whole pairs.
fn items_of_two(words: &mut [u32]) -> &mut [u32] {
    let whole = words.len() / 2 * 2;
    &mut words[..whole]
}
