//! What an inbox holds, and where.
//!
//! ```text
//!   | sums, first | sums, second | embedded rows | logits, first | logits, second | inner widths |
//! ```
//!
//! Invariant: its parts lie one behind the other, each as large as the largest exchange within the limits.

use minisgl_core::config::Limits;
use minisgl_core::shard::Rank;
use minisgl_core::spec::Dims;

use super::sizes::{padded, share_elements, shared_bytes};
use super::way::Way;

/// What an exchange passes on, which says the part of the inbox that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Words {
    /// Sums of o or down, or what the residual stream becomes, in the first of two parts or in the second.
    Sums(usize),
    Embedded,
    /// Of the vocabulary's shares, likewise in one of two.
    Logits(usize),
    /// What a matrix that is cut by rows gets.
    Inner,
}

/// Bytes of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inbox {
    sums: usize,
    embedded: usize,
    logits: usize,
    inner: usize,
    /// Parts for sums, and for logits, that take turns.
    turns: usize,
}

impl Inbox {
    /// `inner`: elements of what a matrix that is cut by rows gets, at most.
    pub(super) fn new(rank: Rank, dims: &Dims, limits: &Limits, inner: usize) -> Inbox {
        let (count, tokens) = (rank.count as usize, limits.step_tokens());
        let row_bytes = padded(dims.hidden) * 4;
        let once = (Way::one_shot_bytes(rank.count) / row_bytes).min(tokens);
        let logits = count * share_elements(rank, [limits.logit_rows(), dims.vocab as usize]) * 2;
        let sums = (count * once * row_bytes).max(shared_bytes(rank, tokens, dims.hidden));
        Inbox { sums, embedded: tokens * row_bytes / 2, logits, inner: inner * 2, turns: 2 }
    }

    /// Where all ranks' words are carried to every inbox, in the order of what is enqueued.
    pub(super) fn carried(rank: Rank, dims: &Dims, limits: &Limits, inner: usize) -> Inbox {
        let all = rank.count as usize * limits.step_tokens() * padded(dims.hidden) * 4;
        Inbox { sums: all, embedded: all / 2, turns: 1, ..Inbox::new(rank, dims, limits, inner) }
    }

    /// Where such words arrive: bytes from its beginning.
    pub(super) fn start(&self, words: Words) -> usize {
        let [sums, embedded, logits, inner, _] = self.starts();
        match words {
            Words::Sums(turn) => sums + turn % self.turns * place(self.sums),
            Words::Embedded => embedded,
            Words::Logits(turn) => logits + turn % self.turns * place(self.logits),
            Words::Inner => inner,
        }
    }

    /// All of it.
    pub(super) fn bytes(&self) -> usize {
        let [.., end] = self.starts();
        end
    }

    /// Where each kind of words begins, and where all end.
    fn starts(&self) -> [usize; 5] {
        let embedded = self.turns * place(self.sums);
        let logits = embedded + place(self.embedded);
        let inner = logits + self.turns * place(self.logits);
        [0, embedded, logits, inner, inner + place(self.inner)]
    }
}

/// Room for so many bytes, such that what follows is aligned.
fn place(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_an_inbox_hold_the_largest_exchange_and_lie_one_behind_the_other() {
        let dims = Dims {
            layers: 1,
            hidden: 1000,
            heads: 8,
            kv_heads: 8,
            head_dim: 128,
            intermediate: 1024,
            vocab: 50_001,
            norm_eps: 1e-6,
        };
        let limits = Limits {
            running: 33,
            queued: 1,
            sequence: 64,
            prefill_tokens: 20_000,
            page_size: 16,
            pages: 8,
            graph_rows: 8,
        };
        for count in [2, 4, 8] {
            let rank = Rank { index: 0, count };
            let inbox = Inbox::new(rank, &dims, &limits, 20_033 * 7);
            let of_all = 20_033 * 1024 * 4;
            assert!(inbox.sums >= count as usize * (Way::one_shot_bytes(count) - 4096), "one shot");
            assert!(inbox.sums >= of_all - of_all / count as usize + of_all / 2, "two shots");
            assert!(inbox.embedded >= 20_033 * 1024 * 2 && inbox.logits >= 33 * 50_001 * 2);
            let order = [
                (Words::Sums(0), inbox.sums),
                (Words::Sums(1), inbox.sums),
                (Words::Embedded, inbox.embedded),
                (Words::Logits(0), inbox.logits),
                (Words::Logits(1), inbox.logits),
                (Words::Inner, 20_033 * 14),
            ];
            let mut end = 0;
            for (words, bytes) in order {
                let start = inbox.start(words);
                assert!(start >= end && start.is_multiple_of(256), "{words:?}");
                end = start + bytes;
            }
            assert!(inbox.bytes() >= end);
        }
    }

    #[test]
    fn words_that_are_carried_have_one_part_for_both_turns() {
        let dims = Dims {
            layers: 1,
            hidden: 64,
            heads: 1,
            kv_heads: 1,
            head_dim: 64,
            intermediate: 64,
            vocab: 64,
            norm_eps: 1e-6,
        };
        let limits = Limits {
            running: 8,
            queued: 1,
            sequence: 64,
            prefill_tokens: 64,
            page_size: 16,
            pages: 8,
            graph_rows: 8,
        };
        let inbox = Inbox::carried(Rank { index: 0, count: 2 }, &dims, &limits, 72 * 64);
        assert_eq!(inbox.start(Words::Sums(0)), inbox.start(Words::Sums(1)));
        assert_eq!(inbox.start(Words::Logits(0)), inbox.start(Words::Logits(1)));
        assert!(inbox.start(Words::Embedded) >= inbox.sums && inbox.sums >= 2 * 72 * 64 * 4);
    }
}
