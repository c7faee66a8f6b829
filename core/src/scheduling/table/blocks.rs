//! Blocks: memory of the host for the tokens of a sequence and for the names of their pages, taken as it grows.
//!
//! Invariant: the request that has run longest can always go on. Nobody else takes one of the blocks that it may still need
//! for a sequence of full length; when it ends, it leaves the next one as many.

use super::{GAP, RequestTable};

impl RequestTable {
    /// Is there room for so many requests of so many prompt tokens each, beside what `oldest`, who has run longest, may need?
    pub fn has_room(&self, requests: usize, tokens: u32, oldest: Option<u32>) -> bool {
        let spare = (self.free_blocks.len() as u32).saturating_sub(self.promised(oldest)) as usize;
        requests <= self.vacant.len() && requests * tokens.div_ceil(self.block_tokens) as usize <= spare
    }

    /// Samples of a prompt of so many tokens that there is room for where nobody else is.
    pub fn samples_max(&self, tokens: u32) -> usize {
        let blocks = self.tokens.len() / (self.block_tokens + GAP) as usize;
        blocks.saturating_sub(self.sequence_blocks as usize)
            / tokens.div_ceil(self.block_tokens).max(1) as usize
    }

    /// Sees to a place for the token that a request draws next; false if it has to wait for others to end, which `oldest`, who
    /// has run longest, never does.
    #[inline]
    pub fn make_room(&mut self, entry: u32, oldest: u32) -> bool {
        let request = self.get(entry);
        if request.planned < request.blocks * self.block_tokens || request.planned == request.len_max {
            return true;
        }
        let promised = if oldest == entry { 0 } else { self.promised(Some(oldest)) };
        self.free_blocks.len() as u32 > promised && self.take_block(entry).is_some()
    }

    /// Tokens that a request may draw beyond those planned, without another block.
    pub fn unplanned_tokens(&self, entry: u32) -> u32 {
        let request = self.get(entry);
        (request.blocks * self.block_tokens).min(request.len_max).saturating_sub(request.planned)
    }

    /// Blocks that the request which has run longest may still need.
    fn promised(&self, oldest: Option<u32>) -> u32 {
        self.sequence_blocks - oldest.map_or(0, |entry| self.get(entry).blocks)
    }

    pub(super) fn take_block(&mut self, entry: u32) -> Option<u32> {
        let block = self.free_blocks.pop()?;
        let i = self.get(entry).blocks;
        self.blocks[(entry * self.sequence_blocks + i) as usize] = block;
        let request = self.get_mut(entry);
        (request.blocks, request.last_block) = (i + 1, block);
        Some(block)
    }

    /// The block of a request's `i`-th run of `block_tokens` tokens.
    #[inline]
    pub(super) fn block(&self, entry: u32, i: u32) -> u32 {
        let request = self.get(entry);
        match i + 1 == request.blocks {
            true => request.last_block,
            false => self.blocks[(entry * self.sequence_blocks + i) as usize],
        }
    }

    /// Takes all of a request's blocks away.
    pub(super) fn free_blocks_of(&mut self, entry: u32) {
        let first = (entry * self.sequence_blocks) as usize;
        let blocks = first..first + self.get(entry).blocks as usize;
        self.free_blocks.extend_from_slice(&self.blocks[blocks]);
    }

    /// Asserts that each block is one request's or free, and that the oldest request can have those it may need.
    ///
    /// # Panics
    /// When it isn't so.
    pub fn check(&self, oldest: Option<u32>) {
        let mut seen = alloc::vec![false; self.tokens.len() / (self.block_tokens + GAP) as usize];
        let held = self.iter().flat_map(|(entry, it)| (0..it.blocks).map(move |i| (entry, i)));
        let held = held.map(|(entry, i)| self.block(entry, i));
        for block in held.chain(self.free_blocks.iter().copied()) {
            assert!(!core::mem::replace(&mut seen[block as usize], true), "block {block} has two owners");
        }
        assert!(seen.into_iter().all(|seen| seen), "a block is lost");
        assert!(self.free_blocks.len() as u32 >= self.promised(oldest), "the oldest request may get stuck");
    }
}
