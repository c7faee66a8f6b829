//! The CPU as a device: memory, order, capture and replay, and every operation as a command.
//!
//! There is one queue, and it is always empty: a command is done when its call returns, so copies, events and waits
//! have nothing to wait for. Between `begin_capture` and `end_capture` commands are listed instead of run.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use minisgl_core::backend::{
    Device, DeviceInfo, Element, KvLayer, LayerWeights, Memory, Ops, Purpose, Queue, Sampler, Step,
    WeightRole,
};
use minisgl_core::batch::{Row, StepShape};
use minisgl_core::computes::Computes;
use minisgl_core::config::Limits;
use minisgl_core::shard::Rank;
use minisgl_core::spec::{DecoderSpec, Dims, LayerSpec, Unsupported};
use minisgl_core::stats::ExpertsRead;
use minisgl_core::tensor::HostTensor;

use crate::activations::Activations;
use crate::attention::OWN_KV;
use crate::command::Command;
use crate::error::CpuError;
use crate::link::Link;
use crate::matmul::SLICING;
use crate::memory::{Buffer, available, floats};
use crate::supports;
use crate::weights::Weight;
use crate::workers::{Job, Workers};

/// The CPU.
pub struct Cpu {
    workers: Result<Workers, String>,
    recording: Option<Vec<Command>>,
    planned: Option<Planned>,
    rank: Rank,
}

/// What a model was promised by [`Ops::reserve`].
struct Planned {
    dims: Dims,
    layers: Vec<LayerSpec>,
    embedding_scale: f32,
    activations: Activations,
}

/// Host memory that copies run from and to.
#[derive(Debug)]
pub struct Pinned(Vec<u32>);

/// A point in time.
#[derive(Debug, Default)]
pub struct Event(Option<Instant>);

/// A recorded list of commands.
#[derive(Debug)]
pub struct Graph(Arc<[Command]>);

impl Default for Cpu {
    fn default() -> Self {
        Cpu::new()
    }
}

impl Cpu {
    /// Starts the worker threads, as many as the machine runs at once. Where it cannot, the first call that allocates
    /// or runs something says so.
    pub fn new() -> Cpu {
        Cpu::of(None)
    }

    /// Starts so many worker threads, at least one: for several engines that share the machine.
    pub fn with_threads(threads: usize) -> Cpu {
        Cpu::of(Some(threads.max(1)))
    }

    /// One of several ranks that compute each step together, with so many worker threads, at least one. What it is given to load
    /// and to reserve is that rank's part of a model ([`minisgl_core::shard`]).
    pub fn of_rank(threads: usize, link: Link) -> Cpu {
        let cpu = Cpu { rank: link.rank(), ..Cpu::with_threads(threads) };
        if let Ok(workers) = &cpu.workers {
            workers.shared().machine.link = Some(link);
        }
        cpu
    }

    fn of(threads: Option<usize>) -> Cpu {
        let workers = Workers::new(threads).map_err(|error| error.to_string());
        Cpu { workers, recording: None, planned: None, rank: Rank::ALONE }
    }

    /// Which of the ranks that compute each step together it is.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    fn workers(&self) -> Result<&Workers, CpuError> {
        self.workers.as_ref().map_err(|reason| CpuError::Threads(reason.clone()))
    }

    fn planned(&self) -> Result<&Planned, CpuError> {
        self.planned.as_ref().ok_or(CpuError::NotReserved)
    }

    /// The buffers between a step's operations.
    ///
    /// # Errors
    /// No model's sizes are known yet.
    pub fn activations(&self) -> Result<Activations, CpuError> {
        Ok(self.planned()?.activations)
    }

    /// What decode steps read of layers with experts, so far.
    ///
    /// # Errors
    /// There are no threads.
    pub fn experts_read(&self) -> Result<ExpertsRead, CpuError> {
        Ok(self.workers()?.shared().machine.experts_read)
    }

    /// The sizes of the rank's model.
    pub(crate) fn dims(&self) -> Result<Dims, CpuError> {
        Ok(self.planned()?.dims)
    }

    pub(crate) fn layer_spec(&self, layer: usize) -> Result<LayerSpec, CpuError> {
        self.planned()?.layers.get(layer).copied().ok_or(CpuError::NotReserved)
    }

    /// Runs or records a command.
    pub(crate) fn enqueue(&mut self, command: Command) -> Result<(), CpuError> {
        match &mut self.recording {
            None => self.workers()?.run(Job::Run(command)),
            Some(commands) => {
                commands.push(command);
                Ok(())
            }
        }
    }

    fn not_recording(&self, message: &'static str) -> Result<(), CpuError> {
        if self.recording.is_some() { Err(CpuError::Recording(message)) } else { Ok(()) }
    }
}

