//! A layer's experts, as their kernels are launched for them, and what a launch of their products has.

use minisgl_core::backend::ExpertWeights;
use minisgl_core::spec;

use super::routing::{Ahead, Routing};
use crate::launch::Launcher;
use crate::memory::{Address, Buffer};
use crate::ops::exchange::Exchange;
use crate::ops::gemm::RowNorm;
use crate::weight::Weight;

/// A layer's experts and what they are applied to.
#[derive(Clone, Copy, Debug)]
pub struct ExpertLayer<'a> {
    /// What they compute.
    pub spec: spec::Experts,
    /// Their weights.
    pub weights: &'a ExpertWeights<Weight>,
    /// `[hidden]` bf16: the scale by column of their norm.
    pub norm: Address,
    /// The scale by row.
    pub row_norm: RowNorm,
    /// `[tokens, hidden]` bf16: what their sum is added to, and what the router gets.
    pub residual: Address,
    /// `[tokens, hidden]`: what they get. The residual stream, or where gate and up are fp8 that times their norm, f16, which the router
    /// writes.
    pub x: Address,
    /// `[tokens, ceil(hidden / 64)]` f32: sums of squares of the new residual stream.
    pub sumsq: Address,
    /// What the next layer takes in place of the residual stream.
    pub ahead: Ahead,
    /// To the other ranks, where there are some.
    pub exchange: Option<&'a Exchange>,
}

/// Gate and up, or down: what a launch has.
#[derive(Clone, Copy)]
pub(super) struct Products<'a> {
    pub(super) launcher: &'a Launcher,
    pub(super) layer: &'a ExpertLayer<'a>,
    /// For down `hidden` has its rows and `intermediate` its columns.
    pub(super) routing: &'a Routing,
    /// `[tokens * per_token, intermediate]`: what gate and up give, and down gets.
    pub(super) activated: Buffer,
    /// `[tokens * per_token, hidden]`: what down gives. Until it does, gate and up have it for what they gather.
    pub(super) given: Buffer,
}
