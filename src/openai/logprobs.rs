//! Log-probabilities in OpenAI's two forms, where tokens are texts, and bytes where they are part of a character.
//!
//! ```text
//!   chat  {"content": [{"token": " the", "bytes": [32,116,…], "logprob": -0.5, "top_logprobs": [{…}, …]}, …]}
//!   text  {"tokens": [" the", …], "token_logprobs": [-0.5, …], "top_logprobs": [{" the": -0.5, …}, …], "text_offset": [0, …]}
//! ```
//!
//! Those of a prompt are in vLLM's form, which names tokens by their ids; the first token has none:
//!
//! ```text
//!   [null, {"262": {"logprob": -0.5, "rank": 1, "decoded_token": " the"}, "11": {…}, …}, …]
//! ```
//!
//! There is an entry for every output token, the one that ended the output included. Bytes that are no text stand as
//! `\xf0\x9f`, in the second form behind `bytes:`, as the API writes them; a model without a tokenizer has `token_id:7`.

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::request::{Completion, TokenLogprobs};

/// The API's number for what is all but impossible; JSON has no infinity.
const LEAST: f32 = -9999.0;

/// The bytes that a token stands for; `None` where the model has no tokenizer.
type TokenBytes<'a> = &'a dyn Fn(u32) -> Option<Vec<u8>>;

/// In answers to conversations.
#[derive(Debug, Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: (),
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: Token,
    top_logprobs: Vec<Token>,
}

#[derive(Debug, Serialize)]
struct Token {
    token: String,
    bytes: Option<Vec<u8>>,
    logprob: f32,
}

impl ChatLogprobs {
    /// Of an output; `None` where they were not asked for.
    pub fn new(completion: &Completion, token_bytes: TokenBytes<'_>) -> Option<Self> {
        Some(Self::of(&completion.token_ids, completion.logprobs.as_ref()?, token_bytes))
    }

    /// Of tokens.
    pub fn of(ids: &[u32], logprobs: &[TokenLogprobs], token_bytes: TokenBytes<'_>) -> Self {
        let token = |id, logprob: f32| {
            let bytes = token_bytes(id);
            Token { token: spelled(id, bytes.as_deref(), ""), bytes, logprob: logprob.max(LEAST) }
        };
        let entry = |(id, entry): (&u32, &TokenLogprobs)| ChatToken {
            token: token(*id, entry.logprob),
            top_logprobs: entry.top.iter().map(|(id, logprob)| token(*id, *logprob)).collect(),
        };
        ChatLogprobs { content: ids.iter().zip(logprobs).map(entry).collect(), refusal: () }
    }
}

/// In continuations of a text.
#[derive(Debug, Default, Serialize)]
pub struct TextLogprobs {
    tokens: Vec<String>,
    /// Null at a prompt's first token, which follows nothing.
    token_logprobs: Vec<Option<f32>>,
    /// Null where alternatives were not asked for. The token drawn is always among them.
    top_logprobs: Option<Vec<Option<BTreeMap<String, f32>>>>,
    /// Where each token begins in the text, in characters; the text's length for a token that is not in it.
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Of an output; `None` where they were not asked for.
    pub fn new(completion: &Completion, token_bytes: TokenBytes<'_>) -> Option<Self> {
        let logprobs = completion.logprobs.as_ref()?;
        let end = completion.text.as_deref().unwrap_or_default().chars().count();
        let mut all = Self::of(&completion.token_ids, logprobs, &mut 0, token_bytes);
        all.clamp(end);
        Some(all)
    }

    /// Of an output behind its prompt, which is repeated as `echo`; `None` where they were not asked for.
    pub fn echoed(completion: &Completion, echo: &str, token_bytes: TokenBytes<'_>) -> Option<Self> {
        let output = Self::new(completion, token_bytes)?;
        let ids = completion.prompt_token_ids.as_deref().unwrap_or_default();
        let scores = completion.prompt_logprobs.as_deref().map_or(&[][..], Vec::as_slice);
        let Some((first, scored)) = ids.split_first().filter(|(_, scored)| scored.len() == scores.len())
        else {
            return Some(output);
        };
        let end = echo.chars().count();
        let mut characters = 0;
        let mut all = TextLogprobs::default();
        let bytes = token_bytes(*first);
        all.tokens.push(spelled(*first, bytes.as_deref(), "bytes:"));
        all.token_logprobs.push(None);
        all.text_offset.push(0);
        characters += characters_of(bytes.as_deref());
        let rest = Self::of(scored, scores, &mut characters, token_bytes);
        // What stands before the text, as special tokens do, is not in it.
        let before = characters.saturating_sub(end);
        all.text_offset.extend(rest.text_offset.iter().map(|offset| offset.saturating_sub(before)));
        all.text_offset.extend(output.text_offset.iter().map(|offset| end + offset));
        all.tokens.extend(rest.tokens.into_iter().chain(output.tokens));
        all.token_logprobs.extend(rest.token_logprobs.into_iter().chain(output.token_logprobs));
        let tops = [rest.top_logprobs, output.top_logprobs].into_iter().flatten().flatten();
        let tops: Vec<_> = [None].into_iter().chain(tops).collect();
        all.top_logprobs = (tops.len() == all.tokens.len()).then_some(tops);
        Some(all)
    }

