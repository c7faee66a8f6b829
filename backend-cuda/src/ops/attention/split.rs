//! How the prefill rows of a step are divided into pieces that blocks take.
//!
//! ```text
//!   plan    count, tokens of an item, blocks that take turns, then pieces: (row, first token, span, place)
//!   item    as many of a row's tokens as a block takes at once
//!   piece   an item, and all that it sees ([`ALL`]) or what it sees of a span of positions
//!   place   where the piece's states are kept for the merge, of its first head; heads and then spans follow each other
//! ```
//!
//! Invariant: every token of every row lies in one item; an item is one piece, or one for each span that it sees.

use std::cmp::Reverse;
use std::ops::Range;

use minisgl_core::batch::Row;
use minisgl_kernels::attention::{ALL, LEAF, SPAN};

/// Words in front of a plan's pieces.
const HEAD: usize = 3;
/// Words of a piece.
const PIECE: usize = 4;

/// Splits keys and values among blocks where a step's items are too few, or too unequal, to keep all of them busy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Splitter {
    /// Blocks of a launch. Each has a place of its own; those of pieces lie behind.
    pub(super) blocks: u32,
    pub(super) kv_heads: u32,
    /// Tokens of an item.
    pub(super) item_tokens: u32,
    /// Positions that a token sees at most.
    pub(super) window: u32,
    /// Pieces of split items that there is memory for; where none, no item is split.
    pub(super) pieces: u32,
}

/// Of a filled plan, how many items are whole, and how many pieces there are of those that are not.
pub(super) fn pieces(words: &[u32]) -> (usize, usize) {
    let (head, pieces) = words.split_at(HEAD);
    let pieces = &pieces.as_chunks::<PIECE>().0[..head[0] as usize];
    let whole = pieces.iter().filter(|[_, _, span, _]| *span == ALL).count();
    (whole, pieces.len() - whole)
}

impl Splitter {
    /// Words of the plan of a step with up to so many items.
    pub(super) fn words(&self, items: u32) -> usize {
        HEAD + PIECE * (items + self.pieces) as usize
    }

    /// Places for states: the blocks' and the pieces'.
    pub(super) fn places(&self) -> usize {
        (self.blocks + self.pieces * self.kv_heads) as usize
    }

    /// Fills the plan of the rows from `first_row` on.
    ///
    /// A row's items follow each other, so that blocks that work at the same time find the same keys and values in L2; rows and
    /// items that see most positions are first: short ones fill the gaps at the end. Of that order whole rounds of blocks
    /// stay whole, unless an item is more than a block's share of all. The rest is split, which costs time,
    /// and comes behind those whole items that are longer than a span.
    ///
    /// Where decode rows attend beside, half of the blocks take turns, if then they have no more to do on average than the longest piece.
    pub(super) fn plan(&self, rows: &[Row], first_row: u32, words: &mut [u32]) {
        let (head, pieces) = words.split_at_mut(HEAD);
        let (pieces, _) = pieces.as_chunks_mut::<PIECE>();
        let (mut count, mut leaves) = (0, 0);
        for (index, row) in (first_row..).zip(&rows[first_row as usize..]) {
            for first in (0..row.tokens).step_by(self.item_tokens as usize) {
                pieces[count] = [index, first, ALL, 0];
                leaves += u64::from(self.leaves(row, first));
                count += 1;
            }
        }
        let kv_len = |index: u32| Reverse(rows[index as usize].kv_len);
        pieces[..count].sort_unstable_by_key(|&[index, first, ..]| (kv_len(index), index, Reverse(first)));
        let whole = count as u32 * self.kv_heads / self.blocks * self.blocks / self.kv_heads;
        let share = leaves * u64::from(self.kv_heads) / u64::from(self.blocks);
        let (items, mut split, mut longest) = (count, 0, 0);
        for item in 0..items {
            let [index, first, ..] = pieces[item];
            let row = &rows[index as usize];
            let spans = self.spans(row, first);
            let fits = item < whole as usize && u64::from(self.leaves(row, first)) <= share;
            if fits || spans.len() == 1 || split + spans.len() as u32 > self.pieces {
                longest = longest.max(self.leaves(row, first));
                continue;
            }
            longest = longest.max(SPAN / LEAF);
            for span in spans.clone() {
                let at = if span == spans.start { item } else { count };
                count += usize::from(at == count);
                pieces[at] = [index, first, span, self.blocks + split * self.kv_heads];
                split += 1;
            }
        }
        if split > 0 {
            // Whole items of several spans, then spans, then short items.
            let class = |&[index, first, span, _]: &[u32; PIECE]| match span {
                ALL if self.spans(&rows[index as usize], first).len() > 1 => 0,
                ALL => 2,
                _ => 1,
            };
            pieces[..count].sort_unstable_by_key(|piece| {
                let &[index, first, span, _] = piece;
                (class(piece), kv_len(index), index, span, Reverse(first))
            });
        }
        let half = self.blocks / 2;
        let few = first_row > 0 && leaves * u64::from(self.kv_heads) <= u64::from(longest) * u64::from(half);
        head.copy_from_slice(&[count as u32, self.item_tokens, if few { half } else { self.blocks }]);
    }

    /// The positions that an item sees.
    fn seen(&self, row: &Row, first: u32) -> Range<u32> {
        let begin = (row.position + first + 1).saturating_sub(self.window);
        begin..row.position + (first + self.item_tokens).min(row.tokens)
    }

    fn leaves(&self, row: &Row, first: u32) -> u32 {
        let seen = self.seen(row, first);
        seen.end.div_ceil(LEAF) - seen.start / LEAF
    }

