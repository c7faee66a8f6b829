//! Cases of a layer's experts, at the shape of Qwen3-30B-A3B: the products alone, whatever router dealt the tokens out, and what
//! is around them.
//!
//! The products' bytes are the weights of the experts that somebody chose, their operations those of the pairs of a token and an
//! expert. Beside them stands, from a thousand tokens on, what the dense products take for as many operations.

use std::slice;

use minisgl_core::backend::{Device, Element, ExpertWeights, Purpose, WeightRole};
use minisgl_core::spec::{
    self, Activation, DecoderSpec, Dims, Fp8, Inputs, LayerSpec, Mlp, ScaleBlock, WeightFormat,
};
use minisgl_core::tensor::splitmix64;

use minisgl_cuda::ops::experts::{Ahead, ExpertLayer, Experts, experts_input};
use minisgl_cuda::ops::gemm::{GateUp, Gemm, Linear, RowNorm, Rows, SmShare};
use minisgl_cuda::{Address, Cuda, CudaError, Weight};

use crate::case::{Call, Case, Check, Filter, Run};
use crate::check::relative_error;
use crate::random::{fp8_element, fp8_part, random, random_element, random_in, random_part};
use crate::step::{StepOf, activations, upload_words};

/// Seeds of gate and up, down, the rows, the router.
const GATE_UP: u64 = 1 << 41;
const DOWN: u64 = 2 << 41;
const ROWS: u64 = 3 << 41;
const ROUTER: u64 = 4 << 41;
const CHOICES: u64 = 5 << 41;
/// What rows are scaled by.
const SCALE: f64 = 0.1;
/// Pairs whose outputs are checked, and outputs of each.
const CHECKED: usize = 6;
const OUTPUTS: usize = 24;
/// What the bf16 of activations and results allows, relative to the norm of the sampled outputs.
const ERROR_MAX: f64 = 0.01;
/// From so many tokens on there is a dense product beside the experts'.
const DENSE_FROM: u32 = 1024;

const HIDDEN: u32 = 2048;
const EXPERTS: spec::Experts = spec::Experts {
    activation: Activation::Silu,
    count: 128,
    per_token: 8,
    intermediate: 768,
    normalized: true,
};
const EXPERT_ELEMENTS: u32 = 3 * HIDDEN * EXPERTS.intermediate;
const FP8: WeightFormat =
    WeightFormat::Fp8(Fp8 { block: ScaleBlock::Tile { rows: 128, cols: 128 }, inputs: Inputs::Plain });

/// Bytes of an expert's weights, scales not counted.
fn expert_bytes(weights: WeightFormat) -> f64 {
    f64::from(EXPERT_ELEMENTS) * if weights == FP8 { 1.0 } else { 2.0 }
}

/// How tokens are dealt out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Router {
    /// As dummy weights' routers do: the first expert is chosen by 12% of the tokens, the last by 1%.
    Uneven,
    /// Each expert gets as many.
    Even,
    /// All get the same.
    Same,
    /// One expert gets none.
    OneLess,
}

impl Router {
    fn name(self) -> &'static str {
        match self {
            Router::Uneven => "uneven",
            Router::Even => "even",
            Router::Same => "same",
            Router::OneLess => "one-less",
        }
    }

    /// The experts of a token, ascending.
    fn chosen(self, token: u32) -> Vec<u16> {
        let (count, each) = (EXPERTS.count, EXPERTS.per_token);
        let mut chosen: Vec<u32> = match self {
            Router::Even => (0..each).map(|i| (token * each + i) % count).collect(),
            Router::Same => (0..each).map(|i| i * (count / each)).collect(),
            Router::Uneven | Router::OneLess => {
                let is_there = |expert: &u32| self == Router::Uneven || *expert != count / 2;
                let there = (0..count).filter(is_there);
                let mut order: Vec<(f64, u32)> = there.map(|expert| (logit(token, expert), expert)).collect();
                order.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
                order.into_iter().take(each as usize).map(|(_, expert)| expert).collect()
            }
        };
        chosen.sort_unstable();
        chosen.into_iter().map(|expert| expert as u16).collect()
    }
}

/// A router's logit: about normal, of a deviation of 1.3 for the first expert down to 0.7 for the last.
fn logit(token: u32, expert: u32) -> f64 {
    let uniform = |i: u64| {
        let index = (u64::from(token) * u64::from(EXPERTS.count) + u64::from(expert)) * 4 + i;
        (splitmix64(CHOICES + index) >> 40) as f64 / f64::from(1 << 24)
    };
    let normal = ((0..4).map(uniform).sum::<f64>() - 2.0) * 3f64.sqrt();
    normal * (1.3 - 0.6 * f64::from(expert) / f64::from(EXPERTS.count - 1))
}

