//! A layer's experts: launches of `experts.cu` and of what it stands around.
//!
//! ```text
//!   residual ── router ──> dispatch ──> gate_up ──> down ──> combine ── residual +=, sums of squares
//!                   └── of few tokens, on Hopper ──^
//! ```
//!
//! Of several ranks each has a share of the inner width of gate and up, and of the rows of down, whose sums are whole: the exchange
//! brings together what down gets, and then the residual stream, of whose columns each rank adds up a share. So each element has the
//! sums that it has on one GPU.
//!
//! The router (`router.rs`) and the two products (`portable.rs`, `hopper.rs`) are those of the kernel set. Grids depend on the number of
//! tokens alone; what the tokens chose is read from memory. So a recorded step does for all choices.
//!
//! Invariant: a token's bits depend on that token alone: each sum has one order, and what its experts give is added in ascending
//! order of their numbers.

mod hopper;
mod layer;
mod portable;
mod router;
pub(super) mod routing;

use hopper::Hopper;
use layer::Products;
use minisgl_core::backend::{Element, Purpose, Queue, Step};
use minisgl_core::config::Limits;
use minisgl_core::shard::Rank;
use minisgl_core::spec::{self, DecoderSpec, LayerSpec};
use minisgl_core::stats::ExpertsRead;
use portable::Portable;
use router::Router;
use routing::THREADS;

pub use layer::ExpertLayer;
pub use routing::{Ahead, COUNT_MAX, PER_TOKEN_MAX, Routing, experts_input};

use super::exchange::Joining;
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::param::Param;

const WARPS: u32 = THREADS / 32;
/// Columns that a warp of `combine` takes.
const COMBINED: u32 = 256;

/// The products of the set in use.
#[derive(Debug)]
enum Kernels {
    Portable(Box<Portable>),
    Hopper(Box<Hopper>),
}

/// The kernels and what they hand to each other.
#[derive(Debug)]
pub struct Experts {
    router: Router,
    dispatch: Kernel,
    products: Kernels,
    combine: Kernel,
    combine_ranks: Kernel,
    rank: Rank,
    /// Addresses; sizes are a layer's and a step's.
    routing: Routing,
    /// `[tokens * per_token, intermediate]` bf16, of experts in fp8 f16 as [`experts_input`] has them: of this rank, and of all.
    activated: Buffer,
    gathered: Buffer,
    /// `[tokens * per_token, hidden]` bf16.
    given: Buffer,
    /// Two u64: as [`ExpertsRead`].
    read: Buffer,
}

impl Experts {
    /// For a model's layers with experts; `None` where it has none.
    pub fn new(gpu: &mut Gpu, spec: &DecoderSpec, limits: &Limits) -> Result<Option<Experts>, CudaError> {
        let layers = || spec.layers.iter().filter_map(LayerSpec::experts);
        let most = |of: fn(spec::Experts) -> u32| layers().map(of).max();
        let Some(count) = most(|it| it.count) else { return Ok(None) };
        let per_token = most(|it| it.per_token).unwrap_or(0);
        let (rank, pair_width) = (gpu.rank(), Self::inner(spec));
        let (tokens, hidden) = (limits.step_tokens(), spec.dims.hidden);
        let pairs = tokens * per_token as usize;
        let mut words = |words| Ok(gpu.alloc(Purpose::Scratch, Element::Word, words)?.address());
        let routing = Routing {
            logits: words(tokens * count as usize)?,
            scales: words(tokens)?,
            // Two numbers a word, and whole 16 bytes.
            chosen: words(pairs.next_multiple_of(8) / 2)?,
            shares: words(pairs)?,
            begins: words(count as usize + 1)?,
            pairs: words(pairs)?,
            bits: words(hopper::SORTED_WORDS as usize)?,
            read: Address::NULL,
            tokens: 0,
            experts: 0,
            per_token: 0,
            hidden,
            intermediate: 0,
            stored: 0,
            normalized: 0,
            nobody: limits.running,
            scaled: Address::NULL,
        };
        gpu.zero(routing.bits, hopper::SORTED_WORDS as usize * 4)?;
        let read = gpu.alloc(Purpose::Scratch, Element::Word, 4)?;
        gpu.zero(read.address(), read.bytes())?;
        let activated = gpu.alloc(Purpose::Scratch, Element::Activation, tokens * pair_width)?;
        let gathered = match rank.count {
            1 => activated,
            ranks => {
                gpu.alloc(Purpose::Scratch, Element::Activation, tokens * pair_width * ranks as usize)?
            }
        };
        let given = gpu.alloc(Purpose::Scratch, Element::Activation, pairs * hidden as usize)?;
        let products = match gpu.properties().hopper {
            true => Kernels::Hopper(Box::new(Hopper::new(gpu, spec.weights)?)),
            false => Kernels::Portable(Box::new(Portable::new(gpu.modules())?)),
        };
        let find = |name| gpu.modules().kernel("experts", name, 0);
        Ok(Some(Experts {
            router: Router::new(gpu.modules(), gpu.properties().hopper)?,
            dispatch: find("experts_dispatch")?,
            products,
            combine: find("experts_combine")?,
            combine_ranks: find("experts_combine_ranks")?,
            rank,
            routing,
            activated,
            gathered,
            given,
            read,
        }))
    }

