//! The inner loops of the operations, compiled for the vector units that the machine has.
//!
//! A [`Kernel`] is a loop nest written once, in plain Rust over arrays of eight floats. [`fastest`] runs the copy that
//! the compiler made for AVX2 with fused multiply-add where the processor has them, else the portable one. The two
//! round differently in the last bit; within one machine it is always the same copy that runs.
//!
//! A dot product is summed in eight lanes, lane `i % 8` taking element i, and the lanes are then added pairwise: an
//! order that depends on nothing but the length.

/// Floats that are added side by side.
pub const LANES: usize = 8;

/// A loop nest to be compiled for several processors.
pub trait Kernel {
    /// Runs it; `FMA` says that multiply-add is one instruction.
    fn run<const FMA: bool>(self);
}

/// Runs a kernel as fast as this machine can.
#[inline]
pub fn fastest(kernel: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn with_avx2(kernel: impl Kernel) {
            kernel.run::<true>();
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has just been found to have both features that the function is compiled for.
            return unsafe { with_avx2(kernel) };
        }
    }
    kernel.run::<{ cfg!(target_arch = "aarch64") }>();
}

#[inline(always)]
fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The dot products of each `w` with each `x`, all of one length: `[x, w]`.
#[inline(always)]
pub fn dots<const FMA: bool, const W: usize, const X: usize>(
    w: [&[f32]; W],
    x: [&[f32]; X],
) -> [[f32; W]; X] {
    let len = w[0].len();
    let (w, x) = (w.map(|w| w[..len].as_chunks::<LANES>()), x.map(|x| x[..len].as_chunks::<LANES>()));
    let mut sums = [[[0.0; LANES]; W]; X];
    for c in 0..len / LANES {
        add_products::<FMA, W, X>(&mut sums, w.map(|(chunks, _)| chunks[c]), x.map(|(chunks, _)| chunks[c]));
    }
    if !len.is_multiple_of(LANES) {
        add_products::<FMA, W, X>(
            &mut sums,
            w.map(|(_, rest)| padded(rest)),
            x.map(|(_, rest)| padded(rest)),
        );
    }
    sums.map(|sums| sums.map(add_lanes))
}

#[inline(always)]
fn add_products<const FMA: bool, const W: usize, const X: usize>(
    sums: &mut [[[f32; LANES]; W]; X],
    w: [[f32; LANES]; W],
    x: [[f32; LANES]; X],
) {
    for j in 0..W {
        for i in 0..X {
            for lane in 0..LANES {
                sums[i][j][lane] = mul_add::<FMA>(w[j][lane], x[i][lane], sums[i][j][lane]);
            }
        }
    }
}

/// The last elements, with zeros behind them, which add nothing.
#[inline(always)]
fn padded(rest: &[f32]) -> [f32; LANES] {
    std::array::from_fn(|lane| rest.get(lane).copied().unwrap_or(0.0))
}

#[inline(always)]
fn add_lanes(s: [f32; LANES]) -> f32 {
    ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
}

/// The sum, lane by lane as in [`dots`].
#[inline(always)]
pub fn sum(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut sums = padded(rest);
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += chunk[lane];
        }
    }
    add_lanes(sums)
}

/// The largest value; minus infinity where there is none.
#[inline(always)]
pub fn largest(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut largest = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            largest[lane] = larger(largest[lane], chunk[lane]);
        }
    }
    largest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| larger(a, *b))
}

/// `e^x` for x <= 0, to within 2 units in the last place; e^-87 for all that is less.
///
/// `x = n ln 2 + r` with n a whole number, so `e^x = 2^n e^r`: adding 1.5 * 2^23 rounds n into the sum's low bits, a
/// polynomial gives `e^r`, and n is moved into a float's exponent.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4; // exact in 10 bits, so that its product with n is too
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let rounded = mul_add::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = mul_add::<FMA>(n, -LN_2_LOW, mul_add::<FMA>(n, -LN_2_HIGH, x));
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = mul_add::<FMA>(series, r, coefficient);
    }
    series * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

/// `out += sum over j of factors[j] * row(j)`, j in order.
#[inline(always)]
pub fn add_scaled_rows<'a, const FMA: bool>(
    out: &mut [f32],
    factors: &[f32],
    row: impl Fn(usize) -> &'a [f32] + Copy,
) {
    let wide = out.len() / 64 * 64;
    let narrow = out.len() / LANES * LANES;
    add_columns::<FMA, 64>(&mut out[..wide], 0, factors, row);
    add_columns::<FMA, LANES>(&mut out[wide..narrow], wide, factors, row);
    add_columns::<FMA, 1>(&mut out[narrow..], narrow, factors, row);
}

/// [`add_scaled_rows`] for columns `from..`, N at a time in registers.
#[inline(always)]
fn add_columns<'a, const FMA: bool, const N: usize>(
    out: &mut [f32],
    from: usize,
    factors: &[f32],
    row: impl Fn(usize) -> &'a [f32],
) {
    for (block, out) in out.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        let mut sums = *out;
        for (j, factor) in factors.iter().enumerate() {
            let Some(values) = row(j)[from + block * N..].first_chunk::<N>() else { continue };
            for lane in 0..N {
                sums[lane] = mul_add::<FMA>(*factor, values[lane], sums[lane]);
            }
        }
        *out = sums;
    }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_the_exponential_to_2_units_in_the_last_place() {
        for i in 0..870_000 {
            let x = i as f32 * -1e-4;
            let exact = f64::from(x).exp();
            for (name, y) in [("fused", exp::<true>(x)), ("plain", exp::<false>(x))] {
                let error = (f64::from(y) - exact).abs() / exact;
                assert!(error < 2.0 * f64::from(f32::EPSILON), "{name}: exp({x}) is {y}, off by {error:e}");
            }
        }
        assert!(exp::<true>(f32::NEG_INFINITY) < 1e-37);
        assert!(exp::<true>(f32::NAN).is_nan());
    }
}
