use minisgl_kernels::HOPPER;
use minisgl_kernels::attention::Set;

use super::super::tiling::{Team, Tiling};
use super::{fitting, half, large};
use crate::declared::{source, threads_of};
use crate::ops::gemm::epilogue::Kind;
use crate::ops::gemm::many::Partials;
use crate::ops::gemm::product::Block;
use crate::ops::gemm::shape::Shape;
use crate::weight::SLICING;

#[test]
fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
    let kinds = [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head];
    let lists = [fitting::of, large::of, half::of];
    for tiling in kinds.into_iter().flat_map(|kind| lists.map(|of| of(kind))).flatten() {
        let in_fp8 = tiling.fp8.into_iter().flatten();
        let all = std::iter::once(tiling.kernel).chain(tiling.normed).chain(in_fp8);
        for name in all {
            assert_eq!(threads_of(HOPPER, name), tiling.threads(), "{name}");
        }
    }
}

#[test]
fn both_sides_share_out_a_batchs_rows_in_the_same_pieces() {
    let kernels = source("hopper/gemm/gemm_few_gate_up.cu");
    for tiling in [fitting::of, large::of].map(|of| of(Kind::GateUp)).into_iter().flatten() {
        let (Tiling { kernel, team, .. }, Block { rows, tokens }) = (tiling, tiling.block);
        if let Team::Batch { piece } = team {
            let line = format!("BATCH({kernel}, {}, {tokens}, {piece}, GateUp)", rows / 64);
            assert!(kernels.contains(&line), "{line}");
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
        assert!(half::of(kind).iter().all(|tiling| tiling.shared <= Tiling::HALF), "{kind:?}");
    }
}

/// Of a product with so many rows, columns and tokens, the kernel that the list has for it.
fn picked(of: fn(Kind) -> &'static [Tiling], kind: Kind, sizes: [u32; 3]) -> Option<&'static str> {
    let [rows, cols, tokens] = sizes;
    let shape = Shape { rows, cols, tokens, slices: kind.slices(cols, SLICING.slices(cols as usize)) };
    of(kind).iter().find(|tiling| tiling.suits(&shape)).map(|tiling| tiling.kernel)
}

#[test]
fn blocks_are_as_large_as_leaves_the_device_full_of_o_and_down() {
    // Qwen3-0.6B's o, and that of Llama's 1B, which has twice the rows.
    let o = |rows, tokens| picked(fitting::of, Kind::Residual, [rows, 2048, tokens]);
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
    // Down of Qwen3-1.7B, and o of its 4B.
    let down = |tokens| picked(fitting::of, Kind::Residual, [2048, 6144, tokens]);
    assert_eq!(
        [64, 96, 128, 160].map(down),
        [
            Some("few_residual_64x64"),
            Some("apart_residual_64x96"),
            Some("apart_residual_64x128"),
            Some("apart_residual_128x80"),
        ]
    );
    let o = |tokens| picked(fitting::of, Kind::Residual, [2560, 4096, tokens]);
    assert_eq!(
        [64, 128, 192, 224, 256].map(o),
        [
            Some("few_residual_64x64"),
            Some("few_residual_128x64_2_paired"),
            Some("few_residual_192x96_paired"),
            Some("few_residual_192x112_paired"),
            None,
        ]
    );
}

#[test]
fn blocks_are_as_large_as_leaves_the_device_full_of_a_large_o_and_down() {
    // Of matrices that L2 does not hold: Qwen2.5's 7B and Qwen3-14B.
    let down = |rows, cols| picked(large::of, Kind::Residual, [rows, cols, 128]);
    assert_eq!(down(3584, 18_944), Some("few_residual_128x128"));
    assert_eq!(down(3584, 3584), Some("few_residual_128x64_2_paired"));
    assert_eq!(down(4096, 14_336), Some("few_residual_192x128"));
    // And down of Qwen3-8B and 14B, and of Llama's 1B; of few tokens, of Qwen2.5's 7B as well.
    let down = |rows, cols| [16, 32].map(|tokens| picked(large::of, Kind::Residual, [rows, cols, tokens]));
    assert_eq!(down(4096, 12_288), [Some("few_residual_64x16_2"), Some("few_residual_64x32_2")]);
    let third = large::of(Kind::Residual).iter().filter(|tiling| tiling.shared == Tiling::THIRD);
    let third: Vec<_> = third.map(|tiling| Some(tiling.kernel)).collect();
    assert_eq!(down(5120, 17_408)[..], third[..]);
    assert_eq!(down(3584, 18_944), [Some("few_residual_64x16"), Some("few_residual_64x32")]);
    let down =
        |rows, cols| [64, 96, 160].map(|tokens| picked(large::of, Kind::Residual, [rows, cols, tokens]));
    assert_eq!(
        down(4096, 12_288),
        [Some("few_residual_64x64_2"), Some("few_residual_192x128"), Some("few_residual_128x80_2")]
    );
    assert_eq!(
        down(5120, 17_408),
        [Some("few_residual_192x64_rows"), Some("few_residual_192x128"), Some("few_residual_192x160_rows")]
    );
    assert_eq!(
        down(2048, 8192),
        [Some("apart_residual_64x64"), Some("apart_residual_64x96"), Some("apart_residual_128x80")]
    );
    let o = |tokens| picked(large::of, Kind::Residual, [4096, 4096, tokens]);
    assert_eq!(
        [64, 96, 128].map(o),
        [Some("few_residual_64x64_2"), Some("few_residual_128x96_2"), Some("few_residual_128x64_2"),]
    );
    let o = |rows, tokens| picked(large::of, Kind::Residual, [rows, rows, tokens]);
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
    // Down of more than 128 tokens, of Qwen2.5's 7B, Qwen3's 8B and 4B, and Llama's 1B.
    let down = |rows, cols| [200, 256].map(|tokens| picked(large::of, Kind::Residual, [rows, cols, tokens]));
    assert_eq!(down(3584, 18_944), [Some("few_residual_128x208_rows"), Some("few_residual_128x256_rows")]);
    assert_eq!(down(4096, 12_288), [Some("few_residual_128x104_2"), Some("few_residual_128x128_2")]);
    assert_eq!(down(2560, 9728), [Some("few_residual_192x112_paired"), Some("few_residual_192x128_paired")]);
    assert_eq!(down(2048, 8192), [Some("apart_residual_128x104"), Some("apart_residual_128x128")]);
    assert_eq!(down(5120, 25_600), [Some("few_residual_192x208_rows"), Some("few_residual_192x256_rows")]);
}

#[test]
fn blocks_are_as_large_as_leaves_the_device_full_of_a_ranks_sums() {
    // Of two ranks each has half of Qwen3-14B's columns, and of the slices.
    let of_two = |cols, tokens| {
        let shape = Shape { rows: 5120, cols, tokens, slices: 2 };
        let tilings = large::of(Kind::RankSums);
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
}

#[test]
fn blocks_are_as_large_as_leaves_the_device_full_of_queries_keys_and_values() {
    // q, k and v of Llama's 1B are 48 heads of 64, of Qwen3's 1.7B 32 of 128.
    let qkv = |heads: u32, tokens| picked(fitting::of, Kind::Qkv, [heads * 128, 2048, tokens]);
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
    let qkv_40 =
        [64, 128, 144, 192, 256].map(|tokens| picked(fitting::of, Kind::Qkv, [40 * 128, 2048, tokens]));
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
    let qkv = |heads: u32, cols, tokens| picked(large::of, Kind::Qkv, [heads * 128, cols, tokens]);
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
    let qkv = [32, 33, 128, 129].map(|tokens| picked(fitting::of, Kind::Qkv, [4096, 1024, tokens]));
    assert_eq!(
        qkv,
        [Some("few_qkv_64x32"), Some("pair_qkv_128x32"), Some("pair_qkv_128x32"), Some("pair_qkv_128x64")]
    );
}

#[test]
fn blocks_are_as_large_as_leaves_the_device_full_of_gates_and_ups() {
    let gate_up =
        [1, 40, 64, 128, 192, 193].map(|tokens| picked(fitting::of, Kind::GateUp, [6144, 1024, tokens]));
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
    let gate_up = |rows, cols, tokens| picked(large::of, Kind::GateUp, [rows, cols, tokens]);
    assert_eq!(gate_up(12_288, 2048, 48), Some("few_gate_up_64x48"));
    assert_eq!(gate_up(16_384, 2048, 64), Some("few_gate_up_64x64"));
    assert_eq!(
        [16, 32, 48, 64, 65].map(|tokens| gate_up(24_576, 4096, tokens)),
        [
            Some("batch_gate_up_192x16"),
            Some("batch_gate_up_192x32"),
            Some("batch_gate_up_192x48"),
            Some("batch_gate_up_192x64"),
            None
        ]
    );
    assert_eq!(gate_up(16_384, 2048, 16), Some("few_gate_up_64x16"));
    assert_eq!(
        [64, 128, 129, 200, 240, 241].map(|tokens| gate_up(37_888, 3584, tokens)),
        [
            Some("batch_gate_up_192x64"),
            None,
            Some("batch_gate_up_192x144"),
            Some("batch_gate_up_192x208"),
            Some("batch_gate_up_192x240"),
            None
        ]
    );
    assert_eq!([256, 257].map(|tokens| gate_up(24_576, 4096, tokens)), [Some("batch_gate_up_192x256"), None]);
}

#[test]
fn partial_sums_of_blocks_that_meet_in_memory_fit_their_buffer() {
    let kinds = [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head];
    let lists = [fitting::of, large::of, half::of];
    let all = kinds.into_iter().flat_map(|kind| lists.map(|of| of(kind))).flatten();
    for tiling in all.filter(|tiling| tiling.meets_in_memory()) {
        // Of each part as many eights of tokens as of the largest.
        let Block { rows, tokens } = tiling.block;
        let block = rows * tokens.next_multiple_of(8 * SLICING.most) * 4;
        assert!(u64::from(tiling.blocks_max) * u64::from(block) <= Partials::BYTES as u64, "{tiling:?}");
    }
}

#[test]
fn a_tilings_ring_fits_its_share_of_shared_memory_and_holds_the_sums() {
    let kinds = [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head];
    let cases = kinds.into_iter().flat_map(|kind| [64, 192, 3072, 17408].map(|cols| (kind, cols)));
    for (kind, cols) in cases {
        let shape =
            Shape { rows: 1024, cols, tokens: 1, slices: kind.slices(cols, SLICING.slices(cols as usize)) };
        for tiling in [fitting::of, large::of, half::of].into_iter().flat_map(|of| of(kind)) {
            let stages = tiling.stages(&shape);
            assert!(tiling.ring().holds(stages, tiling.shared), "{cols} columns, {tiling:?}");
        }
    }
}
