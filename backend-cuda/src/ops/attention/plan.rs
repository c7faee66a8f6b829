//! How the decode rows of a step are divided into work that blocks take (split-KV): whose leaves are cut where (`cuts.rs`), and which
//! segments (`segment.rs`) come of it, in which order.
//!
//! Two plans for 264 blocks and 8 items, a turn for each item of a segment:
//!
//! ```text
//!   8 rows of 32 leaves: few, so cut into pieces of one length, 32 segments, 256 turns, a round of nearly all blocks
//!     row 0   first  0   8 leaves   base  0   at  0   total 25      leaves its folded state at 0
//!     row 0   first  8   8 leaves   base  0   at  1   total 25      leaves eight partials, from 1 on
//!     row 0   first 16   8 leaves   base  0   at  9   total 25      … from 9 on
//!     row 0   first 24   8 leaves   base  0   at 17   total 25      … from 17 on; who comes last folds 0 to 24 in order
//!     row 1   first  0   8 leaves   base 25   at 25   total 25      …
//!
//!   48 rows of 6 to 14 leaves: enough to fill the memory until nearly all have ended, so all whole: 48 segments, 384 turns
//!     row 7   first  0  14 leaves   base  0   at  0   total  0      nobody else has a part of it
//!     row 3   first  0  13 leaves   base  0   at  0   total  0      …
//! ```
//!
//! While a plan is filled the order of its rows lies at the end of the segments' own words. Segments grow towards it and may reach a
//! row's number when that has been read: `filled` segments of `i + 1` rows leave room for one of each row behind.
//!
//! Invariant: every leaf of every row's window lies in one segment. A row's first segment lies in one span, or ends with one, if
//! there are others.

#[cfg(test)]
mod simulated;
#[cfg(test)]
mod tests;

use std::ops::Range;

use minisgl_core::batch::Row;
use minisgl_core::config::Limits;
use minisgl_kernels::attention::LEAF;

use super::cuts::Cuts;
use super::heads::Heads;
use super::segment::{PLAN_HEAD, SEGMENT_WORDS, Segment};
use crate::ops::gemm::SmShare;

/// Memory for the parts of sequences that several blocks share; where it is short, first parts are longer.
const PARTIAL_BYTES_MAX: usize = 64 << 20;
/// Leaves that a row has at least, where there is much to do, before it is cut.
const LEAST: u64 = 12;
/// The same in a half, whose idle blocks leave memory to the other's, and where blocks have a multiprocessor each.
const LEAST_OF_HALF: u64 = 8;
/// The same where others multiply meanwhile: a group of warps that attends reads so many in the time of a half's products, in bf16, and in
/// fp8, whose leaves take it nearly as long, while memory could bring twice as many.
const LEAST_BESIDE_PRODUCTS: [u64; 2] = [16, 8];
/// Memory is filled by one of so many blocks.
const FILLING: u32 = 2;
/// Where blocks have a multiprocessor each, memory is filled while whole rows give every block so many turns.
const MANY_TURNS: u32 = 2;
/// Leaves that a row may have beside those that memory is filled for: to be read by few blocks costs less than to be cut.
const BEYOND: u64 = 4;
/// Segments for each block and item beside those of whole rows.
const PIECES_OF_BLOCK: u32 = 4;
/// Positions that rows are told apart by when they are sorted.
const COUNTS: usize = 8192;

/// Cuts a decode step's rows into segments for blocks to take in turn, the longest first, so that short ones are left for
/// the end, when all blocks should end together.
///
/// Many rows stay whole, but for those that would be read when too few others are left to fill the memory. Even they are not cut into
/// pieces of a few leaves: a piece's partials, and who waits for them, cost more than blocks that end apart. Few rows are cut
/// into pieces of one length, so that the blocks' last turns fill the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct DecodePlanner {
    /// Blocks of a launch.
    pub(super) blocks: u32,
    /// Items of a row; a segment is a turn for each.
    items: u32,
    /// Segments that a plan has room for.
    segments: usize,
    /// Partials of an item that there is memory for.
    pub(super) partials: u32,
    /// Positions that a row's token sees at most.
    window: u32,
    /// The slot of padding rows.
    dummy: u32,
    /// Rows that fill the memory, from which on there is much to do; 0 in a half: any number is. Of blocks that have a multiprocessor
    /// each, rows that give each so many turns.
    filling: u32,
    /// Rows that all blocks begin with; in a half none is told apart.
    first: u32,
    /// Leaves that a row of many has at least before it is cut.
    least: u64,
    /// Are those cut that are longer than what is left for each block, or only those longer than what there was at first?
    evens_out: bool,
    /// Do its blocks run beside those of prefill rows?
    beside: bool,
}

