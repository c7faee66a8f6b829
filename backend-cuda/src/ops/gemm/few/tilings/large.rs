//! Where L2 does not hold w.

use super::super::tiling::Tiling;
use super::{fitting, qkv};
use crate::ops::gemm::epilogue::Kind;

/// Tilings of what o and down add, to the residual stream or to a rank's sums. Both have some of their own: of up to 32 tokens, of up
/// to 64, of up to 128, and of more.
macro_rules! added_large {
    (
        $what:literal,
        [$($to_32:expr),* $(,)?],
        [$($to_64:expr),* $(,)?],
        [$($to_128:expr),* $(,)?],
        [$($more:expr),* $(,)?]
    ) => {
        &[
            $($to_32,)*
            Tiling::slices(concat!("few_", $what, "_64x16"), 64, 16, 16, Tiling::HALF),
            Tiling::slices(concat!("few_", $what, "_64x32"), 64, 32, 32, Tiling::HALF),
            $($to_64,)*
            Tiling::slices(concat!("few_", $what, "_64x64"), 64, 64, 64, Tiling::HALF),
            $($to_128,)*
            Tiling::slices(concat!("few_", $what, "_64x128"), 64, 128, 128, Tiling::HALF)
                .up_to(Tiling::TWO_EACH),
            Tiling::slices(concat!("few_", $what, "_192x128"), 192, 128, 128, Tiling::ALL),
            $($more,)*
        ]
    };
}

