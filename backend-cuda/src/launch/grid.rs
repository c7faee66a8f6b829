//! The shape of a launch, and in which order its blocks may begin.

use std::fmt;

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub(super) blocks: [u32; 3],
    pub(super) threads: u32,
    pub(super) shared: u32,
    pub(super) cluster: u32,
    pub(super) dependent: bool,
    pub(super) cooperative: bool,
}

impl Grid {
    /// `blocks` blocks of `threads` threads.
    pub fn new(blocks: u32, threads: u32) -> Grid {
        Grid { blocks: [blocks, 1, 1], threads, shared: 0, cluster: 1, dependent: false, cooperative: false }
    }

    /// A grid of `y` such rows.
    pub fn rows(self, y: u32) -> Grid {
        Grid { blocks: [self.blocks[0], y, self.blocks[2]], ..self }
    }

    /// A grid of `z` such planes.
    pub fn planes(self, z: u32) -> Grid {
        Grid { blocks: [self.blocks[0], self.blocks[1], z], ..self }
    }

    /// Bytes of dynamic shared memory; at most what the kernel was looked up with.
    pub fn shared(self, bytes: u32) -> Grid {
        Grid { shared: bytes, ..self }
    }

    /// Clusters of `blocks` neighbours along x.
    pub fn cluster(self, blocks: u32) -> Grid {
        Grid { cluster: blocks, ..self }
    }

    /// The kernel may start before the one in front of it ends, because it waits for it by itself
    /// (`dependent_wait`). Ignored for portable kernels, which can't.
    pub fn dependent(self) -> Grid {
        Grid { dependent: true, ..self }
    }

    /// The same, or not: a kernel that fetches before it waits what the one in front of it writes.
    pub fn dependent_if(self, dependent: bool) -> Grid {
        Grid { dependent, ..self }
    }

    /// Blocks wait for each other: none begins before there is room for all.
    pub fn cooperative(self) -> Grid {
        Grid { cooperative: true, ..self }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.contains(&0)
    }
}

/// `8 x 32 blocks of 256 threads and 96.5 KiB, in clusters of 4`.
impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.blocks;
        write!(f, "{x}")?;
        let others = [y, z].into_iter().take(if z > 1 { 2 } else { usize::from(y > 1) });
        others.into_iter().try_for_each(|blocks| write!(f, " x {blocks}"))?;
        write!(f, " blocks of {} threads", self.threads)?;
        if self.shared > 0 {
            write!(f, " and {:.1} KiB", f64::from(self.shared) / 1024.0)?;
        }
        if self.cluster > 1 { write!(f, ", in clusters of {}", self.cluster) } else { Ok(()) }
    }
}
