//! Each operation against an independent computation in f64, straight from its definition, on random inputs.

mod common;

use std::sync::Arc;

use common::{Machine, Random, Sequence, assert_close, dims, greedy, in_time, limits, spec, tensor};
use minisgl_core::backend::{Device, Ops, WeightRole};
use minisgl_core::batch::{LAST_TOKEN, TOKEN_WORDS};
use minisgl_core::fp8;
use minisgl_core::spec::{
    Activation, Attention, DecoderSpec, Fp8, Inputs, NormForm, ScaleBlock, WeightFormat,
};
use minisgl_core::tensor::{Dtype, HostTensor, Scales, TensorData};
use minisgl_cpu::Heads;

const DTYPES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// `[tokens, rows]` of `weight [rows, cols] @ x [tokens, cols]`.
fn product(x: &[f32], weight: &[f32], cols: usize) -> Vec<f64> {
    x.chunks(cols).flat_map(|x| weight.chunks(cols).map(move |w| dot(x, w))).collect()
}

fn normed(x: &[f64], scale: &[f32], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(scale).map(|(x, scale)| x / (mean + eps).sqrt() * f64::from(*scale)).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// A machine for operations that look at no sequence.
fn machine(random: &mut Random) -> Machine {
    Machine::new(dims(8, 2, 1, 4, 8, 16), limits(2, 16, 4), random)
}

#[test]
fn a_linear_layer_is_a_matrix_product() {
    let mut random = Random(1);
    let mut machine = machine(&mut random);
    let shapes =
        [(1, 1, 1), (1, 8, 33), (2, 3, 7), (3, 128, 64), (5, 17, 100), (127, 9, 511), (131, 40, 513)];
    let shapes = shapes.into_iter().chain([(300, 1, 5), (4, 257, 1100)]);
    for (i, (tokens, rows, cols)) in in_time(shapes, 5).enumerate() {
        let (weight, values) = machine.weight(&mut random, rows, cols, DTYPES[i % 3]);
        let x = random.floats(tokens * cols);
        let (x_buffer, out) = (machine.floats(&x), machine.poisoned(tokens * rows));
        machine.cpu.linear(tokens as u32, x_buffer, weight, out).unwrap();
        let expected = product(&x, &values, cols);
        let what = format!("[{tokens}, {cols}] by [{rows}, {cols}]");
        assert_close(&what, &machine.read(out, tokens * rows), &expected, 1e-5);
    }
}

/// A random e4m3 matrix with a scale for each block, and the values that it holds.
fn fp8_matrix(
    random: &mut Random,
    [rows, cols]: [usize; 2],
    block: [usize; 2],
    inputs: Inputs,
) -> (HostTensor, Vec<f32>) {
    let across = cols.div_ceil(block[1]);
    let scales = random.floats(rows.div_ceil(block[0]) * across);
    let values: Vec<f32> = scales.iter().map(|scale| scale.abs() + 0.01).collect();
    let codes: Vec<u8> = random.floats(rows * cols).iter().map(|x| fp8::encode(100.0 * x)).collect();
    let scale = |i: usize| values[i / cols / block[0] * across + i % cols / block[1]];
    let weights =
        codes.iter().enumerate().map(|(i, code)| fp8::VALUES[usize::from(*code)] * scale(i)).collect();
    let scales = Arc::new(Scales { values, block, inputs, input_scale: Some(0.004) });
    let data = TensorData::Fp8 { owner: Arc::new(codes), range: 0..rows * cols, scales };
    (HostTensor { name: "fp8".into(), rows, cols, data }, weights)
}

#[test]
fn slices_are_windows_whose_products_are_added_in_pairs() {
    let mut random = Random(13);
    let mut machine = Machine::new(dims(8, 2, 1, 4, 8, 16), limits(8, 32, 4), &mut random);
    let data = TensorData::Uniform { seed: 9, low: -1.0, high: 1.0 };
    let dummy = HostTensor { name: "dummy".into(), rows: 37, cols: 4800, data };
    let stored = |dtype| {
        let values = Random(14).floats(37 * 4800);
        tensor(37, &values, dtype).0
    };
    let fp8 = fp8_matrix(&mut random, [37, 4800], [16, 70], Inputs::Plain).0;
    for whole in [dummy, stored(Dtype::Bf16), stored(Dtype::F32), fp8] {
        for (slices, tokens) in [(1, 5), (2, 1), (4, 3), (8, 131)] {
            // Rows and columns in the middle; slices are longer than a panel of the product.
            let part = whole.window(5..30, 100..4708);
            let x = random.floats(tokens * part.cols);
            let (buffer, out) = (machine.floats(&x), machine.poisoned(tokens * part.rows));
            let weight = machine.cpu.load(WeightRole::Sliced(slices), std::slice::from_ref(&part)).unwrap();
            machine.cpu.linear(tokens as u32, buffer, weight, out).unwrap();
            let width = part.cols / slices as usize;
            let mut sums: Vec<Vec<f32>> = (0..slices as usize)
                .map(|slice| {
                    let cols = slice * width..(slice + 1) * width;
                    let x: Vec<f32> = x.chunks(part.cols).flat_map(|x| x[cols.clone()].to_vec()).collect();
                    let (x, out) = (machine.floats(&x), machine.poisoned(tokens * part.rows));
                    let weight =
                        machine.cpu.load(WeightRole::Linear, &[part.window(0..part.rows, cols)]).unwrap();
                    machine.cpu.linear(tokens as u32, x, weight, out).unwrap();
                    machine.read(out, tokens * part.rows)
                })
                .collect();
            while sums.len() > 1 {
                let pairs =
                    sums.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect());
                sums = pairs.collect();
            }
            let given = machine.read(out, tokens * part.rows);
            assert!(given == sums[0], "{slices} slices of {whole:?}, {tokens} tokens");
        }
    }
    let odd = stored(Dtype::F32);
    let refused = machine.cpu.load(WeightRole::Sliced(8), &[odd.window(0..1, 0..12)]).unwrap_err();
    assert!(refused.to_string().contains("slices"), "{refused}");
}

