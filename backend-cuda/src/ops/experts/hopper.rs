//! Launches of `experts_products.cu`: the products of a layer's experts by wgmma, where tokens are many behind a kernel that puts
//! each expert's side by side.
//!
//! ```text
//!   pairs of an expert      a unit: rows of w by pairs     blocks
//!   up to 32 on average     128 by up to 64                one a multiprocessor, beside which one of the next product has room
//!   more                    128 by up to 256               a multiprocessor each, two with neighbouring rows share the pairs
//! ```
//!
//! Invariant: a launch depends on the number of tokens alone. Blocks find their units by counts in memory, and there are never
//! more blocks than the device takes at once, so a cluster's blocks meet.

use minisgl_core::backend::{Device, Element, Purpose};

use super::super::gemm::Rows;
use super::super::rows_from;
use super::{ExpertLayer, Routing, tiles_at_most};
use crate::device::Cuda;
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::param::{Param, plain_params};
use crate::tensor_map::TensorMap;
use crate::weight::Weight;

/// What the sources call so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tiling {
    /// Pairs of a unit at most,
    pairs: u32,
    /// fetched so many at a time
    box_pairs: u32,
    /// by each of so many blocks of a cluster,
    sharers: u32,
    /// through a ring of so many stages,
    stages: u32,
    /// whose outputs are turned so many at a time.
    round: u32,
}

impl Tiling {
    const FEW: Tiling = Tiling { pairs: 64, box_pairs: 16, sharers: 1, stages: 4, round: 32 };
    const MANY: Tiling = Tiling { pairs: 256, box_pairs: 32, sharers: 2, stages: 4, round: 64 };
    /// Pairs of an expert, on average, up to which rows of x one by one are quicker than gathered ones: the copy engine takes a
    /// box after the other, however small.
    const BY_TOKEN_MAX: u32 = 4;
    /// Rows of w that a block takes.
    const ROWS: u32 = 128;
    /// Two warpgroups and the warp that fetches.
    const THREADS: u32 = 288;
    /// Bytes of a row of 64 columns.
    const LINE: u32 = 128;

    /// What aligns the ring, its stages with two barriers each, outputs of two warpgroups, and a word for each of their pairs.
    fn shared_bytes(self) -> u32 {
        let stage = (Self::ROWS + self.pairs) * Self::LINE + 16;
        1024 + self.stages * stage + 2 * self.round * Self::LINE + 2 * self.pairs * 4
    }

    /// Pairs of an expert, on average, up to which the tiling for few is quicker.
    fn few_max(self) -> u32 {
        self.pairs / 2
    }

    /// A place for each unit that there can be, as far as the device has room for `places` clusters.
    fn grid(self, rows: u32, routing: &Routing, places: u32) -> Grid {
        let across = rows.div_ceil(Self::ROWS * self.sharers);
        let units = tiles_at_most(routing.pairs(), routing.experts, self.pairs) * across;
        self.blocks(units.min(places))
    }

    fn blocks(self, clusters: u32) -> Grid {
        let grid = Grid::new(clusters * self.sharers, Self::THREADS).cluster(self.sharers);
        grid.shared(self.shared_bytes()).dependent()
    }
}

/// The kernels of a tiling.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    tiling: Tiling,
    gate_up: Kernel,
    down: Kernel,
    /// Clusters that run at once.
    places: u32,
}

impl Loaded {
    fn new(
        cuda: &Cuda,
        tiling: Tiling,
        gate_up: &'static str,
        down: &'static str,
    ) -> Result<Loaded, CudaError> {
        let find = |name| cuda.modules().kernel("experts_products", name, tiling.shared_bytes());
        let [gate_up, down] = [find(gate_up)?, find(down)?];
        let places = match tiling.sharers {
            1 => cuda.properties().multiprocessors,
            // Where none has room the launch will say so.
            _ => cuda.launcher().clusters_at_once(&down, tiling.blocks(1))?.max(1),
        };
        Ok(Loaded { tiling, gate_up, down, places })
    }

    /// One of the products: of `x` `[…, cols]`, fetched so many rows at a time, with each expert's `rows` of `w`.
    fn launch(
        &self,
        launcher: &Launcher,
        kernel: &Kernel,
        routing: &Routing,
        (w, rows): (Weight, u32),
        (x, cols, box_rows): (Rows, u32, u32),
        product: &dyn Param,
    ) -> Result<(), CudaError> {
        let (all, cols) = (routing.experts as usize * rows as usize, cols as usize);
        let x = TensorMap::rows_of_bf16(x.address, x.there as usize, cols, box_rows)?;
        let grid = self.tiling.grid(rows, routing, self.places);
        let w = TensorMap::rows_of_bf16(w.address(), all, cols, Tiling::ROWS)?;
        launcher.launch(kernel, grid, [&w as &dyn Param, &x, routing, product])
    }
}

/// What gate and up become, as `GateUpOfExperts` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct GateUp {
    activated: Address,
    tickets: Address,
}

/// What down becomes, as `DownOfExperts` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Down {
    given: Address,
    tickets: Address,
}

plain_params!(GateUp, Down);

/// The kernels.
#[derive(Debug)]
pub(super) struct Hopper {
    gather: Kernel,
    /// As [`Tiling::FEW`]'s, but without a gather in front.
    gate_up_by_token: Kernel,
    few: Loaded,
    many: Loaded,
    /// A word for each of the products, 0 between launches: units that were taken.
    tickets: [Address; 2],
}

