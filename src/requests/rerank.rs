//! How relevant documents are to a query, as a Qwen3-Reranker judges: its prompt asks for a yes or a no, and the answer's probability,
//! of those two, is the relevance.
//!
//! ```text
//!   prompt(instruction, query, document) ──┬── score "yes" ──> log p(yes) ─┐
//!                                          └── score "no"  ──> log p(no)  ─┴─> p(yes) / (p(yes) + p(no))
//! ```
//!
//! The two share their prompt's pages, so the second computes a page of it at most.

use crate::request::{Completion, Given, Prompt, RequestError, RerankRequest};
use crate::score::{Score, ScoreRequest};

/// What stands before and behind what is to be judged; the three are encoded one by one, as the model was trained.
const BEFORE: &str = "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct \
                      provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n";
const BEHIND: &str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

/// The answers.
const YES: &str = "yes";
const NO: &str = "no";

impl RerankRequest {
    /// The texts that make its prompt, each of which is encoded on its own.
    pub(crate) fn parts(&self) -> [String; 3] {
        let RerankRequest { instruction, query, document } = self;
        let asked = format!("<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}");
        [BEFORE.to_owned(), asked, BEHIND.to_owned()]
    }
}

/// The requests that score "yes" and "no" behind a document's prompt.
pub(crate) fn answers(prompt: &Prompt) -> [ScoreRequest; 2] {
    [YES, NO].map(|word| ScoreRequest::new(prompt.clone(), Given::Text(word.to_owned())))
}

/// A judgement.
#[derive(Clone, Debug, PartialEq)]
pub struct Relevance {
    /// From 0 to 1.
    pub relevance: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// How many of them the prefix cache held when the first answer was scored.
    pub cached_tokens: u32,
}

impl Relevance {
    /// Of a document whose answers have come, in any order. `token_bytes` gives the bytes that a token stands for.
    pub(crate) fn of_answers(
        completions: &[Completion],
        token_bytes: &dyn Fn(u32) -> Option<Vec<u8>>,
    ) -> Result<Self, RequestError> {
        if let Some(error) = completions.iter().find_map(|completion| completion.error.clone()) {
            return Err(error);
        }
        let scores: Vec<Score> = completions.iter().cloned().map(Score::from).collect();
        let answer = |word: &str| {
            let spells = |score: &&Score| {
                score.token_ids.iter().filter_map(|id| token_bytes(*id)).flatten().eq(word.bytes())
            };
            let unknown = || RequestError::Encode(format!("its tokens do not spell {word:?}"));
            scores.iter().find(spells).ok_or_else(unknown)
        };
        Relevance::of(answer(YES)?, answer(NO)?)
    }

    /// Out of the scores of both answers.
    pub(crate) fn of(yes: &Score, no: &Score) -> Result<Self, RequestError> {
        for (word, score) in [(YES, yes), (NO, no)] {
            if let Some(error) = &score.error {
                return Err(error.clone());
            }
            let tokens = score.token_ids.len();
            if tokens != 1 {
                return Err(RequestError::Encode(format!(
                    "{word:?} is {tokens} of its tokens and must be one; rerank with a model that was made for it, like \
                     Qwen3-Reranker"
                )));
            }
        }
        let relevance = 1.0 / (1.0 + (no.logprob() - yes.logprob()).exp());
        Ok(Relevance {
            relevance,
            prompt_tokens: yes.prompt_tokens,
            cached_tokens: yes.cached_tokens.min(no.cached_tokens),
        })
    }
}