/// The nearest of all numbers of e4m3, by trying them; `x` lies near no middle of two.
fn nearest(x: f64) -> f64 {
    let numbers =
        (0..=255u8).filter(|code| code & 0x7f != 0x7f).map(|code| f64::from(fp8::VALUES[usize::from(code)]));
    numbers.min_by(|a, b| (a - x).abs().total_cmp(&(b - x).abs())).unwrap()
}

#[test]
fn an_fp8_matrix_is_multiplied_by_its_scales_and_its_inputs_are_rounded() {
    let mut random = Random(11);
    // Blocks and groups that end within the matrix, and columns beyond a panel of the product.
    for [rows, cols] in [[5, 7], [70, 200], [33, 700]] {
        for (block, inputs) in [
            ([rows, cols], Inputs::Static),
            ([1, cols], Inputs::PerToken),
            ([32, 48], Inputs::PerGroup(48)),
            ([32, 48], Inputs::Plain),
        ] {
            let format = Fp8 { block: ScaleBlock::Row, inputs };
            let dims = dims(8, 2, 1, 4, 700, 16);
            let spec = DecoderSpec { weights: WeightFormat::Fp8(format), ..spec(dims) };
            let mut machine = Machine::of(&spec, limits(2, 16, 4), &mut random);
            let (tensor, weights) = fp8_matrix(&mut random, [rows, cols], block, inputs);
            let weight = machine.cpu.load(WeightRole::Linear, &[tensor]).unwrap();
            let x = random.floats(3 * cols);
            let group = |width: usize| {
                x.chunks(cols).flat_map(move |row| row.chunks(width)).flat_map(|group| {
                    let largest = group.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                    let scale = f64::from(largest / fp8::MAX);
                    group.iter().map(move |x| (nearest(f64::from(*x) / scale) * scale) as f32)
                })
            };
            let rounded: Vec<f32> = match inputs {
                Inputs::Plain => x.clone(),
                Inputs::PerToken => group(cols).collect(),
                Inputs::PerGroup(width) => group(width as usize).collect(),
                Inputs::Static => x
                    .iter()
                    .map(|x| (nearest(f64::from(*x) / f64::from(0.004f32)) * f64::from(0.004f32)) as f32)
                    .collect(),
            };
            let (x, out) = (machine.floats(&x), machine.poisoned(3 * rows));
            machine.cpu.linear(3, x, weight, out).unwrap();
            let what = format!("[{rows}, {cols}] in blocks of {block:?}, {inputs:?}");
            assert_close(&what, &machine.read(out, 3 * rows), &product(&rounded, &weights, cols), 1e-5);
        }
    }
}

