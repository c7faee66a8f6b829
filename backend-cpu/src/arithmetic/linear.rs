//! What matrices are applied to: rounded first, where the checkpoint asks for it.

use minisgl_core::fp8;
use minisgl_core::spec::Activation;
use rayon::prelude::*;

use crate::error::CpuError;
use crate::link::Link;
use crate::weights::{Matrix, Rounding, Rows};
use crate::{matmul, ops};

/// `out = activation(gate) * up` with `gate, up = weight @ x`, row by row.
pub fn gate_up(weight: Rows<'_>, activation: Activation, x: &[f32], out: &mut [f32]) {
    match activation {
        Activation::Silu => matmul::gate_up(weight, x, out, ops::silu),
        Activation::GeluTanh => matmul::gate_up(weight, x, out, ops::gelu_tanh),
    }
}

/// How what matrices are applied to is rounded: by magnitudes that other ranks may have.
pub struct Rounds<'a> {
    pub link: Option<&'a mut Link>,
    /// `[tokens]`, for rows that are rounded whole.
    pub magnitudes: &'a mut [f32],
}

impl Rounds<'_> {
    /// What a matrix is applied to: `x` itself, or `x` rounded as the matrix asks for, in `rounded`.
    pub fn inputs<'x>(
        &mut self,
        weight: &Matrix,
        x: &'x [f32],
        rounded: &'x mut [f32],
    ) -> Result<&'x [f32], CpuError> {
        if weight.rounding == Rounding::None {
            return Ok(x);
        }
        let rounded = &mut rounded[..x.len()];
        let magnitudes = &mut self.magnitudes[..x.len() / weight.cols];
        if weight.rounding == Rounding::Row {
            let rows = x.par_chunks(weight.cols).zip(&mut *magnitudes);
            rows.for_each(|(x, magnitude)| *magnitude = fp8::largest_magnitude(x));
            if let Some(link) = self.link.as_mut().filter(|_| weight.shared) {
                link.largest(magnitudes)?;
            }
        }
        let rows = rounded.par_chunks_mut(weight.cols).zip(x.par_chunks(weight.cols)).zip(magnitudes);
        rows.for_each(|((out, x), magnitude)| {
            out.copy_from_slice(x);
            match weight.rounding {
                Rounding::None => {}
                Rounding::Row => fp8::quantize_by(out, *magnitude),
                Rounding::Groups(width) => out.chunks_mut(width).for_each(fp8::quantize_group),
                Rounding::Static(scale) => fp8::quantize(out, scale),
            }
        });
        Ok(rounded)
    }
}
