//! Steps that only take time: as long as a formula says, one behind the other.
//!
//! ```text
//!   launch ── the device is free, or not yet ──> begins ── step_ms(batch) ──> ended ──> complete
//! ```
//!
//! A row's token is a hash of its place in the sequence, or, where it has a mask, the next one that the mask allows. An embedding is a
//! row of ones.

use std::collections::HashSet;
use std::convert::Infallible;
use std::thread;
use std::time::{Duration, Instant};

use minisgl_core::backend::{DeviceInfo, Memory};
use minisgl_core::batch::{Batch, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::constraint::mask_words;
use minisgl_core::executor::{Executor, ModelInfo, RecordError, Results};
use minisgl_core::kv::KvFormat;
use minisgl_core::request::Ticket;
use minisgl_core::sampling::{NO_TOKEN, RowLogprobs, TOP_LOGPROBS_MAX};
use minisgl_core::shard::Slicing;
use minisgl_core::stats::ExpertsRead;
use minisgl_cuda::HostTimes;
use minisgl_decoder::Checkpoint;

use super::device::SimulatedDevice;
use crate::diagnostics::Ceilings;
use crate::runner::RunnerExecutor;
use crate::telemetry::Probe;

/// The system wakes a sleeper this much too late, about; the rest is waited for awake.
const WAKE_UP: Duration = Duration::from_micros(80);

/// See the module.
pub struct Simulated {
    device: SimulatedDevice,
    model: ModelInfo,
    /// When what was launched has ended.
    free_at: Instant,
    /// When the step completed last began.
    last_began: Option<Instant>,
    steps: [Step; 2],
    /// `[2, slots, mask words]`, as on a device.
    masks: Vec<u32>,
    /// What every row's hidden state is.
    hidden: Vec<f32>,
    /// How long steps were waited for.
    waited: Duration,
}

struct Step {
    began: Instant,
    ends: Instant,
    took_ms: f64,
    tokens: Vec<u32>,
    logprobs: Vec<RowLogprobs>,
    scores: Vec<RowLogprobs>,
}

impl Simulated {
    /// A device on which a model's steps run.
    pub fn new(device: SimulatedDevice, model: ModelInfo) -> Self {
        let now = Instant::now();
        let step = || Step {
            began: now,
            ends: now,
            took_ms: 0.0,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            scores: Vec::new(),
        };
        Simulated {
            device,
            model,
            free_at: now,
            last_began: None,
            steps: [step(), step()],
            masks: Vec::new(),
            hidden: vec![1.0; model.hidden as usize],
            waited: Duration::ZERO,
        }
    }

    /// The token at a place of a sequence, of those that the mask allows; [`NO_TOKEN`] where it allows none.
    fn token(&self, place: u32, mask: Option<&[u32]>) -> u32 {
        let vocab = self.model.vocab;
        let first = (u64::from(place).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32 % vocab;
        let allowed = |id: &u32| mask.is_none_or(|mask| mask[*id as usize / 32] >> (id % 32) & 1 == 1);
        (first..vocab).chain(0..first).find(allowed).unwrap_or(NO_TOKEN)
    }
}

impl Executor for Simulated {
    type Error = Infallible;

    fn info(&self) -> DeviceInfo {
        let name = format!("no device, simulated: {}", self.device.name);
        let slicing = Slicing { most: 1, block: 1, equal: true };
        DeviceInfo {
            name,
            activation_bytes: 2,
            kv: KvFormat::Bf16,
            logit_bytes: 2,
            page_size_min: 1,
            slicing,
        }
    }

    fn model(&self) -> ModelInfo {
        self.model
    }

    fn memory(&self) -> Result<Memory, Infallible> {
        Ok(Memory { free: 0, total: 0 })
    }

    fn page_bytes(&self, _: u32) -> Result<u64, Infallible> {
        Ok(0)
    }

    fn is_out_of_memory(_: &Infallible) -> bool {
        false
    }

    fn reserve(&mut self, limits: &Limits) -> Result<(), Infallible> {
        self.masks = vec![0; 2 * limits.running as usize * mask_words(self.model.vocab)];
        Ok(())
    }

    fn alloc_pages(&mut self, _: &Limits) -> Result<(), Infallible> {
        Ok(())
    }

    fn free_pages(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn record(&mut self, _: &Limits) -> Result<(), RecordError<Infallible>> {
        Ok(())
    }

    fn launch(
        &mut self,
        at: usize,
        batch: &Batch,
        _: StepShape,
        write_mask: &mut dyn FnMut(Ticket, &mut [u32]),
    ) -> Result<(), Infallible> {
        let words = mask_words(self.model.vocab);
        for (owner, index) in batch.masks() {
            write_mask(owner, &mut self.masks[index as usize * words..][..words]);
        }
        let mut tokens = std::mem::take(&mut self.steps[at].tokens);
        tokens.clear();
        for row in batch.rows().iter().filter(|row| row.sampled == 1) {
            let mask = row.mask.checked_sub(1).map(|mask| &self.masks[mask as usize * words..][..words]);
            tokens.push(self.token(row.kv_len, mask));
        }
        let took_ms = self.device.formula.step_ms(batch);
        let even = RowLogprobs {
            token: -(self.model.vocab as f32).ln(),
            len: 0,
            ids: [0; TOP_LOGPROBS_MAX],
            logprobs: [0.0; TOP_LOGPROBS_MAX],
        };
        let began = self.free_at.max(Instant::now());
        let ends = began + Duration::from_secs_f64(took_ms / 1e3);
        let step = &mut self.steps[at];
        step.logprobs.clear();
        step.logprobs.resize(if batch.wants_logprobs() { tokens.len() } else { 0 }, even);
        step.scores.clear();
        step.scores.resize(batch.scored().len(), even);
        (step.tokens, step.began, step.ends, step.took_ms) = (tokens, began, ends, took_ms);
        self.free_at = ends;
        Ok(())
    }

    fn has_ended(&self, at: usize) -> bool {
        Instant::now() >= self.steps[at].ends
    }

    fn complete(&mut self, at: usize) -> Result<Results<'_>, Infallible> {
        let step = &self.steps[at];
        let asked = Instant::now();
        thread::sleep(step.ends.saturating_duration_since(asked).saturating_sub(WAKE_UP));
        while Instant::now() < step.ends {
            std::hint::spin_loop();
        }
        self.waited += asked.elapsed();
        let last = self.last_began.replace(step.began);
        let since = last.map_or(Duration::ZERO, |last| step.began.saturating_duration_since(last));
        Ok(Results {
            tokens: &step.tokens,
            logprobs: &step.logprobs,
            scores: &step.scores,
            since_ms: since.as_secs_f32() * 1e3,
            took_ms: step.took_ms as f32,
        })
    }

    fn hidden(&mut self, _: usize, _: u32) -> Result<&[f32], Infallible> {
        Ok(&self.hidden)
    }
}

impl RunnerExecutor for Simulated {
    fn update(&mut self, _: &Checkpoint, _: &HashSet<String>) -> Result<(), Infallible> {
        Ok(())
    }

    fn ceilings(&mut self) -> Result<Option<Ceilings>, Infallible> {
        Ok(None)
    }

    fn probe(&self) -> Option<Probe> {
        None
    }

    /// There is no driver.
    fn host_times(&self) -> Option<HostTimes> {
        Some(HostTimes { waited: self.waited, driver: Duration::ZERO })
    }

    fn experts_read(&mut self) -> Result<ExpertsRead, Infallible> {
        Ok(ExpertsRead::default())
    }
}
