//! Core's operations: each family of kernels with its launches.

pub mod attention;
pub mod embed;
pub mod gemm;
pub mod sampling;
