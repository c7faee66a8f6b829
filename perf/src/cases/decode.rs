//! Cases of whole decode steps: every kernel of a model's step in its order, with attention and without.
//!
//! ```text
//!   begin_step ─ embed ─ [qkv ─ (attention) ─ o ─ gate_up ─ down] x layers ─ final_norm ─ head ─ sample
//! ```
//!
//! `mixed_step`, which has to be asked for, has tokens of a prompt behind a context besides. `decode_step_fp8`, which has to be asked
//! for by that name where others are asked for, keeps keys and values in fp8. Each layer has weights, keys and values of its own, so a
//! step finds in the cache nothing that the step before left.
//! Products and attention are checked by cases of their own; here, that the logits are finite and that the tokens are
//! those which the definition of sampling draws from them.

use minisgl_core::backend::{
    Device, Element, KvLayer, LayerWeights, MlpWeights, Ops, Purpose, Step, WeightRole,
};
use minisgl_core::batch::Row;
use minisgl_core::kv::{KvFormat, KvLayout};
use minisgl_core::sampling::SlotState;
use minisgl_core::spec::Dims;
use minisgl_core::tensor::{HostTensor, TensorData};
use minisgl_cuda::ops::gemm::{Head, SmShare};
use minisgl_cuda::ops::halves::Part;
use minisgl_cuda::ops::{Layer, Operations, rows_from};
use minisgl_cuda::{Buffer, Cuda, CudaError, Launcher, Weight};

use crate::case::{Case, Check, Filter, Run};
use crate::drawn;
use crate::model::ModelShape;
use crate::random::{random_in, random_pages};
use crate::step::{PAGE_SIZE, StepOf, download_words, upload_words};

/// Weights lie within this, about as in a trained model.
const WEIGHT_MAX: f32 = 0.05;
/// Rows whose tokens are checked.
const CHECKED: usize = 2;

pub(crate) fn cases(filter: &Filter) -> Vec<Case> {
    let mut cases = Vec::new();
    for model in filter.models() {
        for rows in filter.rows_or(&[1, 64, 256]) {
            cases.push(case(model, rows, None));
        }
        for rows in filter.rows_or(&[1, 256]) {
            for context in filter.contexts_or(&[1024]) {
                cases.push(case(model, rows, Some(context)));
                if !model.kv_fp8 && filter.speaks_of("fp8") {
                    cases.push(case(model.with_kv_fp8(), rows, Some(context)));
                }
            }
        }
        for (rows, tokens, behind) in super::mixed(filter) {
            cases.push(mixed(model, rows, tokens, behind));
        }
    }
    cases
}

/// A step of `rows` decode rows and so many tokens of a prompt behind a context.
fn mixed(model: ModelShape, rows: u32, tokens: u32, behind: u32) -> Case {
    let of_each = super::BESIDE_PROMPT;
    let window = model.window.unwrap_or(u32::MAX);
    let of_prompt = (behind + tokens).min(window.saturating_add(tokens - 1));
    let step_of = move || StepOf::mixed(&vec![of_each; rows as usize], tokens, behind, model.vocab);
    Case {
        family: "mixed_step",
        shape: format!("model={} rows={rows} context={of_each} tokens={tokens} behind={behind}", model.name),
        bytes: bytes(model, f64::from(rows) * f64::from(of_each.min(window)) + f64::from(of_prompt)),
        flops: 0.0,
        setup: Box::new(move |cuda, _| setup(cuda, model, step_of(), true)),
    }
}

/// A step of `rows` rows; without a context it has no attention.
fn case(model: ModelShape, rows: u32, context: Option<u32>) -> Case {
    let seen = context.map_or(0, |context| context.min(model.window.unwrap_or(u32::MAX)));
    let family = match context {
        Some(_) if model.kv_fp8 => "decode_step_fp8",
        Some(_) => "decode_step",
        None => "decode_rest",
    };
    let context_text = context.map_or("no attention".to_owned(), |context| format!("context={context}"));
    Case {
        family,
        shape: format!("model={} rows={rows} {context_text}", model.name),
        bytes: bytes(model, f64::from(rows) * f64::from(seen)),
        flops: 0.0,
        setup: Box::new(move |cuda, _| {
            let step_of = StepOf::decode(&vec![context.unwrap_or(1); rows as usize], model.vocab);
            setup(cuda, model, step_of, context.is_some())
        }),
    }
}

