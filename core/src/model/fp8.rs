//! e4m3: eight bits, one of sign, four of exponent with bias 7, three of mantissa, without infinities (Micikevicius et al.,
//! 2022, FP8 Formats for Deep Learning). 0x7f and 0xff are NaN, the largest number is 448, the least above zero 2^-9.
//!
//! A block of numbers in e4m3 has a scale beside it, by which its elements are multiplied. Activations are quantized while a
//! step runs, each group of them by its own largest magnitude ([`quantize_group`]): never by another token's, so that a
//! token's bits depend on its own sequence alone. What is read often after it was rounded once, weights made e4m3 at load and
//! rows of keys and values, gets the best of eight scales ([`best_scale`]).
//!
//! Why the best of eight: e4m3's error is relative, whatever the scale is, but a few largest elements have most of a block's energy. A
//! scale by which the largest one becomes a number of e4m3 leaves it without error, and there are eight such within an octave;
//! by which of them the others come out best is tried.

/// The largest number.
pub const MAX: f32 = 448.0;

/// What is no number.
pub const NAN: u8 = 0x7f;

/// The least number with all bits of mantissa.
const NORMAL_MIN: f32 = 1.0 / 64.0;

/// 2^14: its neighbour in f32 is 2^-9 away, so adding it rounds to whole multiples of that.
const SHIFT: f32 = 16_384.0;

/// What each code means.
pub static VALUES: [f32; 256] = values();

const fn values() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = value(code as u8);
        code += 1;
    }
    values
}

const fn value(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3 & 15) as u32, (code & 7) as u32);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa as f32 / 512.0,
        // f32's exponent has bias 127, and 20 mantissa bits more.
        _ => f32::from_bits((exponent + 120) << 23 | mantissa << 20),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// What a code means: its exponent and mantissa moved to f32's, and the difference of their biases multiplied in, which also
/// makes normal numbers of subnormal ones.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    const BIASES: f32 = f32::from_bits((127 + 120) << 23); // 2^120
    let magnitude = code & 0x7f;
    let value = f32::from_bits(u32::from(magnitude) << 20) * BIASES;
    let value = if magnitude == NAN { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

/// The nearest number's code, of two equally near ones that with an even mantissa; ±448 for what lies beyond.
pub fn encode(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24 & 0x80) as u8;
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return sign | NAN;
    }
    let code = if magnitude < NORMAL_MIN {
        (magnitude + SHIFT).to_bits() - SHIFT.to_bits()
    } else {
        let bits = magnitude.min(MAX).to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        (rounded >> 20) - (120 << 3)
    };
    sign | code as u8
}

/// What the largest magnitude of a block becomes: the numbers from 448 down to where what they are halves of begins.
const TOPS: [f32; 8] = [448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0];

/// The scale of a block whose largest magnitude is `largest`: of the eight by which that becomes one of
/// 240 to 448, each made a number of the scales' format by `round`, the one with the least sum of squared errors; of equal ones
/// the lowest.
pub fn best_scale(block: &[f32], largest: f32, round: impl Fn(f32) -> f32) -> f32 {
    let mut best = (round(largest / MAX), f32::INFINITY);
    for top in TOPS {
        let scale = round(largest / top);
        let error = squared_error(block, scale);
        if error < best.1 {
            best = (scale, error);
        }
    }
    best.0
}

/// The sum of the elements' squared errors by this scale. Each is counted in whole 4,096ths of the scale's square, so that a sum
/// does not depend on its order, and every backend finds the same scale.
fn squared_error(block: &[f32], scale: f32) -> f32 {
    /// So many parts fit a u32 together.
    const AT_ONCE: usize = 1024;
    /// 2^23: what is added to it becomes a whole number.
    const WHOLE: f32 = 8_388_608.0;
    let inverse = 1.0 / scale;
    // Without branches and checks of overflow, both of which would keep it from being vector code: it is what quantizing does most.
    let part = |x: f32| {
        let magnitude = (x * inverse).abs();
        let error = magnitude - rounded(magnitude);
        // At most 2^20, unless the scale is none of those that are tried.
        let part = (error * error * 4096.0).min(1_048_576.0);
        let nearest = part + WHOLE;
        let is_above = u32::from(nearest - WHOLE > part);
        nearest.to_bits().wrapping_sub(WHOLE.to_bits()).wrapping_sub(is_above)
    };
    let mut parts = 0u64;
    for block in block.chunks(AT_ONCE) {
        let mut sum = 0u32;
        for x in block {
            sum = sum.wrapping_add(part(*x));
        }
        parts += u64::from(sum);
    }
    parts as f32 * (scale * scale)
}

