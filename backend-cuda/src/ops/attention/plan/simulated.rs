//! Plans, run on the host: blocks that take their turns in any order, as the kernels do where no prefill rows are beside.

use minisgl_core::tensor::splitmix64;

use super::tests::{first_leaf, planned};
use super::*;

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
        let (segment, item) = (self.segments[(block.turn / self.items) as usize], block.turn % self.items);
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
            let leaves = if total == 0 { first..first + leaves } else { self.fold(base..base + total, item) };
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
            filling: random(5, 20) as u32,
            first: random(11, 20) as u32,
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
