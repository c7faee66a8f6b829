//! How the bulk copy engine sees a matrix: a descriptor that a Hopper kernel takes by value (`__grid_constant__`).

use std::ffi::c_void;

use cudarc::driver::sys;

use crate::error::{CudaError, Named};
use crate::launch::Param;
use crate::memory::Address;

/// A row-major bf16 matrix, fetched in boxes of `box_rows` rows by 64 columns (128 bytes), which land in shared memory
/// with the 128-byte swizzle: 16-byte chunk c of row r lies at chunk `c ^ (r % 8)`. What is fetched beyond the matrix
/// is zero.
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(sys::CUtensorMap);

/// Columns of a box: 128 bytes of bf16, the widest that the swizzle takes.
pub const BOX_COLS: u32 = 64;

impl TensorMap {
    /// Describes `[rows, cols]` at `address` (16-byte aligned; `cols` a multiple of 8).
    pub fn rows_of_bf16(
        address: Address,
        rows: usize,
        cols: usize,
        box_rows: u32,
    ) -> Result<TensorMap, CudaError> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let sizes = [cols as u64, rows as u64];
        let row_bytes = [cols as u64 * 2];
        let (box_sizes, steps) = ([BOX_COLS, box_rows], [1, 1]);
        // SAFETY: all arrays have the lengths that rank 2 asks for; the address is only noted, not read.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                address.0 as *mut c_void,
                sizes.as_ptr(),
                row_bytes.as_ptr(),
                box_sizes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result().named("describing a matrix to the copy engine")?;
        Ok(TensorMap(map))
    }
}

impl Param for TensorMap {
    fn raw(&self) -> (*const c_void, usize) {
        ((&raw const self.0).cast(), size_of::<sys::CUtensorMap>())
    }
}
