//! Keys and values in pages: the formats that they are kept in, and where each one lies. Every backend follows this.
//!
//! ```text
//!   keys of a layer    | page 0 | page 1 | … | dummy page |            its values likewise
//!   page, f32, bf16    | head 0 | head 1 | … |                        so all that a head has in a page is one block
//!   page, fp8          | head 0 | head 1 | … | scales of head 0 | of head 1 | … | to a multiple of 128 bytes |
//!   head               | row 0 | row 1 | … |                          a row: a token's head_dim elements
//!   scales             | of row 0 | of row 1 | … |                    bf16
//! ```
//!
//! In fp8 an element is e4m3 ([`crate::fp8`]) times its row's scale. The scale is the best of the eight by which the
//! row's largest magnitude becomes one of e4m3's numbers from 240 to 448 ([`fp8::best_scale`]), each rounded to bf16. A row
//! whose largest magnitude lies beyond 57,344 gets that magnitude's scales, and one that has less than 2^-13 throughout gets those of
//! 2^-13; what lies beyond 448 of the chosen one, 107,072 at most, is cut. A row's codes and scale are of that row alone, so a token's
//! bits depend on its own sequence alone.
//!
//! Why a scale a row: e4m3 is a floating-point format, so a factor for each channel, or a finer grain, makes its error no smaller in
//! itself. What a search for the scale gains it gains from few large elements, as keys have them; what it costs in perplexity, and
//! what other forms would, is in docs/log/2026-11-29-fp8.
//!
//! Why elements are not rounded: then a scale need not meet its elements. A row is one token's, so its score is that of its codes times
//! the scale, and what its value adds is its probability times the scale, times codes; a GPU makes f16 numbers of codes by one
//! instruction for two, multiplies those, and spends one product a token on scales where it would spend one an element. A backend does
//! so in every way that it attends, few tokens or many: bits depend on it.
//!
//! Why scales behind all rows: so a head's 16 rows of 64 codes or more begin at a multiple of 128 bytes, a line of a GPU's memory, and its
//! 16 scales at one of 16 bytes, as bulk copies must. A backend may permute bits within a row, and scales within those of 16 rows, and
//! keep a scale as a multiple.
//!
//! Invariant: [`KvLayout::place`]s of different rows share no byte, and all lie within the pages' [`KvLayout::page_bytes`].

use core::fmt;

use half::bf16;

use crate::fp8;
pub use crate::spec::KvFormat;
use crate::spec::{DecoderSpec, Dims};

/// Bytes that those of a page in fp8 are a multiple of.
const PAGE_ALIGNMENT: usize = 128;
/// Bytes of a row's scale.
const SCALE_BYTES: usize = 2;
/// Rows of more have scales as if they had this: from 128, which makes 448 of it, to 239, which makes 240 of it. 2^8 times such a
/// scale is an f16 number, which a probability in f16 is multiplied by.
const LARGEST: f32 = 57_344.0; // 448 * 2^7
/// Rows of less have scales as if they had this: 2^8 times the least of them is a normal f16 number still.
const LEAST: f32 = f32::from_bits((127 - 13) << 23); // 2^-13

/// How the pages of a layer's keys are laid out, and those of its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    format: KvFormat,
    kv_heads: usize,
    head_dim: usize,
    page_size: usize,
    page_bytes: usize,
}

/// Where a row lies, in bytes from the beginning of the pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its first element.
    pub row: usize,
    /// Its scale, in a format that has some.
    pub scale: usize,
}

impl KvLayout {
    /// That of a model's pages, of a power of two of tokens.
    pub fn new(format: KvFormat, dims: &Dims, page_size: u32) -> KvLayout {
        let (head_dim, page_size) = (dims.head_dim as usize, page_size as usize);
        let kv_heads = dims.kv_heads as usize;
        let page_bytes = kv_heads * page_size * head_dim * format.element_bytes();
        let page_bytes = match format {
            KvFormat::F32 | KvFormat::Bf16 => page_bytes,
            KvFormat::Fp8 => {
                (page_bytes + kv_heads * page_size * SCALE_BYTES).next_multiple_of(PAGE_ALIGNMENT)
            }
        };
        KvLayout { format, kv_heads, head_dim, page_size, page_bytes }
    }

