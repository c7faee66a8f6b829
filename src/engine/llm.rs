//! The model behind one handle: opened once, then asked as often as one likes.
//!
//! ```text
//!   directory or preset ── Checkpoint ── Engine (opening.rs) ──> Front ──> Llm
//! ```
//!
//! The engine is built on the thread that it stays on; every method asks it through its handle.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use minisgl_core::scheduler::Order;
use minisgl_core::stats::{ExpertsRead, Stats};
use minisgl_decoder::{NamedTensor, WeightUpdate};

use crate::device::{CUDA, Choice};
use crate::diagnostics::Ceilings;
use crate::embed::{EmbedRequest, Embedding};
use crate::error::Error;
use crate::front::{EngineHandle, Events, Front, SessionEvent, SessionOptions};
use crate::info::Info;
use crate::opening::{Opening, open_checkpoint};
use crate::options::Options;
use crate::pooling::Pooling;
use crate::request::{
    ChatPrompt, Completion, Flow, GenerateRequest, Prompt, RequestError, RerankRequest, StreamEvent,
};
use crate::rerank::{Relevance, answers};
use crate::score::{Score, ScoreRequest};
use crate::simulated::{self, Control};
use crate::source::ModelSource;
use crate::streaming::Streaming;
use crate::telemetry::Probe;
use crate::tokenizer::Text;
use crate::weights::{self, Weights};

/// A model on a device, ready to generate. See the [crate's page](crate) for an example.
///
/// It owns its engines, one or, by [`LlmBuilder::data_parallel`](crate::LlmBuilder::data_parallel), several behind one queue:
/// dropping it ends their threads and gives the devices' memory back.
pub struct Llm {
    front: Front,
    text: Arc<Text>,
    info: Info,
    /// A simulated model has none.
    weights: Option<Weights>,
    /// Are they others than those in the model's files?
    updated: bool,
}

