//! Who comes next where several sessions wait: each in turn, and within a session first come, first served.
//!
//! ```text
//!   session A   a1 a2 a3 a4 …     turns  A B C A B A …
//!   session B   b1 b2             comes  a1 b1 c1 a2 b2 a3 …
//!   session C   c1
//! ```
//!
//! So a file of a million requests does not make a single question wait for its end.
//!
//! Invariant: `turns` holds every session that has something waiting, once.

use std::collections::{HashMap, VecDeque};

/// What waits for its turn belongs to a session.
pub trait Waiting {
    /// Which one.
    fn session(&self) -> u64;
}

/// See the module.
pub struct FairQueue<T> {
    waiting: HashMap<u64, VecDeque<T>>,
    turns: VecDeque<u64>,
    /// Taken out and given back: it comes before all others.
    returned: Option<T>,
}

impl<T: Waiting> FairQueue<T> {
    /// An empty queue.
    pub fn new() -> Self {
        FairQueue { waiting: HashMap::new(), turns: VecDeque::new(), returned: None }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.values().map(VecDeque::len).sum::<usize>() + usize::from(self.returned.is_some())
    }

    /// Does nothing wait?
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty() && self.returned.is_none()
    }

    /// Appends to the item's session.
    pub fn push(&mut self, item: T) {
        let session = item.session();
        let queue = self.waiting.entry(session).or_insert_with(|| {
            self.turns.push_back(session);
            VecDeque::new()
        });
        queue.push_back(item);
    }

    /// Takes out what comes next.
    pub fn pop(&mut self) -> Option<T> {
        if let Some(item) = self.returned.take() {
            return Some(item);
        }
        let session = self.turns.pop_front()?;
        let queue = self.waiting.get_mut(&session)?;
        let item = queue.pop_front();
        match queue.is_empty() {
            true => drop(self.waiting.remove(&session)),
            false => self.turns.push_back(session),
        }
        item
    }

    /// Takes out what comes next of all that is `fit`, among the first `window` of each session.
    pub fn pop_where(&mut self, window: usize, fit: impl Fn(&T) -> bool) -> Option<T> {
        if let Some(item) = self.returned.take_if(|item| fit(item)) {
            return Some(item);
        }
        let found = |session: &u64| self.waiting.get(session)?.iter().take(window).position(&fit);
        let (turn, place) =
            self.turns.iter().enumerate().find_map(|(turn, session)| Some((turn, found(session)?)))?;
        let session = self.turns.remove(turn)?;
        let queue = self.waiting.get_mut(&session)?;
        let item = queue.remove(place);
        match queue.is_empty() {
            true => drop(self.waiting.remove(&session)),
            false => self.turns.push_back(session),
        }
        item
    }

    /// Is any `fit`, among the first `window` of each session?
    pub fn any(&self, window: usize, fit: impl Fn(&T) -> bool) -> bool {
        let waiting = self.waiting.values().flat_map(|queue| queue.iter().take(window));
        self.returned.iter().chain(waiting).any(fit)
    }

    /// Gives back what was taken out last; it comes next.
    pub fn give_back(&mut self, item: T) {
        self.returned = Some(item);
    }

    /// Takes out those of a session that `unwanted` picks.
    pub fn remove(&mut self, session: u64, mut unwanted: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut removed = Vec::new();
        removed.extend(self.returned.take_if(|item| item.session() == session && unwanted(item)));
        if let Some(queue) = self.waiting.get_mut(&session) {
            for item in std::mem::take(queue) {
                match unwanted(&item) {
                    true => removed.push(item),
                    false => queue.push_back(item),
                }
            }
            if queue.is_empty() {
                self.waiting.remove(&session);
                self.turns.retain(|other| *other != session);
            }
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Waiting for (u64, u32) {
        fn session(&self) -> u64 {
            self.0
        }
    }

    #[test]
    fn sessions_take_turns_and_each_keeps_its_order() {
        let mut queue = FairQueue::new();
        for item in [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (3, 0)] {
            queue.push(item);
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (1, 2), (1, 3)]);
        assert!(queue.is_empty());
    }

    #[test]
    fn what_is_fit_comes_out_of_turn_and_the_others_keep_theirs() {
        let mut queue = FairQueue::new();
        for item in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 7)] {
            queue.push(item);
        }
        assert_eq!(queue.pop_where(1, |item| item.1 == 7), None, "it lies behind the window");
        assert!(queue.any(2, |item| item.1 == 7) && !queue.any(1, |item| item.1 == 7));
        assert_eq!(queue.pop_where(2, |item| item.1 == 7), Some((2, 7)));
        assert_eq!(queue.pop_where(9, |item| item.1 == 2), Some((1, 2)));
        let order: Vec<_> = std::iter::from_fn(|| queue.pop_where(9, |_| true)).collect();
        assert_eq!(order, [(2, 0), (1, 0), (1, 1)]);
    }

    #[test]
    fn what_is_given_back_comes_next_and_what_is_removed_does_not_come() {
        let mut queue = FairQueue::new();
        for item in [(1, 0), (1, 1), (2, 0), (2, 1)] {
            queue.push(item);
        }
        let first = queue.pop().unwrap();
        queue.give_back(first);
        assert_eq!(queue.remove(2, |item| item.1 == 0), [(2, 0)]);
        assert_eq!(queue.remove(2, |_| true), [(2, 1)]);
        assert_eq!(queue.remove(2, |_| true), []);
        assert_eq!(queue.pop(), Some((1, 0)));
        queue.give_back((1, 0));
        assert_eq!(queue.remove(1, |_| true), [(1, 0), (1, 1)]);
        assert!(queue.is_empty() && queue.pop().is_none());
    }
}
