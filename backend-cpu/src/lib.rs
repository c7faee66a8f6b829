//! The CPU reference backend of minisgl: every operation in f32, as plain loops that one can check by eye.
//!
//! ```text
//!   device.rs   Cpu: memory, events, capture and replay as the engine sees them
//!   command.rs  each operation as plain data, so that it can be run now or recorded and run later
//!   workers.rs  the threads: one runs the commands, all share the loops
//!   memory.rs   buffers, which are ranges, and how a command borrows several at once
//!   weights.rs  matrices read in place from the checkpoint's mapping
//!   link.rs     what devices that compute each step together pass to each other
//!
//!   activations.rs  the buffers between a layer's operations
//!   supports.rs what of a spec is computed here
//!
//!   arithmetic/
//!   layer.rs    a decoder layer out of single operations
//!   ops.rs      what a transformer is: embedding, norm, rope
//!   attention.rs  over keys and values in pages
//!   experts.rs  MLPs of which each token gets some
//!   linear.rs   what matrices are applied to, rounded where a checkpoint asks for it
//!   matmul.rs   rows times a matrix, in blocks
//!   edits.rs    penalties, biases and what may not be drawn, in logits
//!   sampling.rs tokens and log-probabilities out of logits
//!   simd.rs     the inner loops, compiled for the vector units that the machine has
//! ```
//!
//! Invariant: a row's results depend on that row alone, bit for bit. Every sum has an order fixed by its own length,
//! whatever the number of rows, of threads, of ranks, or the page size.

mod activations;
mod arithmetic;
mod command;
mod device;
mod error;
mod link;
mod memory;
mod supports;
mod weights;
mod workers;

pub use activations::Activations;
pub use arithmetic::sampling;
use arithmetic::{attention, edits, experts, linear, matmul, ops, simd};
pub use command::Heads;
pub use device::{Cpu, Event, Graph, Pinned};
pub use error::CpuError;
pub use experts::ExpertBuffers;
pub use link::Link;
pub use memory::{Buffer, available};
pub use weights::Weight;
