//! The end of ranks of which one fails.

use std::thread;

/// Calls others back from where they wait for a rank whose test fails.
pub struct Ending<F: Fn()>(pub F);

impl<F: Fn()> Drop for Ending<F> {
    fn drop(&mut self) {
        if thread::panicking() {
            (self.0)();
        }
    }
}