/// The number that a magnitude's code means.
#[inline(always)]
fn rounded(magnitude: f32) -> f32 {
    let bits = magnitude.min(MAX).to_bits();
    let normal = f32::from_bits(bits.wrapping_add(0x7_ffff).wrapping_add(bits >> 20 & 1) & !0xf_ffff);
    if magnitude < NORMAL_MIN { (magnitude + SHIFT) - SHIFT } else { normal }
}

/// Rounds a block to e4m3 by a scale: an element times 1 / scale, to the nearest.
pub fn encode_block(block: &[f32], scale: f32, codes: &mut [u8]) {
    let inverse = 1.0 / scale;
    for (code, x) in codes.iter_mut().zip(block) {
        *code = encode(x * inverse);
    }
}

/// Rounds a group of activations to e4m3 times a scale, the largest magnitude / 448: each element becomes the product that a
/// matrix is multiplied by. A group of zeros stays so; one with a NaN or an infinity becomes NaN throughout.
pub fn quantize_group(x: &mut [f32]) {
    quantize_by(x, largest_magnitude(x));
}

/// The largest magnitude of a group, NaN if there is a NaN or an infinity.
pub fn largest_magnitude(x: &[f32]) -> f32 {
    match x.iter().all(|x| x.is_finite()) {
        true => x.iter().fold(0.0, |largest, x| largest.max(x.abs())),
        false => f32::NAN,
    }
}

/// Rounds a group, or a part of one, by the largest magnitude of the whole.
pub fn quantize_by(x: &mut [f32], largest: f32) {
    if largest.is_nan() {
        x.fill(f32::NAN);
    } else if largest > 0.0 {
        quantize(x, largest / MAX);
    }
}

