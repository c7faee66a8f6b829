//! Which way sums cross the ranks, and which kernel adds them up.

/// How sums cross the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Every rank sends all of its own to all, and adds all up.
    OneShot,
    /// Every rank adds a share up, and sends that.
    TwoShot,
}

impl Way {
    /// The quicker one for so many bytes of f32.
    pub(super) fn of(ranks: u32, bytes: usize) -> Way {
        if bytes <= Self::one_shot_bytes(ranks) { Way::OneShot } else { Way::TwoShot }
    }

    /// Up to so many bytes a rank sends all: the links have time for it while it would wait for another's share. Two ranks' is
    /// measured on H200s; the others' follow from what crosses the links and what a share's way takes.
    pub(super) fn one_shot_bytes(ranks: u32) -> usize {
        match ranks {
            ..=2 => 1 << 20,
            3..=4 => 256 << 10,
            _ => 128 << 10,
        }
    }

    /// The kernel that adds up sums that come so.
    pub(super) fn kernel(self, ranks: u32) -> &'static str {
        match (self, ranks) {
            (Way::OneShot, ..=2) => "reduce_one_shot_2",
            (Way::OneShot, 3..=4) => "reduce_one_shot_4",
            (Way::OneShot, _) => "reduce_one_shot_8",
            (Way::TwoShot, ..=2) => "reduce_two_shot_2",
            (Way::TwoShot, 3..=4) => "reduce_two_shot_4",
            (Way::TwoShot, _) => "reduce_two_shot_8",
        }
    }
}