pub(crate) fn cases(filter: &Filter) -> Vec<Case> {
    // A given model is a dense one.
    if filter.model.is_some() {
        return Vec::new();
    }
    let tokens: Vec<u32> = filter.rows().into_iter().chain(filter.tokens()).collect();
    let routers = [Router::Uneven, Router::Even, Router::Same, Router::OneLess];
    let of = |weights| {
        tokens.iter().flat_map(move |tokens| routers.map(|router| products(*tokens, router, weights)))
    };
    of(WeightFormat::Bf16).chain(of(FP8)).chain(tokens.iter().map(|tokens| around(*tokens))).collect()
}

fn shape(tokens: u32) -> String {
    format!("model=30b-a3b tokens={tokens}")
}

/// Both products of all pairs.
fn products(tokens: u32, router: Router, weights: WeightFormat) -> Case {
    let chosen: Vec<u16> = (0..tokens).flat_map(|token| router.chosen(token)).collect();
    let is_chosen = |expert: &u32| chosen.contains(&(*expert as u16));
    let distinct = (0..EXPERTS.count).filter(is_chosen).count();
    Case {
        family: if weights == FP8 { "experts_products_fp8" } else { "experts_products" },
        shape: format!("{} router={} experts={distinct}", shape(tokens), router.name()),
        bytes: distinct as f64 * expert_bytes(weights),
        flops: chosen.len() as f64 * f64::from(2 * EXPERT_ELEMENTS),
        setup: Box::new(move |cuda, copies| setup_products(cuda, copies, tokens, &chosen, weights)),
    }
}

/// The router's logits, the choice, the dispatch; the sum of what experts gave.
fn around(tokens: u32) -> Case {
    let bytes = tokens * HIDDEN * 2 * (EXPERTS.per_token + 3);
    Case {
        family: "experts_around",
        shape: shape(tokens),
        bytes: f64::from(bytes),
        flops: 0.0,
        setup: Box::new(move |cuda, _| {
            let layer = Layer::new(cuda, 1, tokens, WeightFormat::Bf16)?;
            let step = StepOf::decode(&vec![1; tokens as usize], 8).upload(cuda, 0, |_, _, _| {})?;
            let call: Call = Box::new(move |launcher, call| {
                let routed = layer.of(call);
                let routing = layer.experts.routing(tokens, &routed);
                layer.experts.route(launcher, &step, &routed, &routing)?;
                layer.experts.combine(launcher, &routed, &routing)
            });
            Ok(Run { call, check: Box::new(|_| Ok(None)), baseline: None })
        }),
    }
}

/// A layer on the device, with copies of its weights.
struct Layer {
    experts: Experts,
    weights: Vec<ExpertWeights<Weight>>,
    norm: Address,
    row_norm: RowNorm,
    residual: Address,
    /// What experts get: of fp8 not what the residual stream is.
    x: Address,
    sumsq: Address,
}

impl Layer {
    fn new(cuda: &mut Cuda, copies: usize, tokens: u32, format: WeightFormat) -> Result<Layer, CudaError> {
        let dims = Dims {
            layers: 1,
            hidden: HIDDEN,
            heads: 1,
            kv_heads: 1,
            head_dim: 64,
            intermediate: 64,
            vocab: 8,
            norm_eps: 1e-6,
        };
        let layer = LayerSpec { mlp: Mlp::Experts(EXPERTS), ..LayerSpec::plain() };
        let limits = StepOf::decode(&vec![1; tokens as usize], 8).limits();
        let spec = DecoderSpec { weights: format, ..DecoderSpec::uniform(dims, layer) };
        let experts = Experts::new(cuda, &spec, &limits)?;
        let experts = experts.ok_or(CudaError::NotReserved)?;
        let (hidden, inner) = (HIDDEN as usize, EXPERTS.intermediate as usize);
        let count = EXPERTS.count as usize;
        let router = random_in(cuda, count, hidden, ROUTER, (3.0 / HIDDEN as f32).sqrt())?;
        let part = |rows, cols, seed| match format {
            WeightFormat::Bf16 => random_part(rows, cols, seed),
            WeightFormat::Fp8(fp8) => fp8_part(rows, cols, fp8.inputs),
        };
        let (gate_ups, downs) = (part(count * 2 * inner, hidden, GATE_UP), part(count * hidden, inner, DOWN));
        let mut weights = Vec::with_capacity(copies);
        for _ in 0..copies {
            let role = WeightRole::ExpertsGateUp(EXPERTS.count);
            let gate_up = cuda.load_weight(role, slice::from_ref(&gate_ups))?;
            let down = cuda.load_weight(WeightRole::ExpertsDown(1), slice::from_ref(&downs))?;
            weights.push(ExpertWeights { router, gate_up, down });
        }
        let segments = HIDDEN / 64;
        let segment = (f64::from(HIDDEN) / SCALE.powi(2) / f64::from(segments)) as f32;
        let sumsq = upload_words(cuda, &vec![segment.to_bits(); (tokens * segments) as usize])?.address();
        let row_norm = RowNorm { sumsq, segments, hidden: HIDDEN, eps: 1e-6 };
        let residual = random(cuda, tokens as usize, hidden, ROWS)?.address();
        let x = match format {
            WeightFormat::Bf16 => residual,
            WeightFormat::Fp8(_) => upload_words(cuda, &inputs(tokens))?.address(),
        };
        Ok(Layer {
            experts,
            weights,
            norm: random(cuda, 1, hidden, ROUTER + 1)?.address(),
            row_norm,
            residual,
            x,
            sumsq: cuda.alloc(Purpose::Scratch, Element::Float, (tokens * segments) as usize)?.address(),
        })
    }