    /// Of tokens that begin `offset` characters behind the output's beginning, which becomes where they end.
    fn of(ids: &[u32], logprobs: &[TokenLogprobs], offset: &mut usize, token_bytes: TokenBytes<'_>) -> Self {
        let mut all = TextLogprobs::default();
        ids.iter().zip(logprobs).for_each(|(id, entry)| all.push(*id, entry, offset, token_bytes));
        all
    }

    /// Adds a token that begins `offset` characters behind the output's beginning, which becomes where it ends.
    pub fn push(&mut self, id: u32, entry: &TokenLogprobs, offset: &mut usize, token_bytes: TokenBytes<'_>) {
        let bytes = token_bytes(id);
        let token = spelled(id, bytes.as_deref(), "bytes:");
        self.text_offset.push(*offset);
        *offset += characters_of(bytes.as_deref());
        if !entry.top.is_empty() {
            let mut top = BTreeMap::from([(token.clone(), entry.logprob.max(LEAST))]);
            for (id, logprob) in &entry.top {
                let token = spelled(*id, token_bytes(*id).as_deref(), "bytes:");
                top.entry(token).or_insert(logprob.max(LEAST));
            }
            self.top_logprobs.get_or_insert_default().push(Some(top));
        }
        self.tokens.push(token);
        self.token_logprobs.push(Some(entry.logprob.max(LEAST)));
    }

    /// Says of tokens that are not in the text, which has `end` characters, that they begin at its end.
    pub fn clamp(&mut self, end: usize) {
        self.text_offset.iter_mut().for_each(|offset| *offset = end.min(*offset));
    }

    /// Takes out the first tokens: those that begin within `end` characters, or right behind them.
    pub fn take_within(&mut self, end: usize) -> Option<Self> {
        let count = self.text_offset.partition_point(|offset| *offset <= end);
        (count > 0).then(|| TextLogprobs {
            tokens: self.tokens.drain(..count).collect(),
            token_logprobs: self.token_logprobs.drain(..count).collect(),
            top_logprobs: self.top_logprobs.as_mut().map(|tops| tops.drain(..count).collect()),
            text_offset: self.text_offset.drain(..count).collect(),
        })
    }
}

/// Characters that begin in a token.
fn characters_of(bytes: Option<&[u8]>) -> usize {
    bytes.unwrap_or_default().iter().filter(|byte| **byte & 0xC0 != 0x80).count()
}

/// Of a prompt's tokens.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct PromptLogprobs(Vec<Option<Candidates>>);

/// The token that stands there and the most probable ones, each once, in this order.
#[derive(Debug)]
struct Candidates(Vec<(u32, Candidate)>);

#[derive(Debug, Serialize)]
struct Candidate {
    logprob: f32,
    /// From 1; null where the token is not among the most probable that were asked for.
    rank: Option<usize>,
    /// Null where the model has no tokenizer.
    decoded_token: Option<String>,
}

impl Serialize for Candidates {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, candidate) in &self.0 {
            map.serialize_entry(&id.to_string(), candidate)?;
        }
        map.end()
    }
}

impl PromptLogprobs {
    /// Of a completion's prompt; `None` where they were not asked for.
    pub fn new(completion: &Completion, token_bytes: TokenBytes<'_>) -> Option<Self> {
        let (ids, scores) = (completion.prompt_token_ids.as_ref()?, completion.prompt_logprobs.as_deref()?);
        let unscored = ids.len().saturating_sub(scores.len());
        let candidate = |id: u32, logprob: f32, rank| {
            let text = token_bytes(id).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            (id, Candidate { logprob: logprob.max(LEAST), rank, decoded_token: text })
        };
        let candidates = |(id, score): (&u32, &TokenLogprobs)| {
            let rank = score.top.iter().position(|(top, _)| top == id).map(|at| at + 1);
            let others = (1..).zip(&score.top).filter(|(_, (top, _))| top != id);
            let others = others.map(|(rank, (id, logprob))| candidate(*id, *logprob, Some(rank)));
            Candidates([candidate(*id, score.logprob, rank)].into_iter().chain(others).collect())
        };
        let scored = ids[unscored..].iter().zip(scores).map(|pair| Some(candidates(pair)));
        Some(PromptLogprobs((0..unscored).map(|_| None).chain(scored).collect()))
    }
}

/// A token as a text.
fn spelled(id: u32, bytes: Option<&[u8]>, prefix: &str) -> String {
    let Some(bytes) = bytes else { return format!("token_id:{id}") };
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold(prefix.to_owned(), |text, byte| {
            match byte.is_ascii_graphic() || *byte == b' ' {
                true => text + (*byte as char).encode_utf8(&mut [0; 1]),
                false => text + &format!("\\x{byte:02x}"),
            }
        }),
    }
}
