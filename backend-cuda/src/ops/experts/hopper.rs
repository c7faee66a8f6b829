//! Launches of `experts_products.cuh`'s kernels: the products of a layer's experts by wgmma, where pairs are many behind a kernel that
//! puts each expert's tokens side by side.
//!
//! ```text
//!   pairs of an expert, on average    a unit: rows of w by pairs    blocks
//!   up to 32                          128 by up to 64               one a multiprocessor, the next product's as these end
//!   up to 16, fp8                     128 by up to 32               two a multiprocessor, for each widens what it gets
//!   more                              128 by up to 256, fp8 192     a multiprocessor each, two with neighbouring rows share the pairs
//! ```
//!
//! Matrices in fp8 have kernels of their own, whose sums are those of the f16 numbers that their elements mean, and of inputs in f16.
//!
//! Of few tokens each block lists by itself which pairs are whose, of the bits that the router has set.
//!
//! Invariant: a launch depends on the number of tokens alone. Blocks find their units by counts in memory, and there are never
//! more blocks than the device takes at once, so a cluster's blocks meet.

use minisgl_core::backend::{Element, Purpose};
use minisgl_core::spec::WeightFormat;

use super::layer::Products;
use super::routing::{Routing, tiles_at_most};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::ops::operands::rows_from;
use crate::param::{Param, plain_params};
use crate::tensor_map::TensorMap;
use crate::weight::{Fp8Tiles, Weight};

/// Pairs that a block lists by itself, and words of the bits that it does it by.
const SORTED_PAIRS: u32 = 2048;
pub(super) const SORTED_WORDS: u32 = 1024;

/// What the sources call so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tiling {
    /// Bytes of a block of columns of w,
    w_bytes: u32,
    /// pairs of a unit at most,
    pairs: u32,
    /// fetched so many at a time, or one by one of their tokens' rows,
    box_pairs: u32,
    /// by each of so many blocks of a cluster,
    sharers: u32,
    /// through a ring of so many stages,
    stages: u32,
    /// whose outputs are turned so many at a time;
    round: u32,
    /// so many blocks of a product a multiprocessor.
    at_once: u32,
}

impl Tiling {
    const FEW: Tiling =
        Tiling { w_bytes: Self::BF16, pairs: 64, box_pairs: 8, sharers: 1, stages: 6, round: 32, at_once: 1 };
    const MANY: Tiling = Tiling {
        w_bytes: Self::BF16,
        pairs: 256,
        box_pairs: 32,
        sharers: 2,
        stages: 4,
        round: 64,
        at_once: 1,
    };
    /// Widening takes more warps than one block has.
    const FEW_FP8: Tiling = Tiling { w_bytes: Self::FP8, pairs: 32, stages: 7, at_once: 2, ..Self::FEW };
    const MANY_FP8: Tiling = Tiling { w_bytes: Self::FP8, pairs: 192, stages: 5, ..Self::MANY };
    /// Bytes of 128 rows by 64 columns.
    const BF16: u32 = Self::ROWS * Self::LINE;
    const FP8: u32 = 2 * Fp8Tiles::BYTES as u32;
    /// Rows of w that a block takes.
    const ROWS: u32 = 128;
    /// Two warpgroups and the warps that fetch w and x.
    const THREADS: u32 = 320;
    /// Bytes of a row of 64 columns.
    const LINE: u32 = 128;
    /// Bytes that a block asks for to have none of its kind beside it: with what it has anyway more than half of a multiprocessor's.
    const ALONE: u32 = 103 << 10;

    /// What aligns the ring, its stages with two barriers each, outputs of two warpgroups, and a word for each of their pairs.
    fn shared_bytes(self) -> u32 {
        let stage = self.w_bytes.next_multiple_of(1024) + self.pairs * Self::LINE + 16;
        1024 + self.stages * stage + 2 * self.round * Self::LINE + 2 * self.pairs * 4
    }

    /// The same where a block shall have a multiprocessor to itself. Blocks that start while the kernels before are
    /// still there go where most is free, so two would share one and others have none: of 132 blocks 124 did, in a step of 130 tokens.
    fn shared_bytes_alone(self) -> u32 {
        self.shared_bytes().max(Self::ALONE)
    }

    /// Pairs of an expert, on average, up to which the tiling for few is quicker.
    fn few_max(self) -> u32 {
        self.pairs / 2
    }

