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

    /// For how many it counts.
    fn count(&self) -> usize {
        1
    }

    /// How much work it is, in a measure of its own.
    fn work(&self) -> u64 {
        0
    }
}

/// See the module.
pub struct FairQueue<T> {
    waiting: HashMap<u64, VecDeque<T>>,
    turns: VecDeque<u64>,
    len: usize,
    work: u64,
}

impl<T: Waiting> FairQueue<T> {
    /// An empty queue.
    pub fn new() -> Self {
        FairQueue { waiting: HashMap::new(), turns: VecDeque::new(), len: 0, work: 0 }
    }

    /// How many wait, each counted for as many as it says.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The work of all that wait.
    pub fn work(&self) -> u64 {
        self.work
    }

    /// What comes next.
    pub fn next(&self) -> Option<&T> {
        self.waiting.get(self.turns.front()?)?.front()
    }

    /// Does nothing wait?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends to the item's session.
    pub fn push(&mut self, item: T) {
        let session = item.session();
        self.add(&item);
        let queue = self.waiting.entry(session).or_insert_with(|| {
            self.turns.push_back(session);
            VecDeque::new()
        });
        queue.push_back(item);
    }

    /// Takes out what comes next.
    pub fn pop(&mut self) -> Option<T> {
        self.take(0, 0)
    }

    /// Takes out what comes next of all that is `fit`, among `window` of those that wait.
    pub fn pop_where(&mut self, window: usize, fit: impl Fn(&T) -> bool) -> Option<T> {
        let (turn, place, _) = self.first(window).find(|(.., item)| fit(item))?;
        self.take(turn, place)
    }

    /// Is any `fit`, among the same `window`?
    pub fn any(&self, window: usize, fit: impl Fn(&T) -> bool) -> bool {
        self.first(window).any(|(.., item)| fit(item))
    }

    /// The first `window` at most, as many of each session, with the session's turn and their places in it.
    fn first(&self, window: usize) -> impl Iterator<Item = (usize, usize, &T)> {
        let of_each = window / self.turns.len().min(window).max(1);
        let sessions = self.turns.iter().take(window).enumerate();
        sessions.flat_map(move |(turn, session)| {
            let queue = self.waiting.get(session).into_iter().flatten();
            queue.take(of_each).enumerate().map(move |(place, item)| (turn, place, item))
        })
    }

    /// Takes out the item at a place of the session whose turn it is.
    fn take(&mut self, turn: usize, place: usize) -> Option<T> {
        let session = self.turns.remove(turn)?;
        let queue = self.waiting.get_mut(&session)?;
        let item = queue.remove(place);
        match queue.is_empty() {
            true => drop(self.waiting.remove(&session)),
            false => self.turns.push_back(session),
        }
        if let Some(item) = &item {
            self.subtract(item);
        }
        item
    }

    fn add(&mut self, item: &T) {
        self.len += item.count();
        self.work += item.work();
    }

    fn subtract(&mut self, item: &T) {
        self.len -= item.count();
        self.work -= item.work();
    }

    /// Gives back what was taken out; it comes next.
    pub fn give_back(&mut self, item: T) {
        let session = item.session();
        self.turns.retain(|other| *other != session);
        self.turns.push_front(session);
        self.add(&item);
        self.waiting.entry(session).or_default().push_front(item);
    }

    /// Takes out those of a session that `unwanted` picks.
    pub fn remove(&mut self, session: u64, mut unwanted: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut removed = Vec::new();
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
        removed.iter().for_each(|item| self.subtract(item));
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
        for window in 1..4 {
            assert_eq!(queue.pop_where(window, |item| item.1 == 7), None, "it lies behind the window");
            assert!(!queue.any(window, |item| item.1 == 7));
        }
        assert!(queue.any(4, |item| item.1 == 7));
        assert_eq!(queue.pop_where(4, |item| item.1 == 7), Some((2, 7)));
        assert_eq!(queue.pop_where(9, |item| item.1 == 2), Some((1, 2)));
        let order: Vec<_> = std::iter::from_fn(|| queue.pop_where(9, |_| true)).collect();
        assert_eq!(order, [(2, 0), (1, 0), (1, 1)]);
    }

    #[test]
    fn a_window_bounds_what_is_looked_at_over_all_sessions() {
        let mut queue = FairQueue::new();
        for session in 0..100 {
            (0..10).for_each(|item| queue.push((session, item)));
        }
        for (window, looked_at) in [(1, 1), (64, 64), (100, 100), (250, 200), (5000, 1000)] {
            let count = std::cell::Cell::new(0);
            assert!(!queue.any(window, |_| {
                count.set(count.get() + 1);
                false
            }));
            assert_eq!(count.get(), looked_at, "{window}");
        }
    }

    #[test]
    fn all_that_is_given_back_comes_next() {
        let mut queue = FairQueue::new();
        for item in [(1, 0), (2, 0), (1, 1), (3, 0)] {
            queue.push(item);
        }
        let [first, second] = [queue.pop(), queue.pop()].map(Option::unwrap);
        assert_eq!(queue.len(), 2);
        queue.give_back(first);
        queue.give_back(second);
        assert_eq!(queue.len(), 4);
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, [(2, 0), (1, 0), (3, 0), (1, 1)]);
        assert!(queue.is_empty());
    }

    /// Of a session, and for how many it counts.
    #[derive(Debug, PartialEq)]
    struct Group(u64, usize);

    impl Waiting for Group {
        fn session(&self) -> u64 {
            self.0
        }

        fn count(&self) -> usize {
            self.1
        }
    }

    #[test]
    fn a_group_counts_for_as_many_as_it_has() {
        let mut queue = FairQueue::new();
        for group in [Group(1, 3), Group(2, 5), Group(2, 7)] {
            queue.push(group);
        }
        assert_eq!(queue.len(), 15);
        let first = queue.pop().unwrap();
        assert_eq!((&first, queue.len()), (&Group(1, 3), 12));
        queue.give_back(first);
        assert_eq!(queue.len(), 15);
        assert_eq!(queue.remove(2, |group| group.1 == 7), [Group(2, 7)]);
        assert_eq!(queue.len(), 8);
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

    #[test]
    fn a_session_all_of_which_is_removed_has_no_turn() {
        let mut queue = FairQueue::new();
        for item in [(1, 0), (1, 1), (2, 0), (3, 0)] {
            queue.push(item);
        }
        assert_eq!(queue.remove(1, |_| true).len(), 2);
        assert_eq!(queue.next(), Some(&(2, 0)));
        queue.push((1, 2));
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, [(2, 0), (3, 0), (1, 2)]);
    }
}