/// Tilings of a kind, for ever more tokens. The first that suits is taken. A block has more tokens than where w fits L2, so that w goes
/// through L2 to fewer blocks; and w's rows fill the device by themselves, so that tiles that take all columns in turn are quicker sooner.
pub(in crate::ops::gemm) fn of(kind: Kind) -> &'static [Tiling] {
    const QKV: &[Tiling] = &[
        Tiling::heads(qkv!("few", "64x16"), 16, 16),
        Tiling::heads(qkv!("few", "64x32"), 32, 32),
        Tiling::heads_rows_paired(qkv!("few", "128x64_rows"), 64, 64).up_to(Tiling::MANY),
        Tiling::head_pair(qkv!("pair", "128x32"), 32, 64, Tiling::ALL),
        // Of so few heads that the slices of both tiles of tokens find room, where the rows of one alone leave most of the device idle.
        Tiling::heads_paired(qkv!("few", "128x64_paired"), 64, 128, Tiling::ALL),
        Tiling::heads_rows_paired(qkv!("few", "128x128_rows"), 128, 128),
        Tiling::heads_rows_paired(qkv!("few", "128x192_rows"), 192, 192).from(Tiling::MANY),
        Tiling::head_pair(qkv!("pair", "128x64"), 64, 128, Tiling::ALL).up_to(Tiling::ONE_EACH),
        Tiling::heads_paired(qkv!("few", "128x96_paired"), 96, 192, Tiling::ALL),
        Tiling::heads_rows_paired(qkv!("few", "128x128_rows"), 128, 256).from(Tiling::MANY),
        Tiling::head_trio(qkv!("trio", "128x64"), 64, 192),
        Tiling::head_trio(qkv!("trio", "128x88"), 88, 256),
    ];
    const RESIDUAL: &[Tiling] = added_large!(
        "residual",
        [
            // One round of blocks on nearly all multiprocessors, or three on each: of two on each some would begin when others end.
            Tiling::two_slices_few("few_residual_64x16_2", 16),
            Tiling::two_slices_few("few_residual_64x32_2", 32),
            Tiling::slices("few_residual_64x16", 64, 16, 16, Tiling::THIRD)
                .from(Tiling::TWO_SINGLE)
                .up_to(Tiling::THREE_SINGLE),
            Tiling::slices("few_residual_64x32", 64, 32, 32, Tiling::THIRD)
                .from(Tiling::TWO_SINGLE)
                .up_to(Tiling::THREE_SINGLE),
        ],
        [
            Tiling::apart_rows("apart_residual_64x64", 64),
            Tiling::two_slices_few("few_residual_64x64_2", 64),
            Tiling::slices("few_residual_64x64", 64, 64, 64, Tiling::HALF).up_to(Tiling::TWO_EACH),
            Tiling::slices("few_residual_64x64_2", 64, 64, 64, Tiling::HALF)
                .of_two_slices()
                .of_few_columns()
                .up_to(Tiling::SINGLE),
            Tiling::rows_paired("few_residual_192x64_rows", 192, 64, 64),
        ],
        [
            Tiling::apart_rows("apart_residual_64x96", 96),
            Tiling::apart_rows("apart_residual_64x128", 128),
            Tiling::slices("few_residual_128x128", 128, 128, 128, Tiling::ALL)
                .up_to(Tiling::ONE_EACH)
                .of_many_columns(),
            Tiling::paired("few_residual_128x64_2_paired", 128, 64, 128).of_two_slices().of_few_columns(),
            Tiling::slices("few_residual_128x96_2", 128, 96, 96, Tiling::ALL)
                .of_two_slices()
                .of_few_columns()
                .up_to(Tiling::SINGLE),
            Tiling::slices("few_residual_128x64_2", 128, 64, 128, Tiling::MOST)
                .of_two_slices()
                .of_few_columns()
                .up_to(Tiling::SINGLE),
        ],
        [
            Tiling::apart("apart_residual_128x72", 72),
            Tiling::apart("apart_residual_128x80", 80),
            Tiling::apart("apart_residual_128x88", 88),
            Tiling::apart("apart_residual_128x96", 96),
            Tiling::apart("apart_residual_128x104", 104),
            Tiling::apart("apart_residual_128x112", 112),
            Tiling::apart("apart_residual_128x120", 120),
            Tiling::apart("apart_residual_128x128", 128),
            Tiling::paired("few_residual_192x96_paired", 192, 96, 192),
            Tiling::paired("few_residual_192x112_paired", 192, 112, 224).from(Tiling::ENOUGH),
            Tiling::paired("few_residual_192x128_paired", 192, 128, 256).from(Tiling::ENOUGH),
            Tiling::two_slices("few_residual_128x80_2", 80).of_few_columns(),
            Tiling::two_slices("few_residual_128x96_2", 96).of_few_columns(),
            Tiling::two_slices("few_residual_128x104_2", 104).of_few_columns(),
            Tiling::two_slices("few_residual_128x112_2", 112).of_few_columns(),
            Tiling::two_slices("few_residual_128x120_2", 120).of_few_columns(),
            Tiling::two_slices("few_residual_128x128_2", 128).of_few_columns(),
            // One round of blocks on nearly all multiprocessors.
            Tiling::two_slices("few_residual_128x80_2", 80).from(Tiling::ONE_EACH),
            Tiling::two_slices("few_residual_128x96_2", 96).from(Tiling::ONE_EACH),
            Tiling::two_slices("few_residual_128x104_2", 104).from(Tiling::ONE_EACH),
            Tiling::two_slices("few_residual_128x112_2", 112).from(Tiling::ONE_EACH),
            Tiling::two_slices("few_residual_128x120_2", 120).from(Tiling::ONE_EACH),
            Tiling::two_slices("few_residual_128x128_2", 128).from(Tiling::ONE_EACH),
            // All tokens, by clusters of eight.
            Tiling::all_tokens("few_residual_128x144_rows", 128, 144),
            Tiling::all_tokens("few_residual_128x160_rows", 128, 160),
            Tiling::all_tokens("few_residual_128x176_rows", 128, 176),
            Tiling::all_tokens("few_residual_128x192_rows", 128, 192),
            Tiling::all_tokens("few_residual_128x208_rows", 128, 208).of_many_columns(),
            Tiling::all_tokens("few_residual_128x224_rows", 128, 224).of_many_columns(),
            Tiling::all_tokens("few_residual_128x240_rows", 128, 240).of_many_columns(),
            Tiling::all_tokens("few_residual_128x256_rows", 128, 256).of_many_columns(),
            Tiling::all_tokens("few_residual_192x144_rows", 192, 144),
            Tiling::all_tokens("few_residual_192x160_rows", 192, 160),
            Tiling::all_tokens("few_residual_192x176_rows", 192, 176),
            Tiling::all_tokens("few_residual_192x192_rows", 192, 192),
            Tiling::all_tokens("few_residual_192x208_rows", 192, 208).of_many_columns(),
            Tiling::all_tokens("few_residual_192x224_rows", 192, 224).of_many_columns(),
            Tiling::all_tokens("few_residual_192x240_rows", 192, 240).of_many_columns(),
            Tiling::all_tokens("few_residual_192x256_rows", 192, 256).of_many_columns(),
        ]
    );
    const SUMS: &[Tiling] = added_large!(
        "sums",
        [],
        [Tiling::rows_paired("few_sums_128x64_rows", 128, 64, 64)],
        [
            Tiling::rows_paired("few_sums_128x96_rows", 128, 96, 96),
            Tiling::slices("few_sums_128x128", 128, 128, 128, Tiling::ALL).up_to(Tiling::ONE_EACH),
        ],
        [
            Tiling::slices("few_sums_128x96_2", 128, 96, 256, Tiling::ALL)
                .of_two_slices()
                .of_few_columns()
                .up_to(Tiling::SINGLE)
                .from(Tiling::ONE_EACH),
            Tiling::paired("few_sums_192x72_paired", 192, 72, 144),
            Tiling::paired("few_sums_192x96_paired", 192, 96, 192),
            Tiling::paired("few_sums_192x128_paired", 192, 128, 256),
            Tiling::two_slices("few_sums_128x96_2", 96).of_few_columns(),
            Tiling::two_slices("few_sums_128x128_2", 128).of_few_columns(),
        ]
    );
    const GATE_UP: &[Tiling] = &[
        Tiling::slices("few_gate_up_64x16", 64, 16, 16, Tiling::HALF).up_to(Tiling::TWO_SINGLE),
        Tiling::slices("few_gate_up_64x32", 64, 32, 32, Tiling::HALF).up_to(Tiling::TWO_SINGLE),
        Tiling::slices("few_gate_up_64x48", 64, 48, 48, Tiling::HALF).up_to(Tiling::TWO_SINGLE),
        Tiling::slices("few_gate_up_64x64", 64, 64, 64, Tiling::HALF).up_to(Tiling::TWO_SINGLE),
        // Where those would be more than one round of blocks.
        Tiling::fine_batch("batch_gate_up_192x16", 192, 16),
        Tiling::fine_batch("batch_gate_up_192x32", 192, 32),
        Tiling::fine_batch("batch_gate_up_192x48", 192, 48),
        Tiling::fine_batch("batch_gate_up_192x64", 192, 64),
        // No more tokens than there are, where tiles of 64 a warpgroup have many more.
        Tiling::batch("batch_gate_up_192x144", 192, 144),
        Tiling::batch("batch_gate_up_192x160", 192, 160),
        Tiling::batch("batch_gate_up_192x176", 192, 176),
        Tiling::batch("batch_gate_up_192x192", 192, 192),
        Tiling::batch("batch_gate_up_192x208", 192, 208),
        Tiling::batch("batch_gate_up_192x224", 192, 224),
        Tiling::batch("batch_gate_up_192x240", 192, 240),
        Tiling::batch("batch_gate_up_192x256", 192, 256).from(Tiling::FULL),
    ];
    match kind {
        Kind::Qkv => QKV,
        Kind::Residual => RESIDUAL,
        Kind::RankSums => SUMS,
        Kind::GateUp => GATE_UP,
        Kind::Head | Kind::Linear => fitting::of(kind),
    }
}