impl DecodePlanner {
    /// For launches of up to `rows` rows that have such a share of an SM.
    pub(super) fn new(
        blocks: u32,
        heads: Heads,
        window: u32,
        limits: &Limits,
        rows: u32,
        share: SmShare,
    ) -> DecodePlanner {
        let items = heads.items();
        let partials = (PARTIAL_BYTES_MAX / (items as usize * heads.partial_bytes())).max(2) as u32;
        let is_whole = matches!(share, SmShare::Whole);
        let longest = u64::from(rows) * u64::from(limits.sequence.div_ceil(LEAF) + 1);
        DecodePlanner {
            blocks,
            items,
            segments: (rows + PIECES_OF_BLOCK * blocks.div_ceil(items)) as usize,
            partials: longest.min(u64::from(partials)) as u32,
            window,
            dummy: limits.running,
            filling: if is_whole { (blocks / FILLING).div_ceil(items) } else { 0 },
            first: if is_whole { blocks / items } else { 0 },
            least: if is_whole { LEAST } else { LEAST_OF_HALF },
            evens_out: true,
            beside: false,
        }
    }

    /// The same for groups of warps that go on with the other half's rows when these end, while these are multiplied: nothing is
    /// gained by ending together.
    pub(super) fn beside_products(self, fp8: bool) -> DecodePlanner {
        DecodePlanner { least: LEAST_BESIDE_PRODUCTS[usize::from(fp8)], evens_out: false, ..self }
    }

    /// The same for blocks that have a multiprocessor each, of which none is to idle while others read.
    pub(super) fn alone_on_multiprocessors(self) -> DecodePlanner {
        let filling = (MANY_TURNS * self.blocks).div_ceil(self.items);
        DecodePlanner { filling, first: 0, least: LEAST_OF_HALF, ..self }
    }

    /// The same for blocks that run beside those of prefill rows.
    pub(super) fn beside_prefill(self) -> DecodePlanner {
        DecodePlanner { beside: true, ..self }
    }

    /// Words of a plan.
    pub(super) fn words(&self) -> usize {
        PLAN_HEAD + self.segments * SEGMENT_WORDS
    }

    /// Fills a plan. Padding rows, which come last, get no segment: nobody wants their output.
    pub(super) fn plan(&self, rows: &[Row], words: &mut [u32]) {
        let (head, segments) = words.split_at_mut(PLAN_HEAD);
        let segments = &mut segments[..self.segments * SEGMENT_WORDS];
        let rows = &rows[..rows.partition_point(|row| row.slot != self.dummy)];
        let seen = rows.iter().map(|row| self.seen(row.kv_len));
        let (most, all) = seen.fold((0, 0), |(most, all), seen| (seen.max(most), all + u64::from(seen)));
        let few = rows.len() < self.filling as usize;
        let filled = match !few && u64::from(most / LEAF + 2) <= self.least {
            true => self.keep_whole(rows, most, segments),
            false => self.cut(rows, few, most, all, segments),
        };
        debug_assert!(!self.beside || filled > 0, "somebody waits for the prefill rows beside");
        head[..2].copy_from_slice(&[filled as u32, u32::from(self.beside)]);
    }

    /// Fills in a segment for each row; says how many. What most steps of thousands of rows come to, all of them short: each row is
    /// looked at once more, and goes where it belongs.
    fn keep_whole(&self, rows: &[Row], most: u32, segments: &mut [u32]) -> usize {
        let segments: &mut [Segment] = bytemuck::cast_slice_mut(segments);
        self.sort(rows, most, |place, index, row| {
            let (leaves, Row { slot, kv_len, .. }) = (self.leaves(row), *row);
            let whole = Segment { row: index, slot, kv_len, ..Segment::default() };
            segments[place] = Segment { first: leaves.start, leaves: leaves.len() as u32, ..whole };
        });
        rows.len()
    }

