//! The kernel's parameters, as `layers_args.cuh` declares them: a model's layers, and a step.
//!
//! Invariant: all of it is in the launch; nothing is kept on the device.

use minisgl_core::backend::{LayerWeights, MlpWeights};

use crate::error::CudaError;
use crate::memory::Address;
use crate::ops::operands::Layer;
use crate::param::plain_params;
use crate::tensor_map::TensorMap;
use crate::weight::Weight;

/// Layers that the kernel's parameter has room for.
pub(super) const LAYERS_MAX: usize = 32;

/// The only sizes that the kernel is compiled for.
pub(super) const HIDDEN: u32 = 1024;
pub(super) const HEADS: u32 = 16;
pub(super) const KV_HEADS: u32 = 8;
pub(super) const HEAD_DIM: u32 = 128;
pub(super) const INTERMEDIATE: u32 = 3072;
pub(super) const PAGE_SIZE: u32 = 16;
/// Tokens of a half that the sums' room is for.
pub(super) const HALF_ROWS_MAX: u32 = 128;

/// A layer, as `layers_args.cuh` declares it.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerArgs {
    pub(super) qkv: TensorMap,
    pub(super) o: TensorMap,
    pub(super) gate_up: TensorMap,
    pub(super) down: TensorMap,
    /// Its pages.
    pub(super) k: Address,
    pub(super) v: Address,
    /// `[head_dim]`, or null.
    pub(super) q_norm: Address,
    pub(super) k_norm: Address,
    /// `[positions, head_dim / 2]` (cos, sin), or null.
    pub(super) rope: Address,
    pub(super) reserved: [u64; 3],
}

/// All layers, and what they have in common.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(super) struct Args {
    pub(super) layers: [LayerArgs; LAYERS_MAX],
    pub(super) batch: Address,
    pub(super) page_table: Address,
    /// Of the whole step, `[tokens, …]`, as in [`Buffers`].
    pub(super) q: Address,
    pub(super) attended: Address,
    pub(super) activated: Address,
    pub(super) residual: Address,
    /// `[halves, o and down, hidden / 64, tokens of a half]` pairs of f32.
    pub(super) sums: Address,
    /// By half, as the decode attention's.
    pub(super) partials: [Address; 2],
    pub(super) arrived: [Address; 2],
    /// Zero between launches.
    pub(super) flags: Address,
    /// How many layers there are.
    pub(super) count: u32,
    /// Of each half, padding rows included.
    pub(super) rows: [u32; 2],
    /// Those of the first, padded.
    pub(super) padded: u32,
    /// First words of the halves' plans in the batch,
    pub(super) plan_offset: [u32; 2],
    /// and of the step's tokens.
    pub(super) tokens_offset: u32,
    pub(super) table_width: u32,
    pub(super) norm_eps: f32,
    pub(super) reserved: [u32; 15],
}

/// What is multiplied, by half: how the copy engine fetches all tokens by 64 columns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Maps {
    pub(super) attended: [TensorMap; 2],
    pub(super) residual: [TensorMap; 2],
    pub(super) activated: [TensorMap; 2],
}

plain_params!(Args, Maps);

/// All of them, and how many; what is behind the last is the last again.
pub(super) fn gathered(
    layers: impl Iterator<Item = Result<LayerArgs, CudaError>>,
) -> Result<([LayerArgs; LAYERS_MAX], u32), CudaError> {
    let mut all: Option<[LayerArgs; LAYERS_MAX]> = None;
    let mut count = 0;
    for layer in layers {
        let layer = layer?;
        let all = all.get_or_insert([layer; LAYERS_MAX]);
        *all.get_mut(count).ok_or(CudaError::NotReserved)? = layer;
        count += 1;
    }
    all.map(|all| (all, count as u32)).ok_or(CudaError::NotReserved)
}

impl LayerArgs {
    /// A pair of blocks shares 64 rows of o or down, two of qkv a head, so that what they exchange is what the last step of a warp's sum
    /// of squares adds: each has every second pair of rows.
    pub(super) fn of(layer: &Layer) -> Result<LayerArgs, CudaError> {
        let Layer { weights, rope, kv, .. } = layer;
        let LayerWeights { qkv, o, q_norm, k_norm, mlp: MlpWeights::Dense { gate_up, down }, .. } = weights
        else {
            return Err(CudaError::NotReserved); // the weights are those of the spec that was reserved
        };
        let pairs = |w: &Weight, boxes| TensorMap::pairs_of_rows(w.address(), w.rows(), w.cols(), boxes);
        let address = |weight: &Option<Weight>| weight.map_or(Address::NULL, |weight| weight.address());
        Ok(LayerArgs {
            qkv: pairs(qkv, [1, 32])?,
            o: pairs(o, [1, 16])?,
            gate_up: pairs(gate_up, [2, 24])?,
            down: pairs(down, [1, 16])?,
            k: kv.k.address(),
            v: kv.v.address(),
            q_norm: address(q_norm),
            k_norm: address(k_norm),
            rope: rope.map_or(Address::NULL, |table| table.address()),
            reserved: [0; 3],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::{assert_declared, constant};

    const FILE: &str = "hopper/layers/layers_args.cuh";

    #[test]
    fn the_host_and_the_kernel_declare_the_same() {
        let files = &[FILE];
        assert_declared!(
            files,
            "Layer",
            LayerArgs { qkv, o, gate_up, down, k, v, q_norm, k_norm, rope, reserved }
        );
        assert_declared!(files, "LayerMaps", Maps { attended, residual, activated });
        assert_declared!(
            files,
            "Layers",
            Args {
                layers,
                batch,
                page_table,
                q,
                attended,
                activated,
                residual,
                sums,
                partials,
                arrived,
                flags,
                count,
                rows,
                padded,
                plan_offset,
                tokens_offset,
                table_width,
                norm_eps,
                reserved,
            }
        );
        let sizes =
            ["HIDDEN", "HEADS", "KV_HEADS", "HEAD_DIM", "MLP", "PAGE"].map(|name| constant(FILE, name));
        assert_eq!(sizes, [HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, PAGE_SIZE]);
        let room = ["LAYERS_MAX", "HALF_ROWS"].map(|name| constant(FILE, name));
        assert_eq!(room, [LAYERS_MAX as u32, HALF_ROWS_MAX]);
        let [apart, phase] =
            ["APART", "PHASE"].map(|name| constant("hopper/layers/layers_flags.cuh", name) as usize);
        assert_eq!(
            super::super::FLAG_WORDS,
            [2 * apart, 2 * phase],
            "of a step, and of a layer's two halves"
        );
    }
}
