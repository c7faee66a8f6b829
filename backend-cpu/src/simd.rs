//! The two inner loops of every operation, compiled for the vector units that the machine has.
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
        add_products::<FMA, W, X>(&mut sums, w.map(|(_, rest)| padded(rest)), x.map(|(_, rest)| padded(rest)));
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
