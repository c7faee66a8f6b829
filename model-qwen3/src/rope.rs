//! The rotary embedding's angles as cosine and sine, computed as transformers does: every step rounded to f32.
//!
//! ```text
//!   frequency[i] = 1 / theta^(2i / head_dim)      angle[p, i] = p * frequency[i]      i < head_dim / 2
//! ```

/// Fills `words`, the bits of f32, with `[positions, head_dim / 2]` pairs of cosine and sine.
pub(crate) fn fill(theta: f64, head_dim: usize, words: &mut [u32]) {
    let frequencies: Vec<f32> = (0..head_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / theta.powf(f64::from(exponent)) as f32
        })
        .collect();
    for (position, row) in words.chunks_exact_mut(head_dim).enumerate() {
        for (pair, frequency) in row.chunks_exact_mut(2).zip(&frequencies) {
            let angle = position as f32 * frequency;
            pair[0] = angle.cos().to_bits();
            pair[1] = angle.sin().to_bits();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_angle_turns_by_its_frequency_at_each_position() {
        let (theta, head_dim) = (10_000.0, 8);
        let mut words = vec![0; 300 * head_dim];
        fill(theta, head_dim, &mut words);
        for position in [0, 1, 2, 299] {
            for i in 0..head_dim / 2 {
                let angle = position as f64 / theta.powf(2.0 * i as f64 / head_dim as f64);
                let at = position * head_dim + 2 * i;
                let [cos, sin] = [words[at], words[at + 1]].map(|bits| f64::from(f32::from_bits(bits)));
                // 299 radians rounded to f32 are off by up to 1.6e-5.
                assert!((cos - angle.cos()).abs() < 3e-5, "cosine at {position}, {i}: {cos}");
                assert!((sin - angle.sin()).abs() < 3e-5, "sine at {position}, {i}: {sin}");
            }
        }
    }
}