    /// Elements of a token that the experts of a layer have within, at most; of a rank's model, the rank's.
    pub fn inner(spec: &DecoderSpec) -> usize {
        let layers = spec.layers.iter().filter_map(LayerSpec::experts);
        layers.map(|it| it.per_token * it.intermediate).max().unwrap_or(0) as usize
    }

    /// Adds to each token's residual stream what its experts give it.
    pub fn launch(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        layer: &ExpertLayer<'_>,
    ) -> Result<(), CudaError> {
        let read = if step.shape.is_decode() { self.read.address() } else { Address::NULL };
        let routing = Routing { read, ..self.routing(step.shape.tokens, layer) };
        self.route(launcher, step, layer, &routing)?;
        self.products(launcher, layer, &routing)?;
        self.combine(launcher, layer, &routing)
    }

    /// A layer's, for so many tokens.
    pub fn routing(&self, tokens: u32, layer: &ExpertLayer<'_>) -> Routing {
        let ExpertLayer { spec, weights, .. } = *layer;
        let routing = Routing {
            tokens,
            experts: spec.count,
            per_token: spec.per_token,
            intermediate: spec.intermediate,
            stored: (weights.gate_up.rows() / spec.count as usize) as u32,
            normalized: u32::from(spec.normalized),
            scaled: if weights.gate_up.is_fp8() { layer.x } else { Address::NULL },
            ..self.routing
        };
        match &self.products {
            Kernels::Hopper(_) if Hopper::sorts(&routing) => routing,
            _ => Routing { bits: Address::NULL, ..routing },
        }
    }

    /// What each pair's expert gives its token.
    ///
    /// # Errors
    /// Those of the launches.
    pub fn products(
        &self,
        launcher: &Launcher,
        layer: &ExpertLayer<'_>,
        routing: &Routing,
    ) -> Result<(), CudaError> {
        let Experts { activated, gathered, given, .. } = *self;
        let gate_up = Products { launcher, layer, routing, activated, given };
        match &self.products {
            Kernels::Portable(kernels) => kernels.gate_up(&gate_up)?,
            Kernels::Hopper(kernels) => kernels.gate_up(&gate_up)?,
        }
        let routing = &routing.of_down(self.rank);
        if let Some(exchange) = layer.exchange {
            let shape = [routing.pairs(), routing.intermediate];
            exchange.gather_inner(launcher, shape, activated.address(), gathered.address())?;
        }
        let down = Products { routing, activated: gathered, ..gate_up };
        match &self.products {
            Kernels::Portable(kernels) => kernels.down(&down),
            Kernels::Hopper(kernels) => kernels.down(&down),
        }
    }

    /// The sum of what a token's experts give it, added to the residual stream.
    ///
    /// # Errors
    /// Those of the launches.
    pub fn combine(
        &self,
        launcher: &Launcher,
        layer: &ExpertLayer<'_>,
        routing: &Routing,
    ) -> Result<(), CudaError> {
        let ExpertLayer { residual, sumsq, ahead, .. } = *layer;
        if let Some(exchange) = layer.exchange {
            let (kernel, given) = (&self.combine_ranks, self.given.address());
            let routing = &routing.of_down(self.rank);
            return exchange.join(
                launcher,
                routing.tokens,
                &Joining { kernel, routing, given, residual, sumsq, ahead },
            );
        }
        let grid =
            Grid::new(routing.tokens, THREADS).rows(routing.hidden.div_ceil(COMBINED * WARPS)).dependent();
        launcher.launch(&self.combine, grid, [routing as &dyn Param, &self.given, &residual, &sumsq, &ahead])
    }

    /// `[tokens * per_token, hidden]` bf16: what [`Experts::products`] leave, a row for each pair of a token and one of its experts.
    pub fn given(&self) -> Buffer {
        self.given
    }

    /// What steps of decode rows alone read so far, after waiting for all that is enqueued.
    ///
    /// # Errors
    /// The device's.
    pub fn read(&self, gpu: &mut Gpu) -> Result<ExpertsRead, CudaError> {
        let mut staging = gpu.alloc_pinned(4)?;
        gpu.download(Queue::Compute, self.read, 4, &mut staging)?;
        let words = gpu.words(&staging)?;
        let wide = |i: usize| u64::from(words[i]) | u64::from(words[i + 1]) << 32;
        Ok(ExpertsRead { layers: wide(0), experts: wide(2) })
    }

    /// Which experts each token gets, and where the products don't find it by themselves, which tokens each expert.
    ///
    /// # Errors
    /// Those of the launches.
    pub fn route(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        layer: &ExpertLayer<'_>,
        routing: &Routing,
    ) -> Result<(), CudaError> {
        self.router.launch(launcher, step, layer, routing)?;
        if routing.bits == Address::NULL { self.dispatch(launcher, routing) } else { Ok(()) }
    }

    /// Which of the chosen are each expert's.
    ///
    /// # Errors
    /// Those of the launches.
    pub fn dispatch(&self, launcher: &Launcher, routing: &Routing) -> Result<(), CudaError> {
        launcher.launch(
            &self.dispatch,
            Grid::new(routing.experts, THREADS).dependent(),
            [routing as &dyn Param],
        )
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::{HOPPER, PORTABLE};

    use super::*;
    use crate::declared::threads_of;

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for name in ["experts_dispatch", "experts_combine", "experts_combine_ranks"] {
            for set in [HOPPER, PORTABLE] {
                assert_eq!(threads_of(set, name), THREADS, "{name}");
            }
        }
    }
}
