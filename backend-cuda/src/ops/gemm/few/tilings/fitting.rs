//! Where w fits L2.

use super::super::tiling::Tiling;
use super::qkv;
use crate::ops::gemm::epilogue::Kind;

/// Tilings of what o and down add, to the residual stream or to a rank's sums, where w fits L2. The former has some of its own.
macro_rules! added {
    ($what:literal, [$($own:expr),* $(,)?]) => {
        &[
            Tiling::slices(concat!("few_", $what, "_64x16"), 64, 16, 16, Tiling::HALF),
            Tiling::slices(concat!("few_", $what, "_64x32"), 64, 32, 64, Tiling::HALF)
                .up_to(Tiling::SOME_TWO),
            Tiling::slices(concat!("few_", $what, "_64x64"), 64, 64, 192, Tiling::HALF)
                .up_to(Tiling::SOME_TWO),
            $($own,)*
            Tiling::slices(concat!("few_", $what, "_64x64_2"), 64, 64, 256, Tiling::HALF)
                .of_two_slices()
                .of_few_columns()
                .up_to(Tiling::TWO_SINGLE),
            Tiling::slices(concat!("few_", $what, "_64x128"), 64, 128, 128, Tiling::HALF)
                .up_to(Tiling::SOME_TWO),
            Tiling::slices(concat!("few_", $what, "_128x88"), 128, 88, 256, Tiling::MOST)
                .up_to(Tiling::ONE_EACH),
        ]
    };
}

/// Tilings of a kind, for ever more tokens, where w fits L2. The first that suits is taken.
pub(in crate::ops::gemm) fn of(kind: Kind) -> &'static [Tiling] {
    const QKV: &[Tiling] = &[
        Tiling::heads(qkv!("few", "64x16"), 16, 16),
        Tiling::heads(qkv!("few", "64x32"), 32, 32),
        Tiling::heads(qkv!("few", "64x48"), 48, 48).of_slices(),
        Tiling::heads(qkv!("few", "64x64"), 64, 64).of_slices(),
        Tiling::heads_paired(qkv!("few", "128x64_paired"), 64, 128, Tiling::MOST).of_slices(),
        Tiling::heads_paired(qkv!("few", "128x96_paired"), 96, 192, Tiling::ALL).of_slices(),
        Tiling::head_pair(qkv!("pair", "128x32"), 32, 128, Tiling::MOST).up_to(Tiling::SINGLE),
        Tiling::head_pair(qkv!("pair", "128x64"), 64, 256, Tiling::MOST).up_to(Tiling::SINGLE),
        // Of more heads than that fills the device with, in one round.
        Tiling::head_pair(qkv!("pair", "128x72"), 72, 144, Tiling::MOST).up_to(Tiling::SINGLE),
        Tiling::head_pair(qkv!("pair", "128x96"), 96, 192, Tiling::MOST).up_to(Tiling::SINGLE),
        Tiling::head_pair(qkv!("pair", "128x128"), 128, 256, Tiling::MOST).up_to(Tiling::SINGLE),
        Tiling::head_pair(qkv!("pair", "128x64"), 64, 256, Tiling::MOST),
    ];
    const RESIDUAL: &[Tiling] = added!(
        "residual",
        [
            Tiling::apart_rows("apart_residual_64x96", 96),
            Tiling::apart_rows("apart_residual_64x128", 128),
            Tiling::apart("apart_residual_128x72", 72),
            Tiling::apart("apart_residual_128x80", 80),
            Tiling::apart("apart_residual_128x88", 88),
            Tiling::apart("apart_residual_128x96", 96),
            Tiling::apart("apart_residual_128x104", 104),
            Tiling::apart("apart_residual_128x112", 112),
            Tiling::apart("apart_residual_128x120", 120),
            Tiling::apart("apart_residual_128x128", 128),
            // Of more rows than one round of those takes: o of Qwen3-4B.
            Tiling::paired("few_residual_128x64_2_paired", 128, 64, 128).of_two_slices().from(Tiling::MANY),
            Tiling::paired("few_residual_192x96_paired", 192, 96, 192).from(Tiling::ENOUGH),
            Tiling::paired("few_residual_192x112_paired", 192, 112, 224).from(Tiling::ENOUGH),
        ]
    );
    const SUMS: &[Tiling] = added!("sums", []);
    const GATE_UP: &[Tiling] = &[
        // In a chain of kernels quicker than a batch's blocks, which by themselves are.
        Tiling::slices("few_gate_up_64x16", 64, 16, 16, Tiling::HALF),
        Tiling::slices("few_gate_up_64x32", 64, 32, 32, Tiling::HALF),
        Tiling::small_batch("batch_gate_up_64x48", 48),
        Tiling::small_batch("batch_gate_up_64x64", 64),
        Tiling::small_batch("batch_gate_up_64x96", 96),
        Tiling::small_batch("batch_gate_up_64x128", 128),
        Tiling::batch("batch_gate_up_192x144", 192, 144),
        Tiling::batch("batch_gate_up_192x160", 192, 160),
        Tiling::batch("batch_gate_up_192x176", 192, 176),
        Tiling::batch("batch_gate_up_192x192", 192, 192),
    ];
    // More tokens than that, and tiles that take all columns in turn are quicker: its many rows of w fill the device.
    const HEAD: &[Tiling] = &[
        Tiling::slices("few_head_64x16", 64, 16, 16, Tiling::QUARTER),
        Tiling::slices("few_head_64x32", 64, 32, 32, Tiling::QUARTER),
        Tiling::slices("few_head_64x64", 64, 64, 64, Tiling::QUARTER),
    ];
    match kind {
        Kind::Qkv => QKV,
        Kind::Residual => RESIDUAL,
        Kind::RankSums => SUMS,
        Kind::GateUp => GATE_UP,
        Kind::Head => HEAD,
        Kind::Linear => &[],
    }
}
