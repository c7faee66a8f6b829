//! Several devices that compute each step together, as one [`Executor`]: each is a rank, with a thread and an executor of its own.
//!
//! ```text
//!   engine's thread    launch N+1 ── complete N ────────────────── waits ──> tokens
//!                          │ batch, counts, masks (board)            ^
//!   rank 0                 ├──> launch N+1 ── complete N ────────────┤  tokens, log-probabilities
//!   rank 1                 └──> launch N+1 ── complete N ────────────┘  tokens, which must be the same
//!                                  │  ^
//!                                  v  │  what the devices exchange themselves, within a step
//! ```
//!
//! Ranks do what one executor would be asked for, in the same order: a call here is a call on each. The batch lies on a board that
//! all read, so that a step costs each a copy to its device and nothing else; nothing is allocated between steps, but for embeddings.
//!
//! A rank that fails ends all: its error is the first on the board, whoever waits for it in an exchange is called back (`abort`),
//! and the engine's next call has that error. A rank that hangs is found by those who wait for it in an exchange, or at the end of
//! a step, who give up in bounded time. Either way threads end with the executor, but one that hangs for ever, which is left behind and said so.
//!
//! Invariant: a place of the board is written when all ranks have completed the step that was there.

mod board;
mod error;
mod thread;

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use minisgl_core::backend::{DeviceInfo, Memory};
use minisgl_core::batch::{Batch, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::executor::{Executor, ModelInfo, RecordError, Results};
use minisgl_core::request::Ticket;

use board::{Board, Outcome};
use thread::{Order, Thread};

pub use error::RankError;

/// See the crate.
pub struct Ranks<X: Executor> {
    threads: Vec<Thread<X>>,
    board: Arc<Board<X::Error>>,
    info: DeviceInfo,
    model: ModelInfo,
    /// Of the step completed last.
    outcome: Outcome,
    /// `[hidden]`: the hidden state that was asked for last.
    hidden: Vec<f32>,
    /// How long a rank is waited for when another has ended a step.
    patience: Duration,
    abort: Arc<dyn Fn() + Send + Sync>,
    renew: Box<dyn Fn() + Send + Sync>,
}

/// How long threads are waited for at the end.
const FAREWELL: Duration = Duration::from_secs(10);

impl<X: Executor> Drop for Ranks<X> {
    fn drop(&mut self) {
        // A step that nobody waits for any more ends at its next exchange.
        (self.abort)();
        let handles: Vec<_> = self.threads.drain(..).map(Thread::close).collect();
        if self.board.all_gone(handles.len(), FAREWELL) {
            // None of them panics: what could is caught.
            handles.into_iter().for_each(|handle| drop(handle.join()));
        } else {
            tracing::error!("a rank hangs; its thread is left behind");
        }
    }
}

impl<X: Executor + 'static> Ranks<X> {
    /// Starts a thread for each of `builders`, which builds its rank's executor there. A rank whose step ends later than another's
    /// is waited for as long as `patience`. `abort` ends what ranks wait for in each other, until `renew` lets them meet again,
    /// which is called when none of them waits.
    ///
    /// # Errors
    /// The first rank's that can't be built; a thread that the system does not give.
    pub fn start<L, F>(
        builders: Vec<F>,
        patience: Duration,
        abort: impl Fn() + Send + Sync + 'static,
        renew: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, RankError<L>>
    where
        L: Error + Send + 'static,
        F: FnOnce() -> Result<X, L> + Send + 'static,
    {
        let (board, abort) =
            (Arc::new(Board::new(builders.len())), Arc::new(abort) as Arc<dyn Fn() + Send + Sync>);
        let (mut threads, mut built) = (Vec::new(), Vec::new());
        for (rank, build) in (0..).zip(builders) {
            let (thread, answer) = Thread::start(rank, build, board.clone(), abort.clone())?;
            threads.push(thread);
            built.push(answer);
        }
        let infos = (0..).zip(built).map(|(rank, answer)| match answer.recv() {
            Ok(Ok(infos)) => Ok(infos),
            Ok(Err(source)) => Err(RankError::Failed { rank, source }),
            Err(_) => Err(RankError::Panicked { rank, message: "it could not be built".into() }),
        });
        let infos: Vec<(DeviceInfo, ModelInfo)> = infos.collect::<Result<_, _>>()?;
        let Some((info, model)) = infos.into_iter().next() else { return Err(RankError::Ended) };
        let info = DeviceInfo { name: format!("{} ranks, each {}", threads.len(), info.name), ..info };
        Ok(Ranks {
            threads,
            board,
            info,
            model,
            outcome: Outcome::default(),
            hidden: Vec::new(),
            patience,
            abort,
            renew: Box::new(renew),
        })
    }

    /// Has every rank do something between two steps; what each gives, rank 0's first.
    ///
    /// # Errors
    /// The first rank's that has one; a rank that has ended.
    pub fn each<R: Send + 'static>(
        &self,
        work: impl Fn(&mut X) -> Result<R, X::Error> + Send + Sync + 'static,
    ) -> Result<Vec<R>, RankError<X::Error>>
    where
        X::Error: Sized,
    {
        let answers = self.ask(&self.threads, work)?;
        let of_rank =
            |(rank, answer): (u32, Result<R, _>)| answer.map_err(|source| RankError::Failed { rank, source });
        (0..).zip(answers).map(of_rank).collect()
    }

    /// The same of these ranks, the first of all, whatever they give.
    fn ask<R: Send + 'static>(
        &self,
        threads: &[Thread<X>],
        work: impl Fn(&mut X) -> R + Send + Sync + 'static,
    ) -> Result<Vec<R>, RankError<X::Error>> {
        let (work, (answer, answers)) = (Arc::new(work), channel());
        for (rank, thread) in threads.iter().enumerate() {
            let (work, answer) = (work.clone(), answer.clone());
            let call = move |executor: &mut X| {
                // Whoever asked waits for all answers.
                let _ = answer.send((rank, work(executor)));
            };
            self.order(thread, Order::Call(Box::new(call)))?;
        }
        drop(answer);
        let mut given: Vec<(usize, R)> = answers.iter().collect();
        if given.len() < threads.len() {
            return Err(self.board.failure());
        }
        given.sort_unstable_by_key(|(rank, _)| *rank);
        Ok(given.into_iter().map(|(_, given)| given).collect())
    }

    fn order(&self, thread: &Thread<X>, order: Order<X>) -> Result<(), RankError<X::Error>> {
        thread.order(order).map_err(|_| self.board.failure())
    }
}

