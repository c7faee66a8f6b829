//! Launches of `experts_router.cu`: which experts each token gets.
//!
//! ```text
//!   any GPU    logits ──> choose                  a warp some experts of up to four tokens; a warp a token
//!   Hopper     one kernel, clusters of 8 blocks   16 tokens each
//! ```
//!
//! Invariant: a token's logits have one order of sums in each set, whatever tokens are beside it.

use minisgl_core::backend::Step;

use super::layer::ExpertLayer;
use super::routing::{COUNT_MAX, Routing};
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::Buffer;
use crate::module::Modules;

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / 32;
/// Tokens that a block takes of those for any GPU, where they are many.
const LOGIT_TOKENS: u32 = 4;
/// Up to so many tokens a warp takes one expert and one token: more blocks matter more than reading less.
const FEW_TOKENS: u32 = 16;

/// A cluster of Hopper's: its blocks, and the tokens that it takes.
const BLOCKS: u32 = 8;
const TOKENS: u32 = 16;
/// Experts that its kernels take.
const EXPERTS: [u32; 3] = [64, 128, COUNT_MAX];

/// The kernels of the set in use.
#[derive(Debug)]
pub(super) enum Router {
    Portable {
        logits: [Kernel; 2],
        choose: Kernel,
    },
    /// By [`EXPERTS`].
    Hopper([Kernel; 3]),
}

impl Router {
    pub(super) fn new(modules: &Modules, hopper: bool) -> Result<Router, CudaError> {
        let find = |name| modules.kernel("experts_router", name, 0);
        Ok(if hopper {
            let names = ["experts_router_64", "experts_router_128", "experts_router_256"];
            let [a, b, c] = names.map(find);
            Router::Hopper([a?, b?, c?])
        } else {
            let logits = [find("experts_logits_1")?, find("experts_logits_4")?];
            Router::Portable { logits, choose: find("experts_choose")? }
        })
    }

    /// Chooses for each token.
    pub(super) fn launch(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        layer: &ExpertLayer<'_>,
        routing: &Routing,
    ) -> Result<(), CudaError> {
        let (tokens, experts, router) = (routing.tokens, routing.experts, layer.weights.router.address());
        let ExpertLayer { row_norm, norm, residual, .. } = layer;
        let tokens_offset = step.layout.tokens as u32;
        match self {
            Router::Hopper(kernels) => {
                let index = EXPERTS.iter().position(|most| experts <= *most).unwrap_or(EXPERTS.len() - 1);
                let grid = Grid::new(tokens.div_ceil(TOKENS) * BLOCKS, THREADS).cluster(BLOCKS).dependent();
                launcher.launch(
                    &kernels[index],
                    grid,
                    [routing, row_norm, &router, norm, residual, &step.batch, &tokens_offset],
                )
            }
            Router::Portable { logits, choose } => {
                let many = usize::from(tokens > FEW_TOKENS);
                let (of_warp, of_block) = ([1, 4][many], [1, LOGIT_TOKENS][many]);
                let grid = Grid::new(experts.div_ceil(WARPS * of_warp), THREADS)
                    .rows(tokens.div_ceil(of_block))
                    .dependent();
                launcher.launch(&logits[many], grid, [routing, row_norm, &router, norm, residual])?;
                let grid = Grid::new(tokens.div_ceil(WARPS), THREADS).dependent();
                launcher.launch(choose, grid, [routing, &step.batch, &tokens_offset])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::{HOPPER, PORTABLE};

    use super::*;
    use crate::declared::{constant, threads_of};

    #[test]
    fn both_sides_declare_the_same() {
        assert_eq!(constant("portable/experts_router.cu", "LOGIT_TOKENS"), LOGIT_TOKENS);
        assert_eq!(constant("hopper/experts/experts_router.cu", "BLOCKS"), BLOCKS);
        assert_eq!(constant("hopper/experts/experts_router.cu", "TOKENS"), TOKENS);
        assert_eq!(32 * constant("experts/experts_choose.cuh", "EXPERTS_A_LANE"), COUNT_MAX);
        for experts in EXPERTS {
            assert_eq!(threads_of(HOPPER, &format!("experts_router_{experts}")), THREADS);
        }
        for name in ["logits_1", "logits_4", "choose"] {
            assert_eq!(threads_of(PORTABLE, &format!("experts_{name}")), THREADS, "{name}");
        }
    }
}
