//! Plans: every leaf once, whatever there is room for, and what is cut.

use std::cmp::Reverse;

use minisgl_core::tensor::splitmix64;

use super::*;
use crate::ops::attention::cuts::SPAN_LEAVES;
use crate::ops::attention::segment::segments;

/// Of two blocks on each of 132 multiprocessors.
const PLANNER: DecodePlanner = DecodePlanner {
    blocks: 264,
    items: 8,
    segments: 388,
    partials: 4096,
    window: u32::MAX,
    dummy: 1000,
    filling: 17,
    first: 33,
    least: LEAST,
    evens_out: true,
    beside: false,
};

/// A plan's segments.
pub(super) fn planned(planner: &DecodePlanner, rows: &[Row]) -> Vec<Segment> {
    let mut words = vec![0; planner.words()];
    planner.plan(rows, &mut words);
    segments(&words).to_vec()
}

/// The first leaf that a row of so many tokens sees.
pub(super) fn first_leaf(planner: &DecodePlanner, kv_len: u32) -> u32 {
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
            filling: random(5, 40) as u32,
            first: random(11, 40) as u32,
            least: 1 + random(9, 20),
            evens_out: random(8, 2) == 0,
            beside: false,
        };
        plans_are_whole(&planner, &rows);
    }
}

#[test]
fn a_long_step_is_cut_into_long_pieces_and_a_short_one_into_as_many_as_there_are_blocks() {
    let rows = |count: u32, leaves: u32| -> Vec<_> {
        (0..count).map(|slot| Row { slot, kv_len: leaves * LEAF, ..Row::default() }).collect()
    };
    let pieces = |rows: &[Row]| planned(&PLANNER, rows).into_iter().map(|segment| segment.leaves);
    let long = rows(256, 16);
    assert!(pieces(&long).count() > long.len(), "the last rows are longer than what is left for a block");
    assert!(pieces(&long).all(|leaves| 2 * u64::from(leaves) > LEAST));
    assert!(pieces(&rows(1, 8)).eq([1; 8]));
    assert!(pieces(&rows(8, 32)).eq([8; 32]), "264 blocks take 256 turns");
    assert!(pieces(&rows(32, 8)).eq([8; 32]));
    let uneven: Vec<_> = (0..48).map(|slot| Row { slot, ..rows(1, 6 + slot % 9)[0] }).collect();
    assert_eq!(pieces(&uneven).count(), 48, "whole, though some blocks take two turns and some one");
    let mut one_is_long = uneven;
    one_is_long[20].kv_len = 64 * LEAF;
    assert_eq!(
        pieces(&one_is_long).count(),
        47 + 5,
        "the 17th longest has 11 leaves, so pieces have 15 at most"
    );
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
        .beside_products(false);
    let rows = |count: u32, leaves: u32| -> Vec<_> {
        (0..count).map(|slot| Row { slot, kv_len: leaves * LEAF, ..Row::default() }).collect()
    };
    let pieces = |rows: &[Row]| planned(&planner, rows).len();
    assert_eq!([64, 32, 17].map(|count| pieces(&rows(count, 32))), [64, 32, 17], "a turn for each block");
    assert_eq!([16, 8].map(|count| pieces(&rows(count, 32))), [32, 16]);
    assert_eq!(pieces(&rows(4, 16)), 4, "products take as long");
    let of_fp8 = DecodePlanner::new(136, heads, u32::MAX, &limits, limits.running / 2, SmShare::Half)
        .beside_products(true);
    assert_eq!(planned(&of_fp8, &rows(4, 16)).len(), 8, "leaves take longer");
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
fn short_rows_are_kept_whole_as_if_it_were_asked_which_of_them_to_cut() {
    let heads = Heads { head_dim: 128, kv_heads: 8, group: 2, at_once: 1 };
    let limits = Limits {
        running: 600,
        queued: 2,
        sequence: 4096,
        prefill_tokens: LEAF,
        page_size: 16,
        pages: 600 * 4096 / 16,
        graph_rows: 0,
    };
    for (window, longest) in [(u32::MAX, 6 * LEAF), (5 * LEAF + 7, 4096)] {
        let rows: Vec<_> = (0..limits.running)
            .map(|slot| (slot, splitmix64(slot.into()) as u32 % longest))
            .map(|(slot, seen)| Row { slot, kv_len: 1 + seen, ..Row::default() })
            .collect();
        let planner = DecodePlanner::new(132, heads, window, &limits, limits.running, SmShare::Whole);
        let (mut words, planned) = (vec![0; planner.words()], planned(&planner, &rows));
        let all = rows.iter().map(|row| u64::from(planner.seen(row.kv_len))).sum();
        let most = rows.iter().map(|row| planner.seen(row.kv_len)).max().unwrap();
        words[0] = planner.cut(&rows, false, most, all, &mut words[PLAN_HEAD..]) as u32;
        assert_eq!((planned.len(), planned.as_slice()), (rows.len(), segments(&words)));
    }
}

#[test]
fn rows_beyond_what_is_told_apart_come_longest_first_as_near_as_they_are() {
    let row = |slot| Row { slot, kv_len: 1 + (splitmix64(slot.into()) % 100_000) as u32, ..Row::default() };
    let rows: Vec<_> = (0..500).map(row).collect();
    let planner = DecodePlanner { segments: 632, ..PLANNER };
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
        dummy: 1,
        filling: 1,
        first: 2,
        ..PLANNER
    };
    assert_eq!(planned(&planner, &[row, Row { slot: 1, ..row }, Row { slot: 1, ..row }]).len(), 1);
}
