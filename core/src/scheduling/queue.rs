//! The requests that wait to be admitted, in the order in which they are going to be.
//!
//! By prefix, those whose prompts begin alike follow each other, so that the first one's pages are still there for the rest.
//! The queue is gone through in sweeps: what would come behind the request admitted last is of this sweep, what would have
//! come before it of the next one. So nobody waits for ever behind what keeps coming in.
//!
//! ```text
//!   admitted last    this sweep        the next
//!   d                d e  d f  k  z │  a  a b  c          d d comes in: before d e          b comes in: behind a b
//! ```
//!
//! Invariant: by prefix, the prompts of each sweep ascend, and the first `sweep` requests are of this one: all, or some.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::config::{Limits, LimitsError};
use crate::host::reserved;
use crate::table::RequestTable;

/// In which order waiting requests are admitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// As submitted.
    #[default]
    Given,
    /// Most output tokens first, so that the last steps are not left to one long request.
    LongestOutputFirst,
    /// Those that share a beginning one after the other, so that it is computed once.
    Prefix,
}

impl Order {
    /// Does it depend on what else waits? Then the queue should be full.
    pub fn sorts(self) -> bool {
        self != Order::Given
    }
}

/// See the module. Holds entries of the request table.
pub(crate) struct Queue {
    order: Order,
    entries: VecDeque<u32>,
    sweep: usize,
    /// By prefix, the prompt admitted last; empty before the first, and where nobody waits.
    last: Vec<u32>,
}

impl Queue {
    /// For as many requests as `limits` lets wait.
    ///
    /// # Errors
    /// Too little host memory.
    pub fn new(order: Order, limits: &Limits) -> Result<Queue, LimitsError> {
        let (entries, last) = (reserved(limits.queued as usize)?, reserved(limits.sequence as usize)?);
        Ok(Queue { order, entries: entries.into(), sweep: 0, last })
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The request to be admitted next.
    pub fn next(&self) -> Option<u32> {
        self.entries.front().copied()
    }

    /// The request that is `i`-th from there.
    pub fn at(&self, i: usize) -> u32 {
        self.entries[i]
    }

    /// Takes it out: it is admitted.
    pub fn pop(&mut self, table: &RequestTable) {
        let Some(entry) = self.entries.pop_front() else { return };
        self.last.clear();
        if self.order == Order::Prefix {
            self.last.extend(table.prompt(entry));
        }
        self.sweep = self.sweep.saturating_sub(1);
        self.begin_sweep();
    }

    /// Puts a request in its place.
    pub fn insert(&mut self, entry: u32, table: &RequestTable) {
        let place = match self.order {
            Order::Given => self.len(),
            Order::LongestOutputFirst => {
                let output = |entry: u32| table.get(entry).len_max - table.get(entry).prompt_len;
                self.entries.partition_point(|other| output(*other) >= output(entry))
            }
            Order::Prefix => self.place_by_prefix(entry, table),
        };
        self.entries.insert(place, entry);
    }

    fn place_by_prefix(&mut self, entry: u32, table: &RequestTable) -> usize {
        let goes_first = |other: u32| table.compare_prompts(other, entry).is_le();
        let mut places = match table.prompt(entry).lt(self.last.iter().copied()) {
            true => self.sweep..self.len(),
            false => 0..self.sweep,
        };
        self.sweep += usize::from(places.start == 0);
        while !places.is_empty() {
            let middle = places.start.midpoint(places.end);
            match goes_first(self.entries[middle]) {
                true => places.start = middle + 1,
                false => places.end = middle,
            }
        }
        places.start
    }

    /// Leaves out all that `keep` does not want.
    pub fn retain(&mut self, mut keep: impl FnMut(u32) -> bool) {
        let (mut seen, mut sweep) = (0, 0);
        self.entries.retain(|entry| {
            let kept = keep(*entry);
            sweep += usize::from(kept && seen < self.sweep);
            seen += 1;
            kept
        });
        self.sweep = sweep;
        self.begin_sweep();
    }

    /// Begins the next sweep if this one is over.
    fn begin_sweep(&mut self) {
        if self.sweep == 0 {
            self.sweep = self.len();
            self.last.clear();
        }
    }
}