#[test]
fn an_fp8_matrix_without_its_scales_is_refused() {
    let mut random = Random(12);
    let mut machine = machine(&mut random);
    let mut load = |change: &dyn Fn(&mut Scales)| {
        let (mut tensor, _) = fp8_matrix(&mut random, [8, 8], [4, 4], Inputs::Static);
        let TensorData::Fp8 { scales, .. } = &mut tensor.data else { unreachable!() };
        change(Arc::make_mut(scales));
        machine.cpu.load(WeightRole::Linear, &[tensor]).map_err(|error| error.to_string())
    };
    assert!(load(&|_| {}).is_ok());
    assert!(load(&|scales| scales.input_scale = None).unwrap_err().contains("does not have"));
    assert!(load(&|scales| scales.values.truncate(3)).unwrap_err().contains("one scale for each block"));
    assert!(load(&|scales| scales.block[1] = 0).unwrap_err().contains("no elements"));
}

#[test]
fn parts_of_a_weight_are_stacked() {
    let mut random = Random(2);
    let mut machine = machine(&mut random);
    let (cols, tokens) = (21, 5);
    let parts = [(3, Dtype::F32), (10, Dtype::Bf16), (6, Dtype::F16)];
    let parts = parts.map(|(rows, dtype)| tensor(rows, &random.floats(rows * cols), dtype));
    let tensors: Vec<_> = parts.iter().map(|(tensor, _)| tensor.clone()).collect();
    let values: Vec<f32> = parts.iter().flat_map(|(_, values)| values.clone()).collect();
    let weight = machine.cpu.load(WeightRole::Linear, &tensors).unwrap();

    let x = random.floats(tokens * cols);
    let (x_buffer, out) = (machine.floats(&x), machine.poisoned(tokens * 19));
    machine.cpu.linear(tokens as u32, x_buffer, weight, out).unwrap();
    assert_close("stacked", &machine.read(out, tokens * 19), &product(&x, &values, cols), 1e-5);
}

#[test]
fn gate_and_up_meet_in_their_activation() {
    let mut random = Random(3);
    let mut machine = machine(&mut random);
    let shapes = [(1, 1, 1), (2, 4, 9), (3, 5, 40), (129, 13, 70), (7, 64, 600)];
    for (tokens, width, cols) in in_time(shapes, 3) {
        let (weight, values) = machine.weight(&mut random, 2 * width, cols, Dtype::Bf16);
        let x = random.floats(tokens * cols);
        let (x_buffer, out) = (machine.floats(&x), machine.poisoned(tokens * width));
        let gelu = |x: f64| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        };
        let activations: [(Activation, &dyn Fn(f64) -> f64); 2] =
            [(Activation::Silu, &|x| x / (1.0 + (-x).exp())), (Activation::GeluTanh, &gelu)];
        for (activation, definition) in activations {
            machine.cpu.gate_up(tokens as u32, activation, x_buffer, weight, out).unwrap();
            let expected: Vec<f64> = product(&x, &values, cols)
                .chunks(2 * width)
                .flat_map(|row| {
                    let (gate, up) = row.split_at(width);
                    gate.iter().zip(up).map(|(gate, up)| definition(*gate) * up).collect::<Vec<_>>()
                })
                .collect();
            let what = format!("{activation:?}(gate) * up");
            assert_close(&what, &machine.read(out, tokens * width), &expected, 1e-5);
        }
    }
}

