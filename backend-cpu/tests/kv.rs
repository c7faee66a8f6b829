//! Keys and values in bf16 and fp8: what is stored is each row's nearest in the format, and attention is over what was stored.

mod common;

use common::{Machine, Random, Sequence, assert_close, bits, dims, greedy, limits, spec};
use half::bf16;
use minisgl_core::backend::{KvLayer, Ops};
use minisgl_core::kv::{KvFormat, KvLayout};
use minisgl_core::spec::{Attention, DecoderSpec};
use minisgl_cpu::{Buffer, Heads};

/// Head counts, head size and page size.
const HEADS: [(u32, u32, u32, u32); 7] = [
    (1, 1, 2, 1),
    (4, 4, 64, 16),
    (4, 2, 64, 32),
    (6, 2, 10, 4),
    (16, 2, 128, 16),
    (10, 1, 6, 8),
    (14, 2, 72, 2),
];

const FORMATS: [KvFormat; 2] = [KvFormat::Bf16, KvFormat::Fp8];

/// The numbers of e4m3 from zero up, by the format's definition, each at its code.
fn e4m3() -> Vec<f64> {
    let number = |code: i32| match (code / 8, f64::from(code % 8)) {
        (0, mantissa) => mantissa / 8.0 * 2f64.powi(-6),
        (exponent, mantissa) => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    (0..127).map(number).collect()
}

/// The nearest of these numbers, of two equally near ones that with an even code.
fn nearest(numbers: &[f64], x: f64) -> f64 {
    let distance = |code: usize| (numbers[code] - x.abs()).abs();
    let best =
        (0..numbers.len()).min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a % 2).cmp(&(b % 2))));
    numbers[best.unwrap()].copysign(x)
}

/// A row as the format keeps it, by another way than the format's own. In fp8 `scale` is what it chose, which must be one of the
/// eight that make the largest element a number of e4m3, and as good as any of them.
fn rounded(format: KvFormat, numbers: &[f64], row: &[f32], scale: bf16) -> Vec<f32> {
    // All of these numbers are f32's.
    let to_bf16 = |x: f64| bf16::from_f32(x as f32).to_f32();
    let by = |scale: bf16| {
        let scale = f64::from(scale.to_f32());
        row.iter().map(move |x| nearest(numbers, f64::from(*x) / scale) * scale)
    };
    let error = |scale| by(scale).zip(row).map(|(kept, x)| (kept - f64::from(*x)).powi(2)).sum::<f64>();
    match format {
        KvFormat::F32 => row.to_vec(),
        KvFormat::Bf16 => row.iter().map(|x| to_bf16(f64::from(*x))).collect(),
        KvFormat::Fp8 => {
            let largest = row.iter().fold(0.0f64, |largest, x| largest.max(f64::from(x.abs())));
            let largest = largest.clamp(2f64.powi(-13), 448.0 * 128.0);
            let tops = [448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0];
            let scales = tops.map(|top| bf16::from_f32((largest / top) as f32));
            assert!(scales.contains(&scale), "{scale} is none of {scales:?}, of {row:?}");
            let best = scales.map(error).into_iter().fold(f64::MAX, f64::min);
            // Errors are counted in whole 4,096ths of the square of the scale.
            let left_out = row.len() as f64 / 4096.0 * f64::from(scale.to_f32()).powi(2);
            let bound = best * 1.0001 + left_out;
            assert!(error(scale) <= bound, "scale {scale} of {row:?} is not the best of {scales:?}");
            by(scale).map(|x| x as f32).collect()
        }
    }
}

fn machine(
    format: KvFormat,
    dims: minisgl_core::spec::Dims,
    sequence: u32,
    page_size: u32,
) -> (Machine, KvLayout) {
    let spec = DecoderSpec { kv: Some(format), ..spec(dims) };
    let machine = Machine::of(&spec, limits(4, sequence, page_size), &mut Random(3));
    (machine, KvLayout::new(format, &dims, page_size))
}

