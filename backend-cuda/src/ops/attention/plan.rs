//! How the decode rows of a step are divided into work that blocks take (split-KV).
//!
//! ```text
//!   plan      count, beside, 6 words unused, segments    some leaves of a row each, and where their partials go
//! ```
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
//!   128 rows of 8 leaves: many, and none longer than a block's share, so all whole: 128 segments, 1,024 turns
//!     row 0   first  0   8 leaves   base  0   at  0   total  0      nobody else has a part of it
//!     row 1   first  0   8 leaves   base  0   at  0   total  0      …
//! ```
//!
//! While a plan is filled the order of its rows lies at the end of the segments' own words. Segments grow towards it and may reach a
//! row's number when that has been read: `filled` segments of `i + 1` rows leave room for one of each row behind.
//!
//! Invariant: every leaf of every row's window lies in one segment. A row's first segment lies in one span, or ends with one, if
//! there are others.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use minisgl_core::batch::Row;
use minisgl_core::config::Limits;
use minisgl_kernels::attention::{LEAF, SPAN};

use super::heads::Heads;
use crate::ops::gemm::SmShare;

/// Memory for the parts of sequences that several blocks share; where it is short, first parts are longer.
const PARTIAL_BYTES_MAX: usize = 64 << 20;
/// Leaves of the shortest piece of a row that is cut where there is much to do.
const LEAST: u64 = 8;
/// The same where others multiply meanwhile: a group of warps that attends reads so many in the time of a half's products.
const LEAST_BESIDE_PRODUCTS: u64 = 16;
/// There is, where whole rows give every block so many turns.
const MANY_TURNS: u32 = 2;
/// Segments for each block and item beside those of whole rows.
const PIECES_OF_BLOCK: u32 = 4;
/// Positions that rows are told apart by when they are sorted.
const COUNTS: usize = 8192;
/// Leaves of a span.
const SPAN_LEAVES: u32 = SPAN / LEAF;
/// Words in front of a decode plan's segments.
const PLAN_HEAD: usize = 8;
/// Words of a segment.
const SEGMENT_WORDS: usize = size_of::<Segment>() / 4;

/// Some leaves of a row's window, one after the other, as `attention_work.cuh` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Segment {
    /// Index of the row among the launch's.
    pub(super) row: u32,
    /// The row's slot.
    pub(super) slot: u32,
    /// Tokens that the row attends to.
    pub(super) kv_len: u32,
    /// Its first leaf, by position in the sequence.
    pub(super) first: u32,
    /// How many leaves it has.
    pub(super) leaves: u32,
    /// Where the row's partials begin,
    pub(super) base: u32,
    /// and where its own do. The row's first segment has one, its folded state, every other one for each leaf.
    pub(super) at: u32,
    /// Partials of the row; 0 where the segment is the whole row and leaves none.
    pub(super) total: u32,
}

/// The segments of a filled plan.
pub(super) fn segments(words: &[u32]) -> &[Segment] {
    let (head, segments) = words.split_at(PLAN_HEAD);
    bytemuck::cast_slice(&segments[..head[0] as usize * SEGMENT_WORDS])
}

