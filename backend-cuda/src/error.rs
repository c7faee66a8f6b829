//! What can go wrong between the host and the GPU, said so that the user knows what to do.
//!
//! The driver reports two kinds of failure. A call that can't be done fails itself: [`CudaError::Driver`], or a kind of
//! its own where there is advice to give. A kernel that fails does so later: the next call, whichever it is, returns the
//! kernel's error, and from then on every call does: [`CudaError::Kernel`] tells what had been launched by then.

use std::ops::Range;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::CUresult;
use minisgl_core::backend::{DeviceWords, Purpose};
use thiserror::Error;

/// Why a CUDA operation failed.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum CudaError {
    /// libcuda can't be opened.
    #[error(
        "no NVIDIA driver on this machine (libcuda.so.1 was not found): install driver 550 or later, or run on the CPU"
    )]
    NoDriver,
    /// The driver predates the PTX version of the kernels.
    #[error(
        "the NVIDIA driver is too old: it supports CUDA {}.{}, the kernels need CUDA 12.4: update it to version 550 or later",
        version / 1000, version % 1000 / 10
    )]
    DriverTooOld {
        /// As the driver reports it: 12020 for CUDA 12.2.
        version: i32,
    },
    /// The driver sees no device.
    #[error(
        "the NVIDIA driver finds no GPU (look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES), or run on the CPU"
    )]
    NoDevice,
    /// No device of this number.
    #[error("there is no GPU {index}: this machine has {count}, numbered from 0 (--devices)")]
    DeviceIndex {
        /// As asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The device lacks the instructions that the kernels use.
    #[error("{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later")]
    DeviceTooOld {
        /// The device.
        name: String,
        /// Its compute capability.
        major: i32,
        /// After the point.
        minor: i32,
    },
    /// The Hopper kernels were asked for on another device.
    #[error(
        "{name} can't run the Hopper kernels (compute capability {major}.{minor}, not 9.0): use --kernels portable"
    )]
    NotHopper {
        /// The device.
        name: String,
        /// Its compute capability.
        major: i32,
        /// After the point.
        minor: i32,
    },
    /// Device memory ran out.
    #[error("out of GPU memory for {}: {} MiB needed, {} MiB free; {}", purpose.noun(), needed >> 20, free >> 20, purpose.advice(WORDS))]
    OutOfMemory {
        /// What it was for.
        purpose: Purpose,
        /// Bytes asked for.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// The driver found no memory for something of its own, a recorded step above all; it does not say how much it needs.
    #[error("out of GPU memory while {operation}: {} MiB free; free some, or {}", free >> 20, Purpose::Graphs.advice(WORDS))]
    DriverMemory {
        /// What was being done.
        operation: &'static str,
        /// Bytes free.
        free: u64,
    },
    /// What is to be freed was not allocated, or is a part of what was.
    #[error("memory is to be freed that was not allocated as such")]
    NotAllocated,
    /// Pinned host memory ran out.
    #[error(
        "{bytes} bytes of host memory can't be pinned ({cause}); raise `ulimit -l`, or free memory on the host"
    )]
    Pinned {
        /// Bytes asked for.
        bytes: usize,
        /// The driver's reason.
        cause: String,
    },
    /// The PTX of a module does not load.
    #[error("the driver can't load the kernels of `{module}` ({cause}): {log}")]
    Module {
        /// The module.
        module: &'static str,
        /// The driver's reason.
        cause: String,
        /// What its compiler said.
        log: String,
    },
    /// The kernels have no module, or the module no kernel, of this name.
    #[error("there is no kernel `{kernel}` in the module `{module}`")]
    NoKernel {
        /// The module.
        module: &'static str,
        /// The kernel.
        kernel: &'static str,
    },
    /// A kernel was given other parameters than it declares.
    #[error("kernel `{kernel}` was launched with parameters of {given:?} bytes; it takes {declared:?}")]
    Parameters {
        /// The kernel.
        kernel: &'static str,
        /// Sizes of the parameters given.
        given: Vec<usize>,
        /// Sizes of those it has.
        declared: Vec<u16>,
    },
    /// A kernel launch was refused.
    #[error("kernel `{kernel}` could not be launched (step {step}): {cause}")]
    Launch {
        /// The kernel.
        kernel: &'static str,
        /// Steps begun so far.
        step: u64,
        /// The driver's reason.
        cause: String,
    },
    /// A kernel failed while it ran.
    #[error("a kernel failed in step {step} or the one before: {cause}; {launched}")]
    Kernel {
        /// Steps begun so far.
        step: u64,
        /// The driver's reason.
        cause: String,
        /// Which kernel it was, or which it may have been.
        launched: String,
    },
    /// The device does not answer any more.
    #[error("the GPU was lost in step {step}: {cause}; see `dmesg` and `nvidia-smi -q`: it may need a reset")]
    DeviceLost {
        /// Steps begun so far.
        step: u64,
        /// The driver's reason.
        cause: String,
    },
    /// A copy reaches beyond the memory that it is from or to.
    #[error("{operation} of {range:?} reaches beyond the {len} that are there")]
    OutOfRange {
        /// The copy, and which end of it.
        operation: &'static str,
        /// What was asked for, in words or in bytes.
        range: Range<usize>,
        /// What there is.
        len: usize,
    },
    /// Ranks can't write into each other's memory, and there is no NCCL, which would carry what they send.
    #[error(
        "GPU {from} can't reach the memory of GPU {to} (`nvidia-smi topo -p2p w` says which can), and NCCL, which then carries what \
         ranks of one model send each other, can't be opened: {reason}; install it (libnccl2, or nvidia-nccl-cu12 of PyPI with the \
         folder of its libnccl.so.2 in LD_LIBRARY_PATH), name other GPUs by --devices, or run an engine on each (--data-parallel)"
    )]
    NoPeerAccess {
        /// The one that would write.
        from: usize,
        /// The one that it would write to.
        to: usize,
        /// Why there is no NCCL.
        reason: String,
    },
    /// There is no NCCL.
    #[error(
        "NCCL can't be opened: {reason}; install it (pip install nvidia-nccl-cu12, and the folder of its libnccl.so.2 in LD_LIBRARY_PATH)"
    )]
    NoNccl {
        /// What the linker says.
        reason: String,
    },
    /// NCCL failed.
    #[error("{operation} by NCCL failed: {cause}; NCCL_DEBUG=WARN says more")]
    Nccl {
        /// What it was to do.
        operation: &'static str,
        /// Its own text.
        cause: String,
    },
    /// Where NCCL carries what ranks send, one did not send it.
    #[error(
        "what ranks send each other by NCCL did not come within {seconds} s: one of them hangs; build the engine anew"
    )]
    RanksLate {
        /// How long it was waited for.
        seconds: f32,
    },
    /// A rank did not send what another waited for.
    #[error("rank {rank} did not come to an exchange within {seconds} s: it hangs; build the engine anew")]
    RankLate {
        /// Which one.
        rank: u32,
        /// How long it was waited for.
        seconds: f32,
    },
    /// The ranks were told not to wait for each other any more.
    #[error("the ranks have ended, for one failed; build the engine anew")]
    RanksEnded,
    /// No tile of a kernel fits a product.
    #[error("no kernel multiplies {rows} x {cols} by {tokens} tokens; run it with --kernels portable")]
    NoTile {
        /// Rows of the matrix.
        rows: u32,
        /// Its columns.
        cols: u32,
        /// Rows that it is applied to.
        tokens: u32,
    },
    /// A matrix is cut in another way than its kernels add.
    #[error(
        "{slices} slices of {cols} columns, where there can be a power of two up to {most}; share the model out among fewer ranks"
    )]
    Slices {
        /// Its columns.
        cols: u32,
        /// What they are cut into.
        slices: u32,
        /// The most that there can be.
        most: u32,
    },
    /// An operation came before the capacities were planned.
    #[error("an operation was asked for before `reserve` had planned its memory")]
    NotReserved,
    /// Something has a size that the kernels don't take.
    #[error("{0}")]
    Unsupported(String),
    /// Any other failed call.
    #[error("{operation} failed: {cause}")]
    Driver {
        /// What was being done.
        operation: &'static str,
        /// The driver's reason.
        cause: String,
    },
}

