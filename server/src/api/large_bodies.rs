//! The turns of large bodies: so many are read at once, whatever the number of connections.

use tokio::sync::{Semaphore, SemaphorePermit};

/// Larger bodies that are read at once.
const LARGE_AT_ONCE: usize = 32;

/// See the module.
pub struct LargeBodies(Semaphore);

impl Default for LargeBodies {
    fn default() -> Self {
        LargeBodies(Semaphore::new(LARGE_AT_ONCE))
    }
}

impl LargeBodies {
    /// Waits for a turn, which lasts until it is dropped.
    pub async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.0.acquire().await.ok()
    }
}
