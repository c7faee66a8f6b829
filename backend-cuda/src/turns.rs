//! Recordings, and calls that would spoil them, take turns in a process.
//!
//! A call that synchronizes the device (allocating and freeing memory, loading code) ends every recording on that device
//! that another thread has under way, whatever mode it began in. So engines of one process, each on a thread of its own,
//! must not do the one while another does the other.
//!
//! Invariant: a thread never waits for itself. One that makes such a call while it records has failed to record, and is
//! about to drop what it has.

use std::cell::Cell;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

static TURNS: RwLock<()> = RwLock::new(());

thread_local! {
    static RECORDS: Cell<bool> = const { Cell::new(false) };
}

/// Held while a step is recorded.
#[derive(Debug)]
pub(crate) struct Recording {
    _turn: RwLockWriteGuard<'static, ()>,
}

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDS.set(false);
    }
}

/// Waits until nothing is under way that would spoil a recording.
pub(crate) fn record() -> Recording {
    let turn = TURNS.write().unwrap_or_else(PoisonError::into_inner);
    RECORDS.set(true);
    Recording { _turn: turn }
}

/// Waits until no other thread records, and keeps it so while the result lives.
pub(crate) fn synchronize() -> Option<RwLockReadGuard<'static, ()>> {
    (!RECORDS.get()).then(|| TURNS.read().unwrap_or_else(PoisonError::into_inner))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_recording_keeps_other_threads_from_synchronizing_and_not_its_own() {
        let recording = record();
        assert!(synchronize().is_none());
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || sender.send(synchronize().is_some()));
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        drop(recording);
        assert_eq!(receiver.recv(), Ok(true));
        assert!(synchronize().is_some());
    }
}
