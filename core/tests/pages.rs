//! The page pool against a naive model: requests as lists of pages, the tree as a list of prefixes.

use minisgl_core::pages::{NO_PAGE, PagePool};
use proptest::prelude::*;

const PAGE_SIZE: usize = 2;

/// What a request does with the pool. Indices are taken modulo what there is.
#[derive(Clone, Debug)]
enum Action {
    /// A request comes: it holds the cached part of its text and takes private pages for the rest.
    Begin {
        text: Vec<u32>,
    },
    /// It puts its first private page into the tree, if the tree has none for the same prefix.
    Insert(prop::sample::Index),
    /// It goes, and gives back what it has.
    End(prop::sample::Index),
    ForgetAll,
}

/// A request: whole pages of text, of which the first `held` lie in the tree.
struct Holder {
    text: Vec<u32>,
    pages: Vec<u32>,
    held: usize,
}

impl Holder {
    fn prefix(&self, pages: usize) -> &[u32] {
        &self.text[..pages * PAGE_SIZE]
    }

    fn deepest(&self) -> u32 {
        self.held.checked_sub(1).map_or(NO_PAGE, |i| self.pages[i])
    }
}

/// The tree as a naive list: prefix, page, and when it was released last.
#[derive(Default)]
struct Naive {
    nodes: Vec<(Vec<u32>, u32, u64)>,
    clock: u64,
}

impl Naive {
    fn page(&self, prefix: &[u32]) -> Option<u32> {
        self.nodes.iter().find(|(other, ..)| other == prefix).map(|(_, page, _)| *page)
    }

    fn holders(&self, prefix: &[u32], requests: &[Holder]) -> u32 {
        let holds = |request: &&Holder| request.prefix(request.held).starts_with(prefix);
        requests.iter().filter(holds).count() as u32
    }

    /// The node that must go next: of those nobody holds, the one released first.
    fn evict(&mut self, requests: &[Holder]) -> Option<u32> {
        let cached = self.nodes.iter().enumerate().filter(|(_, node)| self.holders(&node.0, requests) == 0);
        let (at, _) = cached.min_by_key(|(_, node)| node.2)?;
        Some(self.nodes.remove(at).1)
    }
}

fn action() -> impl Strategy<Value = Action> {
    let text = prop::collection::vec(0..3u32, 1..5)
        .prop_map(|pages| pages.into_iter().flat_map(|page| [page, page + 1]).collect());
    prop_oneof![
        4 => text.prop_map(|text| Action::Begin { text }),
        4 => any::<prop::sample::Index>().prop_map(Action::Insert),
        3 => any::<prop::sample::Index>().prop_map(Action::End),
        1 => Just(Action::ForgetAll),
    ]
}

fn begin(pool: &mut PagePool, naive: &mut Naive, requests: &mut Vec<Holder>, text: Vec<u32>) {
    let mut request = Holder { text, pages: Vec::new(), held: 0 };
    let count = request.text.len() / PAGE_SIZE;
    while request.held < count {
        let tokens = &request.text[request.held * PAGE_SIZE..][..PAGE_SIZE];
        let found = pool.find(request.deepest(), tokens);
        assert_eq!(found, naive.page(request.prefix(request.held + 1)), "the tree knows the same prefixes");
        let Some(page) = found else { break };
        pool.hold(page);
        request.pages.push(page);
        request.held += 1;
    }
    requests.push(request);
    for _ in requests[requests.len() - 1].held..count {
        let free = pool.available() - pool.cached();
        let evicted = if free == 0 { naive.evict(requests) } else { None };
        let taken = pool.take();
        assert_eq!(taken.is_some(), free > 0 || evicted.is_some());
        assert!(evicted.is_none() || taken == evicted, "the least recently released page goes first");
        let request = requests.last_mut().expect("just pushed");
        match taken {
            Some(page) => request.pages.push(page),
            None => request.text.truncate(request.pages.len() * PAGE_SIZE),
        }
    }
}

fn insert(pool: &mut PagePool, naive: &mut Naive, request: &mut Holder) {
    let prefix = request.prefix((request.held + 1).min(request.pages.len())).to_vec();
    if request.held < request.pages.len() && naive.page(&prefix).is_none() {
        let page = request.pages[request.held];
        pool.insert(request.deepest(), page, &prefix[request.held * PAGE_SIZE..]);
        naive.nodes.push((prefix, page, 0));
        request.held += 1;
    }
}

fn end(pool: &mut PagePool, naive: &mut Naive, request: Holder) {
    for page in &request.pages[request.held..] {
        pool.give(*page);
    }
    pool.release_path(request.deepest());
    for depth in (1..=request.held).rev() {
        naive.clock += 1;
        let prefix = request.prefix(depth);
        let node = naive.nodes.iter_mut().find(|(other, ..)| other == prefix).expect("it was held");
        node.2 = naive.clock;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_pool_does_what_a_list_of_prefixes_does(
        capacity in 1..12u32,
        actions in prop::collection::vec(action(), 1..60),
    ) {
        let mut pool = PagePool::new(capacity, PAGE_SIZE as u32).expect("host memory");
        let (mut naive, mut requests) = (Naive::default(), Vec::<Holder>::new());
        for action in actions {
            match action {
                Action::Begin { text } => begin(&mut pool, &mut naive, &mut requests, text),
                Action::Insert(_) | Action::End(_) if requests.is_empty() => {}
                Action::Insert(index) => insert(&mut pool, &mut naive, index.get_mut(&mut requests)),
                Action::End(index) => {
                    let request = requests.remove(index.index(requests.len()));
                    end(&mut pool, &mut naive, request);
                }
                Action::ForgetAll => {
                    pool.evict_all();
                    while naive.evict(&requests).is_some() {}
                }
            }
            let private: usize = requests.iter().map(|request| request.pages.len() - request.held).sum();
            let prefix_of = |page: u32| naive.nodes.iter().find(|node| node.1 == page).expect("a node");
            pool.check(private, |page| naive.holders(&prefix_of(page).0, &requests));
            let cached = naive.nodes.iter().filter(|node| naive.holders(&node.0, &requests) == 0).count();
            prop_assert_eq!(pool.cached() as usize, cached);
            prop_assert_eq!(pool.available() as usize, capacity as usize - private - (naive.nodes.len() - cached));
        }
    }
}
