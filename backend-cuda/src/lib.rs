//! The CUDA backend of minisgl, over the driver API: nothing but an NVIDIA driver is needed.
//!
//! ```text
//!   cuda      what the engine runs on: core's Device, Sampler and Ops over what is below
//!   ops       a model's operations: each family of kernels and its launches         weight   matrices, and their way up
//!   gpu       memory, streams, kernels, a link to other ranks: what operations take
//!   link      what ranks on several devices write to each other                     nccl     carries it where they can't
//!   launch    grids, parameters, dependent launch, late errors                      module   kernels, loaded and looked up
//!   memory    buffers, pinned memory, events, graphs                                context  driver, device, properties
//!   turns     of a process's engines, where one records
//! ```
//!
//! A file knows those below it, and none knows one that knows it.
//!
//! Invariant: after `reserve` a step allocates nothing on the host or the device, and waits for nothing but the pinned
//! memory that it fills.

mod context;
mod cuda;
#[cfg(test)]
mod declared;
mod error;
mod gpu;
mod info;
mod launch;
mod link;
mod memory;
mod module;
mod nccl;
pub mod ops;
mod param;
mod telemetry;
mod tensor_map;
mod turns;
mod weight;

pub use context::{KernelSet, Properties, device_count};
pub use cuda::Cuda;
pub use error::CudaError;
pub use gpu::{Gpu, Options};
pub use launch::{Grid, HostTimes, Kernel, Launcher};
pub use link::Link;
pub use memory::{Address, Buffer, Event, Graph, Pinned, element_bytes};
pub use module::Modules;
pub use nccl::Comm;
pub use param::Param;
pub use telemetry::{GpuState, Telemetry};
pub use tensor_map::{BOX_COLS, TensorMap};
pub use weight::{SLICING, Weight};
