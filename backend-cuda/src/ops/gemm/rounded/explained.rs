//! The same choices without a device.

use super::kernels::{Kernels, chosen, few_of};
use super::rounding;
use crate::ops::gemm::epilogue::Kind;
use crate::ops::gemm::many::Tile;
use crate::ops::gemm::product::Explained;
use crate::ops::gemm::shape::Shape;
use crate::weight::Rounding;

/// What rounds the inputs of a product with `[rows, cols]`, whose groups of rows have scales in pairs or not, and what that is launched as.
pub(in crate::ops::gemm) fn explained(
    kind: Kind,
    shape: &Shape,
    rounding_of: Rounding,
    pairs: bool,
    clusters: fn(u32) -> u32,
) -> Option<[Explained; 2]> {
    let kernels = Kernels::of(kind)?;
    let work = match rounding_of {
        Rounding::Groups(cols) => {
            format!("a warp: a token's groups of {cols} columns, each by its largest magnitude")
        }
        Rounding::Rows => "a block: a token, by its largest magnitude".into(),
        Rounding::Fixed => "a warp: a token's blocks of 128 columns, by the matrix's scale".into(),
    };
    let grid = rounding(2 * shape.cols, shape.tokens, rounding_of);
    let round = Explained { kernel: "fp8_inputs", grid, work };
    let blocks = 2 * clusters(2);
    let Some(chosen) = chosen(kind, shape, &kernels.few, blocks, pairs) else {
        return Tile::explained_of(kernels.tiles(pairs), shape, clusters).map(|product| [round, product]);
    };
    let (block, name) = kernels.few[chosen];
    Some([round, few_of(kind, block, shape, blocks).explained(name, shape)])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a device of 132 multiprocessors, of Qwen3-8B and 14B.
    #[test]
    fn tiles_are_chosen_by_the_blocks_that_they_make() {
        let kernel = |kind, rows: u32, cols: u32, tokens| {
            let slices = if kind == Kind::GateUp { 1 } else { 2 };
            let shape = Shape { rows, cols: cols / 2, tokens, slices };
            explained(kind, &shape, Rounding::Groups(256), true, |size: u32| 132 / size).unwrap()[1].kernel
        };
        assert_eq!(kernel(Kind::Qkv, 6144, 4096, 128), "rounded_few_qkv_128x128");
        assert_eq!(kernel(Kind::Residual, 4096, 4096, 64), "rounded_few_residual_64x64");
        assert_eq!(kernel(Kind::Residual, 5120, 5120, 32), "rounded_few_residual_64x32");
        assert_eq!(kernel(Kind::Residual, 5120, 5120, 64), "rounded_many_joint_residual_short");
        assert_eq!(kernel(Kind::Residual, 4096, 4096, 128), "rounded_many_joint_residual_short");
        assert_eq!(kernel(Kind::Residual, 4096, 12_288, 128), "rounded_many_split_residual_short");
        assert_eq!(kernel(Kind::Residual, 5120, 17_408, 128), "rounded_many_joint_residual_narrow");
        assert_eq!(kernel(Kind::Residual, 5120, 17_408, 160), "rounded_many_joint_residual_middle");
        assert_eq!(kernel(Kind::Residual, 4096, 12_288, 256), "rounded_many_joint_residual_narrow");
        assert_eq!(kernel(Kind::Residual, 4096, 4096, 384), "rounded_many_joint_residual_middle");
        assert_eq!(kernel(Kind::Residual, 4096, 12_288, 512), "rounded_many_residual_narrow");
        assert_eq!(kernel(Kind::Residual, 5120, 17_408, 256), "rounded_many_residual_narrow");
        assert_eq!(kernel(Kind::GateUp, 24_576, 4096, 1), "rounded_few_gate_up_192x16");
        assert_eq!(kernel(Kind::GateUp, 24_576, 4096, 64), "rounded_few_gate_up_192x64");
        assert_eq!(kernel(Kind::GateUp, 34_816, 5120, 64), "rounded_few_gate_up_128x64");
        assert_eq!(kernel(Kind::GateUp, 24_576, 4096, 128), "rounded_many_gate_up_tall");
        assert_eq!(kernel(Kind::GateUp, 24_576, 4096, 256), "rounded_many_gate_up_narrow");
        assert_eq!(kernel(Kind::GateUp, 34_816, 5120, 256), "rounded_many_gate_up_tall");
        assert_eq!(kernel(Kind::GateUp, 24_576, 4096, 1024), "rounded_many_gate_up_narrow");
        assert_eq!(kernel(Kind::GateUp, 24_576, 4096, 8192), "rounded_many_gate_up_middle");
        assert_eq!(kernel(Kind::Qkv, 6144, 4096, 8192), "rounded_many_qkv_narrow");
        assert_eq!(kernel(Kind::Residual, 4096, 12_288, 1024), "rounded_many_residual_narrow");
        assert_eq!(kernel(Kind::Residual, 4096, 12_288, 8192), "rounded_many_residual_narrow");
    }
}
