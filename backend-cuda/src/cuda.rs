//! What the engine runs on: a GPU, and what is set up on it for a model. This is core's [`Device`], [`Sampler`] and [`Ops`]; what they
//! do is done below.
//!
//! ```text
//!   Cuda ──┬── Gpu          memory, streams, kernels, the link to other ranks (gpu.rs)
//!          ├── Loader       weights on their way up (weight/upload.rs)
//!          └── Operations   a model's families of kernels (ops/), which take a Gpu
//! ```
//!
//! Invariant: nothing below knows this file, so a family of kernels is set up and launched without the others.

use std::ops::{Deref, DerefMut, Range};

use half::f16;
use minisgl_core::backend::{
    Device, DeviceInfo, Element, KvLayer, LayerWeights, Memory, Ops, Purpose, Queue, Sampler, Step,
    WeightRole,
};
use minisgl_core::batch::{Row, StepShape};
use minisgl_core::computes::Computes;
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_core::spec::{DecoderSpec, Unsupported};
use minisgl_core::stats::ExpertsRead;
use minisgl_core::tensor::HostTensor;

use crate::error::CudaError;
use crate::gpu::{Gpu, Options};
use crate::link::Link;
use crate::memory::{Buffer, Event, Graph, Pinned};
use crate::ops::{Layer, Operations};
use crate::weight::Loader;
use crate::weight::Weight;

/// A GPU and what is set up on it for a model. Used from the thread that made it. Who takes a [`Gpu`] takes this, too.
#[derive(Debug)]
pub struct Cuda {
    /// Waits for the device when it goes, before what lies below is freed.
    gpu: Gpu,
    loader: Loader,
    /// Set up by `reserve`.
    operations: Option<Operations>,
}

impl Deref for Cuda {
    type Target = Gpu;

    fn deref(&self) -> &Gpu {
        &self.gpu
    }
}

impl DerefMut for Cuda {
    fn deref_mut(&mut self) -> &mut Gpu {
        &mut self.gpu
    }
}

impl Cuda {
    /// Opens a device and loads the kernels for it.
    pub fn new(options: &Options) -> Result<Cuda, CudaError> {
        Gpu::new(options).map(Cuda::on)
    }

    /// The device of one of several ranks that compute each step together. What it is given to load and to reserve is that rank's
    /// part of a model ([`minisgl_core::shard`]).
    pub fn of_rank(link: Link) -> Result<Cuda, CudaError> {
        Gpu::of_rank(link).map(Cuda::on)
    }

    fn on(gpu: Gpu) -> Cuda {
        Cuda { gpu, loader: Loader::default(), operations: None }
    }

    fn operations(&self) -> Result<&Operations, CudaError> {
        self.operations.as_ref().ok_or(CudaError::NotReserved)
    }

    /// What decode steps read of layers with experts so far, after waiting for all that is enqueued.
    ///
    /// # Errors
    /// The device's.
    pub fn experts_read(&mut self) -> Result<ExpertsRead, CudaError> {
        let experts = self.operations.as_ref().and_then(Operations::experts);
        experts.map_or(Ok(ExpertsRead::default()), |experts| experts.read(&mut self.gpu))
    }

    /// Puts a matrix on the device; see [`Ops::load`].
    pub fn load_weight(&mut self, role: WeightRole, parts: &[HostTensor]) -> Result<Weight, CudaError> {
        self.loader.load(&mut self.gpu, role, parts)
    }

    /// See [`Ops::fold_norm`].
    pub fn scale_columns(&mut self, norm: Weight, matrix: Weight) -> Result<(), CudaError> {
        self.loader.scale_columns(&self.gpu, norm, matrix)
    }
}

impl Device for Cuda {
    type Error = CudaError;
    type Buffer = Buffer;
    type Pinned = Pinned;
    type Event = Event;
    type Graph = Graph;

    fn info(&self) -> DeviceInfo {
        self.gpu.info()
    }

    fn memory(&self) -> Result<Memory, CudaError> {
        self.gpu.memory()
    }

    fn alloc(&mut self, purpose: Purpose, element: Element, elements: usize) -> Result<Buffer, CudaError> {
        self.gpu.alloc(purpose, element, elements)
    }

    fn free(&mut self, buffer: Buffer) -> Result<(), CudaError> {
        self.gpu.free(buffer)
    }

