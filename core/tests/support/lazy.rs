//! A device that runs nothing before somebody waits for it: what is wrong in the order of things shows. Either queue
//! can be made to run ahead of the other as far as events let it.
//!
//! Operations lie in three queues. Waiting on the host for a copy runs its queue up to that copy; an operation that
//! waits for an event runs the event's queue up to it first. Fresh memory is poisoned.
//!
//! Its clock counts the compute queue's operations, beside which copies run; a step may take longer, as [`Lazy::priced`] says.
//!
//! Nothing is allocated once queues, memory and graphs are there.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use minisgl_core::backend::{Device, DeviceInfo, Element, Memory, Purpose, Queue, Sampler, Step};
use minisgl_core::batch::{HEADER_WORDS, Header};
use minisgl_core::costs::StepCosts;
use minisgl_core::kv::KvFormat;
use minisgl_core::shard::Slicing;
use thiserror::Error;

use super::hashing;

const POISON: u32 = 0xDEAD_BEEF;
const QUEUE_CAPACITY: usize = 1024;

/// When operations run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// When they are enqueued.
    AtOnce,
    /// As late as possible.
    Late,
    /// Downloads, and uploads that go ahead, when they are enqueued, all else as late as possible.
    CopiesFirst,
    /// These as late as possible, all else when it is enqueued.
    CopiesLast,
}

/// What the lazy device itself can't do.
#[derive(Debug, PartialEq, Error)]
#[error("the device can't {0}")]
pub struct LazyError(pub &'static str);

const OUT_OF_MEMORY: LazyError = LazyError("allocate so much");

/// Words of device memory.
#[derive(Clone, Copy, Debug)]
pub struct Words {
    pub start: usize,
    pub len: usize,
}

/// One operation in a queue.
#[derive(Clone)]
pub enum Op {
    Forward { step: Step<Words>, kv: Words },
    Norm { step: Step<Words>, kv: Words, normed: Words, window: u32 },
    Sample { step: Step<Words>, logits: Words, tokens: Words },
    Head { step: Step<Words>, normed: Words, logits: Words },
    Logprobs { step: Step<Words>, logits: Words, tokens: Words, out: Words },
    Upload { from: Host, range: Range<usize>, to: Words },
    TakeBatch { halves: Words, turn: Words, to: Words },
    Download { from: Words, words: usize, to: Host },
    Record { event: Rc<RefCell<Recorded>> },
    Wait { queue: Queue, until: u64 },
}

/// Pinned memory, shared with the operations that are going to copy.
#[derive(Clone)]
pub struct Host(Rc<UnsafeCell<Vec<u32>>>);

/// Pinned memory as the engine holds it.
pub struct Pinned {
    host: Host,
    uploaded: (Queue, u64),
    downloaded: Option<(Queue, u64)>,
}

/// Where an event was recorded, and when it was passed.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    queue: Queue,
    /// Operations of the queue up to and including the event.
    until: u64,
    passed_at: Option<u64>,
}

/// An event as the engine holds it.
pub struct Event(Rc<RefCell<Recorded>>);

struct Pending {
    ops: VecDeque<Op>,
    /// Operations run so far.
    done: u64,
}

struct State {
    memory: Vec<u32>,
    queues: [Pending; 3],
    /// The compute queue's operations run so far, and what steps took beside: the device's clock, in milliseconds.
    clock: u64,
    costs: StepCosts,
}

/// See the module.
pub struct Lazy {
    pace: Pace,
    state: RefCell<State>,
    recording: Option<Vec<Op>>,
    /// Graphs replayed so far.
    pub replays: u64,
    /// Words that the device has at most.
    pub memory_limit: usize,
    /// Words that a graph takes of them, and that all do.
    pub graph_words: usize,
    recorded: Rc<Cell<usize>>,
}

/// Recorded operations.
pub struct Graph {
    ops: Vec<Op>,
    words: usize,
    recorded: Rc<Cell<usize>>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.recorded.update(|words| words - self.words);
    }
}

impl Lazy {
    pub fn new(pace: Pace) -> Lazy {
        Lazy::priced(pace, StepCosts::default())
    }

