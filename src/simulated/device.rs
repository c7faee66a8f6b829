//! A device that is not there: how long its steps take, by a file of numbers. Everything around them is as ever (the scheduler,
//! pages, prefix cache, tokenizer, service), so that what a GPU's clients would see can be tried on any machine.
//!
//! ```json
//! {"name": "H200, Qwen3-0.6B", "pages": 70000,
//!  "decode_ms": {"step": 0.555, "token": 0.00334}, "mixed_ms": {"step": 0.897, "token": 0.0014},
//!  "attention_ms": {"step": 0.1, "token": 6.5e-7}, "context_ms": 2.667e-5, "further_row_ms": 0.0018, "sample_ms": 0.00075,
//!  "attention_least_ms": 0.2}
//! ```
//!
//! The first three are what an engine measures when it is built (`RUST_LOG=minisgl=info` says it); [`Formula`] says what each means.

use std::fs::File as OpenFile;
use std::io::Read;
use std::path::Path;

use minisgl_core::costs::{Line, StepCosts};
use minisgl_core::formula::Formula;
use serde::Deserialize;

use crate::error::Error;

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct SimulatedDevice {
    /// What it calls itself.
    pub name: String,
    /// KV pages that its memory holds.
    pub pages: u32,
    /// What its steps take.
    pub formula: Formula,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    pages: u32,
    decode_ms: StepAndToken,
    mixed_ms: StepAndToken,
    attention_ms: StepAndToken,
    context_ms: f64,
    further_row_ms: f64,
    sample_ms: f64,
    attention_least_ms: f64,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct StepAndToken {
    step: f32,
    token: f32,
}

impl From<StepAndToken> for Line {
    fn from(StepAndToken { step, token }: StepAndToken) -> Self {
        Line { fixed_ms: step, token_ms: token }
    }
}

impl SimulatedDevice {
    /// Reads a file.
    ///
    /// # Errors
    /// It can't be read, or its numbers are no times.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let bad = |reason: String| Error::SimulatedDevice { path: path.to_owned(), reason };
        /// More is another file: the weights, say.
        const BYTES_MAX: u64 = 1 << 20;
        let mut text = String::new();
        let file = OpenFile::open(path).map_err(|error| bad(error.to_string()))?;
        file.take(BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| bad(error.to_string()))?;
        match text.len() as u64 > BYTES_MAX {
            true => Err(bad(format!("it has more than {BYTES_MAX} bytes"))),
            false => Self::read(&text).map_err(bad),
        }
    }

    fn read(text: &str) -> Result<Self, String> {
        /// More is a mistake: nobody waits for a step of hours.
        const LONGEST_MS: f64 = 1e6;
        let file: File = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let File { decode_ms, mixed_ms, attention_ms, .. } = file;
        let lines = [decode_ms, mixed_ms, attention_ms].map(|line| [line.step, line.token].map(f64::from));
        let own = [file.context_ms, file.further_row_ms, file.sample_ms, file.attention_least_ms];
        if let Some(ms) = lines.as_flattened().iter().chain(&own).find(|ms| !(0.0..=LONGEST_MS).contains(*ms))
        {
            return Err(format!("{ms} is no time in milliseconds, from 0 to {LONGEST_MS}"));
        }
        let costs =
            StepCosts { decode: decode_ms.into(), mixed: mixed_ms.into(), attention: attention_ms.into() };
        let formula = Formula {
            costs,
            context_ms: file.context_ms,
            further_row_ms: file.further_row_ms,
            sample_ms: file.sample_ms,
            attention_least_ms: file.attention_least_ms,
        };
        Ok(SimulatedDevice { name: file.name, pages: file.pages, formula })
    }
}
