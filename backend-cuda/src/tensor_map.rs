//! How the bulk copy engine sees a tensor: a descriptor that a Hopper kernel takes by value (`__grid_constant__`).

use std::ffi::c_void;

use cudarc::driver::sys;

use crate::error::{CudaError, Named};
use crate::memory::Address;
use crate::param::Param;

/// A bf16 tensor, fetched in boxes of rows of 64 elements (128 bytes). What is fetched beyond the tensor is zero.
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(sys::CUtensorMap);

/// Columns of a box: 128 bytes of bf16, the widest that the swizzle takes.
pub const BOX_COLS: u32 = 64;

/// Where a row's 16-byte chunks lie in shared memory.
#[derive(Clone, Copy, Debug)]
enum Chunks {
    /// Chunk c of row r at chunk `c ^ (r % 8)`: the 128-byte swizzle.
    Swizzled,
    /// As in memory.
    AsTheyLie,
}

impl TensorMap {
    /// A matrix `[rows, cols]` at `address` (16-byte aligned; `cols` a multiple of 8) in boxes of `box_rows` rows, which
    /// land swizzled.
    pub fn rows_of_bf16(
        address: Address,
        rows: usize,
        cols: usize,
        box_rows: u32,
    ) -> Result<TensorMap, CudaError> {
        TensorMap::new(address, [cols, rows], [BOX_COLS, box_rows], Chunks::Swizzled)
    }

    /// A matrix `[rows, cols]` as `[rows / 4, 2, 2, cols]`: in boxes of four rows, of which both pairs or one are fetched, and of each
    /// pair both; `[pairs, fours]` are how many of the former and of the latter. They land swizzled, row after row.
    pub fn pairs_of_rows(
        address: Address,
        rows: usize,
        cols: usize,
        [pairs, fours]: [u32; 2],
    ) -> Result<TensorMap, CudaError> {
        TensorMap::new(address, [cols, 2, 2, rows / 4], [BOX_COLS, 2, pairs, fours], Chunks::Swizzled)
    }

    /// Pages of keys or values as `[rows, head_dim]`, in boxes of `box_rows` rows, which land as they lie: swizzled already.
    pub fn pages(
        address: Address,
        rows: usize,
        head_dim: usize,
        box_rows: u32,
    ) -> Result<TensorMap, CudaError> {
        TensorMap::new(address, [head_dim, rows], [BOX_COLS, box_rows], Chunks::AsTheyLie)
    }

    /// Queries `[tokens, heads, head_dim]` in boxes of `box_tokens` tokens by `box_heads` heads, which land swizzled, row
    /// after row.
    pub fn queries(
        address: Address,
        [tokens, heads, head_dim]: [usize; 3],
        box_tokens: u32,
        box_heads: u32,
    ) -> Result<TensorMap, CudaError> {
        let boxes = [BOX_COLS, box_heads, box_tokens];
        TensorMap::new(address, [head_dim, heads, tokens], boxes, Chunks::Swizzled)
    }

    /// A dense tensor of these sizes, the innermost first.
    fn new<const RANK: usize>(
        address: Address,
        sizes: [usize; RANK],
        box_sizes: [u32; RANK],
        chunks: Chunks,
    ) -> Result<TensorMap, CudaError> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let mut bytes = 2;
        // How far apart two neighbours along the next dimension lie; of the last one nobody asks.
        let strides = sizes.map(|size| {
            bytes *= size as u64;
            bytes
        });
        let (sizes, steps) = (sizes.map(|size| size as u64), [1; RANK]);
        let swizzle = match chunks {
            Chunks::Swizzled => sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            Chunks::AsTheyLie => sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        // SAFETY: all arrays have the lengths that the rank asks for, or one more; the address is only noted, not read.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                RANK as u32,
                address.0 as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                box_sizes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result().named("describing a tensor to the copy engine")?;
        Ok(TensorMap(map))
    }
}

impl Param for TensorMap {
    fn raw(&self) -> (*const c_void, usize) {
        ((&raw const self.0).cast(), size_of::<sys::CUtensorMap>())
    }
}
