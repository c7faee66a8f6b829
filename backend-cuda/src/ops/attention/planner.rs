//! How a model's attention is divided on a device: kernels, grids and plans, all of it known without the device.
//!
//! ```text
//!   plan words   | decode rows: the whole step's, or its first half's and its second's | prefill rows |
//! ```

use minisgl_core::batch::{Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_core::spec::Dims;
use minisgl_kernels::attention::{Set, TILE};

use super::heads::Heads;
use super::plan::DecodePlanner;
use super::segment::segments;
use super::split::{Splitter, pieces};
use crate::error::CudaError;
use crate::launch::Grid;
use crate::ops::gemm::SmShare;
use crate::ops::halves::{Division, Part};
use crate::ops::layers::blocks::attenders;

/// Wider than any sequence; the kernels add it to positions.
const NO_WINDOW: u32 = 1 << 30;
/// Bytes for pieces of split items. A portion of 512 tokens behind 16 thousand takes 38 MiB of Qwen3-0.6B's heads.
const KEPT_BYTES: usize = 64 << 20;

/// Decode kernels without a window and with one: for a head of 128 dims, one of 64, two of 64.
type DecodeKernels = [[&'static str; 3]; 2];

const BF16: DecodeKernels = [
    ["attention_decode_128", "attention_decode_64", "attention_decode_64x2"],
    ["attention_decode_window_128", "attention_decode_window_64", "attention_decode_window_64x2"],
];

const FP8: DecodeKernels = [
    ["attention_decode_fp8_128", "attention_decode_fp8_64", "attention_decode_fp8_64x2"],
    ["attention_decode_fp8_window_128", "attention_decode_fp8_window_64", "attention_decode_fp8_window_64x2"],
];

/// Prefill kernels: for heads of 64 dims, and of 128.
const BF16_PREFILL: [&str; 2] = ["attention_prefill_64", "attention_prefill_128"];
const FP8_PREFILL: [&str; 2] = ["attention_prefill_fp8_64", "attention_prefill_fp8_128"];

/// The planners of both kinds of rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planner {
    pub(super) set: Set,
    /// Which set the kernels are of.
    pub(super) hopper: bool,
    /// Are keys and values fp8?
    pub(super) fp8: bool,
    pub(super) heads: Heads,
    /// Positions that a token sees, [`NO_WINDOW`] of them where all.
    pub(super) window: u32,
    /// For a step that is not divided, for each half of one whose rows are, and for each where the multiprocessors are.
    pub(super) whole: DecodePlanner,
    pub(super) half: DecodePlanner,
    pub(super) attenders: DecodePlanner,
    pub(super) splitter: Splitter,
}

impl Planner {
    /// For steps within `limits`. All layers have the same window, or none.
    pub(crate) fn new(
        hopper: bool,
        multiprocessors: u32,
        dims: &Dims,
        window: Option<u32>,
        format: KvFormat,
        limits: &Limits,
    ) -> Result<Planner, CudaError> {
        let heads = Heads::new(dims, hopper);
        let window = window.map_or(NO_WINDOW, |window| window.min(NO_WINDOW));
        let tiles = u64::from(limits.running) * u64::from(limits.sequence.div_ceil(TILE));
        if tiles * u64::from(heads.items()) > u64::from(u32::MAX) {
            return Err(CudaError::Unsupported(
                "the attention kernels count a step's work in 32 bits: lower --max-running or --max-seq-len"
                    .into(),
            ));
        }
        let fp8 = format == KvFormat::Fp8;
        if fp8 && !hopper {
            return Err(CudaError::Unsupported("fp8 keys and values have kernels for Hopper alone".into()));
        }
        let set = Set::new(hopper, heads.head_dim, heads.at_once, fp8);
        let decode = |blocks, rows, share| DecodePlanner::new(blocks, heads, window, limits, rows, share);
        let whole = decode(multiprocessors * set.decode_blocks, limits.running, SmShare::Whole);
        let of_piece = set.prefill.kept * heads.kv_heads as usize;
        Ok(Planner {
            set,
            hopper,
            fp8,
            heads,
            window,
            whole: if set.decode_blocks > 1 { whole } else { whole.alone_on_multiprocessors() },
            half: decode(
                multiprocessors * set.decode_blocks.div_ceil(2),
                Self::half_rows(limits),
                SmShare::Half,
            ),
            attenders: decode(attenders(multiprocessors, format), Self::half_rows(limits), SmShare::Half)
                .beside_products(fp8),
            splitter: Splitter {
                blocks: multiprocessors,
                kv_heads: heads.kv_heads,
                item_tokens: set.prefill.item_tokens(heads.group),
                window,
                pieces: KEPT_BYTES.checked_div(of_piece).unwrap_or(0) as u32,
            },
        })
    }

    /// Rows that a half of a divided step has at most.
    pub(super) fn half_rows(limits: &Limits) -> u32 {
        limits.running.div_ceil(2)
    }

    /// Names of the kernels for decode rows and for prefill rows.
    pub(crate) fn kernels(&self) -> [&'static str; 2] {
        let (kernels, prefill) = if self.fp8 { (FP8, FP8_PREFILL) } else { (BF16, BF16_PREFILL) };
        let [wide, narrow, two] = kernels[usize::from(self.window != NO_WINDOW)];
        let decode = match (self.heads.head_dim, self.heads.at_once) {
            (64, 1) => narrow,
            (64, _) => two,
            _ => wide,
        };
        [decode, prefill[usize::from(self.heads.head_dim != 64)]]
    }

    /// Words of the plan of the largest step within `limits`.
    pub(crate) fn words(&self, limits: &Limits) -> usize {
        let items = self.heads.items_max(&self.set.prefill, limits.step_tokens() as u32, limits.running);
        self.decode_words() + self.splitter.words(items)
    }

    /// Words of the plan of the largest step of decode rows; that of prefill rows lies behind them.
    pub(super) fn decode_words(&self) -> usize {
        self.whole.words().max(2 * self.half.words()).max(2 * self.attenders.words())
    }

    /// Divides a step's work, or that of its halves. `rows` are the step's, padding included.
    pub(crate) fn plan(&self, shape: StepShape, division: Division, rows: &[Row], words: &mut [u32]) {
        let (decode_words, prefill_words) = words.split_at_mut(self.decode_words());
        let decode_rows = &rows[..shape.decode_rows as usize];
        let halves = |planner: &DecodePlanner, words: &mut [u32]| {
            let (first, second) = decode_rows.split_at(Part::First.tokens(shape).len());
            let (first_words, second_words) = words.split_at_mut(planner.words());
            planner.plan(first, first_words);
            planner.plan(second, second_words);
        };
        match division {
            Division::None => {
                let planner = self.plan_prefill(shape, rows, prefill_words);
                if shape.decode_rows > 0 {
                    planner.plan(decode_rows, decode_words);
                }
            }
            Division::Rows => halves(&self.half, decode_words),
            Division::Multiprocessors => halves(&self.attenders, decode_words),
        }
    }

    /// Divides the work of a step's prefill rows, if there are any; says who divides that of the decode rows.
    fn plan_prefill(&self, shape: StepShape, rows: &[Row], words: &mut [u32]) -> DecodePlanner {
        if shape.prefill_rows == 0 {
            return self.whole;
        }
        self.splitter.plan(rows, shape.decode_rows, words);
        if self.hopper { self.whole.beside_prefill() } else { self.whole }
    }

    /// Of the whole step's decode rows, or of a half's.
    pub(super) fn decode_grid(&self, planner: &DecodePlanner) -> Grid {
        Grid::new(planner.blocks, self.set.decode_threads).shared(self.set.decode_shared).dependent()
    }

    /// Hopper's blocks take piece after piece, and fill the device once. A portable block takes one item and head: as many are
    /// launched as the step's tokens may need at most.
    pub(crate) fn prefill_grid(&self, shape: StepShape) -> Grid {
        let items = self.heads.items_max(&self.set.prefill, shape.prefill_tokens(), shape.prefill_rows);
        let blocks = if self.hopper { self.splitter.blocks } else { items * self.heads.kv_heads };
        let grid = Grid::new(blocks, self.set.prefill.threads).shared(self.set.prefill.shared);
        if self.hopper { grid.dependent() } else { grid }
    }

    /// What a part's decode rows are divided into.
    pub(crate) fn explained_decode(&self, shape: StepShape, part: Part, rows: &[Row]) -> (Grid, String) {
        let decoding = part.tokens(shape);
        let decoding = &rows[decoding.start as usize..decoding.end.min(shape.decode_rows) as usize];
        let (of_grid, planner) = match part {
            Part::Whole => (&self.whole, self.plan_prefill(shape, rows, &mut self.prefill_words(shape))),
            _ => (&self.half, self.half),
        };
        let mut words = vec![0; planner.words()];
        planner.plan(decoding, &mut words);
        let segments = segments(&words);
        let leaves = || segments.iter().map(|segment| segment.leaves);
        let cut = segments.iter().filter(|segment| segment.total > 0 && segment.at == segment.base).count();
        let grid = self.decode_grid(of_grid);
        let (least, most) = (leaves().min().unwrap_or(0), leaves().max().unwrap_or(0));
        let each = if least == most { most.to_string() } else { format!("{least} to {most}") };
        let text = format!(
            "{} segments of {each} leaves, {cut} rows cut; {} items each: {} turns for {} blocks",
            segments.len(),
            self.heads.items(),
            segments.len() as u32 * self.heads.items(),
            planner.blocks,
        );
        (grid, text)
    }

    /// How many turns a half's rows are divided into where the multiprocessors are divided.
    pub(crate) fn turns(&self, rows: &[Row]) -> u32 {
        let mut words = vec![0; self.attenders.words()];
        self.attenders.plan(rows, &mut words);
        segments(&words).len() as u32 * self.heads.items()
    }

    /// Room for the plan of a step's prefill rows.
    fn prefill_words(&self, shape: StepShape) -> Vec<u32> {
        let items = self.heads.items_max(&self.set.prefill, shape.prefill_tokens(), shape.prefill_rows);
        vec![0; self.splitter.words(items)]
    }

    /// What the prefill rows are divided into.
    pub(crate) fn explained_prefill(&self, shape: StepShape, rows: &[Row]) -> (Grid, String) {
        let mut words = self.prefill_words(shape);
        self.splitter.plan(rows, shape.decode_rows, &mut words);
        let (whole, split) = pieces(&words);
        let heads = self.heads.kv_heads;
        let text = format!(
            "{whole} items of {} tokens whole, {split} pieces of split ones; {heads} kv heads each: {} turns",
            self.splitter.item_tokens,
            (whole + split) as u32 * heads,
        );
        (self.prefill_grid(shape), text)
    }
}

#[cfg(test)]
mod tests {
    use minisgl_core::batch::{Header, PageUpdate, Token};
    use minisgl_kernels::attention::{LEAF, SPAN};
    use minisgl_kernels::{HOPPER, PORTABLE};

    use super::super::segment::Segment;
    use super::*;
    use crate::declared::{assert_declared, constant, threads_of};

    fn planner(
        hopper: bool,
        [heads, kv_heads, head_dim]: [u32; 3],
        window: Option<u32>,
        format: KvFormat,
    ) -> Planner {
        let (layers, hidden, intermediate, vocab) = (1, 64, 64, 64);
        let dims = Dims { layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, norm_eps: 1e-6 };
        let limits = Limits {
            running: 8,
            queued: 8,
            sequence: 1024,
            prefill_tokens: 512,
            page_size: 16,
            pages: 512,
            graph_rows: 0,
        };
        Planner::new(hopper, 132, &dims, window, format, &limits).unwrap()
    }

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for (hopper, set, format) in
            [(true, HOPPER, KvFormat::Bf16), (true, HOPPER, KvFormat::Fp8), (false, PORTABLE, KvFormat::Bf16)]
        {
            for heads in [[16, 8, 128], [16, 8, 64], [14, 2, 64]] {
                for window in [None, Some(512)] {
                    let planner = planner(hopper, heads, window, format);
                    let [decode, prefill] = planner.kernels();
                    assert_eq!(threads_of(set, decode), planner.set.decode_threads, "{decode}");
                    assert_eq!(threads_of(set, prefill), planner.set.prefill.threads, "{prefill}");
                }
            }
        }
    }

    /// Decode blocks that are told so begin before the kernels before prefill's attention have ended: nobody else may be.
    #[test]
    fn decode_rows_are_said_to_be_beside_prefill_rows_only_where_there_are_some_and_kernels_that_begin_so() {
        for (hopper, prefill_rows, division, beside) in [
            (true, 1, Division::None, 1),
            (true, 0, Division::None, 0),
            (true, 0, Division::Rows, 0),
            (true, 0, Division::Multiprocessors, 0),
            (false, 1, Division::None, 0),
            (false, 0, Division::None, 0),
        ] {
            let planner = planner(hopper, [16, 8, 128], None, KvFormat::Bf16);
            let rows: Vec<_> = (0..4 + prefill_rows)
                .map(|slot| Row {
                    slot,
                    kv_len: 300,
                    tokens: if slot < 4 { 1 } else { 40 },
                    ..Row::default()
                })
                .collect();
            let tokens = 4 + 40 * prefill_rows;
            let shape = StepShape { decode_rows: 4, prefill_rows, tokens, samples: 4 };
            let mut words = vec![u32::MAX; planner.decode_words() + planner.splitter.words(64)];
            planner.plan(shape, division, &rows, &mut words);
            assert_eq!(words[1], beside, "{hopper} {prefill_rows} {division:?}");
        }
    }

    #[test]
    fn the_host_and_the_kernels_mean_the_same_by_a_batch_and_a_plan() {
        let batch = &["step/batch.cuh"];
        assert_declared!(
            batch,
            "Header",
            Header { rows, tokens, samples, updates, output, slot_updates, words, reserved }
        );
        assert_declared!(
            batch,
            "Row",
            Row { slot, first_token, tokens, position, kv_len, sampled, logprobs, mask }
        );
        assert_declared!(batch, "Token", Token { id, slot, position, location });
        assert_declared!(batch, "PageUpdate", PageUpdate { index, page });
        assert_declared!(
            &["attention/attention_work.cuh"],
            "Segment",
            Segment { row, slot, kv_len, first, leaves, base, at, total }
        );
    }

    #[test]
    fn the_host_and_the_kernels_cut_alike() {
        let attention = |name| constant("attention/attention.cuh", name);
        assert_eq!((attention("LEAF"), attention("TILE")), (LEAF, TILE));
        assert_eq!(attention("LEAF") * attention("SPAN_LEAVES"), SPAN);
        assert_eq!(attention("TILE") * attention("LEAF_TILES"), LEAF);
        let [hopper, fp8, portable] =
            [(true, false), (true, true), (false, false)].map(|(hopper, fp8)| Set::new(hopper, 128, 1, fp8));
        for (source, set) in [
            ("hopper/attention/attention.cu", hopper),
            ("hopper/attention/attention_fp8.cu", fp8),
            ("portable/attention.cu", portable),
        ] {
            assert_eq!(constant(source, "DECODE_BLOCKS"), set.decode_blocks, "{source}");
            assert_eq!(constant(source, "DECODE_WARPS"), set.decode_warps, "{source}");
        }
        let prefill = |name| constant("hopper/attention/prefill_work.cuh", name);
        let minisgl_kernels::attention::Prefill { parts, part_queries, .. } = hopper.prefill;
        assert_eq!((prefill("PARTS"), prefill("PART_QUERIES")), (parts, part_queries));
        assert_eq!(constant("portable/attention_prefill.cuh", "COLUMNS"), portable.prefill.part_queries);
        let drafts = constant("hopper/attention/decode_filler.cuh", "DRAFTS_MAX");
        assert_eq!(drafts, minisgl_core::speculation::DRAFTS_MAX);
    }
}
