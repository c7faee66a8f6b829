//! A device that planners are asked about without it, and a launch on it, in words.

use crate::launch::Grid;

/// What planners need to know of a device.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Are the Hopper kernels used?
    pub hopper: bool,
    /// How many clusters of so many blocks, each with a multiprocessor to itself, the device takes at once.
    pub clusters: fn(u32) -> u32,
}

impl Described {
    /// An H100 or H200 SXM, whose multiprocessors lie in groups of unequal size: clusters of four leave some free, as its driver
    /// says.
    pub const HOPPER: Described = Described {
        multiprocessors: 132,
        hopper: true,
        clusters: |blocks| match blocks {
            4 => 30,
            _ => 132 / blocks,
        },
    };

    /// The same with the kernels for any GPU.
    pub const PORTABLE: Described = Described { hopper: false, ..Described::HOPPER };
}

/// A launch.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What it is for.
    pub what: &'static str,
    /// The kernel.
    pub kernel: &'static str,
    /// Its shape.
    pub grid: Grid,
    /// What a block does, where that is worth a word.
    pub work: String,
}
