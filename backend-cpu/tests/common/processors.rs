//! What transformers' logits processors make of logits, as cases for any backend's sampler: `scripts/processors-reference` wrote them.
//!
//! ```text
//!   logits ── penalties, biases, what may not be drawn ──> edited ── temperature, filters ──> kept ── softmax ──> the tokens' shares
//! ```

use std::fs;

use minisgl_core::rules::Rules;
use minisgl_core::sampling::{SamplingParams, SlotState, token_uniform};
use serde_json::Value;

/// Seeds that each case is drawn with.
pub const DRAWS: u64 = 2048;

/// A row of logits, what is asked for, and what comes of it; minus infinity is never drawn.
pub struct Case {
    pub name: String,
    params: SamplingParams,
    rules: Rules,
    endings: Vec<u32>,
    prompt_len: u32,
    /// Prompt and output.
    pub tokens: Vec<u32>,
    pub logits: Vec<f32>,
    pub edited: Vec<f32>,
    pub kept: Vec<f32>,
}

impl Case {
    /// All of them. Cargo runs tests in the crate's folder, `scripts/gpu-check` in the repository's.
    pub fn all() -> Vec<Case> {
        let fixture = "tests/fixtures/processors.json";
        let text = fs::read_to_string(fixture).or_else(|_| fs::read_to_string(format!("../{fixture}")));
        let text = text.expect("the fixture");
        let cases: Vec<Value> = serde_json::from_str(&text).expect("JSON");
        cases.iter().map(Case::read).collect()
    }

    fn read(case: &Value) -> Case {
        let number = |name: &str| case[name].as_f64().expect("a number") as f32;
        let whole = |value: &Value| value.as_u64().expect("a whole number") as u32;
        let list = |value: &Value| value.as_array().expect("a list").clone();
        let ids = |value: &Value| list(value).iter().map(whole).collect::<Vec<u32>>();
        let logit = |value: &Value| value.as_f64().map_or(f32::NEG_INFINITY, |logit| logit as f32);
        let logits = |name: &str| list(&case[name]).iter().map(logit).collect::<Vec<f32>>();
        let biases = list(&case["logit_bias"]).into_iter();
        let biases = biases.map(|pair| (whole(&pair[0]), logit(&pair[1]))).collect();
        let bad_words: Vec<_> = list(&case["bad_words"]).iter().map(ids).collect();
        let (prompt, output) = (ids(&case["prompt"]), ids(&case["output"]));
        Case {
            name: case["name"].as_str().expect("a name").to_owned(),
            params: SamplingParams {
                temperature: number("temperature"),
                top_k: whole(&case["top_k"]),
                top_p: number("top_p"),
                min_p: number("min_p"),
                repetition_penalty: number("repetition_penalty"),
                presence_penalty: number("presence_penalty"),
                frequency_penalty: number("frequency_penalty"),
                min_tokens: whole(&case["min_tokens"]),
                ..SamplingParams::default()
            },
            rules: Rules::new(biases, vec![], &bad_words).expect("few rules"),
            endings: ids(&case["endings"]),
            prompt_len: prompt.len() as u32,
            tokens: [prompt, output].concat(),
            logits: logits("logits"),
            edited: logits("edited"),
            kept: logits("kept"),
        }
    }

    /// The state of its slot, with a seed, and the words of its rules.
    pub fn slot(&self, seed: u64) -> (SlotState, Vec<u32>) {
        let endings = if self.params.min_tokens == 0 { &[][..] } else { &self.endings };
        let mut state = SamplingParams { seed, ..self.params }.slot_state(self.prompt_len);
        self.rules.apply(endings.len(), &mut state);
        (state, self.rules.words(endings.iter().copied()).collect())
    }

    /// The token drawn with a seed is the one of the largest of these.
    pub fn scores(&self, seed: u64) -> Vec<f32> {
        let position = self.tokens.len() as u32;
        let gumbel = |id| -(-token_uniform(seed, position, id).ln()).ln();
        (0..).zip(&self.kept).map(|(id, logit)| logit + gumbel(id)).collect()
    }

    /// How likely it is that draws which have each token this often, or stranger ones, come of the case: the p of a chi-square test.
    pub fn likelihood(&self, counts: &[u32]) -> f64 {
        let largest = self.kept.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let masses: Vec<f64> = self.kept.iter().map(|z| f64::from(z - largest).exp()).collect();
        let (draws, total) = (counts.iter().sum::<u32>(), masses.iter().sum::<f64>());
        // Tokens of which few are expected are taken as one.
        let (mut rest, mut square, mut cells) = ((0.0, 0.0), 0.0, 0);
        let mut cell = |expected: f64, count: f64| {
            square += (count - expected).powi(2) / expected;
            cells += 1;
        };
        for (mass, count) in masses.iter().zip(counts) {
            let (expected, count) = (f64::from(draws) * mass / total, f64::from(*count));
            match expected {
                0.0 => assert_eq!(count, 0.0, "{}: a token was drawn that never is", self.name),
                5.0.. => cell(expected, count),
                _ => rest = (rest.0 + expected, rest.1 + count),
            }
        }
        if rest.0 > 0.0 {
            cell(rest.0.max(1e-3), rest.1);
        }
        if cells > 1 { upper_gamma(f64::from(cells - 1) / 2.0, square / 2.0) } else { 1.0 }
    }
}

/// The regularized upper incomplete gamma function Q(a, x), for the halves that a chi-square test asks for: by
/// Q(a + 1, x) = Q(a, x) + x^a e^-x / Γ(a + 1), from Q(1, x) = e^-x or Q(1/2, x) = erfc(√x).
pub fn upper_gamma(a: f64, x: f64) -> f64 {
    let (mut at, mut sum) =
        if a.fract() == 0.0 { (1.0, (-x).exp()) } else { (0.5, complementary_error(x.sqrt())) };
    // x^at e^-x / Γ(at + 1)
    let mut term =
        if a.fract() == 0.0 { x * (-x).exp() } else { 2.0 * (x / std::f64::consts::PI).sqrt() * (-x).exp() };
    while at < a {
        sum += term;
        at += 1.0;
        term *= x / at;
    }
    sum
}

/// erfc for what is not negative, within 1.2e-7: the rational approximation of Press et al., "Numerical Recipes", 6.2.
fn complementary_error(x: f64) -> f64 {
    const TERMS: [f64; 10] = [
        -1.26551223,
        1.00002368,
        0.37409196,
        0.09678418,
        -0.18628806,
        0.27886807,
        -1.13520398,
        1.48851587,
        -0.82215223,
        0.17087277,
    ];
    let t = 1.0 / (1.0 + 0.5 * x);
    let polynomial = TERMS.iter().rev().fold(0.0, |sum, term| sum * t + term);
    t * (polynomial - x * x).exp()
}
