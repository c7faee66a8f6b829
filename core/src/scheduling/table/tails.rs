//! The last tokens of each request, which the device drew: a line each, and all together.
//!
//! ```text
//!   positions   0 ......... in blocks ........ 1040 1041 1042
//!                                             |<--- tail --->|   at the remainders of their positions
//! ```
//!
//! A full tail goes to its request's block, and is begun anew.

use alloc::vec::Vec;
use core::ops::Range;

use crate::config::LimitsError;
use crate::host::filled;

/// Tokens of a tail at most: a line.
const TAIL: usize = 16;

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Tail([u32; TAIL]);

/// See the module. Its size is final from the start.
pub(super) struct Tails {
    /// `[entries]`
    tails: Vec<Tail>,
    /// Tokens of a tail, a power of two.
    len: u32,
}

impl Tails {
    /// Empty ones, for pages of so many tokens: of a full page all tokens are in a block.
    ///
    /// # Errors
    /// Too little host memory.
    pub fn new(entries: u32, page_size: u32) -> Result<Tails, LimitsError> {
        Ok(Tails { tails: filled(entries as usize, Tail([0; TAIL]))?, len: page_size.min(TAIL as u32) })
    }

    /// Where the tail of so many tokens begins.
    #[inline]
    pub fn begin(&self, tokens: u32) -> u32 {
        tokens & !(self.len - 1)
    }

    /// Sets a tail to what is behind the last full one of a prompt.
    pub fn set(&mut self, entry: u32, prompt: &[u32]) {
        let tail = &prompt[self.begin(prompt.len() as u32) as usize..];
        self.tails[entry as usize].0[..tail.len()].copy_from_slice(tail);
    }

    /// Appends the token at a position; true if the tail is full with it.
    #[inline]
    pub fn push(&mut self, entry: u32, position: u32, token: u32) -> bool {
        let at = position & (self.len - 1);
        self.tails[entry as usize].0[at as usize] = token;
        at + 1 == self.len
    }

    /// Tokens at positions that the tail has.
    pub fn get(&self, entry: u32, positions: Range<u32>) -> &[u32] {
        let first = positions.start & (self.len - 1);
        &self.tails[entry as usize].0[first as usize..][..positions.len()]
    }

    /// All tokens of a full tail.
    pub fn full(&self, entry: u32) -> &[u32] {
        &self.tails[entry as usize].0[..self.len as usize]
    }
}