/// Of all weights, and of what rows see in every layer, `seen` tokens in all.
fn bytes(model: ModelShape, seen: f64) -> f64 {
    let dims = model.dims();
    let (hidden, mlp) = (dims.hidden as usize, dims.intermediate as usize);
    let layer = hidden * (dims.qkv_width() + dims.q_width() + 3 * mlp);
    let weights = dims.layers as usize * layer + hidden * dims.vocab as usize;
    let of_kv = f64::from(dims.layers) * kv_page(model).page_bytes() as f64 * 2.0 / f64::from(PAGE_SIZE);
    2.0 * weights as f64 + seen * of_kv
}

/// A page of a layer's keys, or of its values.
fn kv_page(model: ModelShape) -> KvLayout {
    let format = if model.kv_fp8 { KvFormat::Fp8 } else { KvFormat::Bf16 };
    KvLayout::new(format, &model.dims(), PAGE_SIZE)
}

/// A model's step, ready to be launched.
struct Decode {
    operations: Operations,
    step: Step<Buffer>,
    embedding: Weight,
    layers: Vec<(LayerWeights<Weight>, KvLayer<Buffer>)>,
    attends: bool,
    rope: Buffer,
    norm: Weight,
    head: Weight,
    gathered: Buffer,
    logits: Buffer,
    tokens: Buffer,
}

fn setup(cuda: &mut Cuda, model: ModelShape, mut step_of: StepOf, attends: bool) -> Result<Run, CudaError> {
    let dims = model.dims();
    step_of.state = SlotState { temperature: 0.6, seed_low: 5, ..step_of.state };
    let limits = step_of.limits();
    let mut operations = Operations::new(cuda, &model.spec(), &limits)?;
    // What o multiplies where there is no attention.
    operations.buffers.attended = random_in(cuda, limits.step_tokens(), dims.q_width(), 4, 1.0)?.into();
    let plan_words = operations.attention.plan_words(&limits);
    let step = step_of.upload(cuda, plan_words, |shape, rows, words| {
        operations.plan(shape, rows, words);
    })?;
    let pages = limits.pages as usize + 1;
    let mut wide = None;
    if model.kv_fp8 {
        let words = KvLayout::new(KvFormat::Bf16, &dims, PAGE_SIZE).words(pages);
        let mut pages = || cuda.alloc(Purpose::KvCache, Element::Kv, words);
        wide = Some([pages()?, pages()?]);
    }
    let bytes = kv_page(model).page_bytes();
    let layers = (0..dims.layers)
        .map(|i| {
            let seed = u64::from(i + 1) << 40;
            let mut kv = || match model.kv_fp8 {
                true => random_pages(cuda, pages, bytes, seed).map(Buffer::from),
                false => random_in(cuda, pages, bytes / 2, seed, 1.0).map(Buffer::from),
            };
            let kv = KvLayer { k: kv()?, v: kv()?, wide };
            Ok((layer_weights(cuda, model, seed)?, kv))
        })
        .collect::<Result<_, CudaError>>()?;
    let (hidden, vocab, samples) = (dims.hidden as usize, dims.vocab as usize, step_of.rows.len());
    let decode = Decode {
        operations,
        step,
        embedding: random_in(cuda, vocab, hidden, 1, WEIGHT_MAX)?,
        layers,
        attends,
        rope: rope(cuda, &dims, limits.sequence)?,
        norm: random_in(cuda, 1, hidden, 2, 1.0)?,
        head: random_in(cuda, vocab, hidden, 3, WEIGHT_MAX)?,
        gathered: cuda.alloc(Purpose::Scratch, Element::Activation, samples * hidden)?,
        logits: cuda.alloc(Purpose::Scratch, Element::Logit, samples * vocab)?,
        tokens: cuda.alloc(Purpose::Scratch, Element::Word, samples)?,
    };
    let check = check(step_of.state, step_of.packed_rows(), decode.logits, decode.tokens, dims.vocab);
    Ok(Run { call: Box::new(move |launcher, _| decode.launch(launcher)), check, baseline: None })
}