impl Device for Cpu {
    type Error = CpuError;
    type Buffer = Buffer;
    type Pinned = Pinned;
    type Event = Event;
    type Graph = Graph;

    fn info(&self) -> DeviceInfo {
        let threads = self.workers.as_ref().map_or(0, Workers::threads);
        let name = format!("CPU, {threads} thread{}", if threads == 1 { "" } else { "s" });
        DeviceInfo {
            name,
            activation_bytes: 4,
            kv: OWN_KV,
            logit_bytes: 4,
            page_size_min: 1,
            slicing: SLICING,
        }
    }

    fn memory(&self) -> Result<Memory, CpuError> {
        let (free, total) = available();
        Ok(Memory { free, total })
    }

    /// Every element is one 32-bit word, those of the KV pages too, whatever is kept in them.
    fn alloc(&mut self, purpose: Purpose, _: Element, elements: usize) -> Result<Buffer, CpuError> {
        self.workers()?.shared().machine.memory.alloc(purpose, elements)
    }

    fn free(&mut self, buffer: Buffer) -> Result<(), CpuError> {
        self.workers()?.shared().machine.memory.free(buffer);
        Ok(())
    }

    fn is_out_of_memory(error: &CpuError) -> bool {
        matches!(error, CpuError::OutOfMemory { .. })
    }

    fn slice(&self, buffer: Buffer, range: Range<usize>) -> Buffer {
        buffer.slice(range)
    }

    fn alloc_pinned(&mut self, words: usize) -> Result<Pinned, CpuError> {
        let error = |_| CpuError::OutOfMemory {
            purpose: Purpose::Scratch,
            bytes: words as u64 * 4,
            free: available().0,
        };
        let mut pinned = Vec::new();
        pinned.try_reserve_exact(words).map_err(error)?;
        pinned.resize(words, 0);
        Ok(Pinned(pinned))
    }

    fn words<'a>(&self, pinned: &'a Pinned) -> Result<&'a [u32], CpuError> {
        Ok(&pinned.0)
    }

    fn words_mut<'a>(&self, pinned: &'a mut Pinned) -> Result<&'a mut [u32], CpuError> {
        Ok(&mut pinned.0)
    }

    fn upload(&mut self, from: &mut Pinned, range: Range<usize>, to: Buffer) -> Result<(), CpuError> {
        self.not_recording("an upload cannot be recorded; upload before the replay")?;
        let mut shared = self.workers()?.shared();
        let [to] = shared.machine.memory.borrow([to])?;
        to[range.clone()].copy_from_slice(&from.0[range]);
        Ok(())
    }

    fn upload_ahead(&mut self, from: &mut Pinned, range: Range<usize>, to: Buffer) -> Result<(), CpuError> {
        self.upload(from, range, to)
    }

    fn take_batch(&mut self, halves: Buffer, turn: Buffer, to: Buffer) -> Result<(), CpuError> {
        self.enqueue(Command::TakeBatch { halves, turn, to })
    }

    fn download(&mut self, _: Queue, from: Buffer, words: usize, to: &mut Pinned) -> Result<(), CpuError> {
        self.not_recording("a download cannot be recorded; download after the replay")?;
        let mut shared = self.workers()?.shared();
        let [from] = shared.machine.memory.borrow([from])?;
        to.0[..words].copy_from_slice(&from[..words]);
        Ok(())
    }

    fn widen(words: &[u32], out: &mut [f32]) {
        out.iter_mut().zip(words).for_each(|(out, word)| *out = f32::from_bits(*word));
    }

    fn event(&mut self) -> Result<Event, CpuError> {
        Ok(Event::default())
    }

    fn untimed_event(&mut self) -> Result<Event, CpuError> {
        self.event()
    }

    fn record(&mut self, _: Queue, event: &mut Event) -> Result<(), CpuError> {
        self.not_recording("an event cannot be recorded into a graph; record it around the replay")?;
        event.0 = Some(Instant::now());
        Ok(())
    }

    fn wait(&mut self, _: Queue, _: &Event) -> Result<(), CpuError> {
        Ok(())
    }

    fn elapsed_ms(&self, from: &Event, to: &Event) -> Result<f32, CpuError> {
        let (from, to) = from.0.zip(to.0).ok_or(CpuError::NoTime)?;
        Ok(to.saturating_duration_since(from).as_secs_f32() * 1e3)
    }

    fn has_passed(&self, _: &Event) -> bool {
        true
    }

    fn synchronize(&mut self) -> Result<(), CpuError> {
        Ok(())
    }

    fn warm_up_before_capture(&self) -> bool {
        false // recording a command needs nothing that running it would set up
    }

    fn begin_capture(&mut self) -> Result<(), CpuError> {
        self.not_recording("a recording is already under way; end it before beginning another")?;
        self.recording = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&mut self) -> Result<Graph, CpuError> {
        let commands = self.recording.take();
        let commands =
            commands.ok_or(CpuError::Recording("no recording is under way; begin one before ending it"))?;
        Ok(Graph(commands.into()))
    }

    fn replay(&mut self, graph: &Graph) -> Result<(), CpuError> {
        self.not_recording("a replay cannot be recorded; end the recording first")?;
        self.workers()?.run(Job::Replay(graph.0.clone()))
    }
}