impl Hopper {
    const GATHER_THREADS: u32 = 256;
    /// A warp each.
    const GATHERED_BY_BLOCK: u32 = 8;

    pub(super) fn new(cuda: &mut Cuda) -> Result<Hopper, CudaError> {
        let tickets = cuda.alloc(Purpose::Scratch, Element::Word, 2)?;
        cuda.zero(tickets.address(), tickets.bytes())?;
        let load = |tiling, gate_up, down| Loaded::new(cuda, tiling, gate_up, down);
        Ok(Hopper {
            gather: cuda.modules().kernel("experts_products", "experts_gather", 0)?,
            gate_up_by_token: cuda.modules().kernel(
                "experts_products",
                "experts_few_gate_up_by_token",
                Tiling::FEW.shared_bytes(),
            )?,
            few: load(Tiling::FEW, "experts_few_gate_up", "experts_few_down")?,
            many: load(Tiling::MANY, "experts_many_gate_up", "experts_many_down")?,
            tickets: [tickets.address(), tickets.address().offset(4)],
        })
    }

    /// Until down writes it, `given` has what is gathered.
    pub(super) fn launch(
        &self,
        launcher: &Launcher,
        routing: &Routing,
        layer: &ExpertLayer<'_>,
        [activated, given]: [Buffer; 2],
    ) -> Result<(), CudaError> {
        let (gate_up, down) = (layer.weights.gate_up, layer.weights.down);
        let loaded = self.loaded(routing);
        let is_by_token =
            loaded.tiling == Tiling::FEW && routing.pairs() <= routing.experts * Tiling::BY_TOKEN_MAX;
        let (kernel, x, box_rows) = if is_by_token {
            (&self.gate_up_by_token, Rows { address: layer.residual, there: routing.tokens }, 1)
        } else {
            self.gather(launcher, routing, layer, given)?;
            (&loaded.gate_up, rows_from(given, routing.hidden as usize, 0), loaded.tiling.box_pairs)
        };
        let product = GateUp { activated: activated.address(), tickets: self.tickets[0] };
        let (w, x) = ((gate_up, routing.stored), (x, routing.hidden, box_rows));
        loaded.launch(launcher, kernel, routing, w, x, &product)?;

        let product = Down { given: given.address(), tickets: self.tickets[1] };
        let x = rows_from(activated, routing.intermediate as usize, 0);
        let (w, x) = ((down, routing.hidden), (x, routing.intermediate, loaded.tiling.box_pairs));
        loaded.launch(launcher, &loaded.down, routing, w, x, &product)
    }

    /// Puts each expert's tokens side by side.
    fn gather(
        &self,
        launcher: &Launcher,
        routing: &Routing,
        layer: &ExpertLayer<'_>,
        gathered: Buffer,
    ) -> Result<(), CudaError> {
        let blocks = routing.pairs().div_ceil(Self::GATHERED_BY_BLOCK);
        let grid = Grid::new(blocks, Self::GATHER_THREADS).dependent();
        let x = layer.residual;
        launcher.launch(&self.gather, grid, [routing as &dyn Param, &x, &gathered])
    }

    /// The kernels for so many pairs.
    fn loaded(&self, routing: &Routing) -> &Loaded {
        let few_max = routing.experts * self.few.tiling.few_max();
        if routing.pairs() <= few_max { &self.few } else { &self.many }
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::{assert_declared, source, threads_of};

    const TILINGS: [(Tiling, &str, &str, u32); 2] = [
        (Tiling::FEW, "Few = Tiling<RowsOfBf16", "experts_few", 2),
        (Tiling::MANY, "Many = Tiling<RowsOfBf16", "experts_many", 1),
    ];

    #[test]
    fn both_sides_declare_the_same() {
        let common = &["hopper/experts_products.cuh"];
        assert_declared!(common, "GateUpOfExperts", GateUp { activated, tickets });
        assert_declared!(common, "DownOfExperts", Down { given, tickets });
        let text = source("hopper/experts_products.cu");
        for (tiling, name, kernel, beside) in TILINGS {
            let Tiling { pairs, box_pairs, sharers, stages, round } = tiling;
            let using =
                format!("using {name}, {pairs}, {box_pairs}, {sharers}, {stages}, {round}, {beside}>;");
            assert!(text.contains(&using), "{using}");
            for product in ["gate_up", "down"] {
                let kernel = format!("{kernel}_{product}");
                assert_eq!(threads_of(HOPPER, &kernel), Tiling::THREADS, "{kernel}");
            }
        }
        assert_eq!(threads_of(HOPPER, "experts_few_gate_up_by_token"), Tiling::THREADS);
        assert_eq!(threads_of(HOPPER, "experts_gather"), Hopper::GATHER_THREADS);
    }

    #[test]
    fn blocks_fit_a_multiprocessor_those_of_few_pairs_two_at_a_time() {
        // What a multiprocessor has, each block's own kilobyte of it, and the plan beside what is asked for.
        let (all, own, plan) = (228 << 10, 1 << 10, 3 << 10);
        for (tiling, _, _, beside) in TILINGS {
            assert!(beside * (tiling.shared_bytes() + own + plan) <= all, "{tiling:?}");
            let Tiling { pairs, box_pairs, sharers, round, .. } = tiling;
            assert!(box_pairs % 8 == 0 && pairs % (box_pairs * sharers) == 0, "boxes are whole swizzles");
            assert!(pairs % round == 0 && round % 32 == 0);
        }
    }
}