    /// What elements are kept as.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Elements of a row.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Bytes of a page of one layer's keys, or of its values.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// 32-bit words of so many pages, as [`crate::backend::Element::Kv`] counts them.
    pub fn words(&self, pages: usize) -> usize {
        (pages * self.page_bytes()).div_ceil(4)
    }

    /// Where row `row` of a head lies in a page.
    #[inline(always)]
    pub fn place(&self, page: usize, head: usize, row: usize) -> Place {
        let (begin, row_bytes) = (page * self.page_bytes, self.head_dim * self.format.element_bytes());
        let scales = begin + self.kv_heads * self.page_size * row_bytes;
        let row = head * self.page_size + row;
        Place { row: begin + row * row_bytes, scale: scales + row * SCALE_BYTES }
    }
}

impl KvFormat {
    /// Bytes of an element, without its share of a scale.
    pub fn element_bytes(self) -> usize {
        match self {
            KvFormat::F32 => 4,
            KvFormat::Bf16 => 2,
            KvFormat::Fp8 => 1,
        }
    }

    /// Rounds a row to this format, to the nearest and of two equally near ones to the even one, and leaves it at its place
    /// in the pages. A row with an element that is no number, or infinite, has a scale that is no number in fp8.
    pub fn store(self, row: &[f32], place: Place, pages: &mut [u8]) {
        let bytes = &mut pages[place.row..][..row.len() * self.element_bytes()];
        match self {
            KvFormat::F32 => {
                for (bytes, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(row) {
                    *bytes = x.to_le_bytes();
                }
            }
            KvFormat::Bf16 => {
                for (bytes, x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(row) {
                    *bytes = bf16::from_f32(*x).to_le_bytes();
                }
            }
            KvFormat::Fp8 => {
                let largest = fp8::largest_magnitude(row);
                let mut scale = bf16::NAN;
                if largest.is_nan() {
                    bytes.fill(0);
                } else {
                    let largest = largest.clamp(LEAST, LARGEST);
                    scale = bf16::from_f32(fp8::best_scale(row, largest, to_bf16));
                    fp8::encode_block(row, scale.to_f32(), bytes);
                }
                pages[place.scale..][..SCALE_BYTES].copy_from_slice(&scale.to_le_bytes());
            }
        }
    }

    /// The row at a place in the pages, as many elements as `out` is long.
    #[inline(always)]
    pub fn load(self, place: Place, pages: &[u8], out: &mut [f32]) {
        let bytes = &pages[place.row..][..out.len() * self.element_bytes()];
        match self {
            KvFormat::F32 => {
                for (x, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*bytes);
                }
            }
            KvFormat::Bf16 => {
                for (x, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            KvFormat::Fp8 => {
                let scale = bf16::from_le_bytes([pages[place.scale], pages[place.scale + 1]]).to_f32();
                for (x, code) in out.iter_mut().zip(bytes) {
                    *x = fp8::decode(*code) * scale; // four bits times eight: nothing is rounded
                }
            }
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvFormat::F32 => "f32",
            KvFormat::Bf16 => "bf16",
            KvFormat::Fp8 => "fp8",
        })
    }
}

impl DecoderSpec {
    /// Bytes of a page over all layers, keys and values, on a device that keeps them as `own` where the spec leaves it open.
    pub fn page_bytes(&self, own: KvFormat, page_size: u32) -> u64 {
        let layout = KvLayout::new(self.kv.unwrap_or(own), &self.dims, page_size);
        2 * u64::from(self.dims.layers) * layout.page_bytes() as u64
    }
}

/// The nearest bf16 number, of two equally near ones the even one: [`bf16::from_f32`] for what is a number, in few instructions.
#[inline(always)]
fn to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;

    const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::Bf16, KvFormat::Fp8];

