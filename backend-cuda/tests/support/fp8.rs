//! Rows of keys and values in fp8 as the kernels have them: core's, whose codes are permuted as `fp8_rows.cuh` says.

use minisgl_core::backend::Dims;
use minisgl_core::kv::{KvFormat, KvLayout};

/// Keys' rows and values' are permuted in two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Keys,
    Values,
}

/// How pages of such heads are laid out.
pub fn layout(kv_heads: usize, head_dim: usize, page_size: u32) -> KvLayout {
    KvLayout::new(KvFormat::Fp8, &dims(kv_heads, head_dim), page_size)
}

/// Sizes of a model with such heads.
pub fn dims(kv_heads: usize, head_dim: usize) -> Dims {
    Dims {
        layers: 1,
        hidden: 64,
        heads: kv_heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: head_dim as u32,
        intermediate: 64,
        vocab: 64,
        norm_eps: 1e-6,
    }
}

/// What a row is once it was kept in fp8.
pub fn meant(row: &[f32]) -> Vec<f32> {
    let layout = layout(1, row.len(), 1);
    let (mut page, mut meant) = (vec![0; layout.page_bytes()], vec![0.0; row.len()]);
    KvFormat::Fp8.store(row, layout.place(0, 0, 0), &mut page);
    KvFormat::Fp8.load(layout.place(0, 0, 0), &page, &mut meant);
    meant
}

/// Where the code of dim `d` of a page's row `t` lies among the row's.
fn place(what: What, head_dim: usize, t: usize, d: usize) -> usize {
    let (chunk, within) = (d / 16, d % 16);
    let (word, is_high, is_second) = (within % 8 / 2, within / 8, within % 2);
    match what {
        What::Keys => {
            let half = if head_dim == 128 { (chunk / 4) ^ (t & 1) } else { chunk / 4 };
            64 * half + 16 * word + 4 * (chunk % 4) + (1 - is_high) + 2 * is_second
        }
        What::Values => {
            let swizzle = if head_dim == 128 { t & 7 } else { (t / 2) & 3 };
            16 * (chunk ^ swizzle) + 4 * word + is_high + 2 * is_second
        }
    }
}

/// Rounds a row and leaves it in the pages.
pub fn store(what: What, layout: &KvLayout, [page, head, t]: [usize; 3], row: &[f32], pages: &mut [u8]) {
    let at = layout.place(page, head, t);
    KvFormat::Fp8.store(row, at, pages);
    let codes = pages[at.row..][..row.len()].to_vec();
    for (d, code) in codes.into_iter().enumerate() {
        pages[at.row + place(what, row.len(), t, d)] = code;
    }
}
