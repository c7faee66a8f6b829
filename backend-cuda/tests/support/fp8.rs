//! Rows of keys and values in fp8 as the kernels have them: core's, whose codes are permuted and packed as `fp8_rows.cuh` says, and
//! their scales so, too, 2^120 times.

use half::bf16;
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

/// What a row is once it was kept in fp8.
pub fn meant(row: &[f32]) -> Vec<f32> {
    let mut meant = vec![0.0; row.len()];
    KvFormat::Fp8.load(layout(1, row.len(), 1).place(0, 0, 0), &rounded(row), &mut meant);
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

/// Bytes of a row's scale.
const SCALE_BYTES: usize = 2;

/// Which of 16 rows' scales is row `t`'s.
fn scale_place(t: usize) -> usize {
    let t = t % 16;
    t % 8 / 2 * 4 + t / 8 * 2 + t % 2
}

/// Four codes as `fp8.cuh` packs them.
fn packed(codes: [u8; 4]) -> [u8; 4] {
    let half = |even: u8, odd: u8| {
        let (even, odd) = (u16::from(even), u16::from(odd));
        let [even_sign, odd_sign] = [even, odd].map(|code| code >> 7);
        odd_sign << 15 | (even >> 4 & 7) << 12 | even_sign << 11 | (odd & 0x7f) << 4 | even & 15
    };
    let [low, high] = [half(codes[0], codes[1]), half(codes[2], codes[3])].map(u16::to_le_bytes);
    [low[0], low[1], high[0], high[1]]
}

/// Leaves a rounded row in the pages.
pub fn put(what: What, layout: &KvLayout, [page, head, t]: [usize; 3], row: &[u8], pages: &mut [u8]) {
    let at = layout.place(page, head, t);
    let (own, scale) = row.split_at(row.len() - SCALE_BYTES);
    let codes = &mut pages[at.row..][..own.len()];
    for (d, code) in own.iter().enumerate() {
        codes[place(what, own.len(), t, d)] = *code;
    }
    codes.as_chunks_mut::<4>().0.iter_mut().for_each(|word| *word = packed(*word));
    let scale = bf16::from_le_bytes([scale[0], scale[1]]).to_f32();
    let lifted = bf16::from_f32(scale * 2f32.powi(120));
    let tile = at.scale - t % 16 * SCALE_BYTES;
    pages[tile + scale_place(t) * SCALE_BYTES..][..SCALE_BYTES].copy_from_slice(&lifted.to_le_bytes());
}