/// Cuts a decode step's rows into segments for blocks to take in turn, the longest first, so that short ones are left for
/// the end, when all blocks should end together.
///
/// Many rows stay whole, but for those that are longer than what is left for each block. Even they are not cut into pieces of
/// a few leaves: a piece's partials, and who waits for them, cost more than blocks that end apart. Few rows are cut into
/// pieces of one length, so that the blocks' last turns fill the device.
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
    /// Rows from which on there is much to do: any number in a half, whose idle blocks leave memory to the other's.
    many: u32,
    /// Leaves of the shortest piece of a row of many.
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
        let longest = u64::from(rows) * u64::from(limits.sequence.div_ceil(LEAF) + 1);
        DecodePlanner {
            blocks,
            items,
            segments: (rows + PIECES_OF_BLOCK * blocks.div_ceil(items)) as usize,
            partials: longest.min(u64::from(partials)) as u32,
            window,
            dummy: limits.running,
            many: match share {
                SmShare::Whole => (MANY_TURNS * blocks).div_ceil(items),
                SmShare::Half => 0,
            },
            least: LEAST,
            evens_out: true,
            beside: false,
        }
    }

    /// The same for groups of warps that go on with the other half's rows when these end, while these are multiplied: nothing is
    /// gained by ending together.
    pub(super) fn beside_products(self) -> DecodePlanner {
        DecodePlanner { least: LEAST_BESIDE_PRODUCTS, evens_out: false, ..self }
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
        let rows = &rows[..rows.iter().take_while(|row| row.slot != self.dummy).count()];
        // The rows' order lies in the last places, a word each, which segments reach only when it has been read.
        let order = segments.len() - rows.len().div_ceil(SEGMENT_WORDS) * SEGMENT_WORDS;
        self.sort(rows, &mut segments[order..][..rows.len()]);
        let mut rest: u64 = rows.iter().map(|row| u64::from(self.seen(row.kv_len))).sum();
        let few = rows.len() < self.many as usize;
        let longest = rows.iter().map(|row| self.leaves(row).len() as u32).max().unwrap_or(0);
        let piece = few.then(|| self.piece(rows, longest));
        let (mut filled, mut base) = (0, 0);
        for i in 0..rows.len() {
            let index = segments[order + i];
            let row = &rows[index as usize];
            let leaves = self.leaves(row);
            // Most rows of a step of thousands are short: nobody asks what share of the rest is a block's.
            let cuts = if piece.is_none() && leaves.len() as u64 <= self.least {
                Cuts::whole(&leaves)
            } else {
                let largest = piece.unwrap_or_else(|| self.share(rest).max(self.least));
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
        head[..2].copy_from_slice(&[filled as u32, u32::from(self.beside)]);
    }

    /// Writes the rows' numbers, those that see most first, by counting them: a step may have thousands. Rows that see more than
    /// there are counts are told apart no further than that.
    fn sort(&self, rows: &[Row], order: &mut [u32]) {
        let most = rows.iter().map(|row| self.seen(row.kv_len)).max().unwrap_or(0);
        let shift = (most / COUNTS as u32).checked_ilog2().map_or(0, |bits| bits + 1);
        let count_of = |row: &Row| (self.seen(row.kv_len) >> shift) as usize;
        let mut places = [0; COUNTS];
        rows.iter().for_each(|row| places[count_of(row)] += 1);
        let mut next = 0;
        for place in places[..=(most >> shift) as usize].iter_mut().rev() {
            next += core::mem::replace(place, next);
        }
        for (index, row) in (0..).zip(rows) {
            let place = &mut places[count_of(row)];
            order[*place] = index;
            *place += 1;
        }
    }

    /// The leaves that a row sees.
    fn leaves(&self, row: &Row) -> Range<u32> {
        (row.kv_len - self.seen(row.kv_len)) / LEAF..row.kv_len.div_ceil(LEAF)
    }

    /// The best number of leaves for pieces of all rows, of which the longest has so many, by what it costs in turns: each
    /// one's own part, and those for which blocks have nothing left in the last round, while the others work on a piece with
    /// more of the memory's bandwidth.
    fn piece(&self, rows: &[Row], longest: u32) -> u64 {
        let leaves = |row: &Row| self.leaves(row).len() as u32;
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

/// A row of `leaves` leaves in `count` pieces, the first of `first` leaves.
struct Cuts {
    leaves: u32,
    first: u32,
    count: u32,
}

impl Cuts {
    /// In one piece.
    fn whole(row: &Range<u32>) -> Cuts {
        let leaves = row.len() as u32;
        Cuts { leaves, first: leaves, count: 1 }
    }

    /// Into pieces of about `largest` leaves at most, as far as there is room for that many segments besides the row's own,
    /// and for `partials` partials.
    fn new(row: &Range<u32>, largest: u64, room: usize, partials: u32) -> Cuts {
        let leaves = row.len() as u32;
        let count = u64::from(leaves).div_ceil(largest).min(1 + room as u64) as u32;
        if count == 1 {
            return Cuts::whole(row);
        }
        let least = (leaves + 1).saturating_sub(partials).max(1);
        let first = first_piece(row, (leaves / count).max(least), least);
        Cuts { leaves, first, count: count.min(1 + leaves - first) }
    }

    /// The leaf that piece `i` begins with.
    fn at(&self, i: u32) -> u32 {
        match i {
            0 => 0,
            1 => self.first,
            _ => self.first + (self.leaves - self.first) * (i - 1) / (self.count - 1),
        }
    }
}

/// Leaves of a row's first piece: about `wanted`, `least` at least, so that it lies in one span, ends with one or is the row.
fn first_piece(row: &Range<u32>, wanted: u32, least: u32) -> u32 {
    let end = row.start + wanted;
    let before = end - end % SPAN_LEAVES;
    let fitting = match before.checked_sub(row.start) {
        None | Some(0) => wanted,
        Some(shorter) if shorter >= least => shorter,
        Some(_) => end.next_multiple_of(SPAN_LEAVES) - row.start,
    };
    fitting.min(row.len() as u32)
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

    use minisgl_core::tensor::splitmix64;

    use super::*;

    /// A plan's segments.
    fn planned(planner: &DecodePlanner, rows: &[Row]) -> Vec<Segment> {
        let mut words = vec![0; planner.words()];
        planner.plan(rows, &mut words);
        segments(&words).to_vec()
    }

    /// The first leaf that a row of so many tokens sees.
    fn first_leaf(planner: &DecodePlanner, kv_len: u32) -> u32 {
        kv_len.saturating_sub(planner.window) / LEAF
    }

    /// Every leaf of every row's window lies in one segment, long rows first, and every partial has one place in memory.
    fn plans_are_whole(planner: &DecodePlanner, rows: &[Row]) {
        let mut partials = vec![false; planner.partials as usize];
        let mut leaves = Vec::new();
        for segment in planned(planner, rows) {
            let Segment { row, slot, kv_len, first, leaves: count, base, at, total } = segment;
            assert_eq!((slot, kv_len), (rows[row as usize].slot, rows[row as usize].kv_len));
            assert!(count > 0);
            leaves.extend((first..first + count).map(|leaf| (row, leaf)));
            let begins_row = first == first_leaf(planner, kv_len);
            assert_eq!(begins_row, at == base, "the kernel tells a row's first segment by its place");
            let end = first + count;
            let one_state = first / SPAN_LEAVES == (end - 1) / SPAN_LEAVES || end.is_multiple_of(SPAN_LEAVES);
            assert!(!begins_row || total == 0 || one_state, "a first piece of several spans and a part");
            let own = if begins_row { 1.min(total) } else { count };
            assert!((base..base + total.max(1)).contains(&at) && at + own <= base + total.max(own));
            for place in at..at + own {
                assert!(!std::mem::replace(&mut partials[place as usize], true), "two partials at {place}");
            }
        }
        let of_row = |row: u32| {
            let kv_len = rows[row as usize].kv_len;
            (first_leaf(planner, kv_len)..kv_len.div_ceil(LEAF)).map(move |leaf| (row, leaf))
        };
        let mut longest_first: Vec<u32> = (0..rows.len() as u32).collect();
        longest_first.sort_by_key(|&row| Reverse(planner.seen(rows[row as usize].kv_len)));
        assert!(leaves.into_iter().eq(longest_first.into_iter().flat_map(of_row)));
    }

    #[test]
    fn a_plan_has_every_leaf_once_whatever_there_is_room_for() {
        for draw in 0..2000 {
            let random = |i: u64, below: u64| splitmix64(draw << 16 | i) % below;
            let rows: Vec<_> = (0..1 + random(0, 40))
                .map(|i| Row { slot: i as u32, kv_len: 1 + random(i + 4, 6000) as u32, ..Row::default() })
                .collect();
            let planner = DecodePlanner {
                blocks: 1 + random(1, 300) as u32,
                items: 1 + random(2, 16) as u32,
                segments: rows.len() + random(3, 200) as usize,
                partials: 2 + random(4, 2000) as u32,
                window: if random(6, 2) == 0 { u32::MAX } else { 1 + random(7, 3000) as u32 },
                dummy: 1000,
                many: random(5, 40) as u32,
                least: 1 + random(9, 20),
                evens_out: random(8, 2) == 0,
                beside: false,
            };
            plans_are_whole(&planner, &rows);
        }
    }

    /// A device whose blocks take a plan's turns and do with them what `attention_ring.cuh` and `attention_decode.cuh` say, a claim, a
    /// write or a count at a time, in any order. It complains of a partial that is written twice, or folded before it is there, and of a
    /// row that is folded twice. No block waits for another, so that whatever block is next can go on.
    struct Simulated<'a> {
        segments: &'a [Segment],
        items: u32,
        blocks: u32,
        /// Turns that blocks have claimed beside their first ones.
        taken: u32,
        /// Of each partial and item, the leaves that are folded in it.
        partials: Vec<Option<Range<u32>>>,
        /// Of each row and item, how many of its partials are there.
        arrived: Vec<u32>,
        /// Of each row and item, the leaves that its result has.
        results: Vec<Option<Range<u32>>>,
    }

    /// A block at a turn: what it has claimed meanwhile, and how many of the turn's partials are written.
    #[derive(Clone, Copy)]
    struct Block {
        turn: u32,
        claimed: u32,
        written: u32,
    }

    impl Simulated<'_> {
        fn turns(&self) -> u32 {
            self.segments.len() as u32 * self.items
        }

        /// A block begins a turn, and claims the one behind it.
        fn begin(&mut self, turn: u32) -> Option<Block> {
            self.taken += 1;
            Some(Block { turn, claimed: self.taken - 1, written: 0 })
        }

        /// One more thing that a block does; `None` when it has ended.
        fn go_on(&mut self, block: Block) -> Option<Block> {
            let (segment, item) =
                (self.segments[(block.turn / self.items) as usize], block.turn % self.items);
            let Segment { row, first, leaves, base, at, total, .. } = segment;
            let of_row = (row * self.items + item) as usize;
            let begins_row = at == base;
            let own = if begins_row { total.min(1) } else { leaves };
            if block.written < own {
                let leaf = first + block.written;
                let folded = if begins_row { first..first + leaves } else { leaf..leaf + 1 };
                let place = ((at + block.written) * self.items + item) as usize;
                assert_eq!(self.partials[place].replace(folded), None, "two partials at one place");
                return Some(Block { written: block.written + 1, ..block });
            }
            self.arrived[of_row] += own;
            if self.arrived[of_row] == total {
                self.arrived[of_row] = 0;
                let leaves =
                    if total == 0 { first..first + leaves } else { self.fold(base..base + total, item) };
                assert_eq!(self.results[of_row].replace(leaves), None, "a row has two results");
            }
            let next = self.blocks.min(self.turns()) + block.claimed;
            if next < self.turns() {
                return self.begin(next);
            }
            if block.claimed == self.turns() - 1 {
                self.taken = 0;
            }
            None
        }

        /// The leaves of a row's partials.
        fn fold(&self, places: Range<u32>, item: u32) -> Range<u32> {
            let partial = |place: u32| self.partials[(place * self.items + item) as usize].clone();
            let all: Vec<_> =
                places.map(|at| partial(at).expect("a partial is folded before it is there")).collect();
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start), "leaves out of order: {all:?}");
            all[0].start..all[all.len() - 1].end
        }
    }

    #[test]
    fn blocks_that_take_turns_in_any_order_fold_every_leaf_of_every_row_once() {
        for draw in 0..300 {
            let random = |i: u64, below: u64| splitmix64(draw << 20 | i) % below;
            let rows: Vec<_> = (0..1 + random(0, 12))
                .map(|i| Row { slot: i as u32, kv_len: 1 + random(i + 10, 9000) as u32, ..Row::default() })
                .collect();
            let planner = DecodePlanner {
                blocks: 1 + random(1, 40) as u32,
                items: 1 + random(2, 4) as u32,
                segments: rows.len() + random(3, 60) as usize,
                partials: 2 + random(4, 400) as u32,
                window: if random(6, 2) == 0 { u32::MAX } else { 1 + random(7, 3000) as u32 },
                dummy: 1000,
                many: random(5, 20) as u32,
                least: 1 + random(9, 20),
                evens_out: random(8, 2) == 0,
                beside: false,
            };
            let segments = planned(&planner, &rows);
            let of_rows = rows.len() * planner.items as usize;
            let mut device = Simulated {
                segments: &segments,
                items: planner.items,
                blocks: planner.blocks,
                taken: 0,
                partials: vec![None; (planner.partials * planner.items) as usize],
                arrived: vec![0; of_rows],
                results: vec![None; of_rows],
            };
            let begun = 0..planner.blocks.min(device.turns());
            let mut running: Vec<Block> = begun.filter_map(|turn| device.begin(turn)).collect();
            for step in 100.. {
                if running.is_empty() {
                    break;
                }
                let which = random(step, running.len() as u64) as usize;
                match device.go_on(running[which]) {
                    Some(block) => running[which] = block,
                    None => drop(running.swap_remove(which)),
                }
            }
            assert_eq!(device.taken, 0, "the next launch claims from zero");
            assert!(device.arrived.iter().all(|count| *count == 0), "and counts from zero");
            for (of_row, leaves) in device.results.into_iter().enumerate() {
                let kv_len = rows[of_row / planner.items as usize].kv_len;
                assert_eq!(leaves, Some(first_leaf(&planner, kv_len)..kv_len.div_ceil(LEAF)));
            }
        }
    }

    #[test]
    fn a_long_step_is_cut_into_long_pieces_and_a_short_one_into_as_many_as_there_are_blocks() {
        let rows = |count: u32, leaves: u32| -> Vec<_> {
            (0..count).map(|slot| Row { slot, kv_len: leaves * LEAF, ..Row::default() }).collect()
        };
        let planner = DecodePlanner {
            blocks: 264,
            items: 8,
            segments: 388,
            partials: 4096,
            window: u32::MAX,
            dummy: 1000,
            many: 66,
            least: LEAST,
            evens_out: true,
            beside: false,
        };
        let pieces = |rows: &[Row]| planned(&planner, rows).into_iter().map(|segment| segment.leaves);
        let long = rows(256, 16);
        assert!(pieces(&long).count() > long.len(), "the last rows are longer than what is left for a block");
        assert!(pieces(&long).all(|leaves| u64::from(leaves) >= LEAST));
        assert!(pieces(&rows(1, 8)).eq([1; 8]));
        assert!(pieces(&rows(8, 32)).eq([8; 32]), "264 blocks take 256 turns");
        assert!(pieces(&rows(32, 8)).eq([8; 32]));
    }

    #[test]
    fn where_blocks_go_on_with_others_only_rows_beyond_a_blocks_share_are_cut() {
        let heads = Heads { head_dim: 128, kv_heads: 8, group: 2, at_once: 1 };
        let limits = Limits {
            running: 128,
            queued: 1,
            sequence: 64 * LEAF,
            prefill_tokens: LEAF,
            page_size: 16,
            pages: 64 * 64 * LEAF / 16,
            graph_rows: 0,
        };
        let planner = DecodePlanner::new(136, heads, u32::MAX, &limits, limits.running / 2, SmShare::Half)
            .beside_products();
        let rows = |count: u32, leaves: u32| -> Vec<_> {
            (0..count).map(|slot| Row { slot, kv_len: leaves * LEAF, ..Row::default() }).collect()
        };
        let pieces = |rows: &[Row]| planned(&planner, rows).len();
        assert_eq!([64, 32, 17].map(|count| pieces(&rows(count, 32))), [64, 32, 17], "a turn for each block");
        assert_eq!([16, 8].map(|count| pieces(&rows(count, 32))), [32, 16]);
        assert_eq!(pieces(&rows(4, 16)), 4, "products take as long");
        let mut one_is_long = rows(40, 4);
        one_is_long[20].kv_len = 64 * LEAF;
        assert!((43..46).contains(&pieces(&one_is_long)), "{}", pieces(&one_is_long));
    }

    #[test]
    fn few_rows_are_cut_however_few_an_engine_runs() {
        let heads = Heads { head_dim: 128, kv_heads: 8, group: 2, at_once: 1 };
        let row = Row { slot: 0, kv_len: 64 * LEAF, ..Row::default() };
        let limits = Limits {
            running: 2,
            queued: 2,
            sequence: row.kv_len,
            prefill_tokens: LEAF,
            page_size: 16,
            pages: 2 * 64 * LEAF / 16,
            graph_rows: 0,
        };
        let planner = DecodePlanner::new(264, heads, u32::MAX, &limits, limits.running, SmShare::Whole);
        assert!(planned(&planner, &[row, row]).iter().all(|segment| segment.leaves <= 4));
    }

    #[test]
    fn rows_beyond_what_is_told_apart_come_longest_first_as_near_as_they_are() {
        let row =
            |slot| Row { slot, kv_len: 1 + (splitmix64(slot.into()) % 100_000) as u32, ..Row::default() };
        let rows: Vec<_> = (0..500).map(row).collect();
        let planner = DecodePlanner {
            blocks: 264,
            items: 8,
            segments: 632,
            partials: 4096,
            window: u32::MAX,
            dummy: 1000,
            many: 66,
            least: LEAST,
            evens_out: true,
            beside: false,
        };
        let mut order: Vec<u32> = planned(&planner, &rows).iter().map(|segment| segment.row).collect();
        order.dedup();
        let apart = 100_000_u32.div_ceil(COUNTS as u32).next_power_of_two();
        let kv_len = |index: u32| rows[index as usize].kv_len;
        assert!(order.windows(2).all(|pair| kv_len(pair[0]) + apart > kv_len(pair[1])));
        order.sort_unstable();
        assert!(order.into_iter().eq(0..500), "every row is there, and its segments follow each other");
    }

    #[test]
    fn padding_rows_get_no_segment() {
        let row = Row { kv_len: 100, ..Row::default() };
        let planner = DecodePlanner {
            blocks: 4,
            items: 2,
            segments: 8,
            partials: 8,
            window: u32::MAX,
            dummy: 1,
            many: 2,
            least: LEAST,
            evens_out: true,
            beside: false,
        };
        assert_eq!(planned(&planner, &[row, Row { slot: 1, ..row }, Row { slot: 1, ..row }]).len(), 1);
    }
}