    /// A device whose steps take so many milliseconds.
    pub fn priced(pace: Pace, costs: StepCosts) -> Lazy {
        let pending = || Pending { ops: VecDeque::with_capacity(QUEUE_CAPACITY), done: 0 };
        let state = State { memory: Vec::new(), queues: [pending(), pending(), pending()], clock: 0, costs };
        Lazy {
            pace,
            state: RefCell::new(state),
            recording: None,
            replays: 0,
            memory_limit: usize::MAX,
            graph_words: 0,
            recorded: Rc::default(),
        }
    }

    /// Enqueues an operation, or records it.
    pub fn enqueue(&mut self, queue: Queue, op: Op) -> Result<(), LazyError> {
        match &mut self.recording {
            Some(ops) if queue == Queue::Compute => ops.push(op),
            Some(_) => return Err(LazyError("use another queue while it records")),
            None => {
                let mut state = self.state.borrow_mut();
                let pending = &mut state.queues[queue as usize];
                assert!(pending.ops.len() < QUEUE_CAPACITY, "nobody waits for the device");
                pending.ops.push_back(op);
                let end = pending.done + pending.ops.len() as u64;
                let at_once = match self.pace {
                    Pace::AtOnce => true,
                    Pace::Late => false,
                    Pace::CopiesFirst => queue != Queue::Compute,
                    Pace::CopiesLast => queue == Queue::Compute,
                };
                if at_once {
                    state.run(queue, end);
                }
            }
        }
        Ok(())
    }

    /// Operations enqueued so far.
    fn end(&self, queue: Queue) -> u64 {
        let state = self.state.borrow();
        let pending = &state.queues[queue as usize];
        pending.done + pending.ops.len() as u64
    }

    fn run(&self, queue: Queue, until: u64) {
        self.state.borrow_mut().run(queue, until);
    }
}

impl State {
    /// Runs a queue up to its `until`-th operation.
    fn run(&mut self, queue: Queue, until: u64) {
        while self.queues[queue as usize].done < until {
            let pending = &mut self.queues[queue as usize];
            let op = pending.ops.pop_front().expect("only enqueued operations are waited for");
            // Counted first: an operation may wait for events of its own queue that it lies behind.
            pending.done += 1;
            self.clock += u64::from(queue == Queue::Compute);
            self.perform(op);
        }
    }

    fn perform(&mut self, op: Op) {
        match op {
            Op::Forward { step, kv } => {
                let StepCosts { decode, mixed, attention } = self.costs;
                let ms = match step.shape.is_decode() {
                    true => decode.at(step.shape.tokens),
                    false => {
                        let pairs = hashing::pairs(&mut self.memory, &step);
                        mixed.at(step.shape.tokens) + attention.fixed_ms + attention.token_ms * pairs
                    }
                };
                self.clock += ms as u64;
                hashing::forward(&mut self.memory, &step, kv);
            }
            Op::Norm { step, kv, normed, window } => {
                hashing::norm(&mut self.memory, &step, kv, normed, window);
            }
            Op::Sample { step, logits, tokens } => hashing::sample(&mut self.memory, &step, logits, tokens),
            Op::Head { step, normed, logits } => hashing::head(&mut self.memory, &step, normed, logits),
            Op::Logprobs { step, logits, tokens, out } => {
                hashing::logprobs(&mut self.memory, &step, logits, tokens, out);
            }
            Op::Upload { from, range, to } => {
                assert!(range.end <= to.len, "an upload fits its buffer");
                // SAFETY: no reference to the words lives: see `words_mut`, which waits for this upload first.
                let words = unsafe { &*from.0.get() };
                self.memory[to.start + range.start..to.start + range.end].copy_from_slice(&words[range]);
            }
            Op::TakeBatch { halves, turn, to } => {
                let from = halves.start + self.memory[turn.start] as usize * (halves.len / 2);
                let header = bytemuck::pod_read_unaligned::<Header>(bytemuck::cast_slice(
                    &self.memory[from..from + HEADER_WORDS],
                ));
                self.memory.copy_within(from..from + header.words as usize, to.start);
                self.memory[turn.start] = 1 - self.memory[turn.start];
            }
            Op::Download { from, words, to } => {
                assert!(words <= from.len, "a download lies in its buffer");
                // SAFETY: no reference to the words lives: see `words` and `words_mut`, which wait for this download
                // first; and enqueuing it took a mutable reference to the pinned memory.
                let host = unsafe { &mut *to.0.get() };
                host[..words].copy_from_slice(&self.memory[from.start..from.start + words]);
            }
            Op::Record { event } => event.borrow_mut().passed_at = Some(self.clock),
            Op::Wait { queue, until } => self.run(queue, until),
        }
    }
}