    fn spans(&self, row: &Row, first: u32) -> Range<u32> {
        let seen = self.seen(row, first);
        seen.start / SPAN..seen.end.div_ceil(SPAN)
    }
}

#[cfg(test)]
mod tests {
    use minisgl_core::tensor::splitmix64;

    use super::*;

    const SPLITTER: Splitter =
        Splitter { blocks: 132, kv_heads: 8, item_tokens: 96, window: u32::MAX, pieces: 80 };

    fn row(position: u32, tokens: u32) -> Row {
        Row { position, tokens, kv_len: position + tokens, ..Row::default() }
    }

    fn planned(splitter: &Splitter, rows: &[Row], first_row: u32) -> Vec<[u32; PIECE]> {
        let items: u32 =
            rows[first_row as usize..].iter().map(|row| row.tokens.div_ceil(splitter.item_tokens)).sum();
        let mut words = vec![0; splitter.words(items)];
        splitter.plan(rows, first_row, &mut words);
        assert_eq!(words[1], splitter.item_tokens);
        words[HEAD..].as_chunks::<PIECE>().0[..words[0] as usize].to_vec()
    }

    #[test]
    fn a_plan_has_every_token_once_long_rows_and_late_items_first() {
        let decoding = row(70, 1);
        let rows = [decoding, decoding, row(0, 100), row(500, 1), row(64, 200), row(0, 96), row(0, 501)];
        let of_row =
            |row, tokens: u32| (0..tokens.div_ceil(96)).rev().map(move |item| [row, 96 * item, ALL, 0]);
        let expected = [(3, 1), (6, 501), (4, 200), (2, 100), (5, 96)];
        let expected: Vec<_> = expected.into_iter().flat_map(|(row, tokens)| of_row(row, tokens)).collect();
        assert_eq!(planned(&SPLITTER, &rows, 2), expected);
    }

    #[test]
    fn an_item_is_one_piece_or_one_a_span_and_no_two_keep_states_at_one_place() {
        for draw in 0..2000 {
            let random = |i: u64, below: u64| (splitmix64(draw << 16 | i) % below) as u32;
            let rows: Vec<_> = (0..1 + u64::from(random(0, 6)))
                .map(|i| row(random(4 * i + 7, 30_000), 1 + random(4 * i + 8, 900)))
                .collect();
            let splitter = Splitter {
                blocks: 1 + random(1, 300),
                kv_heads: 1 + random(2, 16),
                item_tokens: 1 + random(3, 192),
                window: if random(4, 2) == 0 { 1 << 30 } else { 1 + random(5, 9000) },
                pieces: random(6, 200),
            };
            let mut pieces = planned(&splitter, &rows, 0);
            let split = pieces.iter().filter(|[_, _, span, _]| *span != ALL).count() as u32;
            assert!(split <= splitter.pieces);
            let mut places: Vec<_> =
                pieces.iter().filter(|piece| piece[2] != ALL).map(|piece| piece[3]).collect();
            places.sort_unstable();
            assert!(places.into_iter().eq((0..split).map(|i| splitter.blocks + i * splitter.kv_heads)));
            pieces.sort_unstable();
            let mut pieces = pieces.into_iter().peekable();
            for (index, row) in (0..).zip(&rows) {
                for first in (0..row.tokens).step_by(splitter.item_tokens as usize) {
                    let [.., span, first_place] = *pieces.peek().unwrap();
                    if span == ALL {
                        assert_eq!(pieces.next(), Some([index, first, ALL, 0]));
                        continue;
                    }
                    for (i, span) in (0..).zip(splitter.spans(row, first)) {
                        let place = first_place + i * splitter.kv_heads;
                        assert_eq!(
                            pieces.next(),
                            Some([index, first, span, place]),
                            "a part finds its spans by this"
                        );
                    }
                }
            }
            assert_eq!(pieces.next(), None);
        }
    }

    #[test]
    fn beside_decode_rows_half_of_the_blocks_take_turns_where_half_is_enough() {
        let blocks = |rows: &[Row], first_row: u32| {
            let mut words = vec![0; SPLITTER.words(200)];
            SPLITTER.plan(rows, first_row, &mut words);
            words[2]
        };
        let decoding = row(900, 1);
        assert_eq!(blocks(&[decoding, row(16_384, 64)], 1), 66, "64 turns of a whole span, 8 of half a leaf");
        assert_eq!(blocks(&[row(16_384, 64)], 0), 132, "nobody is beside");
        assert_eq!(blocks(&[decoding, row(16_384, 512)], 1), 132);
    }

    #[test]
    fn few_items_are_split_and_enough_stay_whole() {
        let split = |rows: &[Row]| planned(&SPLITTER, rows, 0).iter().filter(|piece| piece[2] != ALL).count();
        assert_eq!(split(&[row(16_000, 192)]), 2 * 8);
        assert_eq!(split(&[row(16_000, 64), row(0, 500)]), 8, "an item that is more than a block's share");
        assert_eq!(split(&[row(0, 1024); 16]), 0);
        assert_eq!(split(&[row(2048, 2048); 8]), 2 * 11, "of 176 items 165 fill ten rounds");
        assert_eq!(split(&[row(0, 16_384)]), 0);
        let equal = planned(&SPLITTER, &[row(14_000, 2048)], 0);
        assert_eq!(equal.iter().filter(|piece| piece[2] == ALL).count(), 16);
        assert!(
            equal[..16].iter().all(|piece| piece[2] == ALL),
            "whole rounds of blocks are whole, and first"
        );
    }
}
