//! Middleware over a device: one of its operations, the n-th that is asked for, fails, panics, or takes long. Behind a failure
//! nothing may be asked for any more.
//!
//! Tests of other packages use it too: it knows nothing of this one's device.

use std::cell::Cell;
use std::ops::Range;
use std::thread::sleep;
use std::time::Duration;

use minisgl_core::backend::{
    Device, DeviceInfo, Element, KvLayer, LayerWeights, Memory, Ops, Purpose, Queue, Sampler, Step,
    WeightRole,
};
use minisgl_core::batch::{Row, StepShape};
use minisgl_core::computes::Computes;
use minisgl_core::config::Limits;
use minisgl_core::spec::{DecoderSpec, Unsupported};
use minisgl_core::tensor::HostTensor;
use thiserror::Error;

/// What becomes of the operation.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Fails,
    /// It needs more memory than there is; what comes behind it is well.
    RunsOut,
    Panics,
    /// It takes so long, and then is done.
    Hangs(Duration),
}

/// Why an operation failed.
#[derive(Debug, Error)]
pub enum FaultyError<E> {
    /// It was its turn to.
    #[error("{0} failed on purpose")]
    OnPurpose(&'static str),
    /// As told.
    #[error("no memory is left for {0}, on purpose")]
    OutOfMemory(&'static str),
    /// The device's own reason.
    #[error(transparent)]
    Device(#[from] E),
}

/// See the module.
pub struct Faulty<B> {
    pub device: B,
    /// What becomes of an operation, and how many are well before it.
    fault: Cell<Option<(u64, Fault)>>,
    /// The operation that failed.
    pub failed: Cell<Option<&'static str>>,
}

impl<B> Faulty<B> {
    /// Over a device; until it is armed it is that device.
    pub fn new(device: B) -> Self {
        Faulty { device, fault: Cell::new(None), failed: Cell::new(None) }
    }

    /// Lets the operation behind `well` others become what `fault` says.
    pub fn arm(&self, well: u64, fault: Fault) {
        self.fault.set(Some((well, fault)));
    }

    /// An operation is asked for: it is well, or the one that is not.
    pub fn pass<E>(&self, operation: &'static str) -> Result<(), FaultyError<E>> {
        if self.failed.get().is_some() {
            panic!("{operation} is asked for after a failure");
        }
        match self.fault.take() {
            None => Ok(()),
            Some((well @ 1.., fault)) => {
                self.arm(well - 1, fault);
                Ok(())
            }
            Some((0, Fault::Hangs(time))) => {
                sleep(time);
                Ok(())
            }
            Some((0, Fault::RunsOut)) => Err(FaultyError::OutOfMemory(operation)),
            Some((0, fault)) => {
                self.failed.set(Some(operation));
                match fault {
                    Fault::Panics => panic!("{operation} panicked on purpose"),
                    _ => Err(FaultyError::OnPurpose(operation)),
                }
            }
        }
    }
}

impl<B: Device> Device for Faulty<B> {
    type Error = FaultyError<B::Error>;
    type Buffer = B::Buffer;
    type Pinned = B::Pinned;
    type Event = B::Event;
    type Graph = B::Graph;

    fn info(&self) -> DeviceInfo {
        self.device.info()
    }

    fn memory(&self) -> Result<Memory, Self::Error> {
        Ok(self.device.memory()?)
    }

    fn alloc(
        &mut self,
        purpose: Purpose,
        element: Element,
        elements: usize,
    ) -> Result<B::Buffer, Self::Error> {
        self.pass("alloc")?;
        Ok(self.device.alloc(purpose, element, elements)?)
    }

    fn free(&mut self, buffer: B::Buffer) -> Result<(), Self::Error> {
        self.pass("free")?;
        Ok(self.device.free(buffer)?)
    }

    fn is_out_of_memory(error: &Self::Error) -> bool {
        match error {
            FaultyError::OnPurpose(_) => false,
            FaultyError::OutOfMemory(_) => true,
            FaultyError::Device(error) => B::is_out_of_memory(error),
        }
    }

    fn slice(&self, buffer: B::Buffer, range: Range<usize>) -> B::Buffer {
        self.device.slice(buffer, range)
    }

    fn alloc_pinned(&mut self, words: usize) -> Result<B::Pinned, Self::Error> {
        self.pass("alloc_pinned")?;
        Ok(self.device.alloc_pinned(words)?)
    }

    fn words<'a>(&self, pinned: &'a B::Pinned) -> Result<&'a [u32], Self::Error> {
        self.pass("words")?;
        Ok(self.device.words(pinned)?)
    }

    fn words_mut<'a>(&self, pinned: &'a mut B::Pinned) -> Result<&'a mut [u32], Self::Error> {
        self.pass("words_mut")?;
        Ok(self.device.words_mut(pinned)?)
    }

    fn upload(
        &mut self,
        from: &mut B::Pinned,
        range: Range<usize>,
        to: B::Buffer,
    ) -> Result<(), Self::Error> {
        self.pass("upload")?;
        Ok(self.device.upload(from, range, to)?)
    }

    fn upload_ahead(
        &mut self,
        from: &mut B::Pinned,
        range: Range<usize>,
        to: B::Buffer,
    ) -> Result<(), Self::Error> {
        self.pass("upload_ahead")?;
        Ok(self.device.upload_ahead(from, range, to)?)
    }

    fn take_batch(&mut self, halves: B::Buffer, turn: B::Buffer, to: B::Buffer) -> Result<(), Self::Error> {
        self.pass("take_batch")?;
        Ok(self.device.take_batch(halves, turn, to)?)
    }

    fn download(
        &mut self,
        queue: Queue,
        from: B::Buffer,
        words: usize,
        to: &mut B::Pinned,
    ) -> Result<(), Self::Error> {
        self.pass("download")?;
        Ok(self.device.download(queue, from, words, to)?)
    }

    fn widen(words: &[u32], out: &mut [f32]) {
        B::widen(words, out);
    }

    fn event(&mut self) -> Result<B::Event, Self::Error> {
        self.pass("event")?;
        Ok(self.device.event()?)
    }

    fn untimed_event(&mut self) -> Result<B::Event, Self::Error> {
        self.pass("untimed_event")?;
        Ok(self.device.untimed_event()?)
    }

    fn record(&mut self, queue: Queue, event: &mut B::Event) -> Result<(), Self::Error> {
        self.pass("record")?;
        Ok(self.device.record(queue, event)?)
    }

    fn wait(&mut self, queue: Queue, event: &B::Event) -> Result<(), Self::Error> {
        self.pass("wait")?;
        Ok(self.device.wait(queue, event)?)
    }

    fn elapsed_ms(&self, from: &B::Event, to: &B::Event) -> Result<f32, Self::Error> {
        self.pass("elapsed_ms")?;
        Ok(self.device.elapsed_ms(from, to)?)
    }

    fn has_passed(&self, event: &B::Event) -> bool {
        self.device.has_passed(event)
    }

    fn synchronize(&mut self) -> Result<(), Self::Error> {
        self.pass("synchronize")?;
        Ok(self.device.synchronize()?)
    }

    fn warm_up_before_capture(&self) -> bool {
        self.device.warm_up_before_capture()
    }

    fn begin_capture(&mut self) -> Result<(), Self::Error> {
        self.pass("begin_capture")?;
        Ok(self.device.begin_capture()?)
    }

    /// One that failed is ended too, and one that fails here.
    fn end_capture(&mut self) -> Result<B::Graph, Self::Error> {
        let passed = if self.failed.get().is_none() { self.pass("end_capture") } else { Ok(()) };
        let graph = self.device.end_capture()?;
        passed.map(|()| graph)
    }

    fn replay(&mut self, graph: &B::Graph) -> Result<(), Self::Error> {
        self.pass("replay")?;
        Ok(self.device.replay(graph)?)
    }
}

