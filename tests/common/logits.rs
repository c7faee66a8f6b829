//! A model's logits at every position of a sequence, whole rows of them, which the library's own interface does not give out:
//! an engine without a front, whose step leaves them where they can be read.

use std::path::Path;

use minisgl::{Limits, Policy, SamplingParams, Speculation};
use minisgl_core::backend::{Model, Ops};
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::local::Local;
use minisgl_core::request::Request;
use minisgl_core::scheduler::{Order, Settings};
use minisgl_decoder::{Checkpoint, Decoder};

/// See the module.
pub struct Logits<B: Ops>(Engine<Local<B, Decoder<B>>>);

/// A checkpoint of any family.
pub fn checkpoint(folder: &Path) -> Checkpoint {
    Checkpoint::open(folder, minisgl::models::FAMILIES).unwrap()
}

impl<B: Ops> Logits<B> {
    pub fn new(mut backend: B, checkpoint: &Checkpoint, prefill_tokens: u32, prefix_cache: bool) -> Self {
        let page_size = backend.info().page_size_min.max(16);
        let sequence = checkpoint.config().max_positions.min(512);
        let limits =
            Limits { running: 8, queued: 16, sequence, prefill_tokens, page_size, pages: 512, graph_rows: 8 };
        let scheduler = Settings {
            policy: Policy::Throughput,
            prefix_cache,
            order: Order::Given,
            speculation: Speculation::Never,
            vocab: checkpoint.config().spec.dims.vocab,
        };
        let model = Decoder::load(&mut backend, checkpoint).unwrap();
        let options = EngineOptions { limits, fit: None, scheduler, eos: Vec::new(), overlap: true };
        Logits(Engine::new(backend, model, options).unwrap())
    }

    /// `[tokens, vocab]`: after each token, what the model gives for the next one. A prefill each.
    pub fn of(&mut self, sequence: &[u32]) -> Vec<Vec<f32>> {
        (1..=sequence.len()).map(|len| self.after(&sequence[..len])).collect()
    }

    fn after(&mut self, prompt: &[u32]) -> Vec<f32> {
        let Logits(engine) = self;
        let params = SamplingParams { max_tokens: 1, ..SamplingParams::default() };
        engine.submit(Request::new(prompt, params)).unwrap();
        let mut row = Vec::new();
        while !engine.is_idle() {
            let report = engine.step(&mut |_| {}).unwrap();
            if report.launched.is_some_and(|shape| shape.samples > 0) {
                let (logits, vocab) = (engine.model().logits(), engine.model().dims().vocab);
                row = engine.backend_mut().read_logits(logits, vocab, 0..1).unwrap();
            }
        }
        row
    }
}