/// Rounds activations to e4m3 times this scale; what lies beyond its 448 is cut.
pub fn quantize(x: &mut [f32], scale: f32) {
    for x in x {
        *x = VALUES[usize::from(encode(*x / scale))] * scale;
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    /// Every number that a code means, in order.
    fn numbers() -> impl Iterator<Item = (u8, f32)> {
        (0..0x7f).map(|code| (code, VALUES[usize::from(code)]))
    }

    #[test]
    fn codes_mean_what_the_format_says() {
        assert_eq!(
            [0x00, 0x01, 0x07, 0x08, 0x38, 0x7e].map(|code: usize| VALUES[code]),
            [0.0, 1.0 / 512.0, 7.0 / 512.0, 1.0 / 64.0, 1.0, 448.0]
        );
        assert!(VALUES[0x7f].is_nan() && VALUES[0xff].is_nan());
        assert!((0..0x7f).all(|code| VALUES[code + 0x80] == -VALUES[code]));
        assert!((0..=255).all(|code: u8| match VALUES[usize::from(code)] {
            value if value.is_nan() => decode(code).is_nan(),
            value => decode(code).to_bits() == value.to_bits(),
        }));
        assert!(numbers().zip(numbers().skip(1)).all(|((_, low), (_, high))| low < high));
    }

    #[test]
    fn a_number_keeps_its_code() {
        for (code, value) in numbers() {
            assert_eq!((encode(value), encode(-value)), (code, code | 0x80), "{value}");
        }
    }

    #[test]
    fn what_lies_between_goes_to_the_nearer_and_at_the_middle_to_the_even_one() {
        for ((low, below), (high, above)) in numbers().zip(numbers().skip(1)) {
            let middle = (below + above) / 2.0;
            let even = if low % 2 == 0 { low } else { high };
            let codes = [middle.next_down(), middle, middle.next_up()].map(encode);
            assert_eq!(codes, [low, even, high], "between {below} and {above}");
        }
    }

    #[test]
    fn a_magnitude_is_rounded_to_what_its_code_means() {
        let numbers: Vec<f32> = numbers().map(|(_, value)| value).collect();
        let middles = numbers.windows(2).map(|two| (two[0] + two[1]) / 2.0);
        let near = middles.flat_map(|middle| [middle.next_down(), middle, middle.next_up()]);
        for x in near.chain(numbers.iter().copied()).chain([448.1, 464.0, 500.0, 1e9]) {
            assert_eq!(rounded(x).to_bits(), decode(encode(x)).to_bits(), "{x}");
        }
    }

    #[test]
    fn what_lies_beyond_is_cut_and_nan_stays() {
        assert_eq!([449.0, 1e30, f32::INFINITY, -1e30].map(encode), [0x7e, 0x7e, 0x7e, 0xfe]);
        assert_eq!([1e-30, -1e-30, 0.0].map(encode), [0, 0x80, 0]);
        assert!(VALUES[usize::from(encode(f32::NAN))].is_nan());
    }

    #[test]
    fn a_group_is_rounded_by_its_own_largest_magnitude() {
        let mut x = [0.5, -2.0, 0.0, 1.0e-4];
        quantize_group(&mut x);
        let scale: f32 = 2.0 / 448.0;
        assert_eq!(x[..3], [112.0 * scale, -448.0 * scale, 0.0]);
        assert!((x[3] - 1.0e-4).abs() <= scale / 1024.0);
        let mut zeros = [0.0; 3];
        quantize_group(&mut zeros);
        assert_eq!(zeros, [0.0; 3]);
    }

    #[test]
    fn of_the_scales_that_keep_the_largest_element_the_best_for_the_others_is_taken() {
        let kept = |block: &[f32], scale: f32| {
            let mut codes = [0; 4];
            encode_block(block, scale, &mut codes);
            codes.map(|code| decode(code) * scale)
        };
        // Each is exact by one of the eight scales alone.
        for top in TOPS {
            let block = [top, 9.0, -11.0, 13.0].map(|x| x * 0.25);
            let scale = best_scale(&block, block[0], |scale| scale);
            assert_eq!((scale, kept(&block, scale)), (0.25, block), "{top}");
        }
        // By any of them the largest is without error, but for the scale's own rounding.
        let mut word = 1u32;
        for _ in 0..2_000 {
            let block: [f32; 4] = core::array::from_fn(|_| {
                word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f32::from_bits(0x3f00_0000 + (word >> 7)) // 0.5 up to 16
            });
            let largest = largest_magnitude(&block);
            let scale = best_scale(&block, largest, |scale| scale);
            let error = squared_error(&block, scale);
            assert!(TOPS.iter().all(|top| error <= squared_error(&block, largest / top)), "{block:?}");
            let kept = kept(&block, scale);
            assert!(block.iter().zip(kept).all(|(x, kept)| (x - kept).abs() <= x / 16.0 * 1.000_001));
            let top = block.iter().position(|x| *x == largest).unwrap_or(0);
            assert!((kept[top] - largest).abs() <= largest * 2e-7, "{block:?} is kept as {kept:?}");
        }
    }

    #[test]
    fn errors_are_counted_in_whole_parts() {
        let mut word = 7u32;
        for _ in 0..2_000 {
            let block: [f32; 9] = core::array::from_fn(|_| {
                word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f32::from_bits(0x3a00_0000 + (word >> 5)) - 1.0
            });
            let scale = largest_magnitude(&block) / 300.0;
            let part = |x: &f32| {
                let x = x * (1.0 / scale);
                let error = x - decode(encode(x));
                (error * error * 4096.0) as u32
            };
            let parts: u32 = block.iter().map(part).sum();
            assert_eq!(squared_error(&block, scale), parts as f32 * (scale * scale));
        }
    }

    #[test]
    fn of_scales_that_are_as_good_the_lowest_is_taken() {
        assert_eq!(best_scale(&[0.0, -0.0], 448.0, |scale| scale), 1.0);
        assert_eq!(best_scale(&[1e-42], 448.0, |scale| scale), 1.0);
    }

    #[test]
    fn one_number_that_is_none_spoils_its_group() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in 0..3 {
                let mut x = [1.0, 2.0, 3.0];
                x[place] = bad;
                quantize_group(&mut x);
                assert!(x.iter().all(|x| x.is_nan()), "{bad} at {place}");
            }
        }
    }
}
