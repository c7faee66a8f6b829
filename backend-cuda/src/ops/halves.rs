//! A decode step in two halves that share the device: while products of one wait for each other, attention of the other
//! keeps memory busy.
//!
//! ```text
//!   compute   qkv ─┬─ attention ─ o ─ gate_up ─ down ─ qkv ─ attention ─ o …     ─┬─ final_norm      the first half of the rows
//!   beside         └─ qkv ─ ·········· attention ─ o ─ gate_up ─ down ─ qkv ─ · … ─┘                 the second
//! ```
//!
//! 1. Blocks of these kernels take half of a multiprocessor each, so one of each half runs there; of attention over fp8 two take it
//!    together. Attention on half of every multiprocessor is enough to keep memory busy.
//! 2. A half whose attention comes while the other attends waits for it, with its first keys and values fetched
//!    (`attention_ring.cuh`). So they take turns, and where one ends the other goes on.
//! 3. o comes when attention ends, not when it begins, as kernels otherwise do: until then its place is the other half's.
//! 4. Each half reads all weights. That costs less than waiting does where a layer has few weights and a step many rows.
//!
//! Invariant: rows do not depend on the rows beside them, so no bit depends on whether a step is divided. Drafts see the keys and
//! values of the rows before them, which are in the same half: a step with drafts is not divided.

use std::ops::Range;

use minisgl_core::batch::StepShape;
use minisgl_core::spec::{DecoderSpec, LayerSpec, WeightFormat};
use minisgl_core::speculation::DRAFTED_ROWS_MAX;

/// What of a step is divided while its layers run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Division {
    /// Nothing: kernel after kernel, for all rows.
    None,
    /// Its rows: each half has kernels of its own, beside the other's.
    Rows,
    /// The multiprocessors, which work on halves of the rows: in one kernel some attend and some multiply (`layers.rs`).
    Multiprocessors,
}

/// The rows of a step that a chain of kernels works on. In a step of decode rows, which alone is divided, each is a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All.
    Whole,
    /// The first half, or one more.
    First,
    /// The rest.
    Second,
}

impl Part {
    /// Its tokens, among the step's.
    pub fn tokens(self, shape: StepShape) -> Range<u32> {
        let middle = shape.tokens.div_ceil(2);
        match self {
            Part::Whole => 0..shape.tokens,
            Part::First => 0..middle,
            Part::Second => middle..shape.tokens,
        }
    }
}

/// Which steps are divided.
#[derive(Clone, Copy, Debug)]
pub struct Halves {
    pays: bool,
}

const _: () = assert!(Halves::ROWS_MIN > DRAFTED_ROWS_MAX, "rows of one sequence are in the same half");

impl Halves {
    /// Fewer rows have too little to attend to. A step with drafts has fewer.
    pub(super) const ROWS_MIN: u32 = 40;
    /// Products of more rows need whole multiprocessors.
    const ROWS_MAX: u32 = 256;
    /// Bytes of a layer's weights that are soon read again: in 16 µs on an H100, half of what its products take alone.
    const LAYER_BYTES_MAX: usize = 48 << 20;

    /// For a model, on a device that runs Hopper's kernels or the portable ones, which take whole multiprocessors.
    ///
    /// Both halves of a step would read most of the experts that either reads, so models that have some run undivided, and so do
    /// those with fp8 weights, whose products have no kernels for half of a multiprocessor.
    pub fn new(spec: &DecoderSpec, hopper: bool) -> Halves {
        let (dims, is_dense) = (&spec.dims, |layer: &LayerSpec| layer.experts().is_none());
        let (hidden, mlp) = (dims.hidden as usize, dims.intermediate as usize);
        let layer_bytes = 2 * hidden * (dims.qkv_width() + dims.q_width() + 3 * mlp);
        let in_bf16 = spec.weights == WeightFormat::Bf16;
        let is_small = layer_bytes <= Self::LAYER_BYTES_MAX;
        Halves { pays: hopper && in_bf16 && spec.layers.iter().all(is_dense) && is_small }
    }

    /// Is a step of this shape divided?
    pub fn divide(&self, shape: StepShape) -> bool {
        self.pays && shape.is_decode() && (Self::ROWS_MIN..=Self::ROWS_MAX).contains(&shape.decode_rows)
    }
}

#[cfg(test)]
mod tests {
    use minisgl_core::spec::Dims;

    use super::*;

    /// Qwen3-0.6B.
    const SMALL: Dims = Dims {
        layers: 28,
        hidden: 1024,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 3072,
        vocab: 151_936,
        norm_eps: 1e-6,
    };
    /// Qwen3-14B.
    const LARGE: Dims = Dims { layers: 40, hidden: 5120, heads: 40, intermediate: 17_408, ..SMALL };

    #[test]
    fn two_parts_have_every_token_once() {
        for rows in 1..300 {
            let shape = StepShape::decode(rows);
            let [first, second] = [Part::First, Part::Second].map(|part| part.tokens(shape));
            assert_eq!((first.start, first.end, second.end), (0, second.start, rows));
            assert!(first.len() - second.len() <= 1);
        }
    }

    #[test]
    fn a_step_is_divided_where_its_model_is_small_and_its_rows_are_many() {
        let [small, large] = [SMALL, LARGE].map(|dims| DecoderSpec::uniform(dims, LayerSpec::plain()));
        let mixed = StepShape { decode_rows: 63, prefill_rows: 1, ..StepShape::decode(64) };
        let divided = |spec: &DecoderSpec, hopper, shape| Halves::new(spec, hopper).divide(shape);
        assert!([40, 48, 256].into_iter().all(|rows| divided(&small, true, StepShape::decode(rows))));
        assert!(![1, 32, 264].into_iter().any(|rows| divided(&small, true, StepShape::decode(rows))));
        assert!(!divided(&small, true, mixed));
        assert!(!divided(&small, false, StepShape::decode(64)));
        assert!(!divided(&large, true, StepShape::decode(64)));
    }
}
