//! What a result line says of itself, so that a run can go on where another stopped.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

/// What comes before an origin's name in the id of a result line.
pub(super) const ID_PREFIX: &str = "batch_req_";

/// Where a request came from; its result says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Its line's number, from 1.
    pub line: u64,
    /// Its line's fingerprint: another line, another one.
    pub fingerprint: u64,
}

/// What became of a line of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Which line it was; `None` where its result does not say.
    pub origin: Option<Origin>,
    /// Did it run to its end?
    pub good: bool,
}

impl Origin {
    /// Both numbers as one word: `3-9f86d081884c7d65`.
    pub(super) fn name(&self) -> String {
        format!("{}-{}", self.line, self.fingerprint_text())
    }

    /// The fingerprint as it is written: 16 hexadecimal digits.
    pub(super) fn fingerprint_text(&self) -> String {
        format!("{:016x}", self.fingerprint)
    }

    fn from_name(name: &str) -> Option<Self> {
        let (line, fingerprint) = name.split_once('-')?;
        Self::from_parts(line.parse().ok()?, fingerprint)
    }

    fn from_parts(line: u64, fingerprint: &str) -> Option<Self> {
        let fingerprint = u64::from_str_radix(fingerprint, 16).ok()?;
        Some(Origin { line, fingerprint })
    }
}

/// Reads a line of an output; `None` if it is no result.
pub fn read_result(line: &[u8]) -> Option<Outcome> {
    #[derive(Deserialize)]
    struct Line<'a> {
        #[serde(borrow)]
        id: &'a RawValue,
        line: Option<u64>,
        fingerprint: Option<&'a str>,
        token_ids: Option<IgnoredAny>,
        outputs: Option<IgnoredAny>,
        relevance: Option<IgnoredAny>,
        embedding: Option<IgnoredAny>,
        response: Option<Response>,
        error: Option<IgnoredAny>,
    }
    #[derive(Deserialize)]
    struct Response {
        status_code: u16,
    }
    let Line { id, line, fingerprint, token_ids, outputs, relevance, embedding, response, error } =
        serde_json::from_slice(line).ok()?;
    let output = token_ids.or(outputs).or(relevance).or(embedding);
    let answered = response.as_ref().is_some_and(|response| response.status_code == 200);
    if output.is_none() && response.is_none() && error.is_none() {
        return None;
    }
    let origin = match (line, fingerprint) {
        (Some(line), Some(fingerprint)) => Origin::from_parts(line, fingerprint),
        _ => id.get().trim_matches('"').strip_prefix(ID_PREFIX).and_then(Origin::from_name),
    };
    Some(Outcome { origin, good: error.is_none() && (output.is_some() || answered) })
}