/// Buffers of bytes that no row has left there.
fn pages(machine: &mut Machine, layout: &KvLayout) -> KvLayer<Buffer> {
    let words = vec![0xa5a5_a5a5; layout.words(machine.limits.pages as usize + 1)];
    KvLayer { k: machine.words(&words), v: machine.words(&words), wide: None }
}

fn read(machine: &mut Machine, layout: &KvLayout, buffer: Buffer) -> Vec<u8> {
    let words = machine.read_words(buffer, layout.words(machine.limits.pages as usize + 1));
    bytemuck::cast_slice(&words).to_vec()
}

#[test]
fn rows_are_rounded_to_their_nearest_in_the_format_and_nothing_else_is_touched() {
    let (mut random, numbers) = (Random(21), e4m3());
    for (format, (heads, kv_heads, head_dim, page_size)) in
        FORMATS.into_iter().flat_map(|f| HEADS.map(|h| (f, h)))
    {
        let dims = dims(8, heads, kv_heads, head_dim, 8, 16);
        let (mut machine, layout) = machine(format, dims, 40, page_size);
        let sequences = [(0, 0, 33), (2, 17, 5), (1, 39, 1)];
        let sequences = sequences.map(|(slot, cached, new)| Sequence { slot, cached, new });
        let (step, tokens, _) = machine.step(&mut random, &sequences, greedy, None);
        let (width, head_dim) = (dims.qkv_width(), head_dim as usize);
        // Rows of all magnitudes, one of zeros.
        let mut qkv = random.floats(tokens.len() * width);
        for (i, row) in qkv.chunks_mut(head_dim).enumerate() {
            let magnitude = if i == 5 { 0.0 } else { 2f32.powi(random.below(44) as i32 - 28) };
            row.iter_mut().for_each(|x| *x *= magnitude);
        }
        let (buffer, kv) = (machine.floats(&qkv), pages(&mut machine, &layout));
        let heads_only = Heads { step, qkv: buffer, q_norm: None, k_norm: None, rope: None, rotated: 0, kv };
        machine.cpu.heads(heads_only).unwrap();
        let [k, v] = [kv.k, kv.v].map(|buffer| read(&mut machine, &layout, buffer));

        let mut expected = [vec![0xa5; k.len()], vec![0xa5; v.len()]];
        let row_bytes = head_dim * format.element_bytes();
        for (token, qkv) in tokens.iter().zip(qkv.chunks(width)) {
            let (page, row) = (token.location / page_size, token.location % page_size);
            let rows = qkv[dims.q_width()..].chunks(head_dim);
            for (i, row_of_head) in rows.enumerate() {
                let (what, head) = (i / kv_heads as usize, i % kv_heads as usize);
                let place = layout.place(page as usize, head, row as usize);
                let (got, mut out) = ([&k, &v][what], vec![f32::NAN; head_dim]);
                format.load(place, got, &mut out);
                let scale = &got[place.scale.min(got.len() - 2)..][..2];
                let scale = bf16::from_le_bytes([scale[0], scale[1]]);
                let nearest = rounded(format, &numbers, row_of_head, scale);
                assert_eq!(bits(&out), bits(&nearest), "{format}, {row_of_head:?}");
                expected[what][place.row..][..row_bytes].copy_from_slice(&got[place.row..][..row_bytes]);
                if format == KvFormat::Fp8 {
                    expected[what][place.scale..][..2].copy_from_slice(&got[place.scale..][..2]);
                }
            }
        }
        assert!([k, v] == expected, "{format}: bytes that belong to no row of the step were written");
    }
}

