//! Who answers: an engine in this process, or a service.

mod local;
mod remote;

use std::time::Duration;

use minisgl::{Cause, Message};

pub use local::Local;
pub use remote::Remote;

use super::settings::Settings;

/// How often it is looked whether an answer is to be stopped.
const LOOK: Duration = Duration::from_millis(20);

/// A part of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said<'a> {
    /// What is thought before, where it is told apart.
    Thought(&'a str),
    /// Of the answer.
    Text(&'a str),
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It is whole.
    Whole,
    /// It has as many tokens as it may have.
    Length,
    /// It was stopped.
    Stopped,
}

/// Answers conversations.
pub trait Speaker {
    /// Answers a conversation: `hear` is told every part as it comes, and `stop` is asked often whether that is enough.
    ///
    /// # Errors
    /// There is no answer, or it broke off. An error of `hear`.
    fn answer(
        &mut self,
        messages: &[Message],
        settings: &Settings,
        stop: &dyn Fn() -> bool,
        hear: &mut dyn FnMut(Said<'_>) -> Result<(), Cause>,
    ) -> Result<Ending, Cause>;
}
