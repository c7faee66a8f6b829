//! The CUDA backend of minisgl, over the driver API: nothing but an NVIDIA driver is needed.
//!
//! ```text
//!   context   driver, device, properties            memory    buffers, pinned memory, events, graphs
//!   module    kernels, loaded and looked up         launch    grids, parameters, dependent launch, late errors
//!   device    core's Device over these               ops       core's Ops: each family of kernels and its launches
//!   turns     of a process's engines, where one records    link      what ranks on several devices write to each other
//!   nccl      carries it where they can't
//! ```
//!
//! Invariant: after `reserve` a step allocates nothing on the host or the device, and waits for nothing but the pinned
//! memory that it fills.

mod context;
#[cfg(test)]
mod declared;
mod device;
mod error;
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
pub use device::{Cuda, Options};
pub use error::CudaError;
pub use launch::{Grid, HostTimes, Kernel, Launcher};
pub use link::Link;
pub use memory::{Address, Buffer, Event, Graph, Pinned, element_bytes};
pub use module::Modules;
pub use nccl::Comm;
pub use param::Param;
pub use telemetry::{GpuState, Telemetry};
pub use tensor_map::{BOX_COLS, TensorMap};
pub use weight::{SLICING, Weight};
