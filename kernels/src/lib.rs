//! CUDA kernels of minisgl: their sources, the PTX built from them, and the constants that host and device share.
//!
//! ```text
//!   cuda/*.cu, cuda/portable/*.cu ── build.sh ──> ptx/portable/*.ptx ──> PORTABLE   any GPU from Ampere on
//!   cuda/hopper/*.cu              ── build.sh ──> ptx/hopper/*.ptx   ──> HOPPER     compute capability 9.0
//! ```
//!
//! A module is a family of kernels: one source file. A device that can run the Hopper set takes a module from there
//! where there is one, and from the portable set otherwise.
//!
//! Invariant: `ptx/` is byte for byte what `build.sh` makes of `cuda/`; `build.sh --check` says whether it is.

#![no_std]
#![forbid(unsafe_code)]

pub mod attention;

/// The PTX of a family of kernels.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Name of the source file, without its extension.
    pub name: &'static str,
    /// The PTX text.
    pub ptx: &'static str,
}

macro_rules! modules {
    ($set:literal: $($name:literal),* $(,)?) => {
        &[$(Module { name: $name, ptx: include_str!(concat!("../ptx/", $set, "/", $name, ".ptx")) }),*]
    };
}

/// Modules for compute capability 8.0 and later, in alphabetic order.
pub const PORTABLE: &[Module] =
    modules!["portable": "attention", "embed", "gemm", "perf", "sampling", "weights"];

/// Modules for compute capability 9.0, in alphabetic order. Their kernels are written for dependent launch.
pub const HOPPER: &[Module] = modules!["hopper":
    "attention", "edge", "gemm_decode_gate_up", "gemm_decode_head", "gemm_decode_qkv", "gemm_decode_residual", "gemm_prefill",
];
