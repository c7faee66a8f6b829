//! How relevant documents are to a query, as a Qwen3-Reranker judges: its prompt asks for a yes or a no, and the answer's probability,
//! of those two, is the relevance.
//!
//! ```text
//!   prompt(instruction, query, document) ──┬── score "yes" ──> log p(yes) ─┐
//!                                          └── score "no"  ──> log p(no)  ─┴─> p(yes) / (p(yes) + p(no))
//! ```
//!
//! The two share their prompt's pages, so the second computes a page of it at most.

use crate::request::{Given, RequestError};
use crate::score::{Score, ScoreRequest};
use crate::tokenizer::Text;

/// What stands before and behind what is to be judged; the three are encoded one by one, as the model was trained.
const BEFORE: &str = "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct \
                      provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n";
const BEHIND: &str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

/// A document to be judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RerankRequest {
    /// What the query is for, in a sentence.
    pub instruction: String,
    /// What is looked for.
    pub query: String,
    /// Where it may be found.
    pub document: String,
}

impl RerankRequest {
    /// A document that may answer a search in the web: the model's usual instruction.
    pub fn new(query: impl Into<String>, document: impl Into<String>) -> Self {
        RerankRequest {
            instruction: "Given a web search query, retrieve relevant passages that answer the query"
                .to_owned(),
            query: query.into(),
            document: document.into(),
        }
    }

    /// The requests that score "yes" and "no" behind its prompt.
    pub(crate) fn answers(&self, text: &Text) -> Result<[ScoreRequest; 2], RequestError> {
        let encode = |part: &str| text.encode_given(Given::Text(part.to_owned()), usize::MAX);
        let RerankRequest { instruction, query, document } = self;
        let asked = format!("<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}");
        let prompt = [BEFORE, &asked, BEHIND].map(encode).into_iter().collect::<Result<Vec<_>, _>>()?;
        let prompt = prompt.concat();
        let answer = |word: &str| match encode(word)?.as_slice() {
            [id] => Ok(ScoreRequest::tokens(prompt.clone(), [*id])),
            ids => Err(RequestError::Encode(format!(
                "{word:?} is {} of its tokens and must be one; rerank with a model that was made for it, like Qwen3-Reranker",
                ids.len()
            ))),
        };
        Ok([answer("yes")?, answer("no")?])
    }
}

/// A judgement.
#[derive(Clone, Debug, PartialEq)]
pub struct Relevance {
    /// From 0 to 1.
    pub relevance: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
}

impl Relevance {
    /// Out of the scores of both answers.
    pub(crate) fn of(yes: &Score, no: &Score) -> Result<Self, RequestError> {
        if let Some(error) = yes.error.as_ref().or(no.error.as_ref()) {
            return Err(error.clone());
        }
        let relevance = 1.0 / (1.0 + (no.logprob() - yes.logprob()).exp());
        Ok(Relevance { relevance, prompt_tokens: yes.prompt_tokens })
    }
}
