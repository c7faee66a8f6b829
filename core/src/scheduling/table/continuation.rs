//! What a text said next when it last said what it says now: the continuation that drafts are taken from
//! ([`speculation`](crate::speculation)).

use super::RequestTable;
use crate::speculation::{MATCH_MAX, MATCH_MIN, SEARCHED_MAX};

impl RequestTable {
    /// The place behind the longest match of the known tokens' end with what stands before it; of equals the last. `None` where
    /// less than a few tokens match.
    pub fn find_continuation(&self, entry: u32) -> Option<u32> {
        let known = self.get(entry).known;
        let last = self.token(entry, known.checked_sub(1)?);
        let (mut longest, mut continuation) = (MATCH_MIN - 1, None);
        let searched = known.saturating_sub(SEARCHED_MAX);
        let mut end = known - 1;
        while end > searched {
            let run = self.run_before(entry, end);
            let begin = end - run.len() as u32;
            for i in (0..run.len()).rev().filter(|i| run[*i] == last) {
                let at = begin + i as u32;
                let len = self.matching(entry, at, known - 1);
                if len > longest {
                    (longest, continuation) = (len, Some(at + 1));
                }
                if len == MATCH_MAX {
                    return continuation;
                }
            }
            end = begin;
        }
        continuation
    }

    /// How many tokens up to both positions are the same; no more than are of use.
    fn matching(&self, entry: u32, one: u32, other: u32) -> u32 {
        let same = |i: &u32| self.token(entry, one - i) == self.token(entry, other - i);
        (0..MATCH_MAX.min(one + 1)).take_while(same).count() as u32
    }
}