    fn is_out_of_memory(error: &CudaError) -> bool {
        matches!(error, CudaError::OutOfMemory { .. } | CudaError::DriverMemory { .. })
    }

    fn slice(&self, buffer: Buffer, range: Range<usize>) -> Buffer {
        buffer.slice(range)
    }

    fn alloc_pinned(&mut self, words: usize) -> Result<Pinned, CudaError> {
        self.gpu.alloc_pinned(words)
    }

    fn words<'a>(&self, pinned: &'a Pinned) -> Result<&'a [u32], CudaError> {
        self.gpu.words(pinned)
    }

    fn words_mut<'a>(&self, pinned: &'a mut Pinned) -> Result<&'a mut [u32], CudaError> {
        self.gpu.words_mut(pinned)
    }

    fn upload(&mut self, from: &mut Pinned, range: Range<usize>, to: Buffer) -> Result<(), CudaError> {
        self.gpu.upload(Queue::Compute, from, range, to)
    }

    fn upload_ahead(&mut self, from: &mut Pinned, range: Range<usize>, to: Buffer) -> Result<(), CudaError> {
        self.gpu.upload_ahead(from, range, to)
    }

    fn take_batch(&mut self, halves: Buffer, turn: Buffer, to: Buffer) -> Result<(), CudaError> {
        self.operations()?.take_batch(&self.gpu.launcher, halves, turn, to)
    }

    fn download(
        &mut self,
        queue: Queue,
        from: Buffer,
        words: usize,
        to: &mut Pinned,
    ) -> Result<(), CudaError> {
        self.gpu.download(queue, from, words, to)
    }

    /// Of bf16, two to a word, the first in its low half.
    fn widen(words: &[u32], out: &mut [f32]) {
        for (pair, word) in out.chunks_mut(2).zip(words) {
            let halves = [word << 16, word & 0xFFFF_0000];
            pair.iter_mut().zip(halves).for_each(|(out, bits)| *out = f32::from_bits(bits));
        }
    }

    fn event(&mut self) -> Result<Event, CudaError> {
        self.gpu.launcher.event()
    }

    fn untimed_event(&mut self) -> Result<Event, CudaError> {
        self.gpu.launcher.untimed_event()
    }

    fn record(&mut self, queue: Queue, event: &mut Event) -> Result<(), CudaError> {
        let stream = self.gpu.launcher.stream(queue);
        self.gpu.enqueue("recording an event", || event.record(stream))
    }

    fn wait(&mut self, queue: Queue, event: &Event) -> Result<(), CudaError> {
        let stream = self.gpu.launcher.stream(queue);
        self.gpu.enqueue("waiting for an event", || event.hold(stream))
    }

    fn elapsed_ms(&self, from: &Event, to: &Event) -> Result<f32, CudaError> {
        self.gpu.elapsed_ms(from, to)
    }

    fn has_passed(&self, event: &Event) -> bool {
        event.has_passed()
    }

    fn synchronize(&mut self) -> Result<(), CudaError> {
        self.gpu.synchronize()
    }

    fn begin_capture(&mut self) -> Result<(), CudaError> {
        self.gpu.launcher.begin_capture()
    }

    fn end_capture(&mut self) -> Result<Graph, CudaError> {
        self.gpu.launcher.end_capture()
    }

    fn replay(&mut self, graph: &Graph) -> Result<(), CudaError> {
        self.gpu.launcher.begin_step();
        self.gpu.launcher.replay(graph)
    }
}

impl Sampler for Cuda {
    fn sample(&mut self, step: &Step<Buffer>, logits: Buffer, tokens: Buffer) -> Result<(), CudaError> {
        self.operations()?.sample(&self.gpu.launcher, step, logits, tokens)
    }

    fn logprobs(
        &mut self,
        step: &Step<Buffer>,
        logits: Buffer,
        tokens: Buffer,
        out: Buffer,
    ) -> Result<(), CudaError> {
        self.operations()?.logprobs(&self.gpu.launcher, step, logits, tokens, out)
    }
}

impl Ops for Cuda {
    type Weight = Weight;

    fn computes(&self) -> Computes {
        self.gpu.properties().computes()
    }

