//! The tilings of products of few tokens. Of a kind's list the first that suits a launch is taken.
//!
//! Matrices that L2 does not hold have lists of their own, and so have products that leave half of each multiprocessor to others.
//!
//! Invariant: which is taken is a matter of speed alone.

use super::tiling::Tiling;
use crate::ops::gemm::epilogue::Kind;
use crate::ops::gemm::product::{Explained, Form, SmShare};
use crate::ops::gemm::shape::Shape;

/// The kernels of a tile of queries, keys and values: for any model and for [`Epilogue::is_normed`], with keys and values in bf16
/// and in fp8.
macro_rules! qkv {
    ($team:literal, $tile:literal) => {
        [
            [concat!($team, "_qkv_", $tile), concat!($team, "_qkv_normed_", $tile)],
            [concat!($team, "_qkv_fp8_", $tile), concat!($team, "_qkv_fp8_normed_", $tile)],
        ]
    };
}

/// Tilings of what o and down add, to the residual stream or to a rank's sums, where w fits L2.
macro_rules! added {
    ($what:literal) => {
        &[
            Tiling::slices(concat!("few_", $what, "_64x16"), 64, 16, 16, Tiling::HALF),
            Tiling::slices(concat!("few_", $what, "_64x32"), 64, 32, 64, Tiling::HALF)
                .up_to(Tiling::SOME_TWO),
            Tiling::slices(concat!("few_", $what, "_64x64"), 64, 64, 192, Tiling::HALF)
                .up_to(Tiling::SOME_TWO),
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

/// The same where it does not. Both have some of their own: of up to 64 tokens, of up to 128, and of more.
macro_rules! added_large {
    (
        $what:literal,
        [$($to_64:expr),* $(,)?],
        [$($to_128:expr),* $(,)?],
        [$($more:expr),* $(,)?]
    ) => {
        &[
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

/// Tilings of a kind, for ever more tokens, where w fits L2. The first that suits is taken.
pub(super) fn of(kind: Kind) -> &'static [Tiling] {
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
    const RESIDUAL: &[Tiling] = added!("residual");
    const SUMS: &[Tiling] = added!("sums");
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

/// The same where it does not: a block has more tokens, so that w goes through L2 to fewer blocks, and w's rows fill
/// the device by themselves, so that tiles that take all columns in turn are quicker sooner.
pub(super) fn of_large(kind: Kind) -> &'static [Tiling] {
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
            Tiling::slices("few_residual_64x64", 64, 64, 64, Tiling::HALF).up_to(Tiling::TWO_EACH),
            Tiling::slices("few_residual_64x64_2", 64, 64, 64, Tiling::HALF)
                .of_two_slices()
                .of_few_columns()
                .up_to(Tiling::SINGLE),
            Tiling::rows_paired("few_residual_192x64_rows", 192, 64, 64),
        ],
        [
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
            Tiling::paired("few_residual_192x96_paired", 192, 96, 192),
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
        Tiling::slices("few_gate_up_64x16", 64, 16, 16, Tiling::HALF),
        Tiling::slices("few_gate_up_64x32", 64, 32, 32, Tiling::HALF),
        Tiling::slices("few_gate_up_64x48", 64, 48, 48, Tiling::HALF).up_to(Tiling::TWO_SINGLE),
        // All columns: where one round of blocks has all rows, the fewest fetch the tokens.
        Tiling::slices("few_gate_up_192x48", 192, 48, 48, Tiling::ALL).up_to(Tiling::SINGLE),
        Tiling::slices("few_gate_up_64x64", 64, 64, 64, Tiling::HALF).up_to(Tiling::TWO_SINGLE),
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
        Kind::Head | Kind::Linear => of(kind),
    }
}

/// The same for half of each multiprocessor: few blocks, which all find room at once beside others'.
pub(super) fn of_half(kind: Kind) -> &'static [Tiling] {
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
        Kind::RankSums | Kind::Head | Kind::Linear => of(kind),
    }
}

/// A kind's tilings for a matrix of this size; none where a kind has none.
pub(super) fn all(kind: Kind, shape: &Shape, share: SmShare) -> &'static [Tiling] {
    match share {
        SmShare::Whole if shape.fits_l2() => of(kind),
        SmShare::Whole => of_large(kind),
        SmShare::Half => of_half(kind),
    }
}

/// Which of them is for the shape; none where another kernel is the quicker one. For what a divided step launches there is no
/// other in half of each multiprocessor: the last one then takes all that are too many for those before it.
pub(super) fn index(tilings: &[Tiling], kind: Kind, shape: &Shape, share: SmShare) -> Option<usize> {
    let is_divided = share == SmShare::Half && matches!(kind, Kind::Qkv | Kind::Residual | Kind::GateUp);
    let last = tilings.len().checked_sub(1).filter(|_| is_divided);
    tilings.iter().position(|tiling| tiling.suits(shape)).or(last)
}

/// What a product is launched as; `None` as above.
pub(in crate::ops::gemm) fn explained(
    kind: Kind,
    shape: &Shape,
    share: SmShare,
    form: Form,
) -> Option<Explained> {
    let tilings = all(kind, shape, share);
    Some(tilings[index(tilings, kind, shape, share)?].explained(shape, form))
}

/// Is there one for so many tokens?
pub(in crate::ops::gemm) fn there_is(kind: Kind, shape: &Shape, share: SmShare) -> bool {
    index(all(kind, shape, share), kind, shape, share).is_some()
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;
    use minisgl_kernels::attention::Set;

    use super::*;
    use crate::declared::threads_of;
    use crate::weight::SLICING;

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        let kinds = [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head];
        let lists = [of, of_large, of_half];
        for tiling in kinds.into_iter().flat_map(|kind| lists.map(|of| of(kind))).flatten() {
            let in_fp8 = tiling.fp8.into_iter().flatten();
            let all = std::iter::once(tiling.kernel).chain(tiling.normed).chain(in_fp8);
            for name in all {
                assert_eq!(threads_of(HOPPER, name), tiling.threads(), "{name}");
            }
        }
    }

    #[test]
    fn half_a_multiprocessor_is_left_beside_attention() {
        // The driver takes 1 KiB a block.
        const MULTIPROCESSOR: u32 = 228 << 10;
        for (head_dim, heads) in [(64, 1), (64, 2), (128, 1)] {
            for fp8 in [false, true] {
                let Set { decode_shared, decode_blocks, .. } = Set::new(true, head_dim, heads, fp8);
                let block = decode_shared + (1 << 10);
                let of_half = decode_blocks / 2 * block;
                assert!(of_half + Tiling::HALF + (1 << 10) <= MULTIPROCESSOR, "{head_dim}, {fp8}");
                assert!(decode_blocks * block <= MULTIPROCESSOR, "{head_dim}, {fp8}");
            }
        }
        for kind in [Kind::Qkv, Kind::Residual, Kind::GateUp] {
            assert!(of_half(kind).iter().all(|tiling| tiling.shared <= Tiling::HALF), "{kind:?}");
        }
    }

    /// Of a product with so many rows, columns and tokens, the kernel that the list has for it.
    fn picked(of: fn(Kind) -> &'static [Tiling], kind: Kind, sizes: [u32; 3]) -> Option<&'static str> {
        let [rows, cols, tokens] = sizes;
        let shape = Shape { rows, cols, tokens, slices: kind.slices(cols, SLICING.slices(cols as usize)) };
        of(kind).iter().find(|tiling| tiling.suits(&shape)).map(|tiling| tiling.kernel)
    }

    #[test]
    fn blocks_are_as_large_as_leaves_the_device_full() {
        // Qwen3-0.6B's o, and that of Llama's 1B, which has twice the rows.
        let o = |rows, tokens| picked(of, Kind::Residual, [rows, 2048, tokens]);
        assert_eq!(
            [64, 128, 192, 256].map(|tokens| o(1024, tokens)),
            [
                Some("few_residual_64x32"),
                Some("few_residual_64x64"),
                Some("few_residual_64x64"),
                Some("few_residual_64x64_2"),
            ]
        );
        assert_eq!(
            [32, 64, 128, 192, 256].map(|tokens| o(2048, tokens)),
            [
                Some("few_residual_64x32"),
                Some("few_residual_64x64"),
                Some("few_residual_64x64_2"),
                Some("few_residual_64x64_2"),
                Some("few_residual_64x64_2"),
            ]
        );
        // Of matrices that L2 does not hold: Qwen2.5's 7B and Qwen3-14B.
        let down = |rows, cols| picked(of_large, Kind::Residual, [rows, cols, 128]);
        assert_eq!(down(3584, 18_944), Some("few_residual_128x128"));
        assert_eq!(down(3584, 3584), Some("few_residual_128x64_2_paired"));
        assert_eq!(down(4096, 14_336), Some("few_residual_192x128"));
        // And down of Qwen3-8B and 14B, and of Llama's 1B.
        let down =
            |rows, cols| [64, 96, 160].map(|tokens| picked(of_large, Kind::Residual, [rows, cols, tokens]));
        assert_eq!(
            down(4096, 12_288),
            [Some("few_residual_192x64_rows"), Some("few_residual_192x128"), Some("few_residual_128x80_2")]
        );
        assert_eq!(
            down(5120, 17_408),
            [
                Some("few_residual_192x64_rows"),
                Some("few_residual_192x128"),
                Some("few_residual_192x160_rows")
            ]
        );
        assert_eq!(
            down(2048, 8192),
            [Some("few_residual_64x64"), Some("few_residual_128x128"), Some("few_residual_192x96_paired")]
        );
        let o = |tokens| picked(of_large, Kind::Residual, [4096, 4096, tokens]);
        assert_eq!(
            [64, 96, 128].map(o),
            [Some("few_residual_64x64_2"), Some("few_residual_128x96_2"), Some("few_residual_128x64_2"),]
        );
        let o = |rows, tokens| picked(of_large, Kind::Residual, [rows, rows, tokens]);
        assert_eq!(
            [160, 192, 200, 256].map(|tokens| o(3584, tokens)),
            [
                Some("few_residual_128x80_2"),
                Some("few_residual_128x96_2"),
                Some("few_residual_128x104_2"),
                Some("few_residual_128x128_2"),
            ]
        );
        assert_eq!(
            [136, 192, 256].map(|tokens| o(5120, tokens)),
            [Some("few_residual_192x144_rows"), Some("few_residual_192x192_rows"), None,]
        );
        // Down of more than 128 tokens: 28 tiles of 128 rows, and too few of all for a cluster on every multiprocessor.
        let down =
            |rows, cols| [200, 256].map(|tokens| picked(of_large, Kind::Residual, [rows, cols, tokens]));
        assert_eq!(
            down(3584, 18_944),
            [Some("few_residual_128x208_rows"), Some("few_residual_128x256_rows")]
        );
        assert_eq!(down(4096, 12_288), [Some("few_residual_128x104_2"), Some("few_residual_128x128_2")]);
        assert_eq!(down(2048, 8192), [None; 2]);
        assert_eq!(
            down(5120, 25_600),
            [Some("few_residual_192x208_rows"), Some("few_residual_192x256_rows")]
        );
        // Of two ranks each has half of Qwen3-14B's columns, and of the slices.
        let of_two = |cols, tokens| {
            let shape = Shape { rows: 5120, cols, tokens, slices: 2 };
            let tilings = of_large(Kind::RankSums);
            tilings.iter().find(|tiling| tiling.suits(&shape)).map(|tiling| tiling.kernel)
        };
        assert_eq!(
            [64, 128, 136, 192, 256].map(|tokens| of_two(8704, tokens)),
            [
                Some("few_sums_128x64_rows"),
                Some("few_sums_128x128"),
                Some("few_sums_192x72_paired"),
                Some("few_sums_192x96_paired"),
                Some("few_sums_192x128_paired"),
            ]
        );
        assert_eq!(
            [64, 128, 136, 192, 256].map(|tokens| of_two(2560, tokens)),
            [
                Some("few_sums_128x64_rows"),
                Some("few_sums_128x128"),
                Some("few_sums_192x72_paired"),
                Some("few_sums_192x96_paired"),
                Some("few_sums_128x96_2"),
            ]
        );
        // q, k and v of Llama's 1B are 48 heads of 64, of Qwen3's 1.7B 32 of 128.
        let qkv = |heads: u32, tokens| picked(of, Kind::Qkv, [heads * 128, 2048, tokens]);
        assert_eq!(
            [64, 65, 128, 129, 193].map(|tokens| qkv(24, tokens)),
            [
                Some("few_qkv_64x64"),
                Some("few_qkv_128x64_paired"),
                Some("few_qkv_128x64_paired"),
                Some("few_qkv_128x96_paired"),
                Some("pair_qkv_128x64"),
            ]
        );
        assert_eq!(qkv(32, 128), Some("pair_qkv_128x32"));
        // Those of Qwen3-30B-A3B.
        let qkv_40 = [64, 128, 144, 192, 256].map(|tokens| picked(of, Kind::Qkv, [40 * 128, 2048, tokens]));
        assert_eq!(
            qkv_40,
            [
                Some("few_qkv_64x64"),
                Some("pair_qkv_128x64"),
                Some("pair_qkv_128x72"),
                Some("pair_qkv_128x96"),
                Some("pair_qkv_128x128"),
            ]
        );
        // q, k and v of Qwen2.5's 7B are 36 heads, those of Qwen3-8B 48.
        let qkv = |heads: u32, cols, tokens| picked(of_large, Kind::Qkv, [heads * 128, cols, tokens]);
        assert_eq!(
            [64, 128, 192, 256].map(|tokens| qkv(36, 3584, tokens)),
            [
                Some("few_qkv_128x64_rows"),
                Some("few_qkv_128x128_rows"),
                Some("trio_qkv_128x64"),
                Some("trio_qkv_128x88"),
            ]
        );
        assert_eq!(
            [64, 128, 192, 256].map(|tokens| qkv(48, 4096, tokens)),
            [Some("pair_qkv_128x32"), Some("few_qkv_128x128_rows"), Some("few_qkv_128x192_rows"), None]
        );
        // Those that one of two ranks has of Qwen3-14B.
        assert_eq!(
            [64, 128, 136, 192, 256].map(|tokens| qkv(28, 5120, tokens)),
            [
                Some("few_qkv_128x64_rows"),
                Some("few_qkv_128x64_paired"),
                Some("few_qkv_128x96_paired"),
                Some("few_qkv_128x96_paired"),
                Some("few_qkv_128x128_rows"),
            ]
        );
        // All of Qwen3-0.6B, of which a block has all columns.
        let qkv = [32, 33, 128, 129].map(|tokens| picked(of, Kind::Qkv, [4096, 1024, tokens]));
        assert_eq!(
            qkv,
            [
                Some("few_qkv_64x32"),
                Some("pair_qkv_128x32"),
                Some("pair_qkv_128x32"),
                Some("pair_qkv_128x64")
            ]
        );
        let gate_up = [1, 40, 64, 128, 192, 193].map(|tokens| picked(of, Kind::GateUp, [6144, 1024, tokens]));
        assert_eq!(
            gate_up,
            [
                Some("few_gate_up_64x16"),
                Some("batch_gate_up_64x48"),
                Some("batch_gate_up_64x64"),
                Some("batch_gate_up_64x128"),
                Some("batch_gate_up_192x192"),
                None
            ]
        );
        // Gate and up of Qwen3's 1.7B and 8B, Llama's 1B and Qwen2.5's 7B.
        let gate_up = |rows, cols, tokens| picked(of_large, Kind::GateUp, [rows, cols, tokens]);
        assert_eq!(gate_up(12_288, 2048, 48), Some("few_gate_up_64x48"));
        assert_eq!(gate_up(16_384, 2048, 64), Some("few_gate_up_64x64"));
        assert_eq!(
            [32, 48, 49].map(|tokens| gate_up(24_576, 4096, tokens)),
            [Some("few_gate_up_64x32"), Some("few_gate_up_192x48"), None]
        );
        assert_eq!([48, 64].map(|tokens| gate_up(37_888, 3584, tokens)), [None; 2]);
        assert_eq!(
            [128, 129, 200, 240, 241].map(|tokens| gate_up(37_888, 3584, tokens)),
            [
                None,
                Some("batch_gate_up_192x144"),
                Some("batch_gate_up_192x208"),
                Some("batch_gate_up_192x240"),
                None
            ]
        );
        assert_eq!(
            [256, 257].map(|tokens| gate_up(24_576, 4096, tokens)),
            [Some("batch_gate_up_192x256"), None]
        );
    }

    #[test]
    fn a_tilings_ring_fits_its_share_of_shared_memory_and_holds_the_sums() {
        let kinds = [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head];
        let cases = kinds.into_iter().flat_map(|kind| [64, 192, 3072, 17408].map(|cols| (kind, cols)));
        for (kind, cols) in cases {
            let shape = Shape {
                rows: 1024,
                cols,
                tokens: 1,
                slices: kind.slices(cols, SLICING.slices(cols as usize)),
            };
            for tiling in [of, of_large, of_half].into_iter().flat_map(|of| of(kind)) {
                let stages = tiling.stages(&shape);
                assert!(tiling.ring().holds(stages, tiling.shared), "{cols} columns, {tiling:?}");
            }
        }
    }
}