/// What advice on memory says of GPUs.
const WORDS: DeviceWords =
    DeviceWords { larger: "a GPU with more free memory (--devices)", share: Some("--memory-ratio") };

/// The driver's name and explanation of a status.
pub(crate) fn cause(error: DriverError) -> String {
    let name = error.error_name().map(|text| text.to_string_lossy().into_owned());
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{text} ({name})"),
        _ => format!("status {}", error.0 as u32),
    }
}

/// Does this status say that a kernel launched earlier has failed?
pub(crate) fn is_kernel_failure(error: DriverError) -> bool {
    use CUresult::*;
    matches!(
        error.0,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
    )
}

/// Does this status say that the device's memory was too little?
pub(crate) fn is_out_of_memory(error: DriverError) -> bool {
    error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

/// Does this status say that the device is gone?
pub(crate) fn is_device_lost(error: DriverError) -> bool {
    use CUresult::*;
    matches!(
        error.0,
        CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_EXTERNAL_DEVICE
            | CUDA_ERROR_UNKNOWN
    )
}

impl CudaError {
    /// Of a call that failed itself.
    pub(crate) fn named(operation: &'static str, error: DriverError) -> CudaError {
        if error.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return CudaError::Driver { operation, cause: cause(error) };
        }
        let free = result::mem_get_info().map_or(0, |(free, _)| free as u64);
        CudaError::DriverMemory { operation, free }
    }
}

/// Names the operation that a status belongs to.
pub(crate) trait Named<T> {
    fn named(self, operation: &'static str) -> Result<T, CudaError>;
}

impl<T> Named<T> for Result<T, DriverError> {
    fn named(self, operation: &'static str) -> Result<T, CudaError> {
        self.map_err(|error| CudaError::named(operation, error))
    }
}
