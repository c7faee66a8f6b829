//! Middleware that lets one operation of a device fail: the n-th that the engine asks for.

use std::cell::Cell;
use std::ops::Range;

use minisgl_core::backend::{Device, DeviceInfo, Element, Memory, Purpose, Queue, Sampler, Step};
use thiserror::Error;

use super::hashing::Runs;
use super::lazy::{Op, Words};

/// Why an operation failed.
#[derive(Debug, Error)]
pub enum FaultError<E> {
    /// It was its turn to.
    #[error("{0} failed on purpose")]
    Injected(&'static str),
    /// The device's own reason.
    #[error(transparent)]
    Device(#[from] E),
}

/// See the module.
pub struct Fault<B> {
    device: B,
    /// Operations to go until one fails.
    left: Cell<u64>,
    /// The operation that failed.
    pub failed: Cell<Option<&'static str>>,
}

impl<B> Fault<B> {
    /// Lets the operation after `healthy` others fail.
    pub fn after(healthy: u64, device: B) -> Self {
        Fault { device, left: Cell::new(healthy), failed: Cell::new(None) }
    }

    fn pass<E>(&self, operation: &'static str) -> Result<(), FaultError<E>> {
        if self.failed.get().is_some() {
            panic!("{operation} is asked for after a failure");
        }
        match self.left.get() {
            0 => {
                self.failed.set(Some(operation));
                Err(FaultError::Injected(operation))
            }
            left => {
                self.left.set(left - 1);
                Ok(())
            }
        }
    }
}

impl<B: Device> Device for Fault<B> {
    type Error = FaultError<B::Error>;
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
        matches!(error, FaultError::Device(error) if B::is_out_of_memory(error))
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

    /// One that failed is ended too.
    fn end_capture(&mut self) -> Result<B::Graph, Self::Error> {
        if self.failed.get().is_none() {
            self.pass("end_capture")?;
        }
        Ok(self.device.end_capture()?)
    }

    fn replay(&mut self, graph: &B::Graph) -> Result<(), Self::Error> {
        self.pass("replay")?;
        Ok(self.device.replay(graph)?)
    }
}

impl<B: Runs> Sampler for Fault<B> {
    fn sample(&mut self, step: &Step<Words>, logits: Words, tokens: Words) -> Result<(), Self::Error> {
        Runs::enqueue(self, Op::Sample { step: *step, logits, tokens })
    }

    fn logprobs(
        &mut self,
        step: &Step<Words>,
        logits: Words,
        tokens: Words,
        out: Words,
    ) -> Result<(), Self::Error> {
        Runs::enqueue(self, Op::Logprobs { step: *step, logits, tokens, out })
    }
}

impl<B: Runs> Runs for Fault<B> {
    fn enqueue(&mut self, op: Op) -> Result<(), Self::Error> {
        self.pass("forward")?;
        Ok(self.device.enqueue(op)?)
    }
}
