//! The forward pass of a decoder over a backend's operations.
//!
//! ```text
//!   ids ─ embed ─> residual stream ─ [decoder layer] x L ─> final norm ─> normed ─ head ─> logits
//!                                         │ ^               (last token of each sampled row)
//!                                         v │
//!                                    KV pages of the layer
//! ```
//!
//! What is normed is a prompt's embedding, too; a checkpoint made for embeddings may have no head.
//!
//! Weights are loaded once, by [`Decoder::load`], and may be exchanged in place, by [`Decoder::update`]; buffers are planned once, by
//! [`Model::reserve`]. A step only enqueues.

use std::borrow::Cow;
use std::collections::HashSet;

use minisgl_core::backend::{Device, DeviceInfo, Element, KvCache, KvLayer, Model, Ops, Purpose, Step};
use minisgl_core::batch::{Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::kv::{KvFormat, KvLayout};
use minisgl_core::shard::{Indivisible, Rank, Slicing};
use minisgl_core::spec::{DecoderSpec, Dims, LayerSpec, Mixer, Rope, Unsupported};
use thiserror::Error;

use crate::checkpoint::Checkpoint;
use crate::rope;
use crate::tensors::Tensors;
use crate::weights::ModelWeights;

/// Why a checkpoint could not be put on a device.
#[derive(Debug, Error)]
pub enum LoadError<E: std::error::Error + 'static> {
    /// The device can't compute it.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// So many ranks can't share it out.
    #[error(transparent)]
    Indivisible(#[from] Indivisible),
    /// The device failed, for lack of memory above all.
    #[error(transparent)]
    Device(E),
}

/// A decoder on a device, or a rank's part of one.
pub struct Decoder<B: Ops> {
    spec: DecoderSpec,
    /// What it is a part of.
    whole: DecoderSpec,
    rank: Rank,
    max_positions: u32,
    /// What keys and values are kept as.
    kv: KvFormat,
    /// What the device widens a layer's to, if it does; see [`Ops::widens`].
    wide: Option<KvFormat>,
    step_weight_bytes: u64,
    weights: ModelWeights<B::Weight>,
    planned: Option<Planned<B::Buffer>>,
    pages: Option<Pages<B::Buffer>>,
}

/// Words of which a layer's keys begin at a multiple, and its values: 2 MiB, a GPU's own large page.
const ALIGNMENT: usize = 1 << 19;

/// What [`Model::alloc_pages`] allocates.
struct Pages<Buf> {
    /// `[layers, 2]` times all pages of a layer's keys or values, all but rounding, and room for wide ones: in one piece, so
    /// that little is lost to it.
    all: Buf,
    /// The layers' parts of it.
    layers: KvCache<Buf>,
}

/// What [`Model::reserve`] allocates.
struct Planned<Buf> {
    /// Each layer's table, `[positions, rotated / 2]` pairs of cosine and sine (floats); equal ones are one.
    ropes: Vec<Option<Buf>>,
    /// `[logit rows, hidden]`: the last token of each sampled row, normed.
    normed: Buf,
    /// `[logit rows, vocab]`.
    logits: Buf,
}

impl<B: Ops> Decoder<B> {
    /// Puts a checkpoint's weights on the device; a tied head is the embedding itself.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn load(backend: &mut B, checkpoint: &Checkpoint) -> Result<Self, LoadError<B::Error>> {
        Decoder::load_part(backend, checkpoint, Rank::ALONE)
    }

    /// Puts a rank's part of them on its device; the rest is not read.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn load_part(
        backend: &mut B,
        checkpoint: &Checkpoint,
        rank: Rank,
    ) -> Result<Self, LoadError<B::Error>> {
        let spec = checkpoint.config().spec.shard(rank.count, backend.info().slicing)?;
        backend.supports(&spec)?;
        Self::load_weights(backend, checkpoint, spec, rank).map_err(LoadError::Device)
    }

    fn load_weights(
        backend: &mut B,
        checkpoint: &Checkpoint,
        spec: DecoderSpec,
        rank: Rank,
    ) -> Result<Self, B::Error> {
        let (config, tensors) = (checkpoint.config(), checkpoint.tensors());
        let DeviceInfo { kv: own, slicing, .. } = backend.info();
        let tensors = part(tensors, rank, &config.spec, slicing);
        let kv = config.spec.kv.unwrap_or(own);
        Ok(Decoder {
            max_positions: config.max_positions,
            kv,
            wide: backend.widens(kv).then_some(own),
            step_weight_bytes: tensors.step_bytes(),
            weights: ModelWeights::of(&spec, &tensors, rank, slicing).load(backend)?,
            spec,
            whole: config.spec.clone(),
            rank,
            planned: None,
            pages: None,
        })
    }

    /// Makes the weights what [`Decoder::load`] of a model's tensors makes them, of which those named in `changed` are others than
    /// what they were made from.
    ///
    /// # Errors
    /// Those of the device; some weights may be changed then, and others not.
    pub fn update(
        &mut self,
        backend: &mut B,
        tensors: &Tensors,
        changed: &HashSet<String>,
    ) -> Result<(), B::Error> {
        let slicing = backend.info().slicing;
        let tensors = part(tensors, self.rank, &self.whole, slicing);
        self.step_weight_bytes = tensors.step_bytes();
        ModelWeights::of(&self.spec, &tensors, self.rank, slicing).reload(backend, &self.weights, changed)
    }

    /// What is computed.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// What keys and values are kept as.
    pub fn kv_format(&self) -> KvFormat {
        self.kv
    }

    /// The model's sizes.
    pub fn dims(&self) -> &Dims {
        &self.spec.dims
    }

    /// Where a step leaves its logits, `[samples, vocab]`, for [`Ops::read_logits`]; `None` before
    /// [`Model::reserve`].
    pub fn logits_buffer(&self) -> Option<B::Buffer> {
        self.planned.as_ref().map(|planned| planned.logits)
    }

    /// Its own, or the embedding; none where the checkpoint is for embeddings alone.
    fn head_weight(&self) -> Option<B::Weight> {
        let ModelWeights { embed, head, .. } = &self.weights;
        head.or_else(|| self.spec.tied.then_some(*embed))
    }

    fn planned(&self) -> &Planned<B::Buffer> {
        self.planned.as_ref().expect("the engine reserves before the first step")
    }
}

