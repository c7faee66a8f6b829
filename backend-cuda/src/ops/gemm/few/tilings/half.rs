//! For half of each multiprocessor: few blocks, which all find room at once beside others'.

use super::super::tiling::Tiling;
use super::{fitting, qkv};
use crate::ops::gemm::epilogue::Kind;

/// Tilings of a kind, for ever more tokens. The first that suits is taken.
pub(in crate::ops::gemm) fn of(kind: Kind) -> &'static [Tiling] {
    const QKV: &[Tiling] = &[
        Tiling::heads(qkv!("few", "64x32"), 32, 32),
        Tiling::heads(qkv!("few", "64x64"), 64, 64),
        Tiling::heads(qkv!("few", "64x128"), 128, 128),
    ];
    const RESIDUAL: &[Tiling] = &[
        Tiling::slices("few_residual_64x32", 64, 32, 64, Tiling::HALF),
        Tiling::slices("few_residual_64x128", 64, 128, 128, Tiling::HALF),
    ];
    const GATE_UP: &[Tiling] = &[
        Tiling::slices("few_gate_up_64x32", 64, 32, 32, Tiling::HALF),
        Tiling::slices("few_gate_up_128x64", 128, 64, 64, Tiling::HALF),
        Tiling::slices("few_gate_up_128x128", 128, 128, 128, Tiling::HALF),
    ];
    match kind {
        Kind::Qkv => QKV,
        Kind::Residual => RESIDUAL,
        Kind::GateUp => GATE_UP,
        // Whole in divided steps, which ranks have none of.
        Kind::RankSums | Kind::Head | Kind::Linear => fitting::of(kind),
    }
}