impl Device for Lazy {
    type Error = LazyError;
    type Buffer = Words;
    type Pinned = Pinned;
    type Event = Event;
    type Graph = Graph;

    fn info(&self) -> DeviceInfo {
        let name = "lazy".into();
        let slicing = Slicing { most: 1, block: 1, equal: true };
        DeviceInfo { name, activation_bytes: 4, kv: KvFormat::F32, logit_bytes: 4, page_size_min: 1, slicing }
    }

    fn memory(&self) -> Result<Memory, LazyError> {
        let used = self.state.borrow().memory.len() + self.recorded.get();
        let bytes = |words: usize| (words as u64).saturating_mul(4);
        Ok(Memory { free: bytes(self.memory_limit - used), total: bytes(self.memory_limit) })
    }

    fn alloc(&mut self, _: Purpose, _: Element, elements: usize) -> Result<Words, LazyError> {
        let memory = &mut self.state.borrow_mut().memory;
        if self.memory_limit - memory.len() - self.recorded.get() < elements {
            return Err(OUT_OF_MEMORY);
        }
        let start = memory.len();
        memory.resize(start + elements, POISON);
        Ok(Words { start, len: elements })
    }

    /// The memory goes if it is the newest.
    fn free(&mut self, buffer: Words) -> Result<(), LazyError> {
        self.synchronize()?;
        let memory = &mut self.state.borrow_mut().memory;
        if memory.len() == buffer.start + buffer.len {
            memory.truncate(buffer.start);
        }
        Ok(())
    }

    fn is_out_of_memory(error: &LazyError) -> bool {
        *error == OUT_OF_MEMORY
    }

    fn slice(&self, buffer: Words, range: Range<usize>) -> Words {
        assert!(range.start <= range.end && range.end <= buffer.len);
        Words { start: buffer.start + range.start, len: range.len() }
    }

    fn alloc_pinned(&mut self, words: usize) -> Result<Pinned, LazyError> {
        let host = Host(Rc::new(UnsafeCell::new(vec![0; words])));
        Ok(Pinned { host, uploaded: (Queue::Compute, 0), downloaded: None })
    }