    /// A cluster for each unit that there can be, as far as the device has room for `places`.
    fn clusters(self, rows: u32, routing: &Routing, places: u32) -> u32 {
        let across = rows.div_ceil(Self::ROWS * self.sharers);
        let units = tiles_at_most(routing.pairs(), routing.experts, self.pairs) * across;
        units.min(places)
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
    multiprocessors: u32,
}

impl Loaded {
    fn new(
        gpu: &Gpu,
        module: &'static str,
        tiling: Tiling,
        [gate_up, down]: [&'static str; 2],
    ) -> Result<Loaded, CudaError> {
        let find = |name| gpu.modules().kernel(module, name, tiling.shared_bytes_alone());
        let [gate_up, down] = [find(gate_up)?, find(down)?];
        let multiprocessors = gpu.properties().multiprocessors;
        let places = match tiling.sharers {
            1 => multiprocessors * tiling.at_once,
            // Where none has room the launch will say so.
            _ => gpu.launcher().clusters_at_once(&down, tiling.blocks(1))?.max(1),
        };
        Ok(Loaded { tiling, gate_up, down, places, multiprocessors })
    }

    /// One of the products with each expert's `rows` of `w`, whose `x` is as the kernel takes it.
    fn launch(
        &self,
        launcher: &Launcher,
        kernel: &Kernel,
        routing: &Routing,
        (w, rows): (Weight, u32),
        x: &dyn Param,
        product: &dyn Param,
    ) -> Result<(), CudaError> {
        let clusters = self.tiling.clusters(rows, routing, self.places);
        let mut grid = self.tiling.blocks(clusters);
        if clusters * self.tiling.sharers <= self.multiprocessors {
            grid = grid.shared(self.tiling.shared_bytes_alone());
        }
        if w.is_fp8() {
            return launcher.launch(kernel, grid, [&w.address() as &dyn Param, x, routing, product]);
        }
        let all = routing.experts as usize * rows as usize;
        let w = TensorMap::rows_of_bf16(w.address(), all, w.cols(), Tiling::ROWS)?;
        launcher.launch(kernel, grid, [&w as &dyn Param, x, routing, product])
    }

    /// Rows of `x` that lie side by side, `cols` wide.
    fn boxes(&self, x: Buffer, cols: u32) -> Result<TensorMap, CudaError> {
        let x = rows_from(x, cols as usize, 0);
        TensorMap::rows_of_bf16(x.address, x.there as usize, cols as usize, self.tiling.box_pairs)
    }
}

/// The kernels for matrices of a format. Those for few pairs find rows of x by the pairs' tokens.
#[derive(Debug)]
struct Form {
    few: Loaded,
    many: Loaded,
}

impl Form {
    fn bf16(gpu: &Gpu) -> Result<Form, CudaError> {
        let load = |tiling, names| Loaded::new(gpu, "experts_products", tiling, names);
        Ok(Form {
            few: load(Tiling::FEW, ["experts_few_gate_up", "experts_few_down"])?,
            many: load(Tiling::MANY, ["experts_many_gate_up", "experts_many_down"])?,
        })
    }

    fn fp8(gpu: &Gpu) -> Result<Form, CudaError> {
        let load = |tiling, names| Loaded::new(gpu, "experts_products_fp8", tiling, names);
        Ok(Form {
            few: load(Tiling::FEW_FP8, ["experts_few_gate_up_fp8", "experts_few_down_fp8"])?,
            many: load(Tiling::MANY_FP8, ["experts_many_gate_up_fp8", "experts_many_down_fp8"])?,
        })
    }

    /// The kernels for so many pairs, and whether they are those for few.
    fn loaded(&self, routing: &Routing) -> (&Loaded, bool) {
        let few_max = routing.experts * self.few.tiling.few_max();
        if routing.pairs() <= few_max { (&self.few, true) } else { (&self.many, false) }
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
    bf16: Form,
    /// Where a model has matrices in fp8.
    fp8: Option<Form>,
    /// A word for each of the products, 0 between launches: units that were taken.
    tickets: [Address; 2],
}

impl Hopper {
    const GATHER_THREADS: u32 = 256;
    /// A warp each.
    const GATHERED_BY_BLOCK: u32 = 8;

    pub(super) fn new(gpu: &mut Gpu, weights: WeightFormat) -> Result<Hopper, CudaError> {
        let tickets = gpu.alloc(Purpose::Scratch, Element::Word, 2)?;
        gpu.zero(tickets.address(), tickets.bytes())?;
        Ok(Hopper {
            gather: gpu.modules().kernel("experts_products", "experts_gather", 0)?,
            bf16: Form::bf16(gpu)?,
            fp8: (weights != WeightFormat::Bf16).then(|| Form::fp8(gpu)).transpose()?,
            tickets: [tickets.address(), tickets.address().offset(4)],
        })
    }

    fn form(&self, w: Weight) -> Result<&Form, CudaError> {
        if w.is_fp8() { self.fp8.as_ref().ok_or(CudaError::NotReserved) } else { Ok(&self.bf16) }
    }

    /// Do both products' blocks list by themselves which pairs are each expert's?
    pub(super) fn sorts(routing: &Routing) -> bool {
        let few_max = Tiling::FEW.few_max().min(Tiling::FEW_FP8.few_max()) * routing.experts;
        let words = routing.experts * routing.tokens.div_ceil(32);
        routing.pairs() <= few_max.min(SORTED_PAIRS) && words <= SORTED_WORDS
    }

