//! Launch constants of `attention.cu`: what its headers define, for the host.

/// Positions that are attended to from zero and then folded into what came before (`LEAF`).
pub const LEAF: u32 = 128;
/// Tokens of a tile (`TILE`); pages hold whole tiles.
pub const TILE: u32 = 16;
/// Queries of a prefill block (`COLUMNS`).
pub const COLUMNS: u32 = 128;
/// Threads of a prefill block (`PREFILL_THREADS`).
pub const PREFILL_THREADS: u32 = 256;

/// Threads of a decode block that read keys and values (`DECODE_READERS`).
const DECODE_READERS: u32 = 256;
/// Bytes of dynamic shared memory of a decode block's warps together (`Decoder::SCRATCH`).
const DECODE_SCRATCH: u32 = LEAF / TILE * (256 + 32) + 16;

/// The constants in which the two sets differ, for one head_dim.
#[derive(Clone, Copy, Debug)]
pub struct Set {
    /// Decode blocks that a multiprocessor holds (`DECODE_BLOCKS`).
    pub decode_blocks: u32,
    /// Threads of a decode block (`DECODE_THREADS`).
    pub decode_threads: u32,
    /// Bytes of dynamic shared memory of a decode block: stages (a leaf's keys or values, eight queries, a unit, two
    /// barriers) and scratch.
    pub decode_shared: u32,
    /// Bytes of dynamic shared memory of a prefill block: keys and values of a leaf in each buffer.
    pub prefill_shared: u32,
}

impl Set {
    /// The Hopper set's or the portable set's.
    pub const fn new(hopper: bool, head_dim: u32) -> Set {
        let (blocks, stages, buffers) = if hopper { (2, 3 * 128 / head_dim, 2) } else { (1, 2, 1) };
        let leaf_bytes = LEAF * head_dim * 2;
        let stage_bytes = leaf_bytes + 8 * head_dim * 2 + 48 + 16;
        Set {
            decode_blocks: blocks,
            decode_threads: DECODE_READERS + if hopper { 32 } else { 0 },
            decode_shared: stages * stage_bytes + DECODE_SCRATCH,
            prefill_shared: buffers * 2 * leaf_bytes,
        }
    }
}
