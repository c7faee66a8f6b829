//! Pages in fp8 and wide ones: launches of `fp8_pages.cu`.
//!
//! ```text
//!   few tokens     product ──────────────────────> fp8 ─┬──────────────────────> attention of decode rows
//!   many tokens    product ──> wide ── encode ───> fp8 ─┘
//!                               ^ └───────────────────────────────────────────> attention of prefill rows
//!                               └─── widen: what prefill rows see of fp8 ───┘
//! ```
//!
//! Wide pages have room for one layer's keys and values in two bytes an element, with the numbers and rows of the pages in fp8. A product
//! leaves bf16 there; prefill attends to codes, as f16 numbers, whose scales lie in the pages in fp8: decode has the same operands in
//! registers, so both have the same bits. What it costs is their bytes, a layer's of pages in bf16, and reading and writing those of a
//! step's tokens once more.
//!
//! Invariant: where prefill rows attend, the wide pages hold the codes of the pages in fp8, for every position that any of them sees.

use std::ops::Range;

use minisgl_core::backend::{KvLayer, Step};
use minisgl_core::batch::{ROW_WORDS, TOKEN_WORDS};
use minisgl_core::spec::Dims;

use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::module::Modules;
use crate::param::plain_params;

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / 32;
/// Tokens whose rows a warp encodes.
const ENCODED: u32 = 8;
/// Blocks that widen, as many of each row.
const WIDENING: u32 = 2048;
/// The least of a row.
const WIDENING_LEAST: u32 = 8;

/// Where pages lie; `Fp8Args` of `fp8_pages.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Fp8Args {
    batch: Address,
    k: Address,
    v: Address,
    wide_k: Address,
    wide_v: Address,
    kv_heads: u32,
    page_shift: u32,
}

/// What rows see; `Seen` of `fp8_pages.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Seen {
    page_table: Address,
    rows_offset: u32,
    table_width: u32,
    window: u32,
    /// 1; 0: what came before the step.
    all: u32,
}

plain_params!(Fp8Args, Seen);

/// The kernels for one model's heads.
#[derive(Debug)]
pub struct Fp8Pages {
    encode: Kernel,
    widen: Kernel,
    kv_heads: u32,
    window: u32,
}

impl Fp8Pages {
    /// Looks the kernels up.
    pub fn new(modules: &Modules, dims: &Dims, window: Option<u32>) -> Result<Fp8Pages, CudaError> {
        let [encode, widen] = Self::kernels(dims.head_dim);
        Ok(Fp8Pages {
            encode: modules.kernel("fp8_pages", encode, 0)?,
            widen: modules.kernel("fp8_pages", widen, 0)?,
            kv_heads: dims.kv_heads,
            window: window.unwrap_or(u32::MAX),
        })
    }

    /// From the wide pages the rows of the step's tokens `tokens` to those in fp8, and back their codes.
    pub fn encode(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        tokens: Range<u32>,
        kv: KvLayer<Buffer>,
    ) -> Result<(), CudaError> {
        let offset = step.layout.tokens as u32 + tokens.start * TOKEN_WORDS as u32;
        let count = tokens.len() as u32;
        launcher.launch(
            &self.encode,
            Self::encode_grid(count, self.kv_heads),
            [&self.args(step, kv)?, &offset, &count],
        )
    }

    /// To the wide pages what the step's prefill rows see, or, if it is not all, what of that came before the step.
    pub fn widen(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        all: bool,
        kv: KvLayer<Buffer>,
    ) -> Result<(), CudaError> {
        let (rows, decode_rows) = (step.shape.prefill_rows, step.shape.decode_rows as usize);
        let seen = Seen {
            page_table: step.page_table.address(),
            rows_offset: (step.layout.rows + decode_rows * ROW_WORDS) as u32,
            table_width: step.table_width,
            window: self.window,
            all: all.into(),
        };
        launcher.launch(&self.widen, Self::widen_grid(rows), [&self.args(step, kv)?, &seen])
    }

    /// For so many tokens.
    pub(super) fn encode_grid(tokens: u32, kv_heads: u32) -> Grid {
        Grid::new((tokens.div_ceil(ENCODED) * 2 * kv_heads).div_ceil(WARPS), THREADS).dependent()
    }

    /// For so many prefill rows.
    pub(super) fn widen_grid(rows: u32) -> Grid {
        Grid::new(WIDENING.div_ceil(rows).max(WIDENING_LEAST), THREADS).rows(rows).dependent()
    }

    /// Names of the kernels for heads of so many dims: that encodes, and that widens.
    pub(super) fn kernels(head_dim: u32) -> [&'static str; 2] {
        match head_dim {
            64 => ["fp8_encode_64", "fp8_widen_64"],
            _ => ["fp8_encode_128", "fp8_widen_128"],
        }
    }

    fn args(&self, step: &Step<Buffer>, kv: KvLayer<Buffer>) -> Result<Fp8Args, CudaError> {
        let [wide_k, wide_v] = kv.wide.ok_or(CudaError::NotReserved)?.map(|pages| pages.address());
        Ok(Fp8Args {
            batch: step.batch.address(),
            k: kv.k.address(),
            v: kv.v.address(),
            wide_k,
            wide_v,
            kv_heads: self.kv_heads,
            page_shift: step.page_size.trailing_zeros(),
        })
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::{assert_declared, threads_of};

    #[test]
    fn the_host_and_the_kernels_mean_the_same_by_pages_and_what_is_seen() {
        let source = &["hopper/fp8/fp8_pages.cu"];
        assert_declared!(source, "Fp8Args", Fp8Args { batch, k, v, wide_k, wide_v, kv_heads, page_shift });
        assert_declared!(source, "Seen", Seen { page_table, rows_offset, table_width, window, all });
    }

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for name in ["fp8_encode_64", "fp8_encode_128", "fp8_widen_64", "fp8_widen_128"] {
            assert_eq!(threads_of(HOPPER, name), THREADS, "{name}");
        }
    }
}
