//! Rows that are added to the residual stream, whole or as ranks' sums.

use bytemuck::cast_slice;
use half::bf16;
use minisgl_core::backend::Element;
use minisgl_cuda::SLICING;
use minisgl_cuda::ops::gemm::{RankSums, Residual};

use crate::bench::{BF16, F32, Gpu, Operands, POISON, TOKENS, bf16_rows, check, without_margin};

pub fn residual(gpu: &mut Gpu, rows: usize, cols: usize) {
    let operands = Operands::new(gpu, rows, cols);
    let (w, x) = operands.on_device;
    let before = gpu.random(TOKENS[TOKENS.len() - 1] as usize * rows, 2.0);
    let label = format!("residual {rows}x{cols}");
    let segments = rows.div_ceil(64);
    let run = |gpu: &mut Gpu, tokens: u32| {
        let elements = tokens as usize * rows;
        let mut start = before[..elements].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        start.extend([POISON; 256]);
        let out = gpu.upload(Element::Activation, &start);
        let sumsq = gpu.poisoned(tokens as usize * segments * 2);
        gpu.launch(w, x, tokens, &Residual { residual: out.address(), sumsq: sumsq.address() });
        let out = bf16_rows(&without_margin(gpu.download(out), elements, &label), rows);
        let sums = without_margin(gpu.download(sumsq), tokens as usize * segments * 2, &label);
        let sums: Vec<f32> = cast_slice::<u16, u8>(&sums)
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect();
        for (t, row) in out.iter().enumerate() {
            for (segment, values) in row.chunks(64).enumerate() {
                let want: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
                let got = f64::from(sums[t * segments + segment]);
                let close = (got - want).abs() <= 1e-5 * want;
                assert!(close, "{label}, {tokens} tokens: sum {segment} of token {t} is {got} for {want}");
            }
        }
        let with_sums = |(t, mut row): (usize, Vec<f32>)| {
            // Their bits must not depend on the tokens either; the values are checked above.
            row.extend(
                sums[t * segments..][..segments].iter().map(|sum| sum * 0.0 + f32::from_bits(sum.to_bits())),
            );
            row
        };
        out.into_iter().enumerate().map(with_sums).collect()
    };
    let expected = |t: usize| {
        let old = &before[t * rows..][..rows];
        operands.product(t).iter().zip(old).map(|(y, x)| y + f64::from(*x)).collect()
    };
    check(gpu, &label, BF16, run, expected);
}

/// Every other value of pairs of half-words, as f32.
fn floats(halves: &[u16]) -> Vec<f32> {
    halves
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[low, high]| f32::from_bits(u32::from(*high) << 16 | u32::from(*low)))
        .collect()
}

/// The columns of one of several ranks, as a matrix of its own with its inputs.
fn part_of(gpu: &mut Gpu, operands: &Operands, rank: usize, ranks: usize) -> Operands {
    let (whole, cols) = (operands.cols, operands.cols / ranks);
    let part = |rows: &[bf16]| -> Vec<bf16> {
        rows.chunks_exact(whole).flat_map(|row| row[rank * cols..][..cols].iter().copied()).collect()
    };
    let (w, x) = (part(&operands.w), part(&operands.x));
    let matrix = gpu.weight(&w, w.len() / cols, cols).sliced(SLICING.slices(whole) / ranks as u32);
    let behind = vec![bf16::NAN; 256 * cols];
    let on_device = (matrix, gpu.upload(Element::Activation, &[&x[..], &behind].concat()));
    Operands { cols, w, x, on_device }
}

/// Adds pairs, then pairs of pairs.
fn tree(mut sums: Vec<Vec<f32>>) -> Vec<f32> {
    while sums.len() > 1 {
        let added = |pair: &[Vec<f32>]| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect();
        sums = sums.chunks_exact(2).map(added).collect();
    }
    sums.remove(0)
}

/// What ranks make of their columns, added as a tree, is what one makes of all.
pub fn ranks_sums(gpu: &mut Gpu, rows: usize, cols: usize) {
    let operands = Operands::new(gpu, rows, cols);
    let tokens_max = TOKENS[TOKENS.len() - 1] as usize;
    let before = gpu.random(tokens_max * rows, 2.0);
    let label = format!("{:?} sums {rows}x{cols}", gpu.set);
    let residual = gpu.upload(Element::Activation, &before);
    let sumsq = gpu.poisoned(tokens_max * rows.div_ceil(64) * 2);
    let (w, x) = operands.on_device;
    let added = Residual { residual: residual.address(), sumsq: sumsq.address() };
    gpu.launch(w, x, tokens_max as u32, &added);
    let whole: Vec<u16> = gpu.download(residual);
    let counts = [2, 4, 8].into_iter().filter(|ranks| {
        *ranks <= SLICING.slices(cols) as usize && cols.is_multiple_of(ranks * SLICING.block)
    });
    for ranks in counts {
        let mut sums = Vec::new();
        for rank in 0..ranks {
            let part = part_of(gpu, &operands, rank, ranks);
            let (w, x) = part.on_device;
            let run = |gpu: &mut Gpu, tokens: u32| {
                let padded = rows.next_multiple_of(64); // whole segments
                let elements = tokens as usize * padded * 2;
                let out = gpu.poisoned(elements);
                gpu.launch(w, x, tokens, &RankSums::here(out.address()));
                let sums = floats(&without_margin(gpu.download(out), elements, &label));
                sums.chunks_exact(padded).map(|row| row[..rows].to_vec()).collect::<Vec<_>>()
            };
            check(gpu, &format!("{label}, rank {rank} of {ranks}"), F32, run, |t| part.product(t));
            sums.push(run(gpu, tokens_max as u32).concat());
        }
        let differs = tree(sums)
            .iter()
            .zip(&before)
            .zip(&whole)
            .position(|((sum, old), bits)| bf16::from_f32(old.to_f32() + sum).to_bits() != *bits);
        assert_eq!(differs, None, "{label}: the first output that differs, of {ranks} ranks");
    }
}