#[test]
fn norms_divide_by_the_root_mean_square() {
    let mut random = Random(4);
    let mut machine = machine(&mut random);
    for (tokens, width) in [(1, 1), (3, 7), (50, 128), (17, 1000)] {
        let (weight, scale) = machine.scale(&mut random, width, DTYPES[tokens % 3]);
        let (residual, delta) = (random.floats(tokens * width), random.floats(tokens * width));
        let (residual_buffer, delta_buffer) = (machine.floats(&residual), machine.floats(&delta));
        let out = machine.poisoned(tokens * width);

        machine.cpu.rms_norm(tokens as u32, residual_buffer, weight, out).unwrap();
        let expected: Vec<f64> =
            residual.chunks(width).flat_map(|x| normed(&wide(x), &scale, 1e-6)).collect();
        assert_close("rms_norm", &machine.read(out, tokens * width), &expected, 1e-6);

        machine.cpu.add_rms_norm(tokens as u32, residual_buffer, delta_buffer, weight, out).unwrap();
        let sum: Vec<f64> = wide(&residual).iter().zip(wide(&delta)).map(|(a, b)| a + b).collect();
        let expected: Vec<f64> = sum.chunks(width).flat_map(|x| normed(x, &scale, 1e-6)).collect();
        assert_close("residual", &machine.read(residual_buffer, tokens * width), &sum, 1e-6);
        assert_close("add_rms_norm", &machine.read(out, tokens * width), &expected, 1e-6);
    }
}

#[test]
fn the_final_norm_is_of_each_rows_last_token() {
    let mut random = Random(5);
    let mut machine = Machine::new(dims(24, 2, 1, 4, 8, 16), limits(4, 16, 4), &mut random);
    let sequences = [(0, 0, 5), (3, 4, 1), (1, 2, 9)];
    let sequences = sequences.map(|(slot, cached, new)| Sequence { slot, cached, new });
    let (step, tokens, _) = machine.step(&mut random, &sequences, greedy, None);
    let (residual, delta) = (random.floats(tokens.len() * 24), random.floats(tokens.len() * 24));
    let (weight, scale) = machine.scale(&mut random, 24, Dtype::Bf16);
    let buffers = machine.cpu.activations().unwrap();
    machine.write(buffers.residual, bytemuck::cast_slice(&residual));
    machine.write(buffers.delta, bytemuck::cast_slice(&delta));
    let out = machine.poisoned(3 * 24);
    machine.cpu.final_norm(&step, weight, out).unwrap();
    let row = |last: usize| {
        let at = last * 24..(last + 1) * 24;
        let sum: Vec<f64> =
            wide(&residual[at.clone()]).iter().zip(wide(&delta[at])).map(|(a, b)| a + b).collect();
        normed(&sum, &scale, 1e-6)
    };
    let expected: Vec<f64> = [4, 5, 14].into_iter().flat_map(row).collect();
    assert_close("final norm", &machine.read(out, 3 * 24), &expected, 1e-6);
}

#[test]
fn a_token_is_embedded_by_its_id_or_by_its_slots_last_token() {
    let mut random = Random(6);
    let mut machine = Machine::new(dims(12, 2, 1, 4, 8, 31), limits(3, 16, 4), &mut random);
    let sequences = [0, 2, 1].map(|slot| Sequence { slot, cached: 3, new: 1 });
    let (step, tokens, _) = machine.step(&mut random, &sequences, greedy, None);
    let pool = [7, 30, 11, 0];
    machine.write(machine.token_pool, &pool);
    let mut ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
    ids[1] = pool[2];
    let mut words = machine.read_words(machine.batch, machine.layout.words);
    words[machine.layout.tokens + TOKEN_WORDS] = LAST_TOKEN;
    machine.write(machine.batch, &words);

    let (table, values) = tensor(31, &random.floats(31 * 12), Dtype::F16);
    let table = machine.cpu.load(WeightRole::Embedding, &[table]).unwrap();
    let out = machine.cpu.activations().unwrap().residual;
    machine.write(out, &[f32::NAN.to_bits(); 3 * 12]);
    machine.cpu.embed(&step, table).unwrap();
    let expected: Vec<f64> = ids.iter().flat_map(|id| wide(&values[*id as usize * 12..][..12])).collect();
    assert_close("embedding", &machine.read(out, 3 * 12), &expected, 0.0);
}

