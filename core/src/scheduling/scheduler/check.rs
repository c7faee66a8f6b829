//! The scheduler's invariants, to be asserted.

use crate::pages::NO_PAGE;
use crate::table::State;

use super::Scheduler;

impl Scheduler {
    /// Asserts that no page is lost or shared wrongly and that every request is where it should be. Takes time linear
    /// in the pool: for tests and idle moments.
    ///
    /// # Panics
    /// When an invariant is broken.
    pub fn check(&self) {
        let mut holders = alloc::vec![0; self.pool.capacity() as usize];
        let mut owned = alloc::vec![false; self.pool.capacity() as usize];
        let mut private = 0;
        let in_state = |state| self.table.iter().filter(move |(_, request)| request.state == state);
        assert_eq!(in_state(State::Running).count(), self.running.len(), "running requests");
        assert_eq!(in_state(State::Waiting).count(), self.waiting(), "waiting requests");
        let grouped = in_state(State::Waiting).filter(|(_, request)| request.is_grouped).count();
        assert_eq!(grouped, self.table.grouped_waiting() as usize, "waiting samples");
        let may_cache = self.settings.prefix_cache || grouped > 0;
        assert!(may_cache || self.pool.cached() == 0, "a prefix is kept for nobody");
        for (entry, request) in in_state(State::Running) {
            assert!(self.running.contains(&entry));
            assert!(request.computed <= request.pages * self.limits.page_size, "positions without a page");
            assert!(request.known <= request.planned && request.planned <= request.len_max);
            assert!(request.computed < request.unscored, "a token to be scored was passed over");
            let details = self.table.details(entry);
            let mut node = details.node;
            while node != NO_PAGE {
                holders[node as usize] += 1;
                node = self.pool.parent(node);
            }
            let mapped = (0..request.pages).filter(|i| !details.hole().contains(i));
            for page in mapped.map(|i| self.table.page(entry, i) as usize) {
                if self.pool.is_private(page as u32) {
                    assert!(!owned[page], "page {page} is private to two requests");
                    owned[page] = true;
                    private += 1;
                } else {
                    assert!(holders[page] > 0, "page {page} is mapped by a request that does not hold it");
                }
            }
        }
        self.pool.check(private, |page| holders[page as usize]);
        self.table.check(self.oldest());
    }
}
