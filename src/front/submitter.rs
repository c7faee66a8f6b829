//! The half of a session that requests go into.

use std::fmt;
use std::sync::Arc;

use super::permits::Permits;
use super::session::Session;
use super::shared::Shared;
use crate::error::Error;
use crate::request::GenerateRequest;

/// The half of a session that requests go into. Dropping it says that no more will come.
pub struct Submitter {
    session: Arc<Session>,
    permits: Arc<Permits>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Submitter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Submitter").field("session", &self.session.id).finish_non_exhaustive()
    }
}

impl Submitter {
    pub(super) fn new(session: Arc<Session>, permits: Arc<Permits>, shared: Arc<Shared>) -> Self {
        Submitter { session, permits, shared }
    }

    /// How many requests can be submitted now without waiting. Only this submitter makes it fewer.
    pub fn room(&self) -> usize {
        self.permits.free()
    }

    /// Submits a request under a tag, which its events bear. Waits while as many are on their way as the session's
    /// capacity allows; a thread that also reads the session's events asks [`Submitter::room`] first.
    ///
    /// # Errors
    /// The engine has stopped, or nobody reads the events any more. A request that can't run is no error here: its
    /// completion says so.
    pub fn submit(&mut self, tag: u64, request: GenerateRequest) -> Result<(), Error> {
        self.submit_all([(tag, request)])
    }

    /// Submits requests. Token prompts that there is room for now reach the engine together, so that its first step is a
    /// full one.
    ///
    /// # Errors
    /// As [`Submitter::submit`]; requests after the one that failed were not submitted.
    pub fn submit_all(
        &mut self,
        requests: impl IntoIterator<Item = (u64, GenerateRequest)>,
    ) -> Result<(), Error> {
        let mut ready = Vec::new();
        for (tag, request) in requests {
            self.shared.check_running()?;
            let permit = match self.permits.try_acquire() {
                Some(permit) => permit,
                None => {
                    self.shared.post(std::mem::take(&mut ready))?;
                    self.permits.acquire().ok_or_else(|| self.shared.refusal())?
                }
            };
            if self.session.is_unread() {
                return Err(self.shared.refusal());
            }
            ready.extend(self.shared.prepare(&self.session, tag, request, permit));
        }
        self.shared.post(ready)
    }
}

impl Drop for Submitter {
    fn drop(&mut self) {
        self.session.no_more();
    }
}
