//! A rank's thread: builds its executor, does what it is ordered to, and ends at the first failure, or when nobody orders any more.

use std::any::Any;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use minisgl_core::backend::DeviceInfo;
use minisgl_core::executor::{Executor, ModelInfo};

use crate::board::Board;
use crate::error::RankError;

/// Orders on their way to a rank at most: a step's launch and completion, and those of the one before.
const ORDERS: usize = 4;

/// What a rank is to do.
pub enum Order<X> {
    /// Launch the step posted at a place.
    Launch { at: usize },
    /// Complete it.
    Complete { at: usize },
    /// Something else, between two steps.
    Call(Box<dyn FnOnce(&mut X) + Send>),
}

/// What is known of a rank once it is built.
type Built<L> = Receiver<Result<(DeviceInfo, ModelInfo), L>>;

/// See the module.
pub struct Thread<X: Executor> {
    orders: SyncSender<Order<X>>,
    handle: JoinHandle<()>,
}

impl<X: Executor> Thread<X> {
    /// The thread, which ends when it has done what was ordered.
    pub fn close(self) -> JoinHandle<()> {
        self.handle
    }
}

impl<X: Executor + 'static> Thread<X> {
    /// Starts it.
    pub fn start<L: Error + Send + 'static>(
        rank: u32,
        build: impl FnOnce() -> Result<X, L> + Send + 'static,
        board: Arc<Board<X::Error>>,
        abort: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<(Self, Built<L>), RankError<L>> {
        let ((orders, ordered), (built, answer)) = (sync_channel(ORDERS), sync_channel(1));
        let life = move || {
            let leaving = Leaving(board.clone());
            match build() {
                Ok(executor) => {
                    // Whoever started it waits for the answer, or has met another rank's error.
                    let _ = built.send(Ok((executor.info(), executor.model())));
                    serve(rank, executor, &ordered, &board, &*abort);
                }
                Err(error) => {
                    let _ = built.send(Err(error));
                }
            }
            drop(leaving);
        };
        let thread = Builder::new().name(format!("minisgl-rank-{rank}")).spawn(life);
        let handle = thread.map_err(|reason| RankError::Thread { rank, reason })?;
        Ok((Thread { orders, handle }, answer))
    }

    /// Gives an order.
    ///
    /// # Errors
    /// Nobody takes it any more.
    pub fn order(&self, order: Order<X>) -> Result<(), Ended> {
        self.orders.send(order).map_err(|_| Ended)
    }
}

/// A thread takes no orders any more.
#[derive(Debug)]
pub struct Ended;

/// Says that the thread has ended, however it does.
struct Leaving<E: Error + 'static>(Arc<Board<E>>);

impl<E: Error + 'static> Drop for Leaving<E> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

fn serve<X: Executor>(
    rank: u32,
    mut executor: X,
    orders: &Receiver<Order<X>>,
    board: &Board<X::Error>,
    abort: &dyn Fn(),
) {
    for order in orders {
        let obey = AssertUnwindSafe(|| match order {
            Order::Launch { at } => board.launch(rank, at, &mut executor),
            Order::Complete { at } => board.complete(rank, at, &mut executor),
            Order::Call(call) => {
                call(&mut executor);
                Ok(())
            }
        });
        let failure = match catch_unwind(obey) {
            Ok(Ok(())) => continue,
            Ok(Err(source)) => RankError::Failed { rank, source },
            Err(panic) => RankError::Panicked { rank, message: said(&*panic) },
        };
        board.fail(failure);
        abort();
        return;
    }
}

/// What a panic said.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
