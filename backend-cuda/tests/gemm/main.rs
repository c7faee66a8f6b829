//! Matrix products on the device: what each epilogue writes is the definition's value within rounding, and a token's
//! bits do not depend on how many tokens are multiplied with it, nor on the share of an SM that the product has. How that is held is in
//! `bench.rs`; what each epilogue is held to, in a file of its own.

mod added;
mod bench;
#[path = "../support/fp8.rs"]
mod fp8;
mod gate_up;
mod plain;
mod qkv;
#[path = "../support/mod.rs"]
mod support;

use added::{ranks_sums, residual};
use bench::{Operands, on_every_set, without_margin};
use gate_up::gate_up;
use half::{bf16, f16};
use minisgl_core::backend::Element;
use minisgl_cuda::ops::gemm::{Head, RankSums, Rows};
use plain::{head, linear};
use qkv::{ALL, Has, Heads, qkv};
use support::taken;

/// Rows and columns of a matrix that L2 does not hold beside x, for which there are other tilings. It has neither whole
/// tiles of rows nor whole bands of them.
const LARGE: (usize, usize) = (2600, 5120);
/// Rows and columns of a third, so few and so many that clusters share out the slices of every kind of tile.
const DEEP: (usize, usize) = (2600, 12_288);
/// Rows and columns of two whose blocks meet in memory, with an odd number of tiles of 64 rows and with an even one.
const APART: [(usize, usize); 2] = [(1984, 4608), (1992, 8256)];
/// Gates and columns of another, with so many rows that the widest tiles are the quickest for the most tokens.
const WIDE: (usize, usize) = (4024, 1600);
/// The same of matrices whose rows give each multiprocessor one tile of 144, 192, 208, 224 or 288 rows.
const TALL: [(usize, usize); 5] = [(8960, 704), (10_000, 640), (13_000, 512), (13_904, 512), (17_000, 384)];

#[test]
#[ignore = "needs a GPU"]
fn a_linear_layers_rows_are_the_definitions_and_independent_of_the_batch() {
    on_every_set(|gpu| {
        for (rows, cols) in taken([(192, 192), (64, 64), (320, 72), (1024, 1024)]) {
            linear(gpu, rows, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn logits_are_the_definitions_and_independent_of_the_batch() {
    on_every_set(|gpu| {
        for (rows, cols) in taken([(768, 192), (1024, 64), (1001, 320), (4096, 1024)]) {
            head(gpu, rows, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn the_residual_stream_grows_by_the_product_and_its_squares_are_summed() {
    on_every_set(|gpu| {
        for (rows, cols) in taken([
            (192, 320),
            (64, 64),
            (192, 192),
            (1280, 1024),
            (2048, 512),
            (1024, 3072),
            LARGE,
            DEEP,
            (1024, 2048),
            (1024, 8192),
            (4096, 3072),
            (4000, 3200),
            (5000, 2560),
            (5000, 8256),
            APART[0],
            APART[1],
            (2520, 4096),
        ]) {
            residual(gpu, rows, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn sums_that_blocks_leave_to_who_comes_last_have_the_same_bits() {
    on_every_set(|gpu| {
        for (rows, cols) in taken(APART) {
            // None waits; some do not; nearly all find what they look for.
            for looks in [0, 3, 30] {
                gpu.gemm.look_for_others(looks);
                residual(gpu, rows, cols);
            }
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn ranks_sums_added_as_a_tree_have_the_bits_of_the_whole_product() {
    on_every_set(|gpu| {
        for (rows, cols) in taken([
            (1000, 896),
            (192, 320),
            (1024, 2048),
            (1024, 3072),
            (896, 4864),
            LARGE,
            DEEP,
            (4096, 6144),
        ]) {
            ranks_sums(gpu, rows, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn slices_that_no_kernel_adds_are_refused() {
    on_every_set(|gpu| {
        let operands = Operands::new(gpu, 64, 128);
        let (w, x) = operands.on_device;
        let out = gpu.poisoned(64 * 2);
        let (x, sums) = (Rows { address: x.address(), there: 1 }, RankSums::here(out.address()));
        for slices in [0, 3, 4] {
            let launched = gpu.gemm.launch(gpu.cuda.launcher(), w.sliced(slices), x, 1, gpu.share, &sums);
            assert!(launched.unwrap_err().to_string().contains("slices of 128 columns"), "{slices}");
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn gate_and_up_meet_in_the_right_pairs() {
    on_every_set(|gpu| {
        let large = (LARGE.0, LARGE.1 / 2);
        let [least, small, between, medium, tall] = TALL;
        for (intermediate, cols) in
            taken([(320, 192), (32, 64), (3072, 1024), large, small, between, medium, tall, WIDE, least])
        {
            gate_up(gpu, intermediate, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn queries_keys_and_values_are_normed_turned_and_put_in_their_places() {
    on_every_set(|gpu| {
        let heads = |q, kv, dim, page_size| Heads { q, kv, dim, page_size };
        for (heads, cols) in taken([
            (heads(2, 2, 128, 32), 320),
            (heads(2, 1, 64, 16), 64),
            (heads(3, 1, 64, 16), 192),
            (heads(16, 8, 128, 16), 1024),
            (heads(24, 8, 128, 16), LARGE.1 / 2),
            (heads(6, 2, 128, 16), 328),
            (heads(32, 4, 128, 16), 2048),
            (heads(32, 8, 128, 16), LARGE.1 / 2),
        ]) {
            qkv(gpu, heads, cols, Has { bias: false, ..ALL });
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn biases_head_norms_and_rope_are_there_or_not() {
    let none = Has { bias: false, norms: false, rope: false };
    let bias = Has { bias: true, ..none };
    on_every_set(|gpu| {
        let heads = |q, kv, dim, page_size| Heads { q, kv, dim, page_size };
        for (heads, cols, has) in taken([
            (heads(9, 3, 64, 16), 576, Has { rope: true, ..none }),
            (heads(14, 2, 64, 16), 896, Has { rope: true, ..bias }),
            (heads(28, 4, 128, 16), 3584, Has { rope: true, ..bias }),
            (heads(25, 5, 128, 16), 3072, Has { rope: true, ..bias }),
            (heads(16, 4, 128, 32), 2048, none),
            (heads(3, 1, 64, 16), 192, ALL),
            (heads(4, 2, 128, 16), 256, bias),
            (heads(4, 2, 128, 16), 256, Has { rope: false, ..ALL }),
        ]) {
            qkv(gpu, heads, cols, has);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn logits_beyond_f16_are_clamped() {
    on_every_set(|gpu| {
        let (rows, cols) = (128, 64);
        let w: Vec<bf16> = (0..rows * cols)
            .map(|i| bf16::from_f32(if i / cols % 2 == 0 { 200.0 } else { -200.0 }))
            .collect();
        let w = gpu.weight(&w, rows, cols);
        let x = gpu.upload(Element::Activation, &vec![bf16::from_f32(100.0); 16 * cols]);
        let out = gpu.poisoned(16 * rows);
        gpu.launch(w, x, 16, &Head { out: out.address() });
        let raw = without_margin(gpu.download(out), 16 * rows, "head");
        for (i, bits) in raw.iter().enumerate() {
            let want = if i % rows % 2 == 0 { 65504.0 } else { -65504.0 };
            assert_eq!(f16::from_bits(*bits).to_f32(), want, "output {i}");
        }
    });
}
