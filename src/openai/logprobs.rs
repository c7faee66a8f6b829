//! Log-probabilities in OpenAI's two forms, where tokens are texts, and bytes where they are part of a character.
//!
//! ```text
//!   chat  {"content": [{"token": " the", "bytes": [32,116,…], "logprob": -0.5, "top_logprobs": [{…}, …]}, …]}
//!   text  {"tokens": [" the", …], "token_logprobs": [-0.5, …], "top_logprobs": [{" the": -0.5, …}, …], "text_offset": [0, …]}
//! ```
//!
//! There is an entry for every output token, the one that ended the output included. Bytes that are no text stand as
//! `\xf0\x9f`, in the second form behind `bytes:`, as the API writes them; a model without a tokenizer has `token_id:7`.

use std::collections::BTreeMap;

use serde::Serialize;

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
    token_logprobs: Vec<f32>,
    /// Null where alternatives were not asked for. The token drawn is always among them.
    top_logprobs: Option<Vec<BTreeMap<String, f32>>>,
    /// Where each token begins in the output's text, in characters; the text's length for a token that is not in it.
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Of an output; `None` where they were not asked for.
    pub fn new(completion: &Completion, token_bytes: TokenBytes<'_>) -> Option<Self> {
        let logprobs = completion.logprobs.as_ref()?;
        let end = completion.text.as_deref().unwrap_or_default().chars().count();
        let mut all = Self::of(&completion.token_ids, logprobs, &mut 0, token_bytes);
        all.text_offset.iter_mut().for_each(|offset| *offset = end.min(*offset));
        Some(all)
    }

    /// Of tokens that begin `offset` characters behind the output's beginning, which becomes where they end.
    pub fn of(
        ids: &[u32],
        logprobs: &[TokenLogprobs],
        offset: &mut usize,
        token_bytes: TokenBytes<'_>,
    ) -> Self {
        let mut all = TextLogprobs::default();
        for (id, entry) in ids.iter().zip(logprobs) {
            let bytes = token_bytes(*id);
            let token = spelled(*id, bytes.as_deref(), "bytes:");
            all.text_offset.push(*offset);
            *offset += bytes.iter().flatten().filter(|byte| **byte & 0xC0 != 0x80).count();
            if !entry.top.is_empty() {
                let mut top = BTreeMap::from([(token.clone(), entry.logprob.max(LEAST))]);
                for (id, logprob) in &entry.top {
                    let token = spelled(*id, token_bytes(*id).as_deref(), "bytes:");
                    top.entry(token).or_insert(logprob.max(LEAST));
                }
                all.top_logprobs.get_or_insert_default().push(top);
            }
            all.tokens.push(token);
            all.token_logprobs.push(entry.logprob.max(LEAST));
        }
        all
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