impl<B: Sampler> Sampler for Faulty<B> {
    fn sample(
        &mut self,
        step: &Step<B::Buffer>,
        logits: B::Buffer,
        tokens: B::Buffer,
    ) -> Result<(), Self::Error> {
        self.pass("sample")?;
        Ok(self.device.sample(step, logits, tokens)?)
    }

    fn logprobs(
        &mut self,
        step: &Step<B::Buffer>,
        logits: B::Buffer,
        tokens: B::Buffer,
        out: B::Buffer,
    ) -> Result<(), Self::Error> {
        self.pass("logprobs")?;
        Ok(self.device.logprobs(step, logits, tokens, out)?)
    }
}

impl<B: Ops> Ops for Faulty<B> {
    type Weight = B::Weight;

    fn computes(&self) -> Computes {
        self.device.computes()
    }

    fn supports(&self, spec: &DecoderSpec) -> Result<(), Unsupported> {
        self.device.supports(spec)
    }

    fn reserve(&mut self, spec: &DecoderSpec, limits: &Limits) -> Result<usize, Self::Error> {
        self.pass("reserve")?;
        Ok(self.device.reserve(spec, limits)?)
    }

    fn load(&mut self, role: WeightRole, parts: &[HostTensor]) -> Result<B::Weight, Self::Error> {
        self.pass("load")?;
        Ok(self.device.load(role, parts)?)
    }

