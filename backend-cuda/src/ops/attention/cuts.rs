//! How a row's leaves are cut into pieces.
//!
//! Invariant: pieces follow each other and have all leaves. The first one lies in one span, or ends with one, if there are others.

use std::ops::Range;

use minisgl_kernels::attention::{LEAF, SPAN};

/// Leaves of a span.
pub(super) const SPAN_LEAVES: u32 = SPAN / LEAF;

/// A row of `leaves` leaves in `count` pieces, the first of `first` leaves.
pub(super) struct Cuts {
    pub(super) leaves: u32,
    pub(super) first: u32,
    pub(super) count: u32,
}

impl Cuts {
    /// In one piece.
    pub(super) fn whole(row: &Range<u32>) -> Cuts {
        let leaves = row.len() as u32;
        Cuts { leaves, first: leaves, count: 1 }
    }

    /// Into pieces of about `largest` leaves at most, as far as there is room for that many segments besides the row's own,
    /// and for `partials` partials.
    pub(super) fn new(row: &Range<u32>, largest: u64, room: usize, partials: u32) -> Cuts {
        let leaves = row.len() as u32;
        let count = u64::from(leaves).div_ceil(largest).min(1 + room as u64) as u32;
        if count == 1 {
            return Cuts::whole(row);
        }
        let least = (leaves + 1).saturating_sub(partials).max(1);
        let first = first_piece(row, (leaves / count).max(least), least);
        Cuts { leaves, first, count: count.min(1 + leaves - first) }
    }

    /// The leaf that piece `i` begins with.
    pub(super) fn at(&self, i: u32) -> u32 {
        match i {
            0 => 0,
            1 => self.first,
            _ => self.first + (self.leaves - self.first) * (i - 1) / (self.count - 1),
        }
    }
}

/// Leaves of a row's first piece: about `wanted`, `least` at least, so that it lies in one span, ends with one or is the row.
fn first_piece(row: &Range<u32>, wanted: u32, least: u32) -> u32 {
    let end = row.start + wanted;
    let before = end - end % SPAN_LEAVES;
    let fitting = match before.checked_sub(row.start) {
        None | Some(0) => wanted,
        Some(shorter) if shorter >= least => shorter,
        Some(_) => end.next_multiple_of(SPAN_LEAVES) - row.start,
    };
    fitting.min(row.len() as u32)
}