    /// What call number n multiplies with.
    fn of(&self, call: usize) -> ExpertLayer<'_> {
        ExpertLayer {
            spec: EXPERTS,
            weights: &self.weights[call % self.weights.len()],
            norm: self.norm,
            row_norm: self.row_norm,
            residual: self.residual,
            x: self.x,
            sumsq: self.sumsq,
            ahead: Ahead::NOTHING,
            exchange: None,
        }
    }
}

fn setup_products(
    cuda: &mut Cuda,
    copies: usize,
    tokens: u32,
    chosen: &[u16],
    weights: WeightFormat,
) -> Result<Run, CudaError> {
    let layer = Layer::new(cuda, copies, tokens, weights)?;
    let words: Vec<u32> = chosen
        .chunks(2)
        .map(|pair| u32::from(pair[0]) | u32::from(*pair.get(1).unwrap_or(&u16::MAX)) << 16)
        .collect();
    let padded = [&words[..], &[u32::MAX; 4]].concat(); // the dispatch reads whole 16 bytes
    let chosen_words = upload_words(cuda, &padded)?;
    let scales = upload_words(cuda, &vec![(SCALE as f32).to_bits(); tokens as usize])?;
    let mut routing = layer.experts.routing(tokens, &layer.of(0));
    (routing.chosen, routing.scales) = (chosen_words.address(), scales.address());
    if routing.bits == Address::NULL {
        layer.experts.dispatch(cuda.launcher(), &routing)?;
    } else {
        routing.bits = upload_words(cuda, &bits(tokens, chosen))?.address();
    }
    let given = layer.experts.given();
    let checked: Vec<u16> = chosen.iter().copied().take(64).collect();
    let check: Check = Box::new(move |cuda| {
        let values = activations(cuda, given, checked.len() * HIDDEN as usize)?;
        let pairs = (0..CHECKED).flat_map(|i| {
            let pair = (splitmix64(i as u64) % checked.len() as u64) as usize;
            let (token, expert) = (pair / EXPERTS.per_token as usize, usize::from(checked[pair]));
            let activated = activated(token, expert, weights);
            let values = &values;
            (0..OUTPUTS).map(move |j| {
                let output = (splitmix64((i * OUTPUTS + j) as u64) % u64::from(HIDDEN)) as usize;
                let got = values[pair * HIDDEN as usize + output].to_f64();
                (got, given_by(expert, output, &activated, weights))
            })
        });
        Ok(relative_error(pairs, ERROR_MAX))
    });
    let baseline = if tokens >= DENSE_FROM { Some(("dense", dense(cuda, tokens, &layer)?)) } else { None };
    let call: Call =
        Box::new(move |launcher, call| layer.experts.products(launcher, &layer.of(call), &routing));
    Ok(Run { call, check, baseline })
}

/// Rows as experts in fp8 take them.
fn inputs(tokens: u32) -> Vec<u32> {
    let of_row =
        |row: usize| (0..HIDDEN as usize).map(move |col| random_element(HIDDEN as usize, ROWS, row, col));
    let elements: Vec<u32> =
        (0..tokens as usize).flat_map(of_row).map(|x| u32::from(experts_input(x as f32))).collect();
    elements.as_chunks::<2>().0.iter().map(|[x, y]| x | y << 16).collect()
}

/// `[experts, ceil(tokens / 32)]`: a bit for each token that chose an expert.
fn bits(tokens: u32, chosen: &[u16]) -> Vec<u32> {
    let words = tokens.div_ceil(32) as usize;
    let mut bits = vec![0; EXPERTS.count as usize * words];
    for (pair, expert) in chosen.iter().enumerate() {
        let token = pair / EXPERTS.per_token as usize;
        bits[usize::from(*expert) * words + token / 32] |= 1 << (token % 32);
    }
    bits
}

