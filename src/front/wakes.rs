//! Readers to be woken once a batch.

use std::sync::Arc;

use super::session::{Queued, Session};

/// Readers to be woken when a batch is done, or when the thread ends in the middle of one.
#[derive(Default)]
pub struct Wakes(Vec<Arc<Session>>);

impl Wakes {
    /// Queues an event.
    pub fn push(&mut self, session: &Arc<Session>, event: Queued) {
        if session.push(event) {
            self.add(session.clone());
        }
    }

    /// Has a session's reader woken.
    pub fn add(&mut self, session: Arc<Session>) {
        self.0.push(session);
    }

    /// Wakes them.
    pub fn wake(&mut self) {
        self.0.drain(..).for_each(|session| session.wake());
    }
}

impl Drop for Wakes {
    fn drop(&mut self) {
        self.wake();
    }
}