    fn layout(format: KvFormat, kv_heads: usize, head_dim: usize, page_size: usize) -> KvLayout {
        let dims = Dims {
            layers: 1,
            hidden: 8,
            heads: kv_heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            intermediate: 8,
            vocab: 8,
            norm_eps: 1e-6,
        };
        KvLayout::new(format, &dims, page_size as u32)
    }

    /// What comes back of a row in fp8.
    fn round_trip(row: &[f32]) -> Vec<f32> {
        let layout = layout(KvFormat::Fp8, 1, row.len(), 1);
        let (mut pages, mut out) = (vec![0; layout.page_bytes()], vec![0.0; row.len()]);
        KvFormat::Fp8.store(row, layout.place(0, 0, 0), &mut pages);
        KvFormat::Fp8.load(layout.place(0, 0, 0), &pages, &mut out);
        out
    }

    #[test]
    fn every_byte_of_a_page_belongs_to_one_row_or_to_none() {
        for format in FORMATS {
            for (kv_heads, head_dim, page_size) in
                [(1, 2, 1), (2, 64, 16), (3, 10, 4), (8, 128, 64), (1, 72, 2), (2, 80, 256)]
            {
                let layout = layout(format, kv_heads, head_dim, page_size);
                let mut owners = vec![0; 3 * layout.page_bytes()];
                for row in 0..3 * kv_heads * page_size {
                    let (block, row) = (row / page_size, row % page_size);
                    let place = layout.place(block / kv_heads, block % kv_heads, row);
                    let bytes = head_dim * format.element_bytes();
                    owners[place.row..][..bytes].iter_mut().for_each(|owners| *owners += 1);
                    if format == KvFormat::Fp8 {
                        owners[place.scale..][..2].iter_mut().for_each(|owners| *owners += 1);
                    }
                }
                assert!(owners.iter().all(|owners| *owners <= 1), "{layout:?}");
                let unused = owners.iter().filter(|owners| **owners == 0).count();
                let most = if format == KvFormat::Fp8 { 3 * 127 } else { 0 };
                assert!(unused <= most, "{layout:?} wastes {unused} bytes");
            }
        }
    }

    #[test]
    fn rows_of_fp8_begin_at_lines_and_their_scales_lie_behind_all_of_a_page() {
        for (head_dim, page_size) in [(64, 16), (128, 16), (128, 64), (256, 256)] {
            let layout = layout(KvFormat::Fp8, 4, head_dim, page_size);
            let page_bytes = 4 * page_size * (head_dim + 2);
            assert_eq!((layout.page_bytes(), page_bytes % 128), (page_bytes, 0));
            for row in 0..page_size {
                let begin = 2 * page_bytes + (3 * page_size + row) * head_dim;
                let scale = 2 * page_bytes + 4 * page_size * head_dim + (3 * page_size + row) * 2;
                assert_eq!(layout.place(2, 3, row), Place { row: begin, scale });
            }
            assert_eq!((layout.place(2, 3, 0).row % 128, layout.place(2, 3, 0).scale % 32), (0, 0));
        }
        assert_eq!(layout(KvFormat::Fp8, 1, 128, 16).page_bytes(), 17 * 128);
        let bf16 = layout(KvFormat::Bf16, 8, 128, 16);
        assert_eq!(bf16.page_bytes(), 8 * 16 * 128 * 2);
        assert_eq!(bf16.place(1, 2, 3).row, ((8 + 2) * 16 + 3) * 128 * 2);
    }

    #[test]
    fn rows_come_back_as_they_are_where_the_format_has_them() {
        let row = [0.0, -0.0, 1.0, -1.5, 448.0, 0.015625, -1.0 / 512.0, 20.0];
        for format in FORMATS {
            let layout = layout(format, 2, row.len(), 4);
            let mut pages = vec![0xa5; 2 * layout.page_bytes()];
            let mut out = [f32::NAN; 8];
            format.store(&row, layout.place(1, 1, 2), &mut pages);
            format.load(layout.place(1, 1, 2), &pages, &mut out);
            assert_eq!(out.map(f32::to_bits), row.map(f32::to_bits), "{format}");
        }
    }

