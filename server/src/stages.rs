//! Where a request's time went until its first token.
//!
//! ```text
//!   submitted ── encoding ──> token ids ── queueing ──> in the engine ── prefilling ──> first token ── sending ──> taken by the
//!                                                                                                                connection
//! ```

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::response::Response;

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages {
    /// Chat template and tokenizer.
    pub encoding: Duration,
    /// Until the engine had a place.
    pub queueing: Duration,
    /// Until the step that drew the first token completed.
    pub prefilling: Duration,
    /// Until the connection took it; only of streams.
    pub sending: Option<Duration>,
}

/// As they become known: an answer's for the log, which is written when the answer is over.
pub type SharedStages = Arc<Mutex<Stages>>;

impl fmt::Display for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let (encoding, queueing, prefilling) = (ms(self.encoding), ms(self.queueing), ms(self.prefilling));
        write!(f, "encoding {encoding:.1} ms, queueing {queueing:.1}, prefilling {prefilling:.1}")?;
        self.sending.map_or(Ok(()), |sending| write!(f, ", sending {:.1}", ms(sending)))
    }
}

/// For the log.
pub fn with_stages(mut response: Response, stages: SharedStages) -> Response {
    response.extensions_mut().insert(stages);
    response
}
