//! What a plan of decode rows is made of.
//!
//! ```text
//!   plan      count, beside, 6 words unused, segments    some leaves of a row each, and where their partials go
//! ```

use bytemuck::{Pod, Zeroable};

/// Words in front of a decode plan's segments.
pub(super) const PLAN_HEAD: usize = 8;
/// Words of a segment.
pub(super) const SEGMENT_WORDS: usize = size_of::<Segment>() / 4;

/// Some leaves of a row's window, one after the other, as `attention_work.cuh` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Segment {
    /// Index of the row among the launch's.
    pub(super) row: u32,
    /// The row's slot.
    pub(super) slot: u32,
    /// Tokens that the row attends to.
    pub(super) kv_len: u32,
    /// Its first leaf, by position in the sequence.
    pub(super) first: u32,
    /// How many leaves it has.
    pub(super) leaves: u32,
    /// Where the row's partials begin,
    pub(super) base: u32,
    /// and where its own do. The row's first segment has one, its folded state, every other one for each leaf.
    pub(super) at: u32,
    /// Partials of the row; 0 where the segment is the whole row and leaves none.
    pub(super) total: u32,
}

/// The segments of a filled plan.
pub(super) fn segments(words: &[u32]) -> &[Segment] {
    let (head, segments) = words.split_at(PLAN_HEAD);
    bytemuck::cast_slice(&segments[..head[0] as usize * SEGMENT_WORDS])
}
