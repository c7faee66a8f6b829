//! The CPU as a device: memory, order, capture and replay, and every operation as a command.
//!
//! There is one queue, and it is always empty: a command is done when its call returns, so copies, events and waits
//! have nothing to wait for. Between `begin_capture` and `end_capture` commands are listed instead of run.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use minisgl_core::backend::{
    Device, DeviceInfo, Dims, Element, KvLayer, LayerBuffers, LayerOps, LayerWeights, Memory, Ops, Purpose,
    Queue, Step, WeightRole,
};
use minisgl_core::batch::{Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::tensor::HostTensor;

use crate::command::{Command, QkNormRopeStore};
use crate::crew::{Crew, Job};
use crate::error::CpuError;
use crate::memory::{Buffer, available, floats};
use crate::weights::Weight;

/// The CPU.
pub struct Cpu {
    crew: Result<Crew, String>,
    recording: Option<Vec<Command>>,
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
        let crew = Crew::new().map_err(|error| error.to_string());
        Cpu { crew, recording: None }
    }

    fn crew(&self) -> Result<&Crew, CpuError> {
        self.crew.as_ref().map_err(|reason| CpuError::Threads(reason.clone()))
    }

    /// Runs or records a command.
    fn enqueue(&mut self, command: Command) -> Result<(), CpuError> {
        match &mut self.recording {
            None => self.crew()?.run(Job::Run(command)),
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
        let threads = self.crew.as_ref().map_or(0, Crew::threads);
        let name = format!("CPU, {threads} thread{}", if threads == 1 { "" } else { "s" });
        DeviceInfo { name, activation_bytes: 4, logit_bytes: 4, page_size_min: 1 }
    }

    fn memory(&self) -> Result<Memory, CpuError> {
        let (free, total) = available();
        Ok(Memory { free, total })
    }

    /// Every element is one 32-bit word.
    fn alloc(&mut self, purpose: Purpose, _: Element, elements: usize) -> Result<Buffer, CpuError> {
        self.crew()?.desk().machine.memory.alloc(purpose, elements)
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
        let mut desk = self.crew()?.desk();
        let [to] = desk.machine.memory.borrow([to])?;
        to[range.clone()].copy_from_slice(&from.0[range]);
        Ok(())
    }

    fn download(&mut self, _: Queue, from: Buffer, words: usize, to: &mut Pinned) -> Result<(), CpuError> {
        self.not_recording("a download cannot be recorded; download after the replay")?;
        let mut desk = self.crew()?.desk();
        let [from] = desk.machine.memory.borrow([from])?;
        to.0[..words].copy_from_slice(&from[..words]);
        Ok(())
    }

    fn event(&mut self) -> Result<Event, CpuError> {
        Ok(Event::default())
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
        self.crew()?.run(Job::Replay(graph.0.clone()))
    }
}

impl Ops for Cpu {
    type Weight = Weight;

    fn reserve(&mut self, dims: &Dims, limits: &Limits) -> Result<usize, CpuError> {
        let crew = self.crew()?;
        crew.desk().machine.reserve(dims, limits, crew.threads())?;
        Ok(0)
    }

    fn load(&mut self, role: WeightRole, parts: &[HostTensor]) -> Result<Weight, CpuError> {
        self.crew()?.load(role, parts)
    }

    fn plan(&self, _: StepShape, _: &[Row], _: &mut [u32]) {}

    fn begin_step(&mut self, step: &Step<Buffer>) -> Result<(), CpuError> {
        self.enqueue(Command::BeginStep { step: *step })
    }

    fn embed(&mut self, step: &Step<Buffer>, table: Weight, out: Buffer) -> Result<(), CpuError> {
        self.enqueue(Command::Embed { step: *step, table, out })
    }

    fn decoder_layer(
        &mut self,
        step: &Step<Buffer>,
        first: bool,
        weights: &LayerWeights<Weight>,
        rope: Buffer,
        kv: KvLayer<Buffer>,
        buffers: &LayerBuffers<Buffer>,
    ) -> Result<(), CpuError> {
        self.layer(step, first, weights, rope, kv, buffers)
    }

    fn final_norm(
        &mut self,
        step: &Step<Buffer>,
        residual: Buffer,
        delta: Buffer,
        weight: Weight,
        out: Buffer,
    ) -> Result<(), CpuError> {
        self.enqueue(Command::FinalNorm { step: *step, residual, delta, weight, out })
    }

    fn logits(&mut self, step: &Step<Buffer>, x: Buffer, head: Weight, out: Buffer) -> Result<(), CpuError> {
        self.linear(step.shape.samples, x, head, out)
    }

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

    fn read_logits(&mut self, logits: Buffer, vocab: u32, rows: Range<usize>) -> Result<Vec<f32>, CpuError> {
        self.not_recording("logits cannot be read while recording")?;
        let mut desk = self.crew()?.desk();
        let [logits] = desk.machine.memory.borrow([logits])?;
        let vocab = vocab as usize;
        Ok(floats(logits)[rows.start * vocab..rows.end * vocab].to_vec())
    }
}

impl LayerOps for Cpu {
    fn rms_norm(&mut self, tokens: u32, x: Buffer, weight: Weight, out: Buffer) -> Result<(), CpuError> {
        self.enqueue(Command::RmsNorm { tokens, x, weight, out })
    }

    fn add_rms_norm(
        &mut self,
        tokens: u32,
        residual: Buffer,
        delta: Buffer,
        weight: Weight,
        out: Buffer,
    ) -> Result<(), CpuError> {
        self.enqueue(Command::AddRmsNorm { tokens, residual, delta, weight, out })
    }

    fn linear(&mut self, tokens: u32, x: Buffer, weight: Weight, out: Buffer) -> Result<(), CpuError> {
        self.enqueue(Command::Linear { tokens, x, weight, out })
    }

    fn qk_norm_rope_store(
        &mut self,
        step: &Step<Buffer>,
        qkv: Buffer,
        q_norm: Weight,
        k_norm: Weight,
        rope: Buffer,
        kv: KvLayer<Buffer>,
    ) -> Result<(), CpuError> {
        let command = QkNormRopeStore { step: *step, qkv, q_norm, k_norm, rope, kv };
        self.enqueue(Command::QkNormRopeStore(command))
    }

    fn attention(
        &mut self,
        step: &Step<Buffer>,
        qkv: Buffer,
        kv: KvLayer<Buffer>,
        out: Buffer,
    ) -> Result<(), CpuError> {
        self.enqueue(Command::Attention { step: *step, qkv, kv, out })
    }

    fn gate_up_silu(&mut self, tokens: u32, x: Buffer, weight: Weight, out: Buffer) -> Result<(), CpuError> {
        self.enqueue(Command::GateUpSilu { tokens, x, weight, out })
    }
}
