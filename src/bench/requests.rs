//! What a benchmark runs: random requests, or those of a file.
//!
//! ```text
//!   drawn       Workload ── draw ──> token ids, output lengths          end-of-sequence tokens ignored
//!   a file      {"id": …, "prompt": …}      request lines of either format, run as `generate` runs them
//!               [{"conversations": […]}]    ShareGPT: the first turn is the prompt, and as many tokens are drawn as the
//!                                           answer to it has, end-of-sequence tokens ignored
//! ```
//!
//! A file's prompts are token ids before a clock runs: text is the model's tokenizer's.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;
use thiserror::Error;

use super::sharegpt::{self, Exchange};
use crate::lines::{self, Defaults};
use crate::llm::Llm;
use crate::memory::host_free;
use crate::openai::ModelName;
use crate::request::{GenerateRequest, Prompt, RequestError, SamplingParams};
use crate::workload::Workload;

/// Where requests come from.
#[derive(Clone, Debug)]
pub enum Requests {
    /// Random ones.
    Drawn(Workload),
    /// Those of a file.
    File {
        /// Request lines or ShareGPT JSON.
        path: PathBuf,
        /// So many from its beginning; `None` for all.
        most: Option<usize>,
        /// A request without a seed draws with this one plus its number.
        seed: u64,
    },
}

/// Why a file's requests can't be taken.
#[derive(Debug, Error)]
pub enum RequestsError {
    /// The file.
    #[error("{} can't be read: {cause}; check --requests", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// A line that is no request.
    #[error("line {line} of {} can't be measured: {error}", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// Why.
        error: String,
    },
    /// JSON that is no list of conversations.
    #[error(
        "{} is neither request lines nor ShareGPT JSON ([{{\"conversations\": [{{\"value\": …}}, …]}}, …]): {cause}",
        path.display()
    )]
    Conversations {
        /// Which file.
        path: PathBuf,
        /// What the parser says.
        cause: serde_json::Error,
    },
    /// A text that the model can't take.
    #[error("conversation {number} of {} can't be measured: {error}", path.display())]
    Conversation {
        /// Which file.
        path: PathBuf,
        /// From 1, of those with an answer.
        number: usize,
        /// Why.
        error: RequestError,
    },
    /// More than the host's memory.
    #[error("--n {requests} random requests take {needed} bytes of memory, and {free} are free; lower --n")]
    Memory {
        /// How many.
        requests: usize,
        /// Bytes that they take.
        needed: u64,
        /// Bytes that this process can still have.
        free: u64,
    },
    /// Nothing to run.
    #[error("{} has no requests; give at least one line, or one conversation with an answer", .0.display())]
    Empty(PathBuf),
}

impl Requests {
    /// The seed of the first request's tokens.
    pub fn seed(&self) -> u64 {
        match self {
            Requests::Drawn(workload) => workload.seed,
            Requests::File { seed, .. } => *seed,
        }
    }

    /// Finds what can't be taken before a model is loaded for it.
    ///
    /// # Errors
    /// More random requests than memory holds.
    pub fn check(&self) -> Result<(), RequestsError> {
        let Requests::Drawn(workload) = self else { return Ok(()) };
        let (requests, needed, free) = (workload.requests, workload.bytes(), host_free());
        if needed > free {
            return Err(RequestsError::Memory { requests, needed, free });
        }
        Ok(())
    }

    /// All of them for a model, their prompts as token ids; sampling that they leave open is as in `sampling`.
    ///
    /// # Errors
    /// A file that can't be read, or a request in it that can't run.
    pub fn take(&self, llm: &Llm, sampling: &SamplingParams) -> Result<Vec<GenerateRequest>, RequestsError> {
        match self {
            Requests::Drawn(workload) => Ok(drawn(workload, llm.info().vocab, sampling)),
            Requests::File { path, most, seed } => {
                let sampling = SamplingParams { seed: *seed, ..*sampling };
                FileReader { path, most: most.unwrap_or(usize::MAX), sampling, llm }.requests()
            }
        }
    }

    /// What is said of them.
    pub fn describe(&self, requests: &[GenerateRequest], sampling: &SamplingParams) -> WorkloadReport {
        let prompt_tokens = |request: &GenerateRequest| match &request.prompt {
            Prompt::Tokens(ids) => ids.len(),
            Prompt::Text(_) | Prompt::Chat(_) | Prompt::Rerank(_) => 0,
        };
        let (source, drawn) = match self {
            Requests::Drawn(workload) => (workload.source.to_string(), Some(sampling)),
            Requests::File { path, .. } => (path.display().to_string(), None),
        };
        WorkloadReport {
            source,
            seed: self.seed(),
            requests: requests.len(),
            prompt_tokens: requests.iter().map(prompt_tokens).sum(),
            output_tokens: requests.iter().map(GenerateRequest::output_tokens_max).sum(),
            temperature: drawn.map(|drawn| drawn.temperature),
            top_k: drawn.map(|drawn| drawn.top_k),
            top_p: drawn.map(|drawn| drawn.top_p),
            min_p: drawn.map(|drawn| drawn.min_p),
        }
    }
}

