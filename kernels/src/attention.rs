//! Launch constants of `attention.cu`: what its headers define, for the host.

/// Positions that are attended to from zero and then folded into what came before (`LEAF`).
pub const LEAF: u32 = 128;
/// Tokens of a tile, the unit of copies and of decode's work (`TILE`); pages hold whole tiles.
pub const TILE: u32 = 16;
/// Queries of a prefill block (`COLUMNS`).
pub const COLUMNS: u32 = 128;
/// Threads of a prefill block (`PREFILL_THREADS`).
pub const PREFILL_THREADS: u32 = 256;

/// The constants in which the two sets differ, for one head_dim.
#[derive(Clone, Copy, Debug)]
pub struct Set {
    /// Warps of a decode block (`DECODE_WARPS`).
    pub decode_warps: u32,
    /// Bytes of dynamic shared memory of a decode block: each warp's stages, and a barrier for each.
    pub decode_shared: u32,
    /// Bytes of dynamic shared memory of a prefill block: keys and values of a leaf in each buffer.
    pub prefill_shared: u32,
}

impl Set {
    /// The Hopper set's or the portable set's.
    pub const fn new(hopper: bool, head_dim: u32) -> Set {
        let (stages, buffers) = if hopper { (6 * 128 / head_dim, 2) } else { (3 * 128 / head_dim, 1) };
        let decode_warps = 8;
        let (stage_bytes, leaf_bytes) = (TILE * head_dim * 2 + 8, LEAF * head_dim * 2);
        Set {
            decode_warps,
            decode_shared: decode_warps * stages * stage_bytes,
            prefill_shared: buffers * 2 * leaf_bytes,
        }
    }
}