impl<B: Ops> Model<B> for Decoder<B> {
    fn page_bytes(&self, page_size: u32) -> u64 {
        let wide = self.wide.map(|own| KvLayout::new(own, &self.spec.dims, page_size).page_bytes());
        self.spec.page_bytes(self.kv, page_size) + wide.map_or(0, |bytes| 2 * bytes as u64)
    }

    fn vocab(&self) -> u32 {
        self.spec.dims.vocab
    }

    fn hidden(&self) -> u32 {
        self.spec.dims.hidden
    }

    fn has_head(&self) -> bool {
        self.head_weight().is_some()
    }

    fn max_positions(&self) -> u32 {
        self.max_positions
    }

    fn window(&self) -> Option<u32> {
        self.spec.window()
    }

    fn reserve(&mut self, backend: &mut B, limits: &Limits) -> Result<usize, B::Error> {
        let plan_words = backend.reserve(&self.spec, limits)?;
        let dims = &self.spec.dims;
        let samples = limits.logit_rows();
        self.planned = Some(Planned {
            ropes: upload_ropes(backend, &self.spec.layers, limits.sequence)?,
            normed: backend.alloc(Purpose::Scratch, Element::Activation, samples * dims.hidden as usize)?,
            logits: backend.alloc(Purpose::Scratch, Element::Logit, samples * dims.vocab as usize)?,
        });
        Ok(plan_words)
    }

