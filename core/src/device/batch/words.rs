//! What a batch is made of: records of whole words, the same on host and device.

use bytemuck::{Pod, Zeroable};

use crate::sampling::SlotState;

/// In [`Token::id`]: the token that the slot sampled last, not yet known to the host.
pub const LAST_TOKEN: u32 = u32::MAX;

/// Words of a header.
pub const HEADER_WORDS: usize = size_of::<Header>() / 4;
/// Words of a row.
pub const ROW_WORDS: usize = size_of::<Row>() / 4;
/// Words of a page update.
pub const UPDATE_WORDS: usize = size_of::<PageUpdate>() / 4;
/// Words of a slot update.
pub const SLOT_UPDATE_WORDS: usize = size_of::<SlotUpdate>() / 4;
/// Words of a token.
pub const TOKEN_WORDS: usize = size_of::<Token>() / 4;

/// The counts of a step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Header {
    /// Rows, padding included.
    pub rows: u32,
    /// Tokens, padding included.
    pub tokens: u32,
    /// Rows that are sampled; they come first.
    pub samples: u32,
    /// Page-table entries that changed.
    pub updates: u32,
    /// Where in the output buffers this step's results begin, in rows: two steps can be in flight.
    pub output: u32,
    /// Slots that somebody has taken.
    pub slot_updates: u32,
    /// Words of the packed batch, the header's among them.
    pub words: u32,
    /// Zero; makes the header 64 bytes.
    pub reserved: [u32; 9],
}

/// One request's share of a step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Row {
    /// Row of the page table, of the token pool and of the slots' states.
    pub slot: u32,
    /// Index of its first token among the step's tokens.
    pub first_token: u32,
    /// How many tokens it has.
    pub tokens: u32,
    /// Position in the sequence of its first token.
    pub position: u32,
    /// Tokens that its last token attends to: `position + tokens`. Also the position of the token it samples.
    pub kv_len: u32,
    /// 1 if the row is sampled, else 0.
    pub sampled: u32,
    /// 0: no log-probabilities; 1 + k: those of the token drawn and of the k most probable.
    pub logprobs: u32,
    /// 0: any token may be drawn; 1 + i: those of mask i on the device; see [`crate::constraint`].
    pub mask: u32,
}

/// A page-table entry that changed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PageUpdate {
    /// `slot * table_width + i` for the slot's i-th page.
    pub index: u32,
    /// The page.
    pub page: u32,
}

/// A slot that a request has taken, and how its tokens are drawn.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct SlotUpdate {
    /// The slot.
    pub slot: u32,
    /// Where its words begin among the step's words of rules.
    pub rules: u32,
    /// How many it has there; they go to the slot's region.
    pub rule_words: u32,
    /// Zero.
    pub reserved: u32,
    /// What it holds from this step on.
    pub state: SlotState,
}

/// One token to run.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Token {
    /// Its id, or [`LAST_TOKEN`].
    pub id: u32,
    /// Its request's slot.
    pub slot: u32,
    /// Its position in the sequence.
    pub position: u32,
    /// Where its key and value go: `page * page_size + position % page_size`.
    pub location: u32,
}
