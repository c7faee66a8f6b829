//! Rows of keys and values in fp8 as the kernels have them: core's, whose codes are permuted as `fp8_rows.cuh` says, and their scales
//! so, too, those of values 2^8 times and in f16.

use half::{bf16, f16};
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

/// A row rounded by core: its codes, and behind them its scale.
pub fn rounded(row: &[f32]) -> Vec<u8> {
    let layout = layout(1, row.len(), 1);
    let mut page = vec![0; layout.page_bytes()];
    KvFormat::Fp8.store(row, layout.place(0, 0, 0), &mut page);
    page.truncate(row.len() + SCALE_BYTES);
    page
}

/// Where the code of dim `d` of a page's row `t` lies among the row's.
fn place(what: What, head_dim: usize, t: usize, d: usize) -> usize {
    let (chunk, within) = (d / 16, d % 16);
    let (word, is_high, is_second) = (within % 8 / 2, within / 8, within % 2);
    match what {
        What::Keys => {
            let half = if head_dim == 128 { (chunk / 4) ^ (t & 1) } else { chunk / 4 };
            64 * half + 16 * word + 4 * (chunk % 4) + 2 * is_high + is_second
        }
        What::Values => {
            let swizzle = if head_dim == 128 { t & 7 } else { (t / 2) & 3 };
            16 * (chunk ^ swizzle) + 4 * word + is_high + 2 * is_second
        }
    }
}

/// Bytes of a row's scale.
const SCALE_BYTES: usize = 2;

/// Which of 16 rows' scales is row `t`'s.
fn scale_place(t: usize) -> usize {
    let t = t % 16;
    t % 8 / 2 * 4 + t / 8 * 2 + t % 2
}

/// Leaves a rounded row in the pages.
pub fn put(what: What, layout: &KvLayout, [page, head, t]: [usize; 3], row: &[u8], pages: &mut [u8]) {
    let at = layout.place(page, head, t);
    let (own, scale) = row.split_at(row.len() - SCALE_BYTES);
    let codes = &mut pages[at.row..][..own.len()];
    for (d, code) in own.iter().enumerate() {
        codes[place(what, own.len(), t, d)] = *code;
    }
    let scale = bf16::from_le_bytes([scale[0], scale[1]]);
    let kept = match what {
        What::Keys => scale.to_le_bytes(),
        What::Values => f16::from_f32(scale.to_f32() * 256.0).to_le_bytes(),
    };
    let tile = at.scale - t % 16 * SCALE_BYTES;
    pages[tile + scale_place(t) * SCALE_BYTES..][..SCALE_BYTES].copy_from_slice(&kept);
}
