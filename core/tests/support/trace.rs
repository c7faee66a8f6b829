//! Middleware that writes down what the engine asks of its device, in order.

use std::cell::RefCell;
use std::ops::Range;

use minisgl_core::backend::{Device, DeviceInfo, Element, Memory, Purpose, Queue, Sampler, Step};

use super::hashing::Runs;
use super::lazy::{Op, Words};

/// See the module.
pub struct Trace<B> {
    device: B,
    names: RefCell<Vec<&'static str>>,
}

impl<B> Trace<B> {
    pub fn new(device: B) -> Self {
        Trace { device, names: RefCell::default() }
    }

    /// The operations since the last call, separated by blanks.
    pub fn take(&self) -> String {
        self.names.take().join(" ")
    }

    fn note(&self, name: &'static str) {
        self.names.borrow_mut().push(name);
    }
}

impl<B: Device> Device for Trace<B> {
    type Error = B::Error;
    type Buffer = B::Buffer;
    type Pinned = B::Pinned;
    type Event = B::Event;
    type Graph = B::Graph;

    fn info(&self) -> DeviceInfo {
        self.device.info()
    }

    fn memory(&self) -> Result<Memory, B::Error> {
        self.device.memory()
    }

    fn alloc(&mut self, purpose: Purpose, element: Element, elements: usize) -> Result<B::Buffer, B::Error> {
        self.note("alloc");
        self.device.alloc(purpose, element, elements)
    }

    fn free(&mut self, buffer: B::Buffer) -> Result<(), B::Error> {
        self.note("free");
        self.device.free(buffer)
    }

    fn is_out_of_memory(error: &B::Error) -> bool {
        B::is_out_of_memory(error)
    }

    fn slice(&self, buffer: B::Buffer, range: Range<usize>) -> B::Buffer {
        self.device.slice(buffer, range)
    }

    fn alloc_pinned(&mut self, words: usize) -> Result<B::Pinned, B::Error> {
        self.note("alloc_pinned");
        self.device.alloc_pinned(words)
    }

    fn words<'a>(&self, pinned: &'a B::Pinned) -> Result<&'a [u32], B::Error> {
        self.note("read");
        self.device.words(pinned)
    }

    fn words_mut<'a>(&self, pinned: &'a mut B::Pinned) -> Result<&'a mut [u32], B::Error> {
        self.note("write");
        self.device.words_mut(pinned)
    }

    fn upload(&mut self, from: &mut B::Pinned, range: Range<usize>, to: B::Buffer) -> Result<(), B::Error> {
        self.note("upload");
        self.device.upload(from, range, to)
    }

    fn upload_ahead(
        &mut self,
        from: &mut B::Pinned,
        range: Range<usize>,
        to: B::Buffer,
    ) -> Result<(), B::Error> {
        self.note("upload_ahead");
        self.device.upload_ahead(from, range, to)
    }

    fn take_batch(&mut self, halves: B::Buffer, turn: B::Buffer, to: B::Buffer) -> Result<(), B::Error> {
        self.note("take_batch");
        self.device.take_batch(halves, turn, to)
    }

    fn download(
        &mut self,
        queue: Queue,
        from: B::Buffer,
        words: usize,
        to: &mut B::Pinned,
    ) -> Result<(), B::Error> {
        self.note("download");
        self.device.download(queue, from, words, to)
    }

    fn widen(words: &[u32], out: &mut [f32]) {
        B::widen(words, out);
    }

    fn event(&mut self) -> Result<B::Event, B::Error> {
        self.device.event()
    }

    fn untimed_event(&mut self) -> Result<B::Event, B::Error> {
        self.device.untimed_event()
    }

    fn record(&mut self, queue: Queue, event: &mut B::Event) -> Result<(), B::Error> {
        self.note("record");
        self.device.record(queue, event)
    }

    fn wait(&mut self, queue: Queue, event: &B::Event) -> Result<(), B::Error> {
        self.note("wait");
        self.device.wait(queue, event)
    }

    fn elapsed_ms(&self, from: &B::Event, to: &B::Event) -> Result<f32, B::Error> {
        self.device.elapsed_ms(from, to)
    }

    fn has_passed(&self, event: &B::Event) -> bool {
        self.device.has_passed(event)
    }

    fn synchronize(&mut self) -> Result<(), B::Error> {
        self.note("synchronize");
        self.device.synchronize()
    }

    fn warm_up_before_capture(&self) -> bool {
        self.device.warm_up_before_capture()
    }

    fn begin_capture(&mut self) -> Result<(), B::Error> {
        self.note("begin_capture");
        self.device.begin_capture()
    }

    fn end_capture(&mut self) -> Result<B::Graph, B::Error> {
        self.note("end_capture");
        self.device.end_capture()
    }

    fn replay(&mut self, graph: &B::Graph) -> Result<(), B::Error> {
        self.note("replay");
        self.device.replay(graph)
    }
}

impl<B: Runs> Sampler for Trace<B> {
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

impl<B: Runs> Runs for Trace<B> {
    fn enqueue(&mut self, op: Op) -> Result<(), B::Error> {
        self.note(match op {
            Op::Sample { .. } => "sample",
            Op::Norm { .. } => "norm",
            Op::Head { .. } => "head",
            Op::Logprobs { .. } => "logprobs",
            _ => "forward",
        });
        self.device.enqueue(op)
    }
}
