//! Grammars to constraints, on threads of their own: a hostile one takes a second, and keeps nobody waiting but those who have
//! grammars too.
//!
//! ```text
//!   a request with a grammar, encoded ──> by turns of the sessions ──> thread 1, 2: compile ──> the engine's thread
//!                                                                             └── refused ──> the request's end
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::fair::Waiting;
use super::ready::Ready;
use crate::compiler::Compiler;
use crate::grammar::Grammar;
use crate::request::RequestError;

/// A request whose grammar is to be compiled.
pub struct Uncompiled {
    pub grammar: Arc<Grammar>,
    pub ready: Ready,
}

impl Waiting for Uncompiled {
    fn session(&self) -> u64 {
        self.ready.session()
    }
}

impl Uncompiled {
    /// The request with its constraint; `None` if it has ended here.
    pub fn compile(self, compiler: &Compiler) -> Option<Ready> {
        let Uncompiled { grammar, mut ready } = self;
        if ready.is_unwanted() {
            return Some(ready);
        }
        // What is compiled once is copied for the other samples.
        let constraint = |_| compiler.compile(&grammar, &ready.prompt);
        let compile = || ready.outputs.iter().map(constraint).collect();
        let compiled: Result<Result<Vec<_>, _>, _> = catch_unwind(AssertUnwindSafe(compile));
        match compiled.unwrap_or_else(|_| Err(RequestError::Grammar("its compiler panicked".to_owned()))) {
            Ok(constraints) => {
                ready.constraints = constraints;
                Some(ready)
            }
            Err(error) => {
                ready.reject(&error);
                None
            }
        }
    }
}