    pub(super) fn gate_up(&self, products: &Products<'_>) -> Result<(), CudaError> {
        let Products { launcher, layer, routing, activated, given } = *products;
        let gate_up = layer.weights.gate_up;
        let (loaded, is_few) = self.form(gate_up)?.loaded(routing);
        let product = GateUp { activated: activated.address(), tickets: self.tickets[0] };
        let w = (gate_up, routing.stored);
        if is_few {
            loaded.launch(launcher, &loaded.gate_up, routing, w, &layer.x, &product)
        } else {
            self.gather(products)?;
            let x = loaded.boxes(given, routing.hidden)?;
            loaded.launch(launcher, &loaded.gate_up, routing, w, &x, &product)
        }
    }

    pub(super) fn down(&self, products: &Products<'_>) -> Result<(), CudaError> {
        let Products { launcher, layer, routing, activated, given } = *products;
        let down = layer.weights.down;
        let (loaded, _) = self.form(down)?.loaded(routing);
        let product = Down { given: given.address(), tickets: self.tickets[1] };
        let x = loaded.boxes(activated, routing.intermediate)?;
        loaded.launch(launcher, &loaded.down, routing, (down, routing.hidden), &x, &product)
    }

    /// Puts each expert's tokens side by side.
    fn gather(&self, products: &Products<'_>) -> Result<(), CudaError> {
        let Products { launcher, layer, routing, given, .. } = *products;
        let blocks = routing.pairs().div_ceil(Self::GATHERED_BY_BLOCK);
        let grid = Grid::new(blocks, Self::GATHER_THREADS).dependent();
        let x = layer.x;
        launcher.launch(&self.gather, grid, [routing as &dyn Param, &x, &given])
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::{assert_declared, source, threads_of};

    /// A tiling, the source that has it and what it is called there, blocks beside each other, and a kernel.
    const TILINGS: [(Tiling, &str, &str, u32, &str); 6] = {
        let (bf16, fp8) = ("experts_products.cu", "experts_products_fp8.cu");
        let (few, few_fp8) = (Tiling::FEW, Tiling::FEW_FP8);
        let (few_by_token, few_fp8_by_token) =
            (Tiling { box_pairs: 1, ..few }, Tiling { box_pairs: 1, ..few_fp8 });
        [
            (few_by_token, bf16, "FewByToken = Tiling<RowsOfBf16", 1, "experts_few_gate_up"),
            (few, bf16, "Few = Tiling<RowsOfBf16", 1, "experts_few_down"),
            (Tiling::MANY, bf16, "Many = Tiling<RowsOfBf16", 1, "experts_many_gate_up"),
            (few_fp8_by_token, fp8, "FewByTokenFp8 = Tiling<TilesOfFp8", 2, "experts_few_gate_up_fp8"),
            (few_fp8, fp8, "FewFp8 = Tiling<TilesOfFp8", 2, "experts_few_down_fp8"),
            (Tiling::MANY_FP8, fp8, "ManyFp8 = Tiling<TilesOfFp8", 1, "experts_many_gate_up_fp8"),
        ]
    };

    #[test]
    fn both_sides_declare_the_same() {
        let common = &["hopper/experts/experts_outputs.cuh"];
        assert_declared!(common, "GateUpOfExperts", GateUp { activated, tickets });
        assert_declared!(common, "DownOfExperts", Down { given, tickets });
        for (tiling, file, name, beside, kernel) in TILINGS {
            let Tiling { pairs, box_pairs, sharers, stages, round, .. } = tiling;
            let using =
                format!("using {name}, {pairs}, {box_pairs}, {sharers}, {stages}, {round}, {beside}>;");
            assert!(source(&format!("hopper/experts/{file}")).contains(&using), "{using}");
            assert_eq!(threads_of(HOPPER, kernel), Tiling::THREADS, "{kernel}");
        }
        for kernel in ["experts_many_down", "experts_many_down_fp8"] {
            assert_eq!(threads_of(HOPPER, kernel), Tiling::THREADS, "{kernel}");
        }
        assert_eq!(threads_of(HOPPER, "experts_gather"), Hopper::GATHER_THREADS);
        let sizes = format!("PAIRS = {SORTED_PAIRS}, WORDS = {SORTED_WORDS};");
        assert!(source("hopper/experts/experts_sort.cuh").contains(&sizes), "{sizes}");
    }

    #[test]
    fn blocks_fit_a_multiprocessor_those_of_few_pairs_in_fp8_two_at_a_time() {
        // What a multiprocessor has, each block's own kilobyte of it, and the plan and the list beside what is asked for.
        let (all, own, plan) = (228 << 10, 1 << 10, 11 << 10);
        for (tiling, _, _, beside, _) in TILINGS {
            let [alone, shared] =
                [tiling.shared_bytes_alone(), tiling.shared_bytes()].map(|asked| asked + own + plan);
            assert!(alone + (beside - 1) * shared <= all && beside * shared <= all, "{tiling:?}");
            assert!(2 * alone > all, "{tiling:?}");
            let Tiling { pairs, box_pairs, sharers, round, .. } = tiling;
            let is_whole = box_pairs == 1 || box_pairs % 8 == 0;
            assert!(is_whole && pairs % (box_pairs * sharers) == 0, "boxes are whole swizzles");
            assert!(pairs % round == 0 && round % 32 == 0);
        }
    }
}