#[test]
fn attention_is_a_softmax_over_what_was_stored() {
    let mut random = Random(22);
    for (format, (heads, kv_heads, head_dim, page_size)) in
        FORMATS.into_iter().flat_map(|f| HEADS.map(|h| (f, h)))
    {
        for window in [None, Some(65)] {
            let dims = dims(8, heads, kv_heads, head_dim, 8, 16);
            let (mut machine, layout) = machine(format, dims, 200, page_size);
            let sequences = [(0, 0, 70), (3, 63, 3), (2, 199, 1), (1, 126, 4)];
            let sequences = sequences.map(|(slot, cached, new)| Sequence { slot, cached, new });
            let (step, tokens, _) = machine.step(&mut random, &sequences, greedy, None);
            machine.cpu.begin_step(&step).unwrap();
            let (width, head_dim) = (dims.qkv_width(), head_dim as usize);
            let qkv: Vec<f32> = random.floats(tokens.len() * width).iter().map(|x| x * 3.0).collect();
            let all = (machine.limits.pages as usize + 1) * page_size as usize;
            let mut kept = Vec::new();
            let [k, v] = [(); 2].map(|()| {
                let mut bytes = vec![0; 4 * layout.words(machine.limits.pages as usize + 1)];
                let mut rows = vec![0.0f32; all * kv_heads as usize * head_dim];
                for (i, row) in rows.chunks_mut(head_dim).enumerate() {
                    let (head, location) = (i % kv_heads as usize, i / kv_heads as usize);
                    let place =
                        layout.place(location / page_size as usize, head, location % page_size as usize);
                    format.store(&random.floats(head_dim), place, &mut bytes);
                    format.load(place, &bytes, row);
                }
                kept.push(rows);
                machine.words(bytemuck::cast_slice(&bytes))
            });
            let (buffer, out) = (machine.floats(&qkv), machine.poisoned(tokens.len() * dims.q_width()));
            let attention = Attention { window, ..Attention::plain() };
            machine.cpu.attention(&step, &attention, buffer, KvLayer { k, v, wide: None }, out).unwrap();

            let mut expected = Vec::new();
            for (token, row) in tokens.iter().zip(qkv.chunks(width)) {
                for (h, q) in row.chunks(head_dim).take(heads as usize).enumerate() {
                    let kv_head = h / (heads / kv_heads) as usize;
                    let row = |what: usize, position: u32| {
                        let location = machine.location(token.slot, position) as usize;
                        &kept[what][(location * kv_heads as usize + kv_head) * head_dim..][..head_dim]
                    };
                    let dot = |key: &[f32]| {
                        q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
                    };
                    let first = (token.position + 1).saturating_sub(window.unwrap_or(u32::MAX));
                    let share = |position| (dot(row(0, position)) / (head_dim as f64).sqrt()).exp();
                    let shares: Vec<f64> = (first..=token.position).map(share).collect();
                    let sum: f64 = shares.iter().sum();
                    let value = |i: usize| {
                        let terms =
                            shares.iter().zip(first..).map(|(share, at)| share * f64::from(row(1, at)[i]));
                        terms.sum::<f64>() / sum
                    };
                    expected.extend((0..head_dim).map(value));
                }
            }
            let what = format!("{format}, {heads} heads over {kv_heads} of {head_dim}, pages of {page_size}");
            assert_close(&what, &machine.read(out, expected.len()), &expected, 2e-6);
        }
    }
}

#[test]
fn heads_that_are_too_wide_to_be_widened_are_refused() {
    let refused = |kv, head_dim| {
        let spec = DecoderSpec { kv, ..spec(dims(8, 2, 1, head_dim, 8, 16)) };
        minisgl_cpu::Cpu::new().supports(&spec).map_err(|error| error.to_string())
    };
    assert_eq!(refused(Some(KvFormat::Fp8), 256), Ok(()));
    assert_eq!(refused(None, 512), Ok(()));
    assert!(
        refused(Some(KvFormat::Fp8), 512)
            .is_err_and(|text| text.contains("512") && text.contains("--kv-dtype auto"))
    );
}