    fn reload(
        &mut self,
        weight: B::Weight,
        role: WeightRole,
        parts: &[HostTensor],
    ) -> Result<(), Self::Error> {
        self.pass("reload")?;
        Ok(self.device.reload(weight, role, parts)?)
    }

    fn end_loading(&mut self) -> Result<(), Self::Error> {
        self.pass("end_loading")?;
        Ok(self.device.end_loading()?)
    }

    fn fold_norm(&mut self, norm: B::Weight, linear: B::Weight) -> Result<(), Self::Error> {
        self.pass("fold_norm")?;
        Ok(self.device.fold_norm(norm, linear)?)
    }

    fn plan(&self, shape: StepShape, rows: &[Row], words: &mut [u32]) {
        self.device.plan(shape, rows, words);
    }

    fn begin_step(&mut self, step: &Step<B::Buffer>) -> Result<(), Self::Error> {
        self.pass("begin_step")?;
        Ok(self.device.begin_step(step)?)
    }

    fn embed(&mut self, step: &Step<B::Buffer>, table: B::Weight) -> Result<(), Self::Error> {
        self.pass("embed")?;
        Ok(self.device.embed(step, table)?)
    }

    fn decoder_layers(
        &mut self,
        step: &Step<B::Buffer>,
        weights: &[LayerWeights<B::Weight>],
        ropes: &[Option<B::Buffer>],
        kv: &[KvLayer<B::Buffer>],
    ) -> Result<(), Self::Error> {
        self.pass("decoder_layers")?;
        Ok(self.device.decoder_layers(step, weights, ropes, kv)?)
    }

    fn final_norm(
        &mut self,
        step: &Step<B::Buffer>,
        weight: B::Weight,
        out: B::Buffer,
    ) -> Result<(), Self::Error> {
        self.pass("final_norm")?;
        Ok(self.device.final_norm(step, weight, out)?)
    }

    fn logits(
        &mut self,
        step: &Step<B::Buffer>,
        x: B::Buffer,
        head: B::Weight,
        out: B::Buffer,
    ) -> Result<(), Self::Error> {
        self.pass("logits")?;
        Ok(self.device.logits(step, x, head, out)?)
    }

    fn read_logits(
        &mut self,
        logits: B::Buffer,
        vocab: u32,
        rows: Range<usize>,
    ) -> Result<Vec<f32>, Self::Error> {
        self.pass("read_logits")?;
        Ok(self.device.read_logits(logits, vocab, rows)?)
    }
}