impl<X: Executor + 'static> Executor for Ranks<X> {
    type Error = RankError<X::Error>;

    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn model(&self) -> ModelInfo {
        self.model
    }

    fn memory(&self) -> Result<Memory, Self::Error> {
        let each = self.each(|rank| rank.memory())?;
        each.into_iter().min_by_key(|memory| memory.free).ok_or(RankError::Ended)
    }

    fn page_bytes(&self, page_size: u32) -> Result<u64, Self::Error> {
        let each = self.each(move |rank| rank.page_bytes(page_size))?;
        each.into_iter().max().ok_or(RankError::Ended)
    }

    fn is_out_of_memory(error: &Self::Error) -> bool {
        matches!(error, RankError::Failed { source, .. } if X::is_out_of_memory(source))
    }

    fn reserve(&mut self, limits: &Limits) -> Result<(), Self::Error> {
        self.board.reserve(limits, self.model.vocab);
        self.outcome = Outcome::reserved(limits);
        let limits = *limits;
        self.each(move |rank| rank.reserve(&limits)).map(|_| ())
    }

    fn alloc_pages(&mut self, limits: &Limits) -> Result<(), Self::Error> {
        let limits = *limits;
        self.each(move |rank| rank.alloc_pages(&limits)).map(|_| ())
    }

    fn free_pages(&mut self) -> Result<(), Self::Error> {
        self.each(|rank| rank.free_pages()).map(|_| ())
    }

    fn record(&mut self, limits: &Limits) -> Result<(), RecordError<Self::Error>> {
        let (limits, failures, abort) = (*limits, AtomicU32::new(0), self.abort.clone());
        // Others wait in their exchanges for a rank that fails, and fail then: the first failure is the cause.
        let each = self.ask(&self.threads, move |rank| {
            rank.record(&limits).map_err(|error| {
                let before = failures.fetch_add(1, Ordering::Relaxed);
                abort();
                (before, error)
            })
        });
        let rows = limits.graph_rows.min(limits.running);
        let each = each.map_err(|source| RecordError { rows, recorded: 0, count: 0, source })?;
        let failed = (0..).zip(each).filter_map(|(rank, recorded)| Some((rank, recorded.err()?)));
        match failed.min_by_key(|(_, (before, _))| *before) {
            None => Ok(()),
            Some((rank, (_, RecordError { rows, recorded, count, source }))) => {
                // All have answered, and may try again with fewer pages, once no step is left that was recorded to meet as before:
                // to record none lets those go.
                let none = Limits { graph_rows: 0, ..limits };
                let gone = self.ask(&self.threads, move |rank| rank.record(&none).is_ok());
                if gone.is_ok_and(|gone| gone.into_iter().all(|gone| gone)) {
                    (self.renew)();
                }
                Err(RecordError { rows, recorded, count, source: RankError::Failed { rank, source } })
            }
        }
    }

    fn launch(
        &mut self,
        at: usize,
        batch: &Batch,
        shape: StepShape,
        write_mask: &mut dyn FnMut(Ticket, &mut [u32]),
    ) -> Result<(), Self::Error> {
        self.board.post(at, batch, shape, write_mask);
        self.threads.iter().try_for_each(|thread| self.order(thread, Order::Launch { at }))
    }

    fn has_ended(&self, at: usize) -> bool {
        self.board.has_ended(at)
    }

    fn complete(&mut self, at: usize) -> Result<Results<'_>, Self::Error> {
        for thread in &self.threads {
            thread.order(Order::Complete { at }).map_err(|_| self.board.failure())?;
        }
        self.board.wait(at, self.patience, &mut self.outcome)?;
        let Outcome { tokens, logprobs, scores, since_ms, took_ms } = &self.outcome;
        Ok(Results { tokens, logprobs, scores, since_ms: *since_ms, took_ms: *took_ms })
    }

    /// The first rank's: all have the same.
    fn hidden(&mut self, at: usize, row: u32) -> Result<&[f32], Self::Error> {
        let first = self.ask(&self.threads[..1], move |rank| rank.hidden(at, row).map(<[f32]>::to_vec))?;
        let first = first.into_iter().next().ok_or(RankError::Ended)?;
        self.hidden = first.map_err(|source| RankError::Failed { rank: 0, source })?;
        Ok(&self.hidden)
    }
}
