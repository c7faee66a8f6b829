//! The pool of KV pages: who owns which page, which are free, and which hold a prefix worth keeping.
//!
//! A page is free, private to one request, or a node of the prefix tree. A node is a full page named by its parent
//! node and its tokens, so a path from the root spells a prefix. A request holds a path by its deepest node; a node
//! that nobody holds is cached, until it is held again or evicted.
//!
//! ```text
//!              take                insert                 release
//!      free ──────────> private ──────────> node, held ──────────> node, cached
//!       ^ ^    give        │                     ^       hold           │ │
//!       │ └────────────────┘                     └──────────────────────┘ │
//!       └───────────────────────────── evict ─────────────────────────────┘
//! ```
//!
//! A holder of a node holds its ancestors too, and a path is released from its end to the root. So among the cached
//! pages, in the order in which they were released, children come before their parents: the head of that list is
//! always a leaf, and evicting the head is evicting the least recently used leaf.
//!
//! Invariant: free + private + nodes == capacity, after every public call; [`PagePool::check`] asserts it and the
//! list's order, page by page. Nothing is allocated after construction.

use alloc::vec;
use alloc::vec::Vec;

use crate::config::LimitsError;
use crate::host::{filled, listed};
use crate::tensor::splitmix64;

/// No page: the parent of a prefix's first page, the end of a list, an empty bucket.
pub const NO_PAGE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Private,
    Node,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    state: State,
    /// Requests that hold the node.
    holders: u32,
    /// The node before it on the path, or `NO_PAGE`.
    parent: u32,
    /// Hash of parent and tokens.
    hash: u32,
    /// Neighbours among the cached pages, least recently released first.
    older: u32,
    newer: u32,
}

/// See the module.
pub struct PagePool {
    page_size: usize,
    pages: Vec<Page>,
    /// `[pages, page_size]`: the tokens of nodes.
    tokens: Vec<u32>,
    free: Vec<u32>,
    /// Open-addressed, linearly probed table of nodes; `NO_PAGE` is an empty bucket.
    buckets: Vec<u32>,
    oldest: u32,
    newest: u32,
    cached: u32,
}

impl PagePool {
    /// A pool of free pages.
    ///
    /// # Errors
    /// Too little host memory.
    pub fn new(pages: u32, page_size: u32) -> Result<Self, LimitsError> {
        let page =
            Page { state: State::Free, holders: 0, parent: NO_PAGE, hash: 0, older: NO_PAGE, newer: NO_PAGE };
        Ok(PagePool {
            page_size: page_size as usize,
            pages: filled(pages as usize, page)?,
            tokens: filled(pages as usize * page_size as usize, 0)?,
            free: listed((0..pages).rev())?,
            buckets: filled((2 * pages as usize).next_power_of_two(), NO_PAGE)?,
            oldest: NO_PAGE,
            newest: NO_PAGE,
            cached: 0,
        })
    }

    /// Pages of the pool.
    pub fn capacity(&self) -> u32 {
        self.pages.len() as u32
    }

    /// Pages that [`PagePool::take`] can give: free and cached ones.
    pub fn available(&self) -> u32 {
        self.free.len() as u32 + self.cached
    }

    /// Pages that nobody holds but that keep a prefix.
    pub fn cached(&self) -> u32 {
        self.cached
    }

