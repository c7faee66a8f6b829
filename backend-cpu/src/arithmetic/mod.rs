//! What is computed: operations over slices, a layer made of them, and tokens out of logits.

pub(crate) mod attention;
pub(crate) mod edits;
pub(crate) mod experts;
pub(crate) mod layer;
pub(crate) mod linear;
pub(crate) mod matmul;
pub(crate) mod ops;
pub mod sampling;
pub(crate) mod simd;
