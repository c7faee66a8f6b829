//! What a benchmark asks for: prompts, output lengths, and the bodies that say so to a service.
//!
//! ```text
//!   /v1/completions         token ids as they are, or text
//!   /v1/chat/completions    a user's message: the text, or a common word for each token id
//! ```

use std::str::FromStr;
use std::time::Duration;

use minisgl::JsonObject;
use rand_core::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use serde::Serialize;
use serde_json::{Value, json};

/// The largest id drawn, as in `offline-bench`.
const ID_MAX: u64 = 10_000;

/// Words that are one token each, with the space before them, in the vocabularies in use.
const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not",
    "he", "this", "are", "or", "his", "from", "at", "which", "but", "have", "an", "had", "they", "you",
    "were", "their", "one", "all", "we", "can", "her", "has", "there", "been", "if", "more", "when", "will",
    "would", "who", "so", "no", "she", "other", "its", "may", "these", "what", "them", "than", "some", "him",
    "time", "into", "only", "could", "new", "then",
];

/// Which endpoint is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Api {
    /// `/v1/completions`.
    #[default]
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Api {
    /// Its name below the base address.
    pub fn name(self) -> &'static str {
        match self {
            Api::Completions => "completions",
            Api::Chat => "chat/completions",
        }
    }
}

impl FromStr for Api {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "completions" => Ok(Api::Completions),
            "chat" => Ok(Api::Chat),
            _ => Err(format!("{text} is no API; use completions or chat")),
        }
    }
}

/// What to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Token ids.
    Tokens(Vec<u32>),
    /// Text.
    Text(String),
    /// Token ids by blocks, as traces give them: blocks of one id are equal, so prompts share what they shared.
    Blocks {
        /// Of the prompt.
        tokens: u32,
        /// Of a block.
        block: u32,
        /// Names the blocks, the last one perhaps cut short.
        ids: Vec<u64>,
        /// Of what has no block.
        seed: u64,
    },
}

/// A request of a benchmark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it is due, where a trace says so.
    pub at: Option<Duration>,
    /// What to go on from.
    pub prompt: Prompt,
    /// Tokens to draw.
    pub output_tokens: u32,
}

impl Prompt {
    /// Its token ids; text has none before the service makes them.
    fn ids(&self) -> Option<Vec<u32>> {
        match self {
            Prompt::Tokens(ids) => Some(ids.clone()),
            Prompt::Text(_) => None,
            Prompt::Blocks { tokens, block, ids, seed } => {
                let mut out = Vec::with_capacity(*tokens as usize);
                // Behind the last block named, blocks of this prompt alone.
                let alone = (0..).map(|i| seed.wrapping_add(i) ^ (1 << 63));
                for id in ids.iter().copied().chain(alone) {
                    let left = *tokens - out.len() as u32;
                    if left == 0 {
                        break;
                    }
                    let mut generator = Pcg64Mcg::seed_from_u64(id);
                    let draw = || (generator.next_u64() % (ID_MAX + 1)) as u32;
                    out.extend(std::iter::repeat_with(draw).take(left.min(*block) as usize));
                }
                Some(out)
            }
        }
    }
}

/// What all requests of a benchmark ask for in the same way.
#[derive(Clone, Debug)]
pub struct Manner {
    /// Which endpoint.
    pub api: Api,
    /// The model's name.
    pub model: String,
    /// How freely tokens are drawn.
    pub temperature: f32,
    /// Request i draws its tokens with this plus i.
    pub seed: u64,
    /// Token ids are taken modulo this.
    pub vocab: u32,
    /// Ask with fields of OpenAI's API alone: outputs may then end before they have as many tokens as they should.
    pub standard_fields: bool,
    /// Further fields of every request; they come before all others.
    pub extra: JsonObject,
}