impl Sampler for Cpu {
    fn sample(&mut self, step: &Step<Buffer>, logits: Buffer, tokens: Buffer) -> Result<(), CpuError> {
        self.enqueue(Command::Sample { step: *step, logits, tokens })
    }

    fn logprobs(
        &mut self,
        step: &Step<Buffer>,
        logits: Buffer,
        tokens: Buffer,
        out: Buffer,
    ) -> Result<(), CpuError> {
        self.enqueue(Command::Logprobs { step: *step, logits, tokens, out })
    }
}

impl Ops for Cpu {
    type Weight = Weight;

    fn computes(&self) -> Computes {
        supports::COMPUTES
    }

    fn supports(&self, spec: &DecoderSpec) -> Result<(), Unsupported> {
        supports::check(spec)
    }

    fn reserve(&mut self, spec: &DecoderSpec, limits: &Limits) -> Result<usize, CpuError> {
        let activations = {
            let workers = self.workers()?;
            let machine = &mut workers.shared().machine;
            machine.reserve(spec, limits, workers.threads())?;
            Activations::new(&mut machine.memory, spec, limits, self.rank)?
        };
        let (layers, embedding_scale) = (spec.layers.clone(), spec.embedding_scale);
        self.planned = Some(Planned { dims: spec.dims, layers, embedding_scale, activations });
        Ok(0)
    }

    fn load(&mut self, role: WeightRole, parts: &[HostTensor]) -> Result<Weight, CpuError> {
        self.workers()?.load(role, parts)
    }

    fn reload(&mut self, weight: Weight, role: WeightRole, parts: &[HostTensor]) -> Result<(), CpuError> {
        self.workers()?.reload(weight, role, parts)
    }

    fn end_loading(&mut self) -> Result<(), CpuError> {
        Ok(())
    }

    fn plan(&self, _: StepShape, _: &[Row], _: &mut [u32]) {}

    fn begin_step(&mut self, step: &Step<Buffer>) -> Result<(), CpuError> {
        self.enqueue(Command::BeginStep { step: *step })
    }

    fn embed(&mut self, step: &Step<Buffer>, table: Weight) -> Result<(), CpuError> {
        let Planned { embedding_scale: scale, activations, .. } = *self.planned()?;
        self.enqueue(Command::Embed { step: *step, table, scale, out: activations.residual })
    }

    fn decoder_layers(
        &mut self,
        step: &Step<Buffer>,
        weights: &[LayerWeights<Weight>],
        ropes: &[Option<Buffer>],
        kv: &[KvLayer<Buffer>],
    ) -> Result<(), CpuError> {
        let mut layers = weights.iter().zip(ropes).zip(kv).enumerate();
        layers.try_for_each(|(i, ((weights, rope), kv))| self.layer(step, i, weights, *rope, *kv))
    }

    fn final_norm(&mut self, step: &Step<Buffer>, weight: Weight, out: Buffer) -> Result<(), CpuError> {
        let Activations { residual, delta, .. } = self.activations()?;
        self.enqueue(Command::FinalNorm { step: *step, residual, delta, weight, out })
    }

    fn logits(&mut self, step: &Step<Buffer>, x: Buffer, head: Weight, out: Buffer) -> Result<(), CpuError> {
        let (samples, share) = (step.shape.samples, self.activations()?.logits);
        if self.rank.count == 1 {
            return self.linear(samples, x, head, out);
        }
        self.linear(samples, x, head, share)?;
        let cols = self.dims()?.vocab;
        self.enqueue(Command::JoinColumns { rows: samples, cols, share, out })
    }

    fn read_logits(&mut self, logits: Buffer, vocab: u32, rows: Range<usize>) -> Result<Vec<f32>, CpuError> {
        self.not_recording("logits cannot be read while recording")?;
        let mut shared = self.workers()?.shared();
        let [logits] = shared.machine.memory.borrow([logits])?;
        let vocab = vocab as usize;
        Ok(floats(logits)[rows.start * vocab..rows.end * vocab].to_vec())
    }
}
