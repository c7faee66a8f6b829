//! What the engine's thread and those of the ranks share: two steps, what came of them, and the first failure.
//!
//! ```text
//!   place 0   step N        posted ── each rank launches ── each completes, done 1 … n ── taken
//!   place 1   step N + 1           posted ── …
//! ```

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use minisgl_core::batch::{Batch, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::constraint::mask_words;
use minisgl_core::executor::{Executor, Results};
use minisgl_core::request::Ticket;
use minisgl_core::sampling::RowLogprobs;

use crate::error::RankError;

/// See the module.
pub struct Board<E: Error + 'static> {
    places: [RwLock<Option<Step>>; 2],
    /// Is the step at this place known to have run, on rank 0?
    ended: [AtomicBool; 2],
    state: Mutex<State<E>>,
    changed: Condvar,
}

/// A step to be run.
struct Step {
    batch: Batch,
    shape: StepShape,
    /// `[slots, mask words]`, in the order of [`Batch::masks`].
    masks: Vec<u32>,
    mask_words: usize,
}

struct State<E: Error + 'static> {
    /// `[2][ranks]`.
    outcomes: [Vec<Outcome>; 2],
    /// Bit r: rank r has completed the step at each place.
    done: [u32; 2],
    failure: Option<RankError<E>>,
    /// Has there been one?
    has_failed: bool,
    /// Threads that have ended.
    gone: usize,
}

/// What a step brought back on a rank.
#[derive(Clone, Default)]
pub struct Outcome {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<RowLogprobs>,
    pub scores: Vec<RowLogprobs>,
    pub since_ms: f32,
    pub took_ms: f32,
}

impl Outcome {
    /// With room for the largest step.
    pub fn reserved(limits: &Limits) -> Outcome {
        let (rows, scored) = (limits.running as usize, limits.prefill_tokens as usize);
        Outcome {
            tokens: Vec::with_capacity(rows),
            logprobs: Vec::with_capacity(rows),
            scores: Vec::with_capacity(scored),
            ..Outcome::default()
        }
    }

    fn take_in(&mut self, results: &Results<'_>) {
        let fill = |to: &mut Vec<RowLogprobs>, from: &[RowLogprobs]| {
            to.clear();
            to.extend_from_slice(from);
        };
        self.tokens.clear();
        self.tokens.extend_from_slice(results.tokens);
        fill(&mut self.logprobs, results.logprobs);
        fill(&mut self.scores, results.scores);
        (self.since_ms, self.took_ms) = (results.since_ms, results.took_ms);
    }
}

impl<E: Error + 'static> Board<E> {
    /// For so many ranks.
    pub fn new(ranks: usize) -> Board<E> {
        let outcomes = || vec![Outcome::default(); ranks];
        let state = State {
            outcomes: [outcomes(), outcomes()],
            done: [0; 2],
            failure: None,
            has_failed: false,
            gone: 0,
        };
        Board {
            places: Default::default(),
            ended: Default::default(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Makes room for the largest step.
    pub fn reserve(&self, limits: &Limits, vocab: u32) {
        let mask_words = mask_words(vocab);
        for at in 0..2 {
            let masks = vec![0; limits.running as usize * mask_words];
            let (batch, shape) = (Batch::new(limits), StepShape::default());
            *self.place_mut(at) = Some(Step { batch, shape, masks, mask_words });
            // Each by itself: a clone has no room.
            self.state().outcomes[at].fill_with(|| Outcome::reserved(limits));
        }
    }

    /// Writes a step for the ranks to launch.
    pub fn post(
        &self,
        at: usize,
        batch: &Batch,
        shape: StepShape,
        write_mask: &mut dyn FnMut(Ticket, &mut [u32]),
    ) {
        let mut place = self.place_mut(at);
        let step = place.as_mut().expect("the engine reserves before it launches");
        step.batch.copy_from(batch);
        step.shape = shape;
        let masks = step.masks.chunks_exact_mut(step.mask_words);
        batch.masks().zip(masks).for_each(|((owner, _), mask)| write_mask(owner, mask));
        self.ended[at].store(false, Ordering::Relaxed);
    }

    /// A rank launches what is posted.
    pub fn launch<X: Executor<Error = E>>(&self, rank: u32, at: usize, executor: &mut X) -> Result<(), E> {
        let place = self.place(at);
        let step = place.as_ref().expect("a step is posted before it is launched");
        let mut masks = step.masks.chunks_exact(step.mask_words);
        let mut write_mask = |_: Ticket, mask: &mut [u32]| {
            if let Some(words) = masks.next() {
                mask.copy_from_slice(words);
            }
        };
        executor.launch(at, &step.batch, step.shape, &mut write_mask)?;
        if rank == 0 {
            self.ended[at].store(executor.has_ended(at), Ordering::Relaxed);
        }
        Ok(())
    }

    /// A rank completes a step.
    pub fn complete<X: Executor<Error = E>>(&self, rank: u32, at: usize, executor: &mut X) -> Result<(), E> {
        let results = executor.complete(at)?;
        let mut state = self.state();
        state.outcomes[at][rank as usize].take_in(&results);
        state.done[at] |= 1 << rank;
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until all ranks have completed the step at a place, and takes what came of it. Once the first has, nothing is left
    /// of the step that ranks do together, so the others are given so long.
    pub fn wait(&self, at: usize, patience: Duration, outcome: &mut Outcome) -> Result<(), RankError<E>> {
        let mut state = self.state();
        let mut until = None;
        while state.done[at].count_ones() as usize != state.outcomes[at].len() {
            if state.has_failed {
                return Err(state.failure.take().unwrap_or(RankError::Ended));
            }
            if state.done[at] == 0 {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let until = *until.get_or_insert_with(|| Instant::now() + patience);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.has_failed = true;
                let (rank, seconds) = (state.done[at].trailing_ones(), patience.as_secs_f32());
                return Err(RankError::Late { rank, seconds });
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.done[at] = 0;
        let [first, others @ ..] = &mut state.outcomes[at][..] else { return Err(RankError::Ended) };
        if let Some(other) = others.iter().position(|other| other.tokens != first.tokens) {
            return Err(RankError::Differ { rank: other as u32 + 1 });
        }
        std::mem::swap(outcome, first);
        Ok(())
    }

    /// See [`Executor::has_ended`].
    pub fn has_ended(&self, at: usize) -> bool {
        self.ended[at].load(Ordering::Relaxed) || self.state().has_failed
    }

    /// A rank has failed. The first failure counts: others follow from it.
    pub fn fail(&self, failure: RankError<E>) {
        let mut state = self.state();
        if !std::mem::replace(&mut state.has_failed, true) {
            state.failure = Some(failure);
        }
        self.changed.notify_all();
    }

    /// What the first failure was, to whoever asks first. A rank that takes no orders, or has dropped one, has failed or is about
    /// to say so.
    pub fn failure(&self) -> RankError<E> {
        let mut state = self.state();
        while !state.has_failed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failure.take().unwrap_or(RankError::Ended)
    }

    /// A rank's thread has ended.
    pub fn leave(&self) {
        self.state().gone += 1;
        self.changed.notify_all();
    }

    /// Waits so long at most until so many threads have ended; have they?
    pub fn all_gone(&self, threads: usize, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut state = self.state();
        while state.gone < threads {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn state(&self) -> MutexGuard<'_, State<E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, at: usize) -> RwLockReadGuard<'_, Option<Step>> {
        self.places[at].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn place_mut(&self, at: usize) -> RwLockWriteGuard<'_, Option<Step>> {
        self.places[at].write().unwrap_or_else(PoisonError::into_inner)
    }
}
