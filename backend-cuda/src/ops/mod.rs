//! Core's operations: each family of kernels with its launches.

pub mod embed;
pub mod gemm;
pub mod sampling;