/// Head counts, head size and page size.
const HEADS: [(u32, u32, u32, u32); 8] = [
    (1, 1, 2, 1),
    (4, 4, 64, 16),
    (4, 2, 64, 32),
    (6, 2, 10, 4),
    (16, 2, 128, 16),
    (10, 1, 6, 8),
    (20, 2, 32, 64),
    (14, 2, 72, 2),
];

#[test]
fn heads_are_normed_rotated_and_stored() {
    let mut random = Random(7);
    for (heads, kv_heads, head_dim, page_size) in HEADS {
        let dims = dims(8, heads, kv_heads, head_dim, 8, 16);
        let mut machine = Machine::new(dims, limits(3, 40, page_size), &mut random);
        let sequences = [(0, 0, 33), (2, 17, 5), (1, 39, 1)];
        let sequences = sequences.map(|(slot, cached, new)| Sequence { slot, cached, new });
        let (step, tokens, _) = machine.step(&mut random, &sequences, greedy, None);
        let (width, head_dim) = (dims.qkv_width(), head_dim as usize);
        let qkv = random.floats(tokens.len() * width);
        let (q_norm, q_scale) = machine.scale(&mut random, head_dim, Dtype::Bf16);
        let (k_norm, k_scale) = machine.scale(&mut random, head_dim, Dtype::Bf16);
        let angles = random.floats(40 * head_dim / 2);
        let rope: Vec<f32> = angles.iter().flat_map(|angle| [angle.cos(), angle.sin()]).collect();
        let kv = machine.kv(&mut random);
        let [mut k, mut v] = [kv.k, kv.v].map(|buffer| machine.read(buffer, machine.kv_len()));
        let (qkv_buffer, rope_buffer) = (machine.floats(&qkv), machine.floats(&rope));
        let heads_of_all = Heads {
            step,
            qkv: qkv_buffer,
            q_norm: Some(q_norm),
            k_norm: Some(k_norm),
            rope: Some(rope_buffer),
            rotated: head_dim as u32,
            kv,
        };
        machine.cpu.heads(heads_of_all).unwrap();

        let mut expected = wide(&qkv);
        let rotated = (heads + kv_heads) as usize;
        for (token, row) in tokens.iter().zip(expected.chunks_mut(width)) {
            for (i, head) in row.chunks_mut(head_dim).take(rotated).enumerate() {
                let x = normed(head, if i < heads as usize { &q_scale } else { &k_scale }, 1e-6);
                for (i, out) in head.iter_mut().enumerate() {
                    let angle = (token.position as usize * head_dim / 2) + i % (head_dim / 2);
                    let (cos, sin) = (f64::from(angles[angle].cos()), f64::from(angles[angle].sin()));
                    *out = match i < head_dim / 2 {
                        true => x[i] * cos - x[i + head_dim / 2] * sin,
                        false => x[i] * cos + x[i - head_dim / 2] * sin,
                    };
                }
            }
        }
        let got = machine.read(qkv_buffer, qkv.len());
        assert_close("qkv", &got, &expected, 1e-6);

        let page_size = page_size as usize;
        for (token, row) in tokens.iter().zip(got.chunks(width)) {
            let (page, row_in_page) =
                (token.location as usize / page_size, token.location as usize % page_size);
            for head in 0..kv_heads as usize {
                let to = ((page * kv_heads as usize + head) * page_size + row_in_page) * head_dim;
                let from = (heads as usize + head) * head_dim;
                k[to..][..head_dim].copy_from_slice(&row[from..][..head_dim]);
                let from = from + kv_heads as usize * head_dim;
                v[to..][..head_dim].copy_from_slice(&row[from..][..head_dim]);
            }
        }
        assert_eq!(machine.read(kv.k, k.len()), k, "keys at their locations, all else as it was");
        assert_eq!(machine.read(kv.v, v.len()), v, "values at their locations, all else as they were");
    }
}

