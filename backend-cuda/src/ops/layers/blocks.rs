//! How the multiprocessors are divided: each has one block of the kernel, some multiply and the others attend.

use minisgl_core::kv::KvFormat;

use crate::launch::Grid;

/// Bytes of a block's shared memory: a multiprocessor has room for one such.
pub(super) const SHARED: u32 = 231_424;
/// Threads of a block, where keys and values are kept in bf16, and in fp8; and groups of its warps that take turns in attending.
pub(super) const THREADS: [u32; 2] = [384, 512];
const GROUPS: [u32; 2] = [2, 3];
/// Blocks that multiply; as many at least attend.
pub(super) const MULTIPLY: u32 = 64;

/// Groups of warps that take turns in attending.
pub(in crate::ops) fn attenders(multiprocessors: u32, format: KvFormat) -> u32 {
    GROUPS[usize::from(format == KvFormat::Fp8)] * (multiprocessors / 2 * 2).saturating_sub(MULTIPLY).max(1)
}

/// A block a multiprocessor, in pairs.
pub(super) fn grid(multiprocessors: u32, format: KvFormat) -> Grid {
    let (blocks, threads) = (multiprocessors / 2 * 2, THREADS[usize::from(format == KvFormat::Fp8)]);
    Grid::new(blocks, threads).cluster(2).shared(SHARED).dependent().cooperative()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::constant;

    #[test]
    fn the_host_and_the_kernel_divide_alike() {
        let declared =
            ["LAYERS_SHARED", "MULTIPLIERS"].map(|name| constant("hopper/layers/layers_args.cuh", name));
        assert_eq!(declared, [SHARED, MULTIPLY]);
    }
}
