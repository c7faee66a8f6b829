//! What engines' threads are told.

use minisgl_core::request::Ticket;

use crate::runner::Runner;

/// What the engine's thread is told.
pub enum Message {
    /// The intake has requests that it would take.
    Work,
    /// Abort a session's requests of a tag, or all of them.
    Abort { session: u64, tag: Option<u64> },
    /// A request is over, for a stop text came up.
    StopTextFound(Ticket),
    /// Do something with the engine, between two steps.
    Call(Call),
    /// End the thread.
    Close,
}

/// What is to be done with the engine; it gives back what tells whoever asked.
pub type Work = Box<dyn FnOnce(&mut dyn Runner) -> Reply + Send>;

/// Tells whoever asked what came of it. The engine's thread calls it once it has drawn its own conclusions: who is told that an
/// update failed finds the engine stopped.
pub type Reply = Box<dyn FnOnce()>;

/// Something to be done with the engine, and when.
pub struct Call {
    /// Not before the engine is idle; until then it takes no request in.
    pub when_idle: bool,
    pub work: Work,
}
