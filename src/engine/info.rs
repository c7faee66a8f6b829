//! What an engine is made of, as chosen when it was built.

use std::fmt;

use minisgl_core::backend::Dims;
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_core::spec::LayerSpec;
use minisgl_decoder::Checkpoint;
use serde::Serialize;

/// See [`Llm::info`](crate::Llm::info); displayed as a few lines for people.
#[derive(Clone, Debug)]
pub struct Info {
    /// The model as it was asked for: a directory, a preset or a name.
    pub model: String,
    /// The commit of a model by name.
    pub commit: Option<String>,
    /// `cpu` or `cuda`.
    pub backend: &'static str,
    /// Why this backend, where it was left open.
    pub choice: Option<&'static str>,
    /// The device's name.
    pub device: String,
    /// How many engines take requests out of one queue. What else stands here is the first one's.
    pub engines: usize,
    /// Capacities.
    pub limits: Limits,
    /// Sizes of the model.
    pub dims: Dims,
    /// Positions that any layer's tokens see at most, if every layer has a window; pages behind it go back.
    pub window: Option<u32>,
    /// Token ids lie below it.
    pub vocab: u32,
    /// Tokens that end an output: those of generation_config.json, else config.json, and the tokenizer's `eos_token`.
    pub eos: Vec<u32>,
    /// What the user should hear: files of the model that are of no use, though it runs; a preset that has a directory's name.
    pub warnings: Vec<String>,
    /// Bytes of weights that a decode step reads; of experts all are counted.
    pub step_weight_bytes: u64,
    /// Elements of all layers' matrices that a token is multiplied with.
    pub active_weights: u64,
    /// The model's experts, if it has any.
    pub experts: Option<ExpertsInfo>,
    /// What keys and values are kept as.
    pub kv: KvFormat,
    /// Bytes of a KV page, over all layers, scales included.
    pub page_bytes: u64,
    /// Bytes of device memory in all.
    pub memory_total: u64,
    /// Bytes free when the weights were loaded.
    pub memory_free_loaded: u64,
    /// Bytes free before the decode steps were recorded: KV pages and scratch allocated.
    pub memory_free_before_recording: u64,
    /// Bytes free when the engine was ready: the decode steps recorded.
    pub memory_free_ready: u64,
    /// Seconds to open the device and load the weights.
    pub load_seconds: f64,
    /// Seconds to allocate everything else and record the decode steps.
    pub capture_seconds: f64,
}

/// A model's experts, the same in all layers that have some.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ExpertsInfo {
    /// Layers that have them.
    pub layers: u32,
    /// Of a layer.
    pub count: u32,
    /// Of a token, in each of these layers.
    pub per_token: u32,
    /// Bytes of one.
    pub bytes: u64,
}

impl ExpertsInfo {
    /// A checkpoint's.
    pub fn of(checkpoint: &Checkpoint) -> Option<ExpertsInfo> {
        let experts = || checkpoint.config().spec.layers.iter().filter_map(LayerSpec::experts);
        let (first, layers) = (experts().next()?, experts().count() as u32);
        let all = u64::from(layers) * u64::from(first.count);
        let bytes = checkpoint.tensors().expert_bytes() / all;
        Some(ExpertsInfo { layers, count: first.count, per_token: first.per_token, bytes })
    }

    /// Bytes of all of them.
    pub fn all_bytes(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.count) * self.bytes
    }

    /// Bytes of those that a token does not get.
    pub fn idle_bytes(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.count - self.per_token) * self.bytes
    }

    /// How many of a layer's a step of so many rows reads if each row gets any of them as likely as any other.
    pub fn read_by(&self, rows: u64) -> f64 {
        let missed = 1.0 - f64::from(self.per_token) / f64::from(self.count);
        f64::from(self.count) * (1.0 - missed.powf(rows as f64))
    }
}

impl Info {
    /// Bytes of keys and values of a token, over all layers.
    pub fn kv_bytes_per_token(&self) -> u64 {
        self.page_bytes / u64::from(self.limits.page_size)
    }

    /// KV pages of all engines.
    pub fn pages(&self) -> u32 {
        self.limits.pages * self.engines as u32
    }

    /// Requests that all engines run at once.
    pub fn running(&self) -> usize {
        self.limits.running as usize * self.engines
    }

    /// Bytes of the KV cache, its dummy page included.
    pub fn kv_bytes(&self) -> u64 {
        self.page_bytes * (u64::from(self.limits.pages) + 1)
    }
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let Limits { pages, page_size, running, sequence, prefill_tokens, graph_rows, .. } = self.limits;
        let sequence = u64::from(sequence).min(u64::from(pages) * u64::from(page_size));
        let commit = self.commit.as_ref().map_or_else(String::new, |commit| format!(" at {commit}"));
        let choice = self.choice.map_or_else(String::new, |reason| format!(", since {reason}"));
        writeln!(f, "{}{commit} on {} ({}{choice})", self.model, self.device, self.backend)?;
        if self.engines > 1 {
            writeln!(
                f,
                "{} engines take requests out of one queue; each is as the first one, which is:",
                self.engines
            )?;
        }
        writeln!(
            f,
            "KV cache: {pages} pages of {page_size} tokens in {}, {:.2} GiB; {running} requests at once, {sequence} tokens \
             each, {prefill_tokens} a prefill step",
            self.kv,
            gib(self.kv_bytes())
        )?;
        if let Some(window) = self.window {
            writeln!(f, "a token sees {window} positions: pages behind them go back while a request runs")?;
        }
        if let Some(experts) = self.experts {
            let ExpertsInfo { layers, count, per_token, .. } = experts;
            let active = gib(self.step_weight_bytes.saturating_sub(experts.idle_bytes()));
            writeln!(
                f,
                "a token gets {per_token} of {count} experts in {layers} of {} layers: {active:.2} of {:.2} GiB of weights \
                 that many tokens read",
                self.dims.layers,
                gib(self.step_weight_bytes)
            )?;
        }
        let eos: Vec<String> = self.eos.iter().map(u32::to_string).collect();
        match eos.as_slice() {
            [] => writeln!(f, "outputs end at no token: the model names no end-of-sequence token")?,
            ids => writeln!(f, "outputs end at tokens {}", ids.join(", "))?,
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        write!(
            f,
            "loaded in {:.2} s ({:.2} GiB free), ready in {:.2} s more ({:.2} GiB free",
            self.load_seconds,
            gib(self.memory_free_loaded),
            self.capture_seconds,
            gib(self.memory_free_before_recording),
        )?;
        match graph_rows {
            0 => f.write_str(")"),
            _ => {
                let free = gib(self.memory_free_ready);
                write!(f, ", {free:.2} once decode was recorded up to {graph_rows} rows)")
            }
        }
    }
}