/// Heads may be normed together, not normed, turned in part, not turned.
#[test]
fn norms_and_rope_of_heads_may_be_absent_wider_or_partial() {
    let mut random = Random(17);
    let (heads, kv_heads, head_dim) = (4, 2, 16);
    for (full_norm, rotated) in [(None, 16), (Some(true), 0), (Some(true), 16), (Some(false), 8), (None, 0)] {
        let dims = dims(8, heads, kv_heads, head_dim, 8, 16);
        let mut machine = Machine::new(dims, limits(1, 40, 4), &mut random);
        let sequences = [Sequence { slot: 0, cached: 3, new: 30 }];
        let (step, tokens, _) = machine.step(&mut random, &sequences, greedy, None);
        let (width, head_dim) = (dims.qkv_width(), head_dim as usize);
        let qkv = random.floats(tokens.len() * width);
        let widths = match full_norm {
            Some(true) => [dims.q_width(), dims.kv_width()],
            _ => [head_dim, head_dim],
        };
        let [(q_norm, q_scale), (k_norm, k_scale)] =
            widths.map(|width| machine.scale(&mut random, width, Dtype::F32));
        let angles = random.floats(40 * rotated / 2);
        let rope: Vec<f32> = angles.iter().flat_map(|angle| [angle.cos(), angle.sin()]).collect();
        let (qkv_buffer, rope_buffer, kv) =
            (machine.floats(&qkv), machine.floats(&[&rope[..], &[0.0]].concat()), machine.kv(&mut random));
        let turned = Heads {
            step,
            qkv: qkv_buffer,
            q_norm: full_norm.map(|_| q_norm),
            k_norm: full_norm.map(|_| k_norm),
            rope: (rotated > 0).then_some(rope_buffer),
            rotated: rotated as u32,
            kv,
        };
        machine.cpu.heads(turned).unwrap();

        let mut expected = wide(&qkv);
        for (token, row) in tokens.iter().zip(expected.chunks_mut(width)) {
            let (q, kv) = row.split_at_mut(dims.q_width());
            for (x, scale) in [(q, &q_scale), (&mut kv[..dims.kv_width()], &k_scale)] {
                if full_norm.is_some() {
                    x.chunks_mut(scale.len()).for_each(|x| x.copy_from_slice(&normed(x, scale, 1e-6)));
                }
                for head in x.chunks_mut(head_dim) {
                    let before = head.to_vec();
                    for i in 0..rotated / 2 {
                        let angle = f64::from(angles[token.position as usize * rotated / 2 + i]);
                        let (low, high) = (before[i], before[i + rotated / 2]);
                        head[i] = low * angle.cos() - high * angle.sin();
                        head[i + rotated / 2] = high * angle.cos() + low * angle.sin();
                    }
                }
            }
        }
        let what = format!("norms {full_norm:?}, {rotated} elements turned");
        assert_close(&what, &machine.read(qkv_buffer, qkv.len()), &expected, 1e-6);
    }
}

#[test]
fn attention_is_a_softmax_over_all_earlier_positions() {
    attention_is_a_softmax(None, None, 3.0);
}

#[test]
fn a_position_that_is_seen_alone_is_all_that_comes_out_however_low_its_score() {
    attention_is_a_softmax(Some(1), None, 1e5);
}

#[test]
fn attention_with_a_window_sees_no_further_and_a_score_scale_is_the_specs() {
    for window in [1, 2, 63, 64, 65, 100, 1000] {
        attention_is_a_softmax(Some(window), None, 3.0);
    }
    attention_is_a_softmax(Some(70), Some(0.0625), 3.0);
}

