//! Paged attention against float64, and against itself: no bit of a token depends on what runs beside it, nor how. What is attended
//! to is a world (`world.rs`).

#[path = "../support/fp8.rs"]
mod fp8;
#[path = "../support/mod.rs"]
mod support;
mod world;

use support::taken;
use world::*;

fn decode_is_right(kind: Kind, heads: Heads, page_size: u32, lengths: &[u32]) {
    let mut world = World::new(kind, heads, page_size, lengths);
    let spans: Vec<_> =
        (0..).zip(lengths).map(|(slot, n)| Span { slot, position: n - 1, tokens: 1 }).collect();
    let result = world.run(spans.len(), &spans);
    println!("{heads:?}, page size {page_size}, {} rows", lengths.len());
    world.check(&spans, &result, 64);
}

/// Every head ratio that models have, one that is no power of two, and one beyond a tile's eight columns.
fn head_shapes() -> Vec<Heads> {
    let mut shapes = Vec::new();
    for head_dim in [64, 128] {
        shapes.extend(
            taken([(4, 4), (8, 2), (8, 1), (3, 5), (2, 8), (2, 12)]).map(|(kv_heads, group)| Heads {
                kv_heads,
                group,
                head_dim,
            }),
        );
    }
    shapes
}

const QWEN3: Heads = Heads { kv_heads: 8, group: 2, head_dim: 128 };