    fn supports(&self, spec: &DecoderSpec) -> Result<(), Unsupported> {
        self.gpu.properties().supports(spec, self.gpu.rank())
    }

    fn widens(&self, kept: KvFormat) -> bool {
        kept == KvFormat::Fp8
    }

    fn reserve(&mut self, spec: &DecoderSpec, limits: &Limits) -> Result<usize, CudaError> {
        let operations = Operations::new(&mut self.gpu, spec, limits)?;
        let plan_words = operations.attention.plan_words(limits);
        self.operations = Some(operations);
        Ok(plan_words)
    }

    fn load(&mut self, role: WeightRole, parts: &[HostTensor]) -> Result<Weight, CudaError> {
        self.load_weight(role, parts)
    }

    fn reload(&mut self, weight: Weight, role: WeightRole, parts: &[HostTensor]) -> Result<(), CudaError> {
        self.loader.reload(&mut self.gpu, weight, role, parts)
    }

    fn end_loading(&mut self) -> Result<(), CudaError> {
        self.loader.free_staging();
        self.gpu.synchronize()
    }

    fn fold_norm(&mut self, norm: Weight, linear: Weight) -> Result<(), CudaError> {
        self.scale_columns(norm, linear)
    }

    fn plan(&self, shape: StepShape, rows: &[Row], words: &mut [u32]) {
        if let Some(operations) = &self.operations {
            operations.plan(shape, rows, words);
        }
    }

    fn begin_step(&mut self, step: &Step<Buffer>) -> Result<(), CudaError> {
        self.gpu.launcher.begin_step();
        self.operations()?.begin_step(&self.gpu.launcher, step)
    }

    fn embed(&mut self, step: &Step<Buffer>, table: Weight) -> Result<(), CudaError> {
        self.operations()?.embed(&self.gpu.launcher, step, table)
    }

    fn decoder_layers(
        &mut self,
        step: &Step<Buffer>,
        weights: &[LayerWeights<Weight>],
        ropes: &[Option<Buffer>],
        kv: &[KvLayer<Buffer>],
    ) -> Result<(), CudaError> {
        let all = weights.iter().zip(ropes).zip(kv).enumerate();
        let layers = all.map(|(index, ((own, rope), kv))| Layer {
            index,
            step,
            weights: own,
            next: weights.get(index + 1),
            rope: *rope,
            kv: *kv,
        });
        self.operations()?.layers(&self.gpu.launcher, step, layers)
    }

    fn final_norm(&mut self, step: &Step<Buffer>, weight: Weight, out: Buffer) -> Result<(), CudaError> {
        self.operations()?.final_norm(&self.gpu.launcher, step, weight, out)
    }

    fn logits(&mut self, step: &Step<Buffer>, x: Buffer, head: Weight, out: Buffer) -> Result<(), CudaError> {
        self.operations()?.logits(&self.gpu.launcher, step, x, head, out)
    }

    fn read_logits(&mut self, logits: Buffer, vocab: u32, rows: Range<usize>) -> Result<Vec<f32>, CudaError> {
        let vocab = vocab as usize;
        let elements = rows.start * vocab..rows.end * vocab;
        let halves = elements.len();
        // Pinned memory comes in words, and a row may begin and end within one: take the words around it.
        let around = elements.start / 2 * 2..elements.end.next_multiple_of(2).min(logits.elements());
        let mut staging = self.gpu.alloc_pinned(around.len().div_ceil(2))?;
        let skipped = elements.start - around.start;
        self.gpu.download_bytes(Queue::Compute, logits.slice(around), &mut staging)?;
        let words = self.gpu.words(&staging)?;
        let values: &[f16] = bytemuck::cast_slice(words);
        Ok(values[skipped..skipped + halves].iter().map(|value| value.to_f32()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_come_back_in_their_order() {
        let values: [f32; 6] = [1.0, -2.5, 0.15625, -0.0, f32::INFINITY, 3.0e38];
        let bits = |value: f32| u32::from(half::bf16::from_f32(value).to_bits());
        let words: Vec<u32> = values.chunks(2).map(|pair| bits(pair[0]) | bits(pair[1]) << 16).collect();
        let mut out = [0.0; 6];
        Cuda::widen(&words, &mut out);
        assert_eq!(out, values.map(|value| half::bf16::from_f32(value).to_f32()));
    }
}