/// Random requests, each with a seed of its own, and as long as the workload says.
pub fn drawn(workload: &Workload, vocab: u32, sampling: &SamplingParams) -> Vec<GenerateRequest> {
    let items = workload.draw(vocab).into_iter().enumerate();
    let request = |(i, item): (usize, crate::workload::Item)| {
        GenerateRequest::tokens(item.prompt).sampling(SamplingParams {
            seed: workload.seed.wrapping_add(i as u64),
            max_tokens: item.output_tokens,
            ignore_eos: true,
            ..*sampling
        })
    };
    items.map(request).collect()
}

/// A file being read for a model.
struct FileReader<'a> {
    path: &'a Path,
    most: usize,
    sampling: SamplingParams,
    llm: &'a Llm,
}

impl FileReader<'_> {
    fn requests(&self) -> Result<Vec<GenerateRequest>, RequestsError> {
        let mut file = BufReader::new(File::open(self.path).map_err(|cause| self.unreadable(cause))?);
        let requests = match sharegpt::is_array(&mut file).map_err(|cause| self.unreadable(cause))? {
            true => self.conversations(file),
            false => self.lines(file),
        }?;
        match requests.is_empty() {
            true => Err(RequestsError::Empty(self.path.to_owned())),
            false => Ok(requests),
        }
    }

    fn unreadable(&self, cause: io::Error) -> RequestsError {
        RequestsError::Read { path: self.path.to_owned(), cause }
    }

    fn lines(&self, mut file: impl BufRead) -> Result<Vec<GenerateRequest>, RequestsError> {
        let defaults = Defaults { sampling: self.sampling, model: ModelName::new(&self.llm.info().model) };
        let (mut requests, mut line, mut number) = (Vec::new(), Vec::new(), 0);
        while requests.len() < self.most {
            line.clear();
            number += 1;
            if file.read_until(b'\n', &mut line).map_err(|cause| self.unreadable(cause))? == 0 {
                break;
            }
            if !lines::is_blank(&line) {
                let error =
                    |error: String| RequestsError::Line { path: self.path.to_owned(), line: number, error };
                let parsed =
                    lines::parse(&line, number, &defaults).map_err(|bad| error(bad.error.to_string()))?;
                for request in [parsed.request].into_iter().chain(parsed.beside) {
                    let prompt = self.llm.encode_prompt(request.prompt);
                    let prompt = prompt.map_err(|cause| error(cause.to_string()))?;
                    requests.push(GenerateRequest { prompt: Prompt::Tokens(prompt), ..request });
                }
            }
        }
        Ok(requests)
    }

    fn conversations(&self, file: impl Read) -> Result<Vec<GenerateRequest>, RequestsError> {
        let exchanges = sharegpt::read(file, self.most)
            .map_err(|cause| RequestsError::Conversations { path: self.path.to_owned(), cause })?;
        exchanges.into_iter().enumerate().map(|(i, exchange)| self.exchange(i, exchange)).collect()
    }

    fn exchange(&self, i: usize, exchange: Exchange) -> Result<GenerateRequest, RequestsError> {
        let tokens = |text: &str| {
            self.llm.encode(text).map_err(|error| RequestsError::Conversation {
                path: self.path.to_owned(),
                number: i + 1,
                error,
            })
        };
        let answer = tokens(&exchange.answer)?.len() as u32;
        Ok(GenerateRequest::tokens(tokens(&exchange.prompt)?).sampling(SamplingParams {
            seed: self.sampling.seed.wrapping_add(i as u64),
            max_tokens: answer.max(1),
            ignore_eos: true,
            ..self.sampling
        }))
    }
}

/// What ran.
#[derive(Clone, Debug, Serialize)]
pub struct WorkloadReport {
    /// `pcg`, `minisgl`, or a file's path.
    pub source: String,
    /// Of the generator, or of requests without one.
    pub seed: u64,
    /// How many.
    pub requests: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Tokens to be drawn, of a file's requests at most.
    pub output_tokens: u64,
    /// 0 is greedy; null where each request may have its own, and so the others.
    pub temperature: Option<f32>,
    /// 0 is off.
    pub top_k: Option<u32>,
    /// 1 is off.
    pub top_p: Option<f32>,
    /// 0 is off.
    pub min_p: Option<f32>,
}

impl fmt::Display for WorkloadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WorkloadReport { source, seed, requests, prompt_tokens, output_tokens, .. } = self;
        write!(f, "{requests} requests ({source}, seed {seed}): {prompt_tokens} prompt and ")?;
        let Some(temperature) = self.temperature else {
            return write!(f, "at most {output_tokens} output tokens");
        };
        write!(f, "{output_tokens} output tokens, temperature {temperature}")?;
        if let Some(top_k) = self.top_k.filter(|top_k| *top_k != 0) {
            write!(f, ", top_k {top_k}")?;
        }
        if let Some(top_p) = self.top_p.filter(|top_p| *top_p != 1.0) {
            write!(f, ", top_p {top_p}")?;
        }
        match self.min_p.filter(|min_p| *min_p != 0.0) {
            Some(min_p) => write!(f, ", min_p {min_p}"),
            None => Ok(()),
        }
    }
}