#[test]
#[ignore = "needs a GPU"]
fn decode_of_any_length_and_head_ratio_is_right() {
    for kind in KINDS {
        for (i, heads) in head_shapes().into_iter().enumerate() {
            decode_is_right(kind, heads, [16, 32, 64][i % 3], &LENGTHS);
        }
        for page_size in taken([16, 256, 32, 64]) {
            decode_is_right(kind, QWEN3, page_size, &LENGTHS);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn decode_of_one_row_is_right() {
    for kind in KINDS {
        for length in taken(LENGTHS) {
            decode_is_right(kind, QWEN3, 16, &[length]);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn decode_of_many_rows_is_right() {
    for kind in KINDS {
        for (rows, longest) in taken([(31, 700), (2, 3000), (255, 300), (256, 1100)]) {
            decode_is_right(kind, QWEN3, 16, &random_lengths(rows, longest));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn decode_of_a_long_sequence_is_right() {
    for kind in KINDS {
        decode_is_right(kind, Heads { kv_heads: 2, group: 8, head_dim: 128 }, 16, &[20_011, 5, 300]);
    }
}

/// The share of a warp grows with the batch, so a row is cut elsewhere each time.
#[test]
#[ignore = "needs a GPU"]
fn a_row_decodes_to_the_same_bits_alone_and_among_255_others() {
    for kind in KINDS {
        for heads in taken([
            QWEN3,
            Heads { kv_heads: 2, group: 5, head_dim: 128 },
            Heads { kv_heads: 4, group: 1, head_dim: 64 },
            Heads { kv_heads: 4, group: 4, head_dim: 64 },
        ]) {
            let mut lengths = random_lengths(256, 600);
            lengths[..LENGTHS.len()].copy_from_slice(&LENGTHS);
            let mut world = World::new(kind, heads, 16, &lengths);
            let width = world.width();
            let together = world.decode((0..).zip(lengths.iter().copied()));
            for count in [1, 7, 60] {
                for first in [0, 9, 11, 12, 150] {
                    let some = first..first + count;
                    let result = world.decode(some.clone().map(|slot| (slot as u32, lengths[slot])));
                    let expected = &together[some.start * width..some.end * width];
                    assert!(bits(&result) == bits(expected), "{kind:?}, {heads:?}: rows {some:?}");
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn padding_rows_harm_nobody() {
    for kind in KINDS {
        let lengths = random_lengths(5, 900);
        let mut world = World::new(kind, QWEN3, 16, &lengths);
        let alone = world.decode((0..).zip(lengths.iter().copied()));
        // Slot 5 is the dummy, whose page holds NaN here.
        let rows = (0..).zip(lengths.iter().copied()).take(3).chain([(5, 1); 2]);
        let padded = world.decode(rows);
        let used = 3 * world.width();
        assert!(bits(&padded[..used]) == bits(&alone[..used]));
    }
}

fn prefill_is_right(kind: Kind, heads: Heads, page_size: u32, spans: &[(u32, u32)]) {
    let lengths: Vec<u32> = spans.iter().map(|(position, tokens)| position + tokens).collect();
    let mut world = World::new(kind, heads, page_size, &lengths);
    let spans: Vec<_> =
        (0..).zip(spans).map(|(slot, &(position, tokens))| Span { slot, position, tokens }).collect();
    let result = world.prefill(&spans);
    println!("{heads:?}, page size {page_size}, {} rows", spans.len());
    world.check(&spans, &result, 64);
}

#[test]
#[ignore = "needs a GPU"]
fn prefill_of_whole_prompts_chunks_and_prefix_hits_is_right() {
    let whole: Vec<_> = LENGTHS.iter().map(|length| (0, *length)).collect();
    let later = [(1, 1), (16, 100), (100, 28), (127, 2), (128, 130), (300, 512), (1000, 1), (511, 77)];
    for kind in KINDS {
        for (i, heads) in head_shapes().into_iter().enumerate() {
            let page_size = [16, 32, 64][i % 3];
            prefill_is_right(kind, heads, page_size, &whole[..11]);
            prefill_is_right(kind, heads, page_size, &later);
        }
        prefill_is_right(kind, QWEN3, 256, &later);
        prefill_is_right(kind, QWEN3, 16, &whole);
        prefill_is_right(kind, QWEN3, 16, &[(0, 1)]);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_prompt_gives_the_same_bits_whole_and_in_chunks() {
    for kind in KINDS {
        for heads in taken([
            QWEN3,
            Heads { kv_heads: 2, group: 5, head_dim: 128 },
            Heads { kv_heads: 2, group: 4, head_dim: 64 },
        ]) {
            let mut world = World::new(kind, heads, 16, &[1111, 400]);
            let width = world.width();
            let whole = world.prefill(&[Span { slot: 0, position: 0, tokens: 1111 }]);
            for chunk in taken([333, 64, 100, 640]) {
                for position in (0..1111).step_by(chunk) {
                    let tokens = (chunk as u32).min(1111 - position);
                    let other = Span { slot: 1, position: 16, tokens: 370 };
                    let spans = [other, Span { slot: 0, position, tokens }];
                    let result = world.prefill(&spans);
                    let expected = &whole[position as usize * width..][..tokens as usize * width];
                    assert!(
                        bits(&result[370 * width..]) == bits(expected),
                        "{kind:?}, {heads:?}: {chunk} from {position}"
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_token_gives_the_same_bits_in_prefill_and_in_decode() {
    for kind in KINDS {
        for heads in head_shapes() {
            let length = LENGTHS[11];
            let mut world = World::new(kind, heads, 16, &[length]);
            let width = world.width();
            let prefilled = world.prefill(&[Span { slot: 0, position: 0, tokens: length }]);
            for position in LENGTHS.iter().map(|n| n - 1).filter(|position| *position < length) {
                let decoded = world.decode([(0, position + 1)].into_iter());
                let expected = &prefilled[position as usize * width..][..width];
                assert!(bits(&decoded) == bits(expected), "{kind:?}, {heads:?}: position {position}");
            }
        }
    }
}

/// Lengths around the ends of spans, and of many of them: decode cuts few rows into pieces and leaves many whole, prefill of few
/// tokens is split, and that of a whole prompt is not.
#[test]
#[ignore = "needs a GPU"]
fn tokens_of_long_sequences_give_the_same_bits_in_every_way() {
    for kind in KINDS {
        for (heads, window) in taken([
            (QWEN3, ALL),
            (Heads { kv_heads: 2, group: 5, head_dim: 128 }, 5000),
            (Heads { kv_heads: 4, group: 4, head_dim: 64 }, ALL),
        ]) {
            let slots = [&[9_000, 9_000, 4_200][..], &[1; 297]].concat(); // places for many rows
            let mut world = World::windowed(kind, heads, 16, &slots, window, &vec![0; slots.len()]);
            let width = world.width();
            let whole = world.prefill(&[Span { slot: 0, position: 0, tokens: 9_000 }]);
            let expected = |position: u32, tokens: u32| {
                bits(&whole[position as usize * width..][..tokens as usize * width])
            };
            world.check(&[Span { slot: 0, position: 0, tokens: 9_000 }], &whole, 16);
            for (position, tokens) in
                [(2_000, 100), (2_047, 1), (4_000, 300), (8_190, 64), (8_191, 300), (6_144, 1)]
            {
                let span = Span { slot: 0, position, tokens };
                for _ in 0..2 {
                    let alone = world.prefill(&[span]);
                    assert!(
                        bits(&alone) == expected(position, tokens),
                        "{kind:?}, {heads:?}: {span:?} alone"
                    );
                }
                let other = Span { slot: 2, position: 4_000, tokens: 200 };
                let mixed = world
                    .run(2, &[Span { tokens: 1, ..span }, Span { slot: 1, tokens: 1, ..span }, other, span]);
                assert!(
                    bits(&mixed[..width]) == expected(position, 1),
                    "{kind:?}, {heads:?}: {span:?} decodes"
                );
                assert!(
                    bits(&mixed[202 * width..]) == expected(position, tokens),
                    "{kind:?}, {heads:?}: {span:?} beside others"
                );
            }
            let lengths = [2_048, 2_049, 4_096, 6_143, 8_192, 8_193, 9_000];
            for length in lengths {
                let decoded = world.decode([(0, length)].into_iter());
                assert!(bits(&decoded) == expected(length - 1, 1), "{kind:?}, {heads:?}: {length} tokens");
            }
            let many = world.decode((0..slots.len()).map(|row| (0, lengths[row % lengths.len()])));
            for (row, decoded) in many.chunks(width).enumerate() {
                let length = lengths[row % lengths.len()];
                assert!(
                    bits(decoded) == expected(length - 1, 1),
                    "{kind:?}, {heads:?}: {length} tokens in row {row}"
                );
            }
        }
    }
}

/// Both kinds of rows share the step's plan words and queries, and each kernel counts turns of its own; the steps come twice,
/// so that a count that is not back at zero shows.
#[test]
#[ignore = "needs a GPU"]
fn rows_give_the_same_bits_in_a_mixed_step_and_in_steps_of_their_own() {
    let chunks = [(0, 300), (100, 28), (128, 130), (1000, 1), (511, 77), (0, 1), (300, 512)];
    for kind in KINDS {
        for (heads, window) in
            taken([(QWEN3, ALL), (Heads { kv_heads: 3, group: 3, head_dim: 64 }, ALL), (QWEN3, 200)])
        {
            for decode_rows in [1, 9, 70] {
                let mut lengths = random_lengths(decode_rows, 1500);
                lengths.extend(chunks.iter().map(|(position, tokens)| position + tokens));
                let begins = vec![0; lengths.len()];
                let mut world = World::windowed(kind, heads, 16, &lengths, window, &begins);
                let split = decode_rows * world.width();
                let decoding = (0..).zip(&lengths[..decode_rows]);
                let decoding: Vec<_> =
                    decoding.map(|(slot, n)| Span { slot, position: n - 1, tokens: 1 }).collect();
                let prefilling: Vec<_> = (decode_rows as u32..)
                    .zip(chunks)
                    .map(|(slot, (position, tokens))| Span { slot, position, tokens })
                    .collect();
                let (alone, prompts) = (world.run(decode_rows, &decoding), world.prefill(&prefilling));
                for _ in 0..2 {
                    let mixed = world.run(decode_rows, &[&decoding[..], &prefilling].concat());
                    assert!(
                        bits(&mixed[..split]) == bits(&alone),
                        "{kind:?}, {heads:?}: {decode_rows} decode rows"
                    );
                    assert!(bits(&mixed[split..]) == bits(&prompts), "beside {decode_rows} decode rows");
                }
            }
        }
    }
}

/// Windows within a tile, across tiles, a leaf and pages; and wider than most sequences.
const WINDOWS: [u32; 7] = [1, 31, 32, 128, 200, 700, 4096];
/// One of each decode kernel that knows windows.
const WINDOWED: [Heads; 3] =
    [QWEN3, Heads { kv_heads: 3, group: 3, head_dim: 64 }, Heads { kv_heads: 4, group: 4, head_dim: 64 }];

/// What lies before the window is NaN, as it may be once its page is somebody else's.
#[test]
#[ignore = "needs a GPU"]
fn decode_sees_its_window_alone() {
    for kind in KINDS {
        for (i, window) in taken(WINDOWS).enumerate() {
            let heads = WINDOWED[i % WINDOWED.len()];
            for lengths in [LENGTHS.to_vec(), random_lengths(70, 1500), vec![2047]] {
                let begins: Vec<u32> = lengths.iter().map(|length| length.saturating_sub(window)).collect();
                let mut world = World::windowed(kind, heads, [16, 64][i % 2], &lengths, window, &begins);
                let spans: Vec<_> =
                    (0..).zip(&lengths).map(|(slot, n)| Span { slot, position: n - 1, tokens: 1 }).collect();
                let result = world.run(spans.len(), &spans);
                println!("window {window}, {heads:?}, {} rows", lengths.len());
                world.check(&spans, &result, 64);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn prefill_sees_its_windows_alone() {
    let spans = [(0, 300), (1, 1), (300, 512), (1000, 1), (511, 77), (900, 300), (128, 128), (40, 1)];
    for kind in KINDS {
        for (i, window) in taken(WINDOWS).enumerate() {
            let heads = WINDOWED[i % WINDOWED.len()];
            let lengths: Vec<u32> = spans.iter().map(|(position, tokens)| position + tokens).collect();
            let begins: Vec<u32> =
                spans.iter().map(|(position, _)| (position + 1_u32).saturating_sub(window)).collect();
            let mut world = World::windowed(kind, heads, [16, 64][i % 2], &lengths, window, &begins);
            let spans: Vec<_> =
                (0..).zip(spans).map(|(slot, (position, tokens))| Span { slot, position, tokens }).collect();
            let result = world.prefill(&spans);
            println!("window {window}, {heads:?}");
            world.check(&spans, &result, 64);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn with_a_window_a_token_gives_the_same_bits_in_prefill_and_in_decode_alone_and_among_others() {
    for kind in KINDS {
        for window in taken(WINDOWS) {
            let lengths = [1000, 70, 333];
            let mut world = World::windowed(kind, QWEN3, 16, &lengths, window, &[0; 3]);
            let width = world.width();
            let prefilled = world.prefill(&[Span { slot: 0, position: 0, tokens: 1000 }]);
            for position in LENGTHS.iter().map(|n| n - 1).filter(|position| *position < 1000) {
                let expected = &prefilled[position as usize * width..][..width];
                let alone = world.decode([(0, position + 1)].into_iter());
                assert!(bits(&alone) == bits(expected), "window {window}: position {position} alone");
                let beside = world.decode([(1, 70), (0, position + 1), (2, 333)].into_iter());
                assert!(
                    bits(&beside[width..2 * width]) == bits(expected),
                    "window {window}: position {position}"
                );
            }
            for chunk in [100, 640] {
                let span = Span { slot: 0, position: chunk, tokens: 333 };
                let result = world.prefill(&[span]);
                let expected = &prefilled[chunk as usize * width..][..333 * width];
                assert!(bits(&result) == bits(expected), "window {window}: from {chunk}");
            }
        }
    }
}