/// An element of gate and up or of down.
fn element(weights: WeightFormat, seed: u64, cols: usize, row: usize, col: usize) -> f64 {
    match weights {
        WeightFormat::Bf16 => random_element(cols, seed, row, col),
        WeightFormat::Fp8(_) => fp8_element(cols, row, col),
    }
}

/// What `down` gets.
fn activated(token: usize, expert: usize, weights: WeightFormat) -> Vec<f64> {
    let (hidden, inner) = (HIDDEN as usize, EXPERTS.intermediate as usize);
    let x: Vec<f64> = (0..hidden).map(|k| SCALE * random_element(hidden, ROWS, token, k)).collect();
    let sum = |row: usize| -> f64 {
        x.iter().enumerate().map(|(k, x)| x * element(weights, GATE_UP, hidden, row, k)).sum()
    };
    let of = |i: usize| {
        let (gate, up) = (sum(expert * 2 * inner + i), sum(expert * 2 * inner + inner + i));
        gate / (1.0 + (-gate).exp()) * up
    };
    (0..inner).map(of).collect()
}

fn given_by(expert: usize, output: usize, activated: &[f64], weights: WeightFormat) -> f64 {
    let row = expert * HIDDEN as usize + output;
    activated.iter().enumerate().map(|(k, x)| x * element(weights, DOWN, activated.len(), row, k)).sum()
}

/// The dense products of as many operations: one expert's, of all pairs.
fn dense(cuda: &mut Cuda, tokens: u32, layer: &Layer) -> Result<Call, CudaError> {
    let (hidden, inner) = (HIDDEN as usize, EXPERTS.intermediate as usize);
    let pairs = tokens * EXPERTS.per_token;
    let gemm = Gemm::new(cuda)?;
    let part = |seed| random_part(inner, hidden, seed);
    let gate_up = cuda.load_weight(WeightRole::GateUp, &[part(GATE_UP), part(GATE_UP + 1)])?;
    let down = random(cuda, hidden, inner, DOWN)?;
    let mut rows = |width: usize| cuda.alloc(Purpose::Scratch, Element::Activation, pairs as usize * width);
    let (x, activated, out) = (rows(hidden)?, rows(inner)?, rows(hidden)?);
    let sumsq = upload_words(cuda, &vec![1.0f32.to_bits(); (pairs * HIDDEN / 64) as usize])?;
    let norm = RowNorm { sumsq: sumsq.address(), ..layer.row_norm };
    let gated = GateUp { norm, out: activated.address(), intermediate: EXPERTS.intermediate, reserved: 0 };
    Ok(Box::new(move |launcher, _| {
        let x = Rows { address: x.address(), there: pairs };
        gemm.launch(launcher, gate_up, x, pairs, SmShare::Whole, &gated)?;
        let activated = Rows { address: activated.address(), there: pairs };
        gemm.launch(launcher, down, activated, pairs, SmShare::Whole, &Linear { out: out.address() })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routers_deal_tokens_out_as_they_say() {
        let counts = |router: Router| {
            let mut counts = vec![0; EXPERTS.count as usize];
            for token in 0..2048 {
                let chosen = router.chosen(token);
                assert!(chosen.is_sorted_by(|a, b| a < b) && chosen.len() == EXPERTS.per_token as usize);
                chosen.iter().for_each(|expert| counts[usize::from(*expert)] += 1);
            }
            counts
        };
        assert!(counts(Router::Even).iter().all(|count| *count == 128));
        assert_eq!(counts(Router::Same).iter().filter(|count| **count > 0).count(), 8);
        assert_eq!(counts(Router::OneLess).iter().filter(|count| **count == 0).count(), 1);
        let uneven = counts(Router::Uneven);
        assert!(
            (8..18).contains(&(uneven[0] * 100 / 2048)) && uneven[127] < 60 && uneven[127] > 5,
            "{uneven:?}"
        );
    }

    #[test]
    fn bytes_are_those_of_the_experts_that_somebody_chose() {
        let bytes = |tokens, router| products(tokens, router, WeightFormat::Bf16).bytes;
        assert_eq!(products(1, Router::Uneven, FP8).bytes, 8.0 * 4_718_592.0);
        assert_eq!(bytes(1, Router::Uneven), 8.0 * 9_437_184.0);
        assert_eq!(bytes(256, Router::Same), 8.0 * 9_437_184.0);
        assert_eq!(bytes(256, Router::Even), 128.0 * 9_437_184.0);
        assert_eq!(bytes(64, Router::OneLess).min(127.0 * 9_437_184.0), bytes(64, Router::OneLess));
    }
}