    /// A page for one request alone, evicting the least recently used prefix if none is free.
    pub fn take(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => self.evict()?,
        };
        self.pages[page as usize].state = State::Private;
        Some(page)
    }

    /// Gives a private page back.
    pub fn give(&mut self, page: u32) {
        assert_eq!(self.pages[page as usize].state, State::Private);
        self.pages[page as usize].state = State::Free;
        self.free.push(page);
    }

    /// Is the page private to a request?
    pub fn is_private(&self, page: u32) -> bool {
        self.pages[page as usize].state == State::Private
    }

    /// The node before this one on its path, or `NO_PAGE`.
    pub fn parent(&self, node: u32) -> u32 {
        self.pages[node as usize].parent
    }

    /// The node with these tokens (a full page of them) behind `parent`.
    pub fn find(&self, parent: u32, tokens: &[u32]) -> Option<u32> {
        let mut bucket = self.home(hash(parent, tokens));
        loop {
            let page = self.buckets[bucket];
            if page == NO_PAGE {
                return None;
            }
            if self.spells(page, parent, tokens) {
                return Some(page);
            }
            bucket = self.next(bucket);
        }
    }

    /// Is it the node with these tokens behind `parent`?
    fn spells(&self, node: u32, parent: u32, tokens: &[u32]) -> bool {
        self.pages[node as usize].parent == parent && self.tokens_of(node) == tokens
    }

    /// Adds a holder to a node whose parent the caller holds.
    pub fn hold(&mut self, node: u32) {
        assert_eq!(self.pages[node as usize].state, State::Node);
        if self.pages[node as usize].holders == 0 {
            self.unlink(node);
        }
        self.pages[node as usize].holders += 1;
    }

    /// Makes a private page a node, held once, behind a node that the caller holds. No such node may be there yet.
    pub fn insert(&mut self, parent: u32, page: u32, tokens: &[u32]) {
        assert!(self.is_private(page));
        let hash = hash(parent, tokens);
        let first = page as usize * self.page_size;
        self.tokens[first..first + self.page_size].copy_from_slice(tokens);
        let entry = &mut self.pages[page as usize];
        (entry.state, entry.holders, entry.parent, entry.hash) = (State::Node, 1, parent, hash);
        let mut bucket = self.home(hash);
        while self.buckets[bucket] != NO_PAGE {
            let other = self.buckets[bucket];
            let same = self.pages[other as usize].hash == hash && self.spells(other, parent, tokens);
            assert!(!same, "a prefix is inserted twice");
            bucket = self.next(bucket);
        }
        self.buckets[bucket] = page;
    }

    /// Takes a holder from a path, given by its deepest node (or `NO_PAGE`, the empty path).
    pub fn release_path(&mut self, deepest: u32) {
        let mut node = deepest;
        while node != NO_PAGE {
            let entry = &mut self.pages[node as usize];
            assert!(entry.holders > 0);
            entry.holders -= 1;
            let (holders, parent) = (entry.holders, entry.parent);
            if holders == 0 {
                self.link_newest(node);
            }
            node = parent;
        }
    }

    /// Forgets every cached prefix.
    pub fn evict_all(&mut self) {
        while let Some(page) = self.evict() {
            self.pages[page as usize].state = State::Free;
            self.free.push(page);
        }
    }

    /// Takes the least recently used leaf out of the tree. Its state is the caller's to set.
    fn evict(&mut self) -> Option<u32> {
        let page = self.oldest;
        if page == NO_PAGE {
            return None;
        }
        self.unlink(page);
        self.remove_from_buckets(page);
        Some(page)
    }

    /// Empties a node's bucket and moves back those behind it that would no longer be found (Knuth, TAOCP 6.4, R).
    fn remove_from_buckets(&mut self, page: u32) {
        let mut hole = self.home(self.pages[page as usize].hash);
        while self.buckets[hole] != page {
            hole = self.next(hole);
        }
        let mut bucket = hole;
        loop {
            bucket = self.next(bucket);
            let other = self.buckets[bucket];
            if other == NO_PAGE {
                break;
            }
            let home = self.home(self.pages[other as usize].hash);
            let mask = self.buckets.len() - 1;
            if bucket.wrapping_sub(home) & mask >= bucket.wrapping_sub(hole) & mask {
                self.buckets[hole] = other;
                hole = bucket;
            }
        }
        self.buckets[hole] = NO_PAGE;
    }

    fn home(&self, hash: u32) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }

    fn next(&self, bucket: usize) -> usize {
        (bucket + 1) & (self.buckets.len() - 1)
    }

    fn tokens_of(&self, page: u32) -> &[u32] {
        &self.tokens[page as usize * self.page_size..][..self.page_size]
    }

    fn link_newest(&mut self, page: u32) {
        let newest = self.newest;
        let entry = &mut self.pages[page as usize];
        (entry.older, entry.newer) = (newest, NO_PAGE);
        match newest {
            NO_PAGE => self.oldest = page,
            _ => self.pages[newest as usize].newer = page,
        }
        self.newest = page;
        self.cached += 1;
    }

    fn unlink(&mut self, page: u32) {
        let Page { older, newer, .. } = self.pages[page as usize];
        match older {
            NO_PAGE => self.oldest = newer,
            _ => self.pages[older as usize].newer = newer,
        }
        match newer {
            NO_PAGE => self.newest = older,
            _ => self.pages[newer as usize].older = older,
        }
        self.cached -= 1;
    }

    /// Asserts the invariants, in time linear in the pool; for tests and for idle moments. `private` is how many pages
    /// the requests say are theirs alone, `holders` how many holders they say each node has.
    ///
    /// # Panics
    /// When a page is lost, shared wrongly, or out of order.
    pub fn check(&self, private: usize, holders: impl Fn(u32) -> u32) {
        let count = |state| self.pages.iter().filter(|page| page.state == state).count();
        assert_eq!(self.free.len(), count(State::Free), "free list against page states");
        assert_eq!(private, count(State::Private), "private pages against the requests' own");
        let in_buckets = self.buckets.iter().filter(|bucket| **bucket != NO_PAGE).count();
        assert_eq!(in_buckets, count(State::Node), "nodes against the table");
        for (i, page) in self.pages.iter().enumerate().filter(|(_, page)| page.state == State::Node) {
            let i = i as u32;
            assert_eq!(
                self.find(page.parent, self.tokens_of(i)),
                Some(i),
                "node {i} is not found by its name"
            );
            assert_eq!(page.holders, holders(i), "holders of node {i}");
            if page.parent != NO_PAGE {
                let parent = &self.pages[page.parent as usize];
                assert_eq!(parent.state, State::Node, "parent of node {i}");
                assert!(parent.holders >= page.holders, "node {i} is held, its parent is not");
            }
        }
        self.check_cached_order();
    }

    fn check_cached_order(&self) {
        let mut rank = vec![usize::MAX; self.pages.len()];
        let (mut page, mut length) = (self.oldest, 0);
        while page != NO_PAGE {
            assert_eq!(self.pages[page as usize].holders, 0, "page {page} is held, yet listed as cached");
            rank[page as usize] = length;
            length += 1;
            page = self.pages[page as usize].newer;
        }
        assert_eq!(length, self.cached as usize, "length of the list of cached pages");
        for (i, page) in self.pages.iter().enumerate() {
            if page.state == State::Node && page.parent != NO_PAGE && rank[i] != usize::MAX {
                assert!(rank[i] < rank[page.parent as usize], "node {i} would be evicted after its parent");
            }
        }
    }
}

/// Hash of a node's name. Tokens are compared as well, so it need not be strong, only well spread.
fn hash(parent: u32, tokens: &[u32]) -> u32 {
    let mut state = u64::from(parent);
    for pair in tokens.chunks(2) {
        let word = u64::from(pair[0]) | u64::from(*pair.get(1).unwrap_or(&0)) << 32;
        state = splitmix64(state ^ word);
    }
    state as u32
}