impl fmt::Debug for Llm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Llm").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Llm {
    pub(crate) fn open(
        source: ModelSource,
        weights: Option<Weights>,
        options: Options,
        choice: Choice,
    ) -> Result<Llm, Error> {
        let updated = weights.is_some();
        let weights = match weights {
            Some(weights) => weights,
            None => Weights(Arc::new(open_checkpoint(&source, &options, &choice)?)),
        };
        let text = Arc::new(source.folder().map_or(Ok(Text::default()), Text::open)?);
        let pooling = source.folder().map_or_else(Pooling::default, Pooling::open);
        let (order, engines) = (options.order, options.engines()?);
        let Weights(checkpoint) = weights.clone();
        let has_weights = options.simulate.is_none();
        let opening = Opening { source, choice, checkpoint, text: text.clone(), options, engines };
        let opening = Arc::new(opening);
        let build = |engine| {
            let opening = opening.clone();
            move || opening.engine(engine)
        };
        let (front, infos) = Front::start(text.clone(), pooling, order, (0..engines).map(build).collect())?;
        // Engines differ in their devices and memory alone; the first speaks for all.
        let info = infos.into_iter().next().ok_or(Error::NoEngine)?;
        Ok(Llm { front, text, info, weights: has_weights.then_some(weights), updated })
    }

    /// A model without weights, and what is seen of its engine; see [`crate::simulated`].
    ///
    /// # Errors
    /// A thread that the system does not give.
    pub fn simulated(control: Control, text: Text) -> Result<(Llm, Arc<Control>), Error> {
        let (text, info) = (Arc::new(text), simulated::info(control.limits));
        let (front, control) = simulated::start_with(control, text.clone(), Order::Given)?;
        Ok((Llm { front, text, info, weights: None, updated: false }, control))
    }

    /// The engine from any thread: requests of their own, sessions of many.
    pub fn handle(&self) -> EngineHandle {
        self.front.handle().clone()
    }

    /// Runs all requests; completions come in the order of the requests, those of a request's samples one behind the other.
    ///
    /// # Errors
    /// A step failed; the error holds what had finished. A request that can't run is no error: its completion says so.
    pub fn generate(&mut self, requests: &[GenerateRequest]) -> Result<Vec<Completion>, Error> {
        let mut completions: Vec<Vec<Completion>> = vec![Vec::new(); requests.len()];
        let outcome = self.drive(SessionOptions::default(), requests.iter().cloned(), |event, _| {
            if let SessionEvent::Finished { tag, completion, .. } = event {
                completions[tag as usize].push(*completion);
            }
            true
        });
        completions.iter_mut().for_each(|samples| samples.sort_by_key(|one| one.sample));
        match outcome {
            Ok(()) => Ok(completions.into_iter().flatten().collect()),
            Err(Error::Step { cause, .. }) => {
                let finished = completions.into_iter().enumerate();
                let finished =
                    finished.flat_map(|(index, samples)| samples.into_iter().map(move |one| (index, one)));
                Err(Error::Step { cause, finished: finished.collect() })
            }
            Err(error) => Err(error),
        }
    }

    /// Runs requests as they come out of an iterator, pulled when there is room for them, and hands every token, end
    /// and step to `on_event`, which may abort them. What an aborted request has is what was handed over before.
    ///
    /// # Errors
    /// A step failed; what had finished was delivered.
    pub fn generate_stream(
        &mut self,
        requests: impl IntoIterator<Item = GenerateRequest>,
        on_event: impl FnMut(StreamEvent<'_>) -> Flow,
    ) -> Result<(), Error> {
        let options = SessionOptions { tokens: true, text: true, steps: true, ..SessionOptions::default() };
        let mut stream = Streaming::new(on_event);
        self.drive(options, requests, |event, events| stream.hear(event, events))
    }

    /// Submits requests as there is room, and hands events on until all have ended; none is submitted any more once
    /// `on_event` gives false.
    fn drive(
        &self,
        options: SessionOptions,
        requests: impl IntoIterator<Item = GenerateRequest>,
        mut on_event: impl FnMut(SessionEvent, &mut Events) -> bool,
    ) -> Result<(), Error> {
        let (submitter, mut events) = self.front.handle().session(options);
        let mut submitter = Some(submitter);
        let mut requests = (0..).zip(requests).fuse();
        let mut refused = Ok(());
        loop {
            if let Some(open) = &mut submitter {
                let room = open.room();
                let mut submitted = 0;
                let pulled = requests.by_ref().take(room).inspect(|_| submitted += 1);
                refused = open.submit_all(pulled);
                if submitted < room || refused.is_err() {
                    submitter = None;
                }
            }
            match events.next() {
                Some(event) => {
                    if !on_event(event?, &mut events) {
                        submitter = None;
                    }
                }
                None => return refused,
            }
        }
    }

    /// Scores completions behind prompts, one prefill each; scores come in the order of the requests.
    ///
    /// # Errors
    /// As for [`Llm::generate`], but for what had finished. A request that can't run is no error: its score says so.
    pub fn score(&mut self, requests: &[ScoreRequest]) -> Result<Vec<Score>, Error> {
        let requests: Vec<GenerateRequest> = requests.iter().cloned().map(Into::into).collect();
        Ok(self.generate(&requests)?.into_iter().map(Score::from).collect())
    }

    /// Embeds prompts, one prefill each; embeddings come in the order of the requests.
    ///
    /// # Errors
    /// As for [`Llm::score`]. A prompt that can't be embedded is no error: its embedding says so.
    pub fn embed(&mut self, requests: &[EmbedRequest]) -> Result<Vec<Embedding>, Error> {
        let requests: Vec<GenerateRequest> = requests.iter().cloned().map(Into::into).collect();
        Ok(self.generate(&requests)?.into_iter().map(Embedding::from).collect())
    }

    /// Judges how relevant documents are to queries, with a Qwen3-Reranker; in the order of the requests.
    ///
    /// # Errors
    /// As for [`Llm::score`]. A document that can't be judged has an error of its own.
    pub fn rerank(
        &mut self,
        requests: &[RerankRequest],
    ) -> Result<Vec<Result<Relevance, RequestError>>, Error> {
        let answers = requests.iter().flat_map(|request| answers(&Prompt::Rerank(request.clone())));
        let scores = self.score(&answers.collect::<Vec<_>>())?;
        let (answered, _) = scores.as_chunks();
        Ok(answered.iter().map(|[yes, no]| Relevance::of(yes, no)).collect())
    }

    /// The token ids of a text, by the checkpoint's tokenizer.
    ///
    /// # Errors
    /// No tokenizer, or one that refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, RequestError> {
        self.encode_prompt(Prompt::Text(text.to_owned()))
    }

    /// The token ids of any prompt.
    ///
    /// # Errors
    /// A text or a conversation that the checkpoint has no files for, or that they refuse.
    pub fn encode_prompt(&self, prompt: Prompt) -> Result<Vec<u32>, RequestError> {
        self.text.encode(prompt)
    }

    /// The text of tokens, special ones left out; `None` without a tokenizer.
    pub fn decode(&self, ids: &[u32]) -> Option<String> {
        self.text.decode(ids)
    }

    /// The bytes that a token stands for, special or not: part of a character, maybe. `None` without a tokenizer, or where
    /// it has no such token.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.text.token_bytes(id)
    }

    /// The prompt that a conversation becomes by the checkpoint's chat template.
    ///
    /// # Errors
    /// No template, or one that refuses the messages.
    pub fn render_chat(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        self.text.render(prompt)
    }

    /// Device, capacities, memory, and how long it took to get ready.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// What the engine did since it was built, or since [`Llm::reset_stats`]; zeros if its thread has ended.
    pub fn stats(&self) -> Stats {
        self.front.handle().stats().unwrap_or_default()
    }

    /// Sets the counters to zero.
    pub fn reset_stats(&mut self) {
        // A thread that has ended counts no more.
        let _ = self.front.handle().call_each(false, |runner| runner.reset_stats());
    }

    /// What steps of decode rows alone have read of layers with experts since the engine was built.
    ///
    /// # Errors
    /// Those of the device.
    pub fn experts_read(&self) -> Result<ExpertsRead, Error> {
        let each = self.front.handle().call_each(false, |runner| runner.experts_read())?;
        let each: Result<Vec<ExpertsRead>, _> = each.into_iter().collect();
        Ok(each.map_err(Error::Device)?.into_iter().fold(ExpertsRead::default(), |sum, read| sum + read))
    }

    /// Forgets all cached prefixes, so that the next run computes every prompt anew.
    pub fn clear_prefix_cache(&mut self) {
        // A thread that has ended has no cache.
        let _ = self.front.handle().call_each(false, |runner| runner.clear_prefix_cache());
    }

    /// Puts tensors in the place of the model's own, under the names of its checkpoint, all of them or some: from then on the model
    /// is, bit for bit, what is loaded from a checkpoint with these tensors. Requests that run end with the old weights before;
    /// those that wait begin with the new ones. Cached prefixes are forgotten.
    ///
    /// The tensors stay on the host, where a later update of others, and [`Llm::updated_weights`], find them.
    ///
    /// # Errors
    /// A name that the model does not have, a shape or a type that is not the model's, or on a GPU a matrix that is in fp8 and was not,
    /// or the other way round: then everything is as before. A device that
    /// fails while they are written, [`Error::Update`]: its engine takes no requests any more.
    pub fn update_weights(&mut self, tensors: impl IntoIterator<Item = NamedTensor>) -> Result<(), Error> {
        self.update(weights::given(tensors)?)
    }

    /// As [`Llm::update_weights`], with all tensors of a `*.safetensors` file or of a checkpoint's folder. The files are read as a
    /// whole, and may be written again afterwards.
    ///
    /// # Errors
    /// As there; and files that can't be read.
    pub fn update_weights_from(&mut self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.update(weights::read(path.as_ref())?)
    }

    fn update(&mut self, update: WeightUpdate) -> Result<(), Error> {
        let handle = self.front.handle();
        handle.check_running()?;
        let weights = self.weights.as_ref().ok_or(Error::NoWeights)?;
        let (weights, changed) = weights.with(update, self.info.backend == CUDA)?;
        tracing::info!(tensors = changed.len(), "updating weights");
        let (Weights(checkpoint), changed) = (weights.clone(), Arc::new(changed));
        self.info.step_weight_bytes = checkpoint.tensors().step_bytes();
        // Engines that go on have the new ones, whatever becomes of others.
        (self.weights, self.updated) = (Some(weights), true);
        let each = handle.call_working(true, move |runner| match runner.has_stopped() {
            true => Ok(()), // It has failed meanwhile, and runs nothing any more.
            false => runner.update_weights(&checkpoint, &changed),
        });
        each?.into_iter().collect::<Result<_, _>>().map_err(Error::Update)
    }

    /// What [`Llm::update_weights`] has made of the weights, to build another engine of this model with
    /// ([`LlmBuilder::weights`](crate::LlmBuilder::weights)); `None` where they are those in the model's files.
    pub fn updated_weights(&self) -> Option<Weights> {
        self.weights.clone().filter(|_| self.updated)
    }

    /// Measures what the devices of all engines reach at best, together: a second of their time, once nothing runs. `None` on
    /// the CPU.
    ///
    /// # Errors
    /// Those of the devices.
    pub fn ceilings(&mut self) -> Result<Option<Ceilings>, Error> {
        let each = self.front.handle().call_each(true, |runner| runner.ceilings())?;
        let each: Result<Vec<Option<Ceilings>>, _> = each.into_iter().collect();
        Ok(each.map_err(Error::Device)?.into_iter().flatten().reduce(Ceilings::joined))
    }

    /// Where to ask for the first engine's device's clocks and what holds them down, at any time and from any thread; `None` on
    /// the CPU.
    pub fn probe(&self) -> Option<Probe> {
        self.front.handle().call(false, |runner| runner.probe()).ok()?
    }

    /// Asserts that no KV page is lost or shared wrongly. Takes time linear in the pool.
    ///
    /// # Panics
    /// When the engine's books are wrong.
    pub fn check(&self) {
        // A thread that has ended has no books.
        let _ = self.front.handle().check();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::FinishReason;
    use crate::simulated::{Control, request};

    /// A model whose engine fails at a step.
    fn failing(fails_at: u64) -> Llm {
        let control = Control { fails_at: Some(fails_at), ..Control::default() };
        Llm::simulated(control, Text::default()).unwrap().0
    }

    /// The request that ends with step i is the i-th.
    fn requests() -> Vec<GenerateRequest> {
        (0..4).map(|i| request(0, i + 1)).collect()
    }

    #[test]
    fn a_failed_step_keeps_what_had_finished_and_the_model_says_so_ever_after() {
        let mut llm = failing(2);
        let Err(Error::Step { cause, finished }) = llm.generate(&requests()) else {
            panic!("the step fails")
        };
        assert_eq!(cause.to_string(), "the kernel `down` failed");
        let finished: Vec<_> = finished.into_iter().map(|(index, one)| (index, one.finish_reason)).collect();
        assert_eq!(finished, [(0, FinishReason::Length), (1, FinishReason::Length)]);
        assert!(matches!(llm.generate(&requests()), Err(Error::Failed)));
        assert!(matches!(llm.score(&[ScoreRequest::tokens([1], [2])]), Err(Error::Failed)));
    }

    #[test]
    fn a_stream_has_delivered_what_finished_before_a_step_failed() {
        let mut ends = Vec::new();
        let outcome = failing(3).generate_stream(requests(), |event| {
            if let StreamEvent::Finished { index, .. } = event {
                ends.push(index);
            }
            Flow::Continue
        });
        assert!(matches!(outcome, Err(Error::Step { finished, .. }) if finished.is_empty()));
        assert_eq!(ends, [0, 1, 2]);
    }
}