    /// Fills in the segments of rows that may have to be cut; says how many.
    fn cut(&self, rows: &[Row], few: bool, most: u32, all: u64, segments: &mut [u32]) -> usize {
        // The rows' order lies in the last places, a word each, which segments reach only when it has been read.
        let order = segments.len() - rows.len().div_ceil(SEGMENT_WORDS) * SEGMENT_WORDS;
        self.sort(rows, most, |place, index, _| segments[order + place] = index);
        let mut rest = all;
        let piece = few.then(|| self.piece(rows));
        let at_first = if few { 0 } else { self.largest_at_first(rows, &segments[order..], all) };
        let (mut filled, mut base) = (0, 0);
        for i in 0..rows.len() {
            let index = segments[order + i];
            let row = &rows[index as usize];
            let leaves = self.leaves(row);
            // Many rows are short: nobody asks what share of the rest is a block's.
            let cuts = if piece.is_none() && leaves.len() as u64 <= self.least {
                Cuts::whole(&leaves)
            } else {
                let of_many = if i < self.first as usize { at_first } else { self.share(rest) };
                let largest = piece.unwrap_or_else(|| of_many.max(self.least));
                let room = self.segments - rows.len() + i - filled;
                Cuts::new(&leaves, largest, room, self.partials - base)
            };
            let total = if cuts.count == 1 { 0 } else { 1 + cuts.leaves - cuts.first };
            for i in 0..cuts.count {
                let (begin, end) = (cuts.at(i), cuts.at(i + 1));
                let at = if i == 0 { base } else { base + 1 + begin - cuts.first };
                let first = leaves.start + begin;
                let (slot, kv_len, leaves) = (row.slot, row.kv_len, end - begin);
                let segment = Segment { row: index, slot, kv_len, first, leaves, base, at, total };
                segments[filled * SEGMENT_WORDS..][..SEGMENT_WORDS]
                    .copy_from_slice(bytemuck::cast_slice(&[segment]));
                filled += 1;
            }
            let unread = order + i + 1;
            debug_assert!(filled * SEGMENT_WORDS <= unread || i + 1 == rows.len(), "a row's number is lost");
            base += total;
            if self.evens_out {
                rest -= u64::from(self.seen(row.kv_len));
            }
        }
        filled
    }

    /// Says each row's place among them, with its number, if those that see most, which is `most`, come first. They are counted: a
    /// step may have thousands. Rows that see more than there are counts are told apart no further than that.
    fn sort(&self, rows: &[Row], most: u32, mut put: impl FnMut(usize, u32, &Row)) {
        let shift = (most / COUNTS as u32).checked_ilog2().map_or(0, |bits| bits + 1);
        let count_of = |row: &Row| (self.seen(row.kv_len) >> shift) as usize;
        let mut places = [0_u32; COUNTS];
        rows.iter().for_each(|row| places[count_of(row)] += 1);
        let mut next = 0;
        for place in places[..=(most >> shift) as usize].iter_mut().rev() {
            next += core::mem::replace(place, next);
        }
        for (index, row) in (0..).zip(rows) {
            let place = &mut places[count_of(row)];
            put(*place as usize, index, row);
            *place += 1;
        }
    }

    /// The leaves that a row sees.
    fn leaves(&self, row: &Row) -> Range<u32> {
        (row.kv_len - self.seen(row.kv_len)) / LEAF..row.kv_len.div_ceil(LEAF)
    }

    /// Leaves of the longest piece of the rows that all blocks begin with, of those in `order`: a block's share of `all` tokens, or what
    /// memory is filled for and a little.
    fn largest_at_first(&self, rows: &[Row], order: &[u32], all: u64) -> u64 {
        let last_filling = self.filling.checked_sub(1).map_or(0, |last| {
            let row = &rows[order[last as usize] as usize];
            self.leaves(row).len() as u64
        });
        self.share(all).max(last_filling + BEYOND)
    }

    /// The best number of leaves for pieces of all rows, by what it costs in turns: each one's own part, and those for which
    /// blocks have nothing left in the last round, while the others work on a piece with more of the memory's bandwidth.
    fn piece(&self, rows: &[Row]) -> u64 {
        let leaves = |row: &Row| self.leaves(row).len() as u32;
        let longest = rows.iter().map(leaves).max().unwrap_or(0);
        let pieces = |largest: u32| rows.iter().map(|row| leaves(row).div_ceil(largest)).sum::<u32>();
        let cost = |largest: &u32| {
            let turns = pieces(*largest) * self.items;
            turns + largest * (turns.next_multiple_of(self.blocks) - turns)
        };
        let there = (1..=longest).map(|cuts| longest.div_ceil(cuts));
        let fit = there.take_while(|&largest| pieces(largest) as usize <= self.segments);
        u64::from(fit.min_by_key(cost).unwrap_or(longest))
    }

    /// Positions that the last of so many sees.
    fn seen(&self, kv_len: u32) -> u32 {
        kv_len.min(self.window)
    }

    /// Leaves that each block gets of `tokens` tokens, for all items.
    fn share(&self, tokens: u64) -> u64 {
        tokens * u64::from(self.items) / (u64::from(LEAF) * u64::from(self.blocks))
    }
}
