//! A step's launches as the planners decide them, on a device that is described and need not be there.
//!
//! ```text
//!   take_batch ─ begin_step ─ embed ─ [qkv ─ attention ─ o ─ gate_up ─ down] each layer, twice where rows are divided ─ final_norm ─ head ─ sample
//!                        or qkv of the first layer ─ all else of all layers ─ o ─ gate_up ─ down of the last one's second half
//! ```
//!
//! Of several ranks it is what the first one launches: o and down leave sums, which are added up behind them, or have rows, for which inputs
//! are gathered and outputs joined. A copy of the rank's columns, in front of the first such product of a step, is not among it.
//!
//! What is asked here is what a launch asks: tilings, grids, plans and kernels are chosen by the same functions.

use minisgl_core::batch::{Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_core::shard::Rank;
use minisgl_core::spec::{
    Attention, Bias, DecoderSpec, Fp8, Inputs, Mixer, QkNorm, ScaleBlock, WeightFormat,
};

use super::attention::Planner;
pub use super::described::{Described, Launch};
use super::embed::Ends;
use super::exchange::explained as exchanges;
use super::fp8_pages::Fp8Pages;
use super::gemm::{self, Form, Kind, SmShare};
use super::halves::{Halves, Part};
use super::layers::LayersKernel;
use super::sampling::Sampling;
use super::shared_rows::SharedRows;
use super::supports;
use crate::error::CudaError;
use crate::launch::Grid;
use crate::weight::{Fp8Codes, SLICING, gate_up_rows};

/// What a step launches.
#[derive(Clone, Debug)]
pub struct Explained {
    /// Before the layers.
    pub before: Vec<Launch>,
    /// The layers'.
    pub layers: ExplainedLayers,
    /// Behind them.
    pub behind: Vec<Launch>,
}

/// What launches the layers are.
#[derive(Clone, Debug)]
pub enum ExplainedLayers {
    /// These in each layer, for each part of the step: the whole, or two halves, of which the second runs on a stream of its own.
    Each(Vec<(Part, Vec<Launch>)>),
    /// These, for all layers.
    All(Vec<Launch>),
}

/// The launches of a step of `rows` of a model whose layers are alike, without experts, by one of so many ranks.
///
/// # Errors
/// A model that the kernels can't compute, or so many ranks; limits beyond what they count.
pub fn explain(
    device: &Described,
    spec: &DecoderSpec,
    ranks: u32,
    limits: &Limits,
    shape: StepShape,
    rows: &[Row],
) -> Result<Explained, CudaError> {
    supports::check(spec, device.hopper)
        .and_then(|()| supports::check_rank(spec, Rank { index: 0, count: ranks }))
        .map_err(|error| CudaError::Unsupported(error.to_string()))?;
    let spec = &spec.shard(ranks, SLICING).map_err(|error| CudaError::Unsupported(error.to_string()))?;
    let format = spec.kv.unwrap_or(KvFormat::Bf16);
    let planner =
        Planner::new(device.hopper, device.multiprocessors, &spec.dims, spec.window(), format, limits)?;
    let alone = device.hopper && ranks == 1;
    let in_one = alone
        && LayersKernel::suits(spec, limits.page_size, device.multiprocessors)
        && LayersKernel::takes(shape);
    let explainer = Explainer { device, spec, ranks, shape, rows, planner, in_one };
    let layers = if in_one {
        ExplainedLayers::All(explainer.all_layers())
    } else if Halves::new(spec, alone).divide(shape) {
        explainer.each_layer(&[Part::First, Part::Second])
    } else {
        explainer.each_layer(&[Part::Whole])
    };
    Ok(Explained { before: explainer.before(), layers, behind: explainer.behind() })
}

struct Explainer<'a> {
    device: &'a Described,
    /// The rank's.
    spec: &'a DecoderSpec,
    ranks: u32,
    shape: StepShape,
    rows: &'a [Row],
    planner: Planner,
    /// Are all layers in one kernel?
    in_one: bool,
}

