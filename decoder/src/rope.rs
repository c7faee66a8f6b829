//! The rotary embedding's angles as cosine and sine, computed as transformers does: every step rounded to f32.
//!
//! ```text
//!   frequency[i] = 1 / base^(2i / rotated), then scaled      angle[p, i] = p * frequency[i]      i < rotated / 2
//! ```

use std::f64::consts::PI;

use minisgl_core::spec::{Rope, RopeScaling};

/// Fills `words`, the bits of f32, with `[positions, rotated / 2]` pairs of cosine and sine.
pub(crate) fn fill(rope: &Rope, words: &mut [u32]) {
    let frequencies = frequencies(rope);
    let magnitude = match rope.scaling {
        RopeScaling::Yarn { magnitude, .. } | RopeScaling::Long { magnitude, .. } => magnitude as f32,
        RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
    };
    for (position, row) in words.chunks_exact_mut(rope.rotated as usize).enumerate() {
        for (pair, frequency) in row.chunks_exact_mut(2).zip(&frequencies) {
            let angle = position as f32 * frequency;
            pair[0] = (angle.cos() * magnitude).to_bits();
            pair[1] = (angle.sin() * magnitude).to_bits();
        }
    }
}

/// `[rotated / 2]`.
fn frequencies(rope: &Rope) -> Vec<f32> {
    let pairs = rope.rotated as usize / 2;
    // Positions in which a pair turns by one radian.
    let wavelength = |i: usize| {
        let exponent = (2 * i) as f32 / rope.rotated as f32;
        rope.base.powf(f64::from(exponent)) as f32
    };
    let plain = |i: usize| 1.0 / wavelength(i);
    let scaled = |i: usize| match rope.scaling {
        RopeScaling::Default => plain(i),
        RopeScaling::Linear { factor } => plain(i) / factor as f32,
        RopeScaling::Llama3 { factor, low, high, original } => {
            let (frequency, turns) = (f64::from(plain(i)), original * f64::from(plain(i)) / (2.0 * PI));
            // How much of the pair stays as it is: nothing of long wavelengths, all of short ones.
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            ((1.0 - kept) * frequency / factor + kept * frequency) as f32
        }
        RopeScaling::Yarn { factor, original, fast, slow, truncate, .. } => {
            // The pair that turns so often within the positions of the first training.
            let pair_of = |turns: f64| {
                f64::from(rope.rotated) * (original / (turns * 2.0 * PI)).ln() / (2.0 * rope.base.ln())
            };
            let (first, last) = (pair_of(fast), pair_of(slow));
            let (first, last) = if truncate { (first.floor(), last.ceil()) } else { (first, last) };
            let (first, last) = (first.max(0.0), last.min(f64::from(rope.rotated - 1)));
            let width = if last == first { 0.001 } else { last - first };
            let stretched = ((i as f64 - first) / width).clamp(0.0, 1.0);
            let frequency = f64::from(plain(i));
            (stretched * frequency / factor + (1.0 - stretched) * frequency) as f32
        }
        RopeScaling::Long { factors, .. } => 1.0 / (factors[i] * wavelength(i)),
    };
    (0..pairs).map(scaled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_angle_turns_by_its_frequency_at_each_position() {
        let (base, rotated) = (10_000.0_f64, 8);
        let mut words = vec![0; 300 * rotated];
        fill(&Rope::plain(base, rotated as u32), &mut words);
        for position in [0, 1, 2, 299] {
            for i in 0..rotated / 2 {
                let angle = position as f64 / base.powf(2.0 * i as f64 / rotated as f64);
                let at = position * rotated + 2 * i;
                let [cos, sin] = [words[at], words[at + 1]].map(|bits| f64::from(f32::from_bits(bits)));
                // 299 radians rounded to f32 are off by up to 1.6e-5.
                assert!((cos - angle.cos()).abs() < 3e-5, "cosine at {position}, {i}: {cos}");
                assert!((sin - angle.sin()).abs() < 3e-5, "sine at {position}, {i}: {sin}");
            }
        }
    }

    /// The ratio of each pair's frequency to what it is without scaling.
    fn ratios(scaling: RopeScaling) -> Vec<f32> {
        let plain = Rope::plain(500_000.0, 64);
        let scaled = frequencies(&Rope { scaling, ..plain });
        scaled.iter().zip(frequencies(&plain)).map(|(scaled, plain)| scaled / plain).collect()
    }

    #[test]
    fn scaling_leaves_short_wavelengths_and_stretches_long_ones_by_the_factor() {
        assert!(ratios(RopeScaling::Linear { factor: 4.0 }).iter().all(|ratio| *ratio == 0.25));
        let (factor, original) = (8.0, 8192.0);
        let yarn =
            RopeScaling::Yarn { factor, original, fast: 32.0, slow: 1.0, truncate: true, magnitude: 1.2 };
        for scaling in [RopeScaling::Llama3 { factor, low: 1.0, high: 4.0, original }, yarn] {
            let ratios = ratios(scaling);
            assert_eq!((ratios[0], ratios[31]), (1.0, 0.125), "{scaling:?}");
            assert!(ratios.is_sorted_by(|a, b| a >= b), "{scaling:?}: {ratios:?}");
            assert!(ratios.iter().any(|ratio| (0.2..0.9).contains(ratio)), "{scaling:?}: {ratios:?}");
        }
    }
}