    fn alloc_pages(&mut self, backend: &mut B, pages: u32, page_size: u32) -> Result<(), B::Error> {
        let dims = &self.spec.dims;
        let half = KvLayout::new(self.kv, dims, page_size).words(pages as usize + 1);
        let halves = 2 * dims.layers as usize;
        // Elsewhere, decode steps of many long rows take 1% longer on an H200; of small pools it would take too much.
        let apart = if half < 64 * ALIGNMENT { half } else { half.next_multiple_of(ALIGNMENT) };
        let wide = self.wide.map_or(0, |own| KvLayout::new(own, dims, page_size).words(pages as usize + 1));
        let all = backend.alloc(Purpose::KvCache, Element::Kv, halves * apart + 2 * wide)?;
        let part = |i: usize| backend.slice(all, i * apart..i * apart + half);
        let wide_part =
            |i: usize| backend.slice(all, halves * apart + i * wide..halves * apart + (i + 1) * wide);
        let wide = self.wide.map(|_| [wide_part(0), wide_part(1)]);
        let layers = (0..halves).step_by(2).map(|i| KvLayer { k: part(i), v: part(i + 1), wide }).collect();
        self.pages = Some(Pages { all, layers });
        Ok(())
    }

    fn free_pages(&mut self, backend: &mut B) -> Result<(), B::Error> {
        self.pages.take().map_or(Ok(()), |pages| backend.free(pages.all))
    }

    fn plan(&self, backend: &B, shape: StepShape, rows: &[Row], words: &mut [u32]) {
        backend.plan(shape, rows, words);
    }

    fn forward(&mut self, backend: &mut B, step: &Step<B::Buffer>) -> Result<(), B::Error> {
        let planned = self.planned();
        let kv = &self.pages.as_ref().expect("the engine allocates pages before the first step").layers;
        backend.begin_step(step)?;
        backend.embed(step, self.weights.embed)?;
        backend.decoder_layers(step, &self.weights.layers, &planned.ropes, kv)
    }

    fn norm(&mut self, backend: &mut B, step: &Step<B::Buffer>) -> Result<(), B::Error> {
        backend.final_norm(step, self.weights.norm, self.planned().normed)
    }

    fn head(&mut self, backend: &mut B, step: &Step<B::Buffer>) -> Result<(), B::Error> {
        let planned = self.planned();
        match self.head_weight() {
            Some(head) => backend.logits(step, planned.normed, head, planned.logits),
            None => Ok(()), // The engine asks for none.
        }
    }

    fn normed(&self) -> B::Buffer {
        self.planned().normed
    }

    fn logits(&self) -> B::Buffer {
        self.planned().logits
    }

    fn step_weight_bytes(&self) -> u64 {
        self.step_weight_bytes
    }
}

/// What a rank has of a model's tensors.
fn part<'a>(tensors: &'a Tensors, rank: Rank, whole: &DecoderSpec, slicing: Slicing) -> Cow<'a, Tensors> {
    match rank.count {
        1 => Cow::Borrowed(tensors),
        _ => Cow::Owned(tensors.shard(rank, whole, slicing)),
    }
}

/// Each layer's table; layers with the same rope have the same.
fn upload_ropes<B: Device>(
    backend: &mut B,
    layers: &[LayerSpec],
    positions: u32,
) -> Result<Vec<Option<B::Buffer>>, B::Error> {
    let mut tables: Vec<(Rope, B::Buffer)> = Vec::new();
    let mut ropes = Vec::with_capacity(layers.len());
    for layer in layers {
        let rope = match layer.mixer {
            Mixer::Attention(attention) => attention.rope,
            Mixer::GatedDelta { .. } => None,
        };
        let table = match rope {
            None => None,
            Some(rope) => Some(match tables.iter().find(|(other, _)| *other == rope) {
                Some((_, table)) => *table,
                None => {
                    let table = upload_rope(backend, &rope, positions)?;
                    tables.push((rope, table));
                    table
                }
            }),
        };
        ropes.push(table);
    }
    Ok(ropes)
}

fn upload_rope<B: Device>(backend: &mut B, rope: &Rope, positions: u32) -> Result<B::Buffer, B::Error> {
    let floats = positions as usize * rope.rotated as usize;
    let buffer = backend.alloc(Purpose::Scratch, Element::Float, floats)?;
    let mut staging = backend.alloc_pinned(floats)?;
    rope::fill(rope, backend.words_mut(&mut staging)?);
    backend.upload(&mut staging, 0..floats, buffer)?;
    // The staging memory goes when this returns; the copy must be done by then.
    backend.synchronize()?;
    Ok(buffer)
}