fn layer_weights(cuda: &mut Cuda, model: ModelShape, seed: u64) -> Result<LayerWeights<Weight>, CudaError> {
    let dims = model.dims();
    let (hidden, mlp, head_dim) = (dims.hidden as usize, dims.intermediate as usize, dims.head_dim as usize);
    let mut linear = |rows, cols, part: u64| random_in(cuda, rows, cols, seed + (part << 32), WEIGHT_MAX);
    let qkv = linear(dims.qkv_width(), hidden, 2)?;
    let o = linear(hidden, dims.q_width(), 3)?;
    let down = linear(hidden, mlp, 4)?;
    let mut row = |there: bool, width, part: u64| {
        there.then(|| random_in(cuda, 1, width, seed + (part << 32), 1.0)).transpose()
    };
    let (q_norm, k_norm) = (row(!model.bias, head_dim, 5)?, row(!model.bias, head_dim, 6)?);
    let qkv_bias = row(model.bias, dims.qkv_width(), 7)?;
    let part = |part: u64| HostTensor {
        name: "random".into(),
        rows: mlp,
        cols: hidden,
        data: TensorData::Uniform { seed: seed + (part << 32), low: -WEIGHT_MAX, high: WEIGHT_MAX },
    };
    let gate_up = cuda.load(WeightRole::GateUp, &[part(8), part(9)])?;
    Ok(LayerWeights {
        // Folded into the matrices.
        attention_norm: None,
        qkv,
        qkv_bias,
        q_norm,
        k_norm,
        o,
        attention_out_norm: None,
        mlp_norm: None,
        mlp: MlpWeights::Dense { gate_up, down },
        mlp_out_norm: None,
    })
}

/// `[positions, head_dim / 2]` pairs of cosine and sine, with the angles of rope's base 10^6.
fn rope(cuda: &mut Cuda, dims: &Dims, positions: u32) -> Result<Buffer, CudaError> {
    let half = dims.head_dim / 2;
    let angles = (0..positions).flat_map(|position| {
        (0..half).map(move |i| f64::from(position) * 1e6f64.powf(-f64::from(i) / f64::from(half)))
    });
    let words: Vec<u32> =
        angles.flat_map(|angle| [angle.cos() as f32, angle.sin() as f32]).map(f32::to_bits).collect();
    upload_words(cuda, &words)
}

impl Decode {
    fn launch(&self, launcher: &Launcher) -> Result<(), CudaError> {
        let Decode { operations, step, rope, .. } = self;
        let Operations { dims, buffers, ends, gemm, sampling, sumsq, .. } = operations;
        // The batch lies where it is taken to, so a step begins behind `take_batch` here.
        ends.begin_step(launcher, step)?;
        ends.embed(launcher, step, self.embedding.address(), dims.hidden, buffers.residual, *sumsq)?;
        let all = self.layers.iter().enumerate();
        let mut layers = all.map(|(index, (weights, kv))| Layer {
            index,
            step,
            weights,
            next: None,
            rope: Some(*rope),
            kv: *kv,
        });
        if self.attends {
            operations.layers(launcher, step, layers)?;
        } else {
            layers.try_for_each(|layer| {
                operations.before_attention(launcher, &layer, Part::Whole)?;
                operations.after_attention(launcher, &layer, Part::Whole)
            })?;
        }
        let (norm, gathered) = (self.norm.address(), self.gathered);
        ends.final_norm(launcher, step, buffers.residual, norm, dims.hidden, dims.norm_eps, gathered)?;
        let out = Head { out: self.logits.address() };
        let rows = rows_from(gathered, dims.hidden as usize, 0);
        gemm.launch(launcher, self.head, rows, step.shape.samples, SmShare::Whole, &out)?;
        sampling.sample(launcher, step, self.logits, dims.vocab, self.tokens)
    }
}

fn check(state: SlotState, rows: Vec<Row>, logits: Buffer, tokens: Buffer, vocab: u32) -> Check {
    Box::new(move |cuda| {
        let tokens = download_words(cuda, tokens, rows.len())?;
        let count = rows.len().min(CHECKED);
        let logits = cuda.read_logits(logits, vocab, 0..count)?;
        let rows = rows.iter().zip(tokens).zip(logits.chunks_exact(vocab as usize));
        Ok(rows
            .map(|((row, token), logits)| drawn::complaint(&state, row.kv_len, logits, token))
            .find_map(|one| one))
    })
}