    #[test]
    fn what_is_kept_is_a_code_times_a_scale_within_its_range() {
        let mut word = 1u32;
        for _ in 0..20_000 {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = f32::from_bits(word & 0xff7f_ffff | 0x0100_0000);
            assert_eq!(to_bf16(x), bf16::from_f32(x).to_f32(), "{x}");
        }
        assert!(to_bf16(f32::NAN).is_nan() && to_bf16(-f32::NAN).is_nan());
        for largest in [1e-30, 3e-3, 5.0, 57_344.0, 6e4, 1e5, 3e38] {
            for kept in round_trip(&[largest, -largest / 3.0, largest / 7.0, 0.0]) {
                // Four bits times eight.
                assert!(kept.abs() <= 107_072.0 && kept.to_bits() & 0xfff == 0, "{kept}");
            }
        }
        assert_eq!(round_trip(&[1e9, -1e9]), [57_344.0, -57_344.0]);
        // By 239 the others come out better than by 128, and it keeps more.
        assert_eq!(round_trip(&[6e4, 3e4, 1e3]), [61_184.0, 30_592.0, 956.0]);
    }

    #[test]
    fn elements_are_off_by_little_more_than_a_sixteenth_of_themselves_at_most() {
        let mut word = 1u32;
        for _ in 0..20_000 {
            let row: [f32; 5] = core::array::from_fn(|_| {
                word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let magnitude = f32::from_bits(0x3900_0000 + (word >> 5)); // 2^-13 up to 8
                if word & 1 == 0 { magnitude } else { -magnitude }
            });
            let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            for (x, kept) in row.iter().zip(round_trip(&row)) {
                // Below the least normal code by 2^-10 of the scale; and that is rounded itself.
                let bound = (x.abs() / 16.0).max(largest / 239.0 / 1024.0) + x.abs() / 256.0;
                assert!((x - kept).abs() <= bound, "{x} of {row:?} is kept as {kept}");
            }
            // Of less than 2^-13 throughout, as many below.
            let less = row.map(|x| x / 131_072.0);
            for (x, kept) in less.iter().zip(round_trip(&less)) {
                let bound = (x.abs() / 16.0).max(LEAST / 239.0 / 1024.0) + x.abs() / 256.0;
                assert!((x - kept).abs() <= bound, "{x} of {less:?} is kept as {kept}");
            }
        }
    }

    #[test]
    fn scales_times_256_are_normal_f16_numbers() {
        for largest in [0.0, 1e-30, 1.3e-4, 3e-3, 5.0, 57_344.0, 6e4, 3e38] {
            let layout = layout(KvFormat::Fp8, 1, 2, 1);
            let (mut pages, place) = (vec![0; layout.page_bytes()], layout.place(0, 0, 0));
            KvFormat::Fp8.store(&[largest, largest / 3.0], place, &mut pages);
            let scale = bf16::from_le_bytes([pages[place.scale], pages[place.scale + 1]]).to_f32();
            let lifted = half::f16::from_f32(scale * 256.0);
            assert!(lifted.is_normal() && lifted.to_f32() == scale * 256.0, "{scale}, of {largest}");
        }
    }

    #[test]
    fn zeros_stay_and_a_row_with_what_is_no_number_is_none_at_all() {
        assert_eq!(round_trip(&[0.0, -0.0]).iter().map(|x| x.to_bits()).collect::<Vec<_>>(), [0, 1 << 31]);
        assert_eq!(round_trip(&[1e-45, -1e-40]), [0.0, 0.0]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(round_trip(&[1.0, bad, 2.0]).iter().all(|x| x.is_nan()), "{bad}");
        }
    }
}