impl Explainer<'_> {
    fn before(&self) -> Vec<Launch> {
        let tokens = self.shape.tokens;
        vec![
            launch(
                "take_batch",
                "take_batch",
                Ends::take_batch_grid(),
                "the batch, from where it waited while the step before ran",
            ),
            launch(
                "begin_step",
                "begin_step",
                Ends::begin_step_grid(),
                "changes of the page table, slots, rules",
            ),
            match self.passing() {
                Some([embed, _]) => launch("embed", "embed_share", embed, "rows that the rank has go to all"),
                None => launch("embed", "embed", Ends::row_grid(tokens), "a block: a token"),
            },
        ]
    }

    /// What ranks pass to each other at a step's ends: embedded rows, and logits.
    fn passing(&self) -> Option<[Grid; 2]> {
        let StepShape { tokens, samples, .. } = self.shape;
        let grids = || {
            let rank = Rank { index: 0, count: self.ranks };
            exchanges::ends(rank, self.device.multiprocessors, &self.spec.dims, [tokens, samples])
        };
        (self.ranks > 1).then(grids)
    }

    fn all_layers(&self) -> Vec<Launch> {
        let turns = [Part::First, Part::Second].map(|part| {
            let rows = part.tokens(self.shape);
            self.planner.turns(&self.rows[rows.start as usize..rows.end as usize]).to_string()
        });
        let mut launches = self.qkv(Part::Whole);
        let format = self.spec.kv.unwrap_or(KvFormat::Bf16);
        launches.push(LayersKernel::explained(self.device.multiprocessors, format, &turns.join(" and ")));
        launches.extend(self.after_attention(Part::Second));
        launches
    }

    fn each_layer(&self, parts: &[Part]) -> ExplainedLayers {
        ExplainedLayers::Each(parts.iter().map(|part| (*part, self.layer(*part))).collect())
    }

    fn qkv(&self, part: Part) -> Vec<Launch> {
        let dims = &self.spec.dims;
        self.product("qkv", Kind::Qkv, [dims.qkv_width() as u32, dims.hidden], part)
    }

    fn layer(&self, part: Part) -> Vec<Launch> {
        let dims = &self.spec.dims;
        let mut launches = self.qkv(part);
        launches.extend(self.attention(part, [dims.qkv_width() as u32, dims.hidden]));
        launches.extend(self.after_attention(part));
        launches
    }

    fn after_attention(&self, part: Part) -> Vec<Launch> {
        let dims = &self.spec.dims;
        let (hidden, mlp) = (dims.hidden, dims.intermediate);
        let mut launches = self.added("o", [hidden, dims.q_width() as u32], part);
        launches.extend(self.product(
            "gate_up",
            Kind::GateUp,
            [gate_up_rows(mlp as usize) as u32, hidden],
            part,
        ));
        launches.extend(self.added("down", [hidden, mlp], part));
        launches
    }

    /// A product that is added to the residual stream, by the ranks together.
    fn added(&self, what: &'static str, [hidden, cols]: [u32; 2], part: Part) -> Vec<Launch> {
        if self.ranks == 1 {
            return self.product(what, Kind::Residual, [hidden, cols], part);
        }
        let tokens = part.tokens(self.shape).len() as u32;
        let rank = Rank { index: 0, count: self.ranks };
        if SharedRows::takes(cols as usize, rank) {
            let cols = cols * self.ranks;
            let multiprocessors = self.device.multiprocessors;
            let [gathered, joined] = exchanges::rows(rank, multiprocessors, [tokens, cols, hidden]);
            let mut launches = vec![launch(what, "gather_columns", gathered, "the rank's inputs go to all")];
            launches.extend(self.product(what, Kind::Residual, [hidden / self.ranks, cols], part));
            launches.push(launch("", "join_columns", joined, "the rank's outputs go to all"));
            return launches;
        }
        let mut launches = self.product(what, Kind::RankSums, [hidden, cols], part);
        let (kernel, grid, work) = exchanges::sums(self.ranks, self.device.multiprocessors, [tokens, hidden]);
        launches.push(launch("", kernel, grid, work));
        launches
    }

    fn behind(&self) -> Vec<Launch> {
        let (samples, vocab) = (self.shape.samples, self.spec.dims.vocab);
        let columns = Rank { index: 0, count: self.ranks }.share(vocab as usize).len() as u32;
        let head = [columns, self.spec.dims.hidden, samples];
        let form = Form { normed: false, kv_fp8: false, weights_fp8: false, ranks: 1 };
        let head = gemm::explained(self.device, Kind::Head, head, SmShare::Whole, form);
        let chunk = Sampling::chunk(samples, vocab);
        let mut launches =
            vec![launch("final_norm", "final_norm", Ends::row_grid(samples), "a block: a sampled row")];
        launches.extend(head.map(|it| launch("head", it.kernel, it.grid, it.work)));
        let logits = self.passing().map(|[_, logits]| logits);
        launches.extend(logits.map(|grid| launch("", "gather_columns", grid, "the rank's logits go to all")));
        launches.push(launch(
            "sample",
            "sample_cut",
            Sampling::cut_grid(samples),
            "a block: a row's filters",
        ));
        let (grid, work) = (Sampling::draw_grid(samples, vocab), format!("a block: {chunk} logits of a row"));
        launches.push(launch("", "sample_draw", grid, work));
        launches
    }

    /// A product, behind what its matrix in fp8 needs of inputs and of memory.
    fn product(&self, what: &'static str, kind: Kind, [rows, cols]: [u32; 2], part: Part) -> Vec<Launch> {
        let tokens = part.tokens(self.shape).len() as u32;
        if let Some(fp8) = self.rounded() {
            let pairs = self.has_pairs(kind, fp8.block);
            let launches =
                gemm::explained_rounded(self.device, kind, [rows, cols, tokens], fp8.inputs, pairs);
            let launches = launches.into_iter().flatten();
            return launches.map(|it| launch(what, it.kernel, it.grid, it.work)).collect();
        }
        let weights_fp8 = self.spec.weights != WeightFormat::Bf16;
        let (normed, kv_fp8) = (self.is_normed(), self.keeps_fp8(part, [rows, cols]));
        let ranks = if kind == Kind::Residual { 1 } else { self.ranks };
        let form = Form { normed, kv_fp8, weights_fp8, ranks };
        let mut launches = Vec::new();
        if weights_fp8 && !matches!(kind, Kind::Residual | Kind::RankSums) {
            let work = "a block: a token times the norm's scale";
            launches.push(launch(what, "fp8_weights_scale", gemm::scaling(tokens), work));
        }
        if let Some(grid) = gemm::widening(rows, cols, tokens).filter(|_| weights_fp8) {
            launches.push(launch(what, "fp8_weights_widen", grid, "a block: a tile, to memory"));
        }
        let explained = gemm::explained(self.device, kind, [rows, cols, tokens], self.share(part), form);
        launches.extend(explained.map(|it| launch(what, it.kernel, it.grid, it.work)));
        launches
    }

    /// What weights are if inputs are rounded.
    fn rounded(&self) -> Option<Fp8> {
        match self.spec.weights {
            WeightFormat::Fp8(fp8) if fp8.inputs != Inputs::Plain => Some(fp8),
            WeightFormat::Fp8(_) | WeightFormat::Bf16 => None,
        }
    }

    /// Have groups of a matrix's rows scales of such blocks in pairs, as they lie on the device? Gate and up take turns there, and of
    /// queries, keys and values none may end within so many rows.
    fn has_pairs(&self, kind: Kind, block: ScaleBlock) -> bool {
        let ScaleBlock::Tile { rows, .. } = block else { return true };
        let dims = &self.spec.dims;
        let parts = [dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim];
        let are_whole = |sizes: &[u32]| sizes.iter().all(|rows| rows.is_multiple_of(Fp8Codes::PAIRED as u32));
        match kind {
            Kind::GateUp => are_whole(&[2 * rows]),
            Kind::Qkv => are_whole(&[rows]) && are_whole(&parts),
            _ => are_whole(&[rows]),
        }
    }

    fn share(&self, part: Part) -> SmShare {
        if part == Part::Whole || self.in_one { SmShare::Whole } else { SmShare::Half }
    }

    /// Does the product of queries, keys and values, of such a matrix, keep these in fp8?
    fn keeps_fp8(&self, part: Part, [rows, cols]: [u32; 2]) -> bool {
        let tokens = part.tokens(self.shape).len() as u32;
        let weights_fp8 = self.spec.weights != WeightFormat::Bf16;
        self.spec.kv == Some(KvFormat::Fp8)
            && self.rounded().is_none()
            && gemm::keeps_fp8([rows, cols, tokens], self.share(part), weights_fp8)
    }

    /// Have heads norms and rope, and no biases?
    fn is_normed(&self) -> bool {
        self.spec.layers.iter().all(|layer| {
            let Mixer::Attention(Attention { bias, qk_norm, rope, .. }) = layer.mixer else { return false };
            bias == Bias::None && qk_norm == QkNorm::PerHead && rope.is_some()
        })
    }

    /// Attention, behind what pages in fp8 need where the product, of a matrix of this size, left keys and values in wide ones, and
    /// where prefill rows read those.
    fn attention(&self, part: Part, qkv: [u32; 2]) -> Vec<Launch> {
        let [decode, prefill] = self.planner.kernels();
        let mut launches = Vec::new();
        if self.spec.kv == Some(KvFormat::Fp8) {
            let [encode, widen] = Fp8Pages::kernels(self.spec.dims.head_dim);
            if !self.keeps_fp8(part, qkv) {
                let grid =
                    Fp8Pages::encode_grid(part.tokens(self.shape).len() as u32, self.spec.dims.kv_heads);
                launches.push(launch(
                    "attention",
                    encode,
                    grid,
                    "a warp: eight tokens of a head's keys or values",
                ));
            }
            if self.shape.prefill_rows > 0 {
                let grid = Fp8Pages::widen_grid(self.shape.prefill_rows);
                launches.push(launch("attention", widen, grid, "a row of blocks: what a prefill row sees"));
            }
        }
        if self.shape.prefill_rows > 0 {
            let (grid, work) = self.planner.explained_prefill(self.shape, self.rows);
            launches.push(launch("attention", prefill, grid, work));
        }
        if self.shape.decode_rows > 0 {
            let (grid, work) = self.planner.explained_decode(self.shape, part, self.rows);
            launches.push(launch("attention", decode, grid, work));
        }
        launches
    }
}

fn launch(what: &'static str, kernel: &'static str, grid: Grid, work: impl Into<String>) -> Launch {
    Launch { what, kernel, grid, work: work.into() }
}
