//! What was launched last, for errors that come late: a kernel's failure shows at a later call.

use std::cell::Cell;

/// Names of the kernels launched last, for errors that come late.
#[derive(Debug, Default)]
pub(super) struct Trace {
    names: Cell<[&'static str; 8]>,
    launches: Cell<usize>,
    pub(super) step: Cell<u64>,
}

impl Trace {
    pub(super) fn push(&self, name: &'static str) {
        let mut names = self.names.get();
        names[self.launches.get() % names.len()] = name;
        self.names.set(names);
        self.launches.set(self.launches.get() + 1);
    }

    /// The last names, newest first.
    pub(super) fn last(&self) -> String {
        let (names, launches) = (self.names.get(), self.launches.get());
        let newest_first = (1..=launches.min(names.len())).map(|back| names[(launches - back) % names.len()]);
        newest_first.collect::<Vec<_>>().join(", ")
    }
}