/// Of queries so large.
fn attention_is_a_softmax(window: Option<u32>, scale: Option<f32>, size: f32) {
    let mut random = Random(8);
    for (heads, kv_heads, head_dim, page_size) in HEADS {
        let dims = dims(8, heads, kv_heads, head_dim, 8, 16);
        let mut machine = Machine::new(dims, limits(4, 200, page_size), &mut random);
        let sequences = [(0, 0, 70), (3, 63, 3), (2, 199, 1), (1, 126, 4)];
        let sequences = sequences.map(|(slot, cached, new)| Sequence { slot, cached, new });
        let (step, tokens, _) = machine.step(&mut random, &sequences, greedy, None);
        machine.cpu.begin_step(&step).unwrap();
        let (width, head_dim) = (dims.qkv_width(), head_dim as usize);
        let qkv: Vec<f32> = random.floats(tokens.len() * width).iter().map(|x| x * size).collect();
        let kv = machine.kv(&mut random);
        let (k, v) = (machine.read(kv.k, machine.kv_len()), machine.read(kv.v, machine.kv_len()));
        let (qkv_buffer, out) = (machine.floats(&qkv), machine.poisoned(tokens.len() * dims.q_width()));
        let spec = Attention { window, scale, ..Attention::plain() };
        machine.cpu.attention(&step, &spec, qkv_buffer, kv, out).unwrap();

        let mut expected = Vec::new();
        for (token, row) in tokens.iter().zip(qkv.chunks(width)) {
            for (h, q) in row.chunks(head_dim).take(heads as usize).enumerate() {
                let kv_head = h / (heads / kv_heads) as usize;
                let at = |position: u32| {
                    let location = machine.location(token.slot, position) as usize;
                    let (page, row) = (location / page_size as usize, location % page_size as usize);
                    ((page * kv_heads as usize + kv_head) * page_size as usize + row) * head_dim
                };
                let scale = scale.map_or(1.0 / (head_dim as f64).sqrt(), f64::from);
                let score = |position| dot(q, &k[at(position)..][..head_dim]) * scale;
                let first = (token.position + 1).saturating_sub(window.unwrap_or(u32::MAX));
                let scores = (first..=token.position).map(score);
                let largest = scores.clone().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.map(|score| (score - largest).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let value = |i: usize| {
                    let terms =
                        weights.iter().zip(first..).map(|(w, position)| w * f64::from(v[at(position) + i]));
                    terms.sum::<f64>() / sum
                };
                expected.extend((0..head_dim).map(value));
            }
        }
        let what = format!("{heads} heads over {kv_heads} of {head_dim}, pages of {page_size}");
        assert_close(&what, &machine.read(out, expected.len()), &expected, 2e-6);
    }
}

#[test]
fn page_updates_change_their_entries_alone() {
    let mut random = Random(9);
    let mut machine = Machine::new(dims(8, 2, 1, 4, 8, 16), limits(3, 16, 4), &mut random);
    let before: Vec<u32> = (0..16).map(|_| random.below(100) as u32).collect();
    machine.write(machine.page_table, &before);
    let (step, _, _) = machine.step(&mut random, &[Sequence { slot: 1, cached: 6, new: 3 }], greedy, None);
    machine.cpu.begin_step(&step).unwrap();
    let mut expected = before;
    expected[4..7].copy_from_slice(&machine.pages[1][..3]);
    assert_eq!(machine.read_words(machine.page_table, 16), expected);
}

#[test]
fn a_slice_is_a_part_of_its_buffer() {
    let mut random = Random(10);
    let mut machine = machine(&mut random);
    let buffer = machine.words(&[1, 2, 3, 4, 5, 6]);
    let part = machine.cpu.slice(buffer, 1..5);
    let part = machine.cpu.slice(part, 1..3);
    assert_eq!(machine.read_words(part, 2), [3, 4]);
}

#[test]
fn norms_may_scale_by_one_plus_their_weight() {
    let mut random = Random(18);
    let mut machine = machine(&mut random);
    let (weight, values) = tensor(1, &random.floats(40), Dtype::Bf16);
    let weight = machine.cpu.load(WeightRole::Norm(NormForm::OnePlusScale), &[weight]).unwrap();
    let x = random.floats(3 * 40);
    let (x_buffer, out) = (machine.floats(&x), machine.poisoned(3 * 40));
    machine.cpu.rms_norm(3, x_buffer, weight, out).unwrap();
    let scale: Vec<f32> = values.iter().map(|value| 1.0 + value).collect();
    let expected: Vec<f64> = x.chunks(40).flat_map(|x| normed(&wide(x), &scale, 1e-6)).collect();
    assert_close("(1 + w) norm", &machine.read(out, 3 * 40), &expected, 1e-6);
}
