//! Launch constants of `attention.cu`: what its headers define, for the host.

/// Positions that are attended to from zero and then folded into what came before (`LEAF`).
pub const LEAF: u32 = 128;
/// Positions whose leaves are folded before they are folded into what came before (`SPAN`).
pub const SPAN: u32 = 16 * LEAF;
/// The span of a piece of a prefill step that has all of what its item sees (`ALL`).
pub const ALL: u32 = u32::MAX;
/// Tokens of a tile (`TILE`); pages hold whole tiles.
pub const TILE: u32 = 16;

/// Query heads that may share a key and value head (`PART_QUERIES` of the Hopper set).
pub const GROUP_MAX: u32 = 64;

/// The constants in which the two sets differ, for one head_dim, and for so many kv heads at once.
#[derive(Clone, Copy, Debug)]
pub struct Set {
    /// Decode blocks that a multiprocessor holds (`DECODE_BLOCKS`).
    pub decode_blocks: u32,
    /// Warps of a decode block that read keys and values (`DECODE_WARPS`).
    pub decode_warps: u32,
    /// Threads of a decode block (`DECODE_THREADS`).
    pub decode_threads: u32,
    /// Bytes of dynamic shared memory of a decode block: stages (a tile of keys or values a warp, a unit, two barriers), eight
    /// queries of each turn that they are of (`TURNS`), and scratch (`Decoder::SCRATCH`).
    pub decode_shared: u32,
    /// The prefill kernel.
    pub prefill: Prefill,
}

/// Constants of a prefill kernel for one head_dim.
#[derive(Clone, Copy, Debug)]
pub struct Prefill {
    /// Parts of an item (`PARTS`), beside each other in a row's tokens.
    pub parts: u32,
    /// Queries of a part (`PART_QUERIES`, `COLUMNS`): as many tokens as have all of a group's.
    pub part_queries: u32,
    /// Threads of a block (`PREFILL_THREADS`).
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    /// Bytes of a block's states at a place in memory; 0 where items are not split.
    pub kept: usize,
}

impl Prefill {
    /// Warpgroups of 64 queries and one that fetches. Shared memory: queries, a ring of five stages of 32 KiB or ten of 16,
    /// ones, what is known of the parts, two turns, barriers in pairs, with `fp8` a scale for each of the ring's tokens, and what
    /// aligns all to 1024 bytes.
    const fn hopper(head_dim: u32, fp8: bool) -> Prefill {
        let (parts, part_queries, stages, turns) = (3, 64, 5 * 128 / head_dim, 2);
        let rows = parts * part_queries + stages * LEAF;
        let scales = if fp8 { stages * LEAF * 2 } else { 0 };
        let known = 256 + parts * 32 + turns * 16 + (turns + parts + stages) * 16 + scales;
        Prefill {
            parts,
            part_queries,
            threads: 128 * parts + 128,
            shared: rows * head_dim * 2 + known + 1024,
            kept: (parts * (head_dim / 8 + 1) * 128 * 16) as usize,
        }
    }

    /// Keys and values of a leaf.
    const fn portable(head_dim: u32) -> Prefill {
        Prefill { parts: 1, part_queries: 128, threads: 256, shared: 2 * LEAF * head_dim * 2, kept: 0 }
    }

    /// Tokens of an item whose key and value heads have `group` query heads each.
    pub const fn item_tokens(&self, group: u32) -> u32 {
        self.parts * (self.part_queries / group)
    }
}

impl Set {
    /// The Hopper set's or the portable set's, whose decode blocks take so many kv heads at once (`HEADS`). With keys and values in
    /// `fp8`, which Hopper's alone has, blocks are twice as many and half as large, and have more stages (`DECODE_STAGES`).
    pub const fn new(hopper: bool, head_dim: u32, heads: u32, fp8: bool) -> Set {
        let of_hopper = if fp8 { 5 } else { 3 } * 128 / (head_dim * heads);
        let (blocks, warps, stages) = match (hopper, fp8) {
            (true, true) => (4, 4, of_hopper),
            (true, false) => (2, 8, of_hopper),
            (false, _) => (1, 8, 2),
        };
        let row_bytes = if fp8 { head_dim + 2 } else { head_dim * 2 };
        let stage_bytes = warps * TILE * row_bytes * heads + 48 + 16;
        let stages_of_unit = 2 * LEAF / (warps * TILE);
        let turns = stages.div_ceil(stages_of_unit);
        let m_tiles = heads * head_dim / 16;
        let states = warps * 32 * 16 * (m_tiles.div_ceil(warps) + 1);
        let scratch = LEAF / TILE * 256 + warps * 32 + m_tiles * 256 + 16 + states;
        Set {
            decode_blocks: blocks,
            decode_warps: warps,
            decode_threads: warps * 32 + if hopper { 32 } else { 0 },
            decode_shared: stages * stage_bytes + turns * 8 * head_dim * 2 + scratch,
            prefill: if hopper { Prefill::hopper(head_dim, fp8) } else { Prefill::portable(head_dim) },
        }
    }
}