    fn words<'a>(&self, pinned: &'a Pinned) -> Result<&'a [u32], LazyError> {
        if let Some((queue, until)) = pinned.downloaded {
            self.run(queue, until);
        }
        // SAFETY: the last download into the words has run, and a further one needs a mutable reference to `pinned`.
        Ok(unsafe { &*pinned.host.0.get() })
    }

    fn words_mut<'a>(&self, pinned: &'a mut Pinned) -> Result<&'a mut [u32], LazyError> {
        let (queue, until) = pinned.uploaded;
        self.run(queue, until);
        self.words(pinned)?;
        // SAFETY: every copy from or to the words has run, and a further one needs a mutable reference to `pinned`.
        Ok(unsafe { &mut *pinned.host.0.get() })
    }

    fn upload(&mut self, from: &mut Pinned, range: Range<usize>, to: Words) -> Result<(), LazyError> {
        from.uploaded = (Queue::Compute, self.end(Queue::Compute) + 1);
        self.enqueue(Queue::Compute, Op::Upload { from: from.host.clone(), range, to })
    }

    fn upload_ahead(&mut self, from: &mut Pinned, range: Range<usize>, to: Words) -> Result<(), LazyError> {
        let (queue, until) = (Queue::Upload, self.end(Queue::Upload) + 1);
        from.uploaded = (queue, until);
        self.enqueue(queue, Op::Upload { from: from.host.clone(), range, to })?;
        self.enqueue(Queue::Compute, Op::Wait { queue, until })
    }

    fn take_batch(&mut self, halves: Words, turn: Words, to: Words) -> Result<(), LazyError> {
        self.enqueue(Queue::Compute, Op::TakeBatch { halves, turn, to })
    }

    fn download(
        &mut self,
        queue: Queue,
        from: Words,
        words: usize,
        to: &mut Pinned,
    ) -> Result<(), LazyError> {
        to.downloaded = Some((queue, self.end(queue) + 1));
        self.enqueue(queue, Op::Download { from, words, to: to.host.clone() })
    }

    fn widen(words: &[u32], out: &mut [f32]) {
        out.iter_mut().zip(words).for_each(|(out, word)| *out = f32::from_bits(*word));
    }

    fn event(&mut self) -> Result<Event, LazyError> {
        Ok(Event(Rc::new(RefCell::new(Recorded { queue: Queue::Compute, until: 0, passed_at: None }))))
    }

    fn untimed_event(&mut self) -> Result<Event, LazyError> {
        self.event()
    }

    fn record(&mut self, queue: Queue, event: &mut Event) -> Result<(), LazyError> {
        *event.0.borrow_mut() = Recorded { queue, until: self.end(queue) + 1, passed_at: None };
        self.enqueue(queue, Op::Record { event: event.0.clone() })
    }

    fn wait(&mut self, queue: Queue, event: &Event) -> Result<(), LazyError> {
        let Recorded { queue: other, until, .. } = *event.0.borrow();
        self.enqueue(queue, Op::Wait { queue: other, until })
    }

    fn elapsed_ms(&self, from: &Event, to: &Event) -> Result<f32, LazyError> {
        let passed = |event: &Event| {
            let Recorded { queue, until, .. } = *event.0.borrow();
            self.run(queue, until);
            event.0.borrow().passed_at.ok_or(LazyError("tell the time of an event that was not recorded"))
        };
        Ok(passed(to)? as f32 - passed(from)? as f32)
    }

    fn has_passed(&self, event: &Event) -> bool {
        event.0.borrow().passed_at.is_some()
    }

    fn synchronize(&mut self) -> Result<(), LazyError> {
        for queue in [Queue::Compute, Queue::Copy, Queue::Upload] {
            self.run(queue, self.end(queue));
        }
        Ok(())
    }

    fn warm_up_before_capture(&self) -> bool {
        self.pace == Pace::Late
    }

    fn begin_capture(&mut self) -> Result<(), LazyError> {
        match self.recording.replace(Vec::new()) {
            None => Ok(()),
            Some(_) => Err(LazyError("record within a recording")),
        }
    }

    fn end_capture(&mut self) -> Result<Graph, LazyError> {
        let ops = self.recording.take().ok_or(LazyError("end a recording that was not begun"))?;
        let words = self.graph_words;
        if self.memory_limit - self.state.borrow().memory.len() - self.recorded.get() < words {
            return Err(OUT_OF_MEMORY);
        }
        self.recorded.update(|all| all + words);
        Ok(Graph { ops, words, recorded: self.recorded.clone() })
    }

    fn replay(&mut self, graph: &Graph) -> Result<(), LazyError> {
        self.replays += 1;
        graph.ops.iter().try_for_each(|op| self.enqueue(Queue::Compute, op.clone()))
    }
}

impl Sampler for Lazy {
    fn sample(&mut self, step: &Step<Words>, logits: Words, tokens: Words) -> Result<(), LazyError> {
        self.enqueue(Queue::Compute, Op::Sample { step: *step, logits, tokens })
    }

    fn logprobs(
        &mut self,
        step: &Step<Words>,
        logits: Words,
        tokens: Words,
        out: Words,
    ) -> Result<(), LazyError> {
        self.enqueue(Queue::Compute, Op::Logprobs { step: *step, logits, tokens, out })
    }
}