impl Manner {
    /// The body of request `i`.
    pub fn body(&self, i: usize, request: &Request) -> Vec<u8> {
        let seed = self.seed.wrapping_add(i as u64) & i64::MAX as u64;
        let mut body = json!({
            "model": self.model,
            "max_tokens": request.output_tokens,
            "temperature": self.temperature,
            "seed": seed,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if !self.standard_fields {
            body["ignore_eos"] = true.into();
            // Tokens that have no text of their own are told then, too.
            body["return_token_ids"] = true.into();
        }
        match self.api {
            Api::Completions => body["prompt"] = self.prompt(&request.prompt),
            Api::Chat => body["messages"] = json!([{"role": "user", "content": text(&request.prompt)}]),
        }
        for (field, value) in &self.extra {
            body[field] = value.clone();
        }
        body.to_string().into_bytes()
    }

    fn prompt(&self, prompt: &Prompt) -> Value {
        match prompt.ids() {
            Some(ids) => ids.into_iter().map(|id| id % self.vocab.max(1)).collect(),
            None => text(prompt).into(),
        }
    }
}

/// A prompt as text: a word a token where it is none.
fn text(prompt: &Prompt) -> String {
    match prompt {
        Prompt::Text(text) => text.clone(),
        prompt => {
            let ids = prompt.ids().unwrap_or_default();
            let words: Vec<&str> = ids.iter().map(|id| WORDS[*id as usize % WORDS.len()]).collect();
            words.join(" ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manner(api: Api) -> Manner {
        Manner {
            api,
            model: "m".to_owned(),
            temperature: 0.5,
            seed: 7,
            vocab: 100,
            standard_fields: false,
            extra: JsonObject::new(),
        }
    }

    fn body(manner: &Manner, prompt: Prompt) -> Value {
        let request = Request { at: None, prompt, output_tokens: 9 };
        serde_json::from_slice(&manner.body(3, &request)).unwrap()
    }

    fn blocks(tokens: u32, ids: &[u64], seed: u64) -> Vec<u32> {
        Prompt::Blocks { tokens, block: 4, ids: ids.to_vec(), seed }.ids().unwrap()
    }

    #[test]
    fn a_body_says_all_that_the_service_must_know() {
        let asked = body(&manner(Api::Completions), Prompt::Tokens(vec![5, 205]));
        let expected = json!({
            "model": "m", "prompt": [5, 5], "max_tokens": 9, "temperature": 0.5, "seed": 10, "stream": true,
            "stream_options": {"include_usage": true}, "ignore_eos": true, "return_token_ids": true,
        });
        assert_eq!(asked, expected);
        let text = body(&manner(Api::Completions), Prompt::Text("Hi".to_owned()));
        assert_eq!(text["prompt"], "Hi");
        let chat = body(&manner(Api::Chat), Prompt::Tokens(vec![0, 1, 65]));
        assert_eq!(chat["messages"], json!([{"role": "user", "content": "the of of"}]));
        assert!(chat.get("prompt").is_none());
    }

    #[test]
    fn standard_fields_are_openais_alone_and_extra_ones_come_first() {
        let mut manner = Manner { standard_fields: true, ..manner(Api::Chat) };
        manner.extra = json!({"temperature": 0, "top_k": 1}).as_object().unwrap().clone();
        let asked = body(&manner, Prompt::Text("Hi".to_owned()));
        assert!(asked.get("ignore_eos").is_none() && asked.get("return_token_ids").is_none());
        assert_eq!((&asked["temperature"], &asked["top_k"]), (&json!(0), &json!(1)));
    }

    #[test]
    fn prompts_share_the_blocks_that_a_trace_says_they_share() {
        let (a, b) = (blocks(10, &[1, 2, 3], 0), blocks(12, &[1, 2, 9], 1));
        assert_eq!((a.len(), b.len()), (10, 12));
        assert_eq!(a[..8], b[..8]);
        assert_ne!(a[8..], b[8..10]);
        assert_eq!(a, blocks(10, &[1, 2, 3], 5), "the seed is of what has no block");
    }

    #[test]
    fn what_has_no_block_is_shared_with_nobody() {
        let (a, b) = (blocks(12, &[1], 100), blocks(12, &[1], 200));
        assert_eq!(a[..4], b[..4]);
        assert_ne!(a[4..8], b[4..8]);
        assert_ne!(a[4..8], a[8..12]);
    }

    #[test]
    fn an_api_is_read_as_it_is_written() {
        assert_eq!(("chat".parse(), "completions".parse()), (Ok(Api::Chat), Ok(Api::Completions)));
        assert!("edits".parse::<Api>().unwrap_err().contains("use completions or chat"));
    }
}
