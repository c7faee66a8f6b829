//! Permits: how many requests may be on their way at once.
//!
//! ```text
//!   acquire ──> Permit, travels with its request ──> dropped when the reader takes the request's end
//!     ^ waits while none is free                        │
//!     └──────────────── one more is free <──────────────┘
//! ```
//!
//! The samples of a request have clones of one permit, which is free when the last of them has ended.
//!
//! Invariant: free permits and those that exist make the capacity.

use std::sync::{Arc, Condvar, Mutex};

use super::locked;

/// A pool of permits.
pub struct Permits {
    state: Mutex<State>,
    returned: Condvar,
}

struct State {
    free: usize,
    waiting: usize,
    closed: bool,
}

/// The right to have one request on its way. Clones are the same permit.
#[derive(Clone)]
pub struct Permit(Arc<Acquired>);

/// A permit taken out of its pool, until it is dropped.
struct Acquired(Arc<Permits>);

impl Permits {
    /// A pool of `capacity` permits, at least one.
    pub fn new(capacity: usize) -> Arc<Self> {
        let state = State { free: capacity.max(1), waiting: 0, closed: false };
        Arc::new(Permits { state: Mutex::new(state), returned: Condvar::new() })
    }

    /// How many are free now.
    pub fn free(&self) -> usize {
        locked(&self.state).free
    }

    /// One permit if one is free.
    pub fn try_acquire(self: &Arc<Self>) -> Option<Permit> {
        let mut state = locked(&self.state);
        state.free = state.free.checked_sub(1)?;
        Some(Permit(Arc::new(Acquired(self.clone()))))
    }

    /// One permit, waited for; `None` if the pool is closed while there is none.
    pub fn acquire(self: &Arc<Self>) -> Option<Permit> {
        let mut state = locked(&self.state);
        while state.free == 0 {
            if state.closed {
                return None;
            }
            state.waiting += 1;
            state = self.returned.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.free -= 1;
        Some(Permit(Arc::new(Acquired(self.clone()))))
    }

    /// From now on nobody waits for a permit.
    pub fn close(&self) {
        locked(&self.state).closed = true;
        self.returned.notify_all();
    }
}

impl Permit {
    /// Closes the pool that the permit came from.
    pub fn close_pool(&self) {
        self.0.0.close();
    }
}

impl Drop for Acquired {
    fn drop(&mut self) {
        let mut state = locked(&self.0.state);
        state.free += 1;
        if state.waiting > 0 {
            self.0.returned.notify_one();
        }
    }
}
