//! A request's constraint: it follows the output, token by token.
//!
//! ```text
//!   engine's thread    accept(t) ──> Computing ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─> state, write_mask
//!   a worker                         └─ lock: t goes into the parser, the next mask comes out: Ready, Complete or Failed
//! ```
//!
//! Invariant: whoever sees another state than `Computing` finds the mask's lock free, but for another reader.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use llguidance::Matcher;
use llguidance::api::StopReason;
use minisgl_core::constraint::{Constraint, ConstraintState};

use crate::workers::{Workers, locked};

/// See the module.
#[derive(Debug)]
pub struct Follower {
    output: Arc<Output>,
    workers: Arc<Workers>,
}

struct Output {
    state: AtomicU8,
    parser: Mutex<Parser>,
    found: Condvar,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Output({:?})", self.state())
    }
}

/// What has come so far, and what may come next.
#[derive(Clone)]
pub struct Parser {
    matcher: Matcher,
    /// Of the next token.
    mask: Vec<u32>,
}

impl Parser {
    /// At the beginning of an output, whose first token is none of `lost`, with masks of so many words.
    ///
    /// # Errors
    /// No text is allowed, or it takes too much work to find out.
    pub fn new(matcher: Matcher, lost: &[u32]) -> Result<Self, String> {
        let mut parser = Parser { matcher, mask: vec![0; lost.len()] };
        match parser.find_mask() {
            ConstraintState::Ready => {}
            ConstraintState::Complete => return Err("it allows only an empty output".to_owned()),
            _ => return Err(parser.error()),
        }
        parser.mask.iter_mut().zip(lost).for_each(|(mask, lost)| *mask &= !lost);
        match parser.mask.iter().all(|word| *word == 0) {
            true => {
                Err("it begins with a space, which the tokenizer drops from a text's beginning".to_owned())
            }
            false => Ok(parser),
        }
    }

    /// One that goes its own way from here.
    pub fn fork(&self) -> Self {
        Parser { matcher: self.matcher.deep_clone(), mask: self.mask.clone() }
    }

    fn accept(&mut self, token: u32) -> ConstraintState {
        match self.matcher.consume_token(token) {
            Ok(()) => self.find_mask(),
            Err(_) => ConstraintState::Failed,
        }
    }

    fn find_mask(&mut self) -> ConstraintState {
        if self.matcher.is_stopped() {
            let is_ok = !self.matcher.is_error() && self.matcher.stop_reason().is_ok();
            return if is_ok { ConstraintState::Complete } else { ConstraintState::Failed };
        }
        match self.matcher.compute_mask() {
            Ok(mask) => {
                let words = self.mask.len();
                self.mask.copy_from_slice(&mask.as_slice()[..words]);
                ConstraintState::Ready
            }
            Err(_) => ConstraintState::Failed,
        }
    }

    fn error(&self) -> String {
        let error = self.matcher.get_error().unwrap_or_else(|| self.matcher.stop_reason().to_string());
        // Where there is no more to be said, it is the name of a reason.
        match error.starts_with(&StopReason::NoExtensionBias.to_string()) {
            true => "no text is allowed by it".to_owned(),
            false => error,
        }
    }
}

impl Output {
    fn state(&self) -> ConstraintState {
        const STATES: [ConstraintState; 4] = [
            ConstraintState::Computing,
            ConstraintState::Ready,
            ConstraintState::Complete,
            ConstraintState::Failed,
        ];
        STATES[self.state.load(Ordering::Acquire) as usize]
    }

    fn accept(&self, token: u32) {
        let mut parser = locked(&self.parser);
        let state = parser.accept(token);
        self.state.store(state as u8, Ordering::Release);
        drop(parser);
        self.found.notify_all();
    }
}

impl Follower {
    /// At the beginning of an output.
    pub fn new(parser: Parser, workers: Arc<Workers>) -> Self {
        let state = AtomicU8::new(ConstraintState::Ready as u8);
        let output = Output { state, parser: Mutex::new(parser), found: Condvar::new() };
        Follower { output: Arc::new(output), workers }
    }
}

impl Drop for Follower {
    /// A parser may be large: a worker gives its memory back, not the engine's thread, but for one who is done before this returns.
    fn drop(&mut self) {
        let output = self.output.clone();
        self.workers.post(Box::new(move || drop(output)));
    }
}

impl Constraint for Follower {
    fn accept(&self, token: u32) {
        self.output.state.store(ConstraintState::Computing as u8, Ordering::Release);
        let output = self.output.clone();
        self.workers.post(Box::new(move || output.accept(token)));
    }

    fn state(&self) -> ConstraintState {
        self.output.state()
    }

    fn wait(&self) {
        let mut parser = locked(&self.output.parser);
        while self.state() == ConstraintState::Computing {
            parser = self.output.found.wait(parser).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn write_mask(&self, mask: &mut [u32]) {
        mask.copy_from_slice(&locked(&self.output.parser).mask);
    }
}
