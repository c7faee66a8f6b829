//! A batch to words and back, padded up to the shape that a recorded step has.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use super::Batch;
use super::layout::{Layout, StepShape};
use super::words::{
    HEADER_WORDS, Header, PageUpdate, ROW_WORDS, Row, SLOT_UPDATE_WORDS, SlotUpdate, TOKEN_WORDS, Token,
    UPDATE_WORDS,
};
use crate::config::Limits;

impl Batch {
    /// Writes the batch into `words`, padded with dummy rows up to `shape`, and returns how many words hold it. The
    /// plan words are left to the backend. Only a step of decode rows alone is padded.
    pub fn pack(
        &self,
        layout: &Layout,
        shape: StepShape,
        dummy: Dummy,
        output: u32,
        words: &mut [u32],
    ) -> usize {
        assert!(
            shape == self.shape() || (shape.is_decode() && self.shape().is_decode()),
            "only steps of decode rows alone are padded"
        );
        let updates: &[u32] = bytemuck::cast_slice(&self.updates);
        let slot_updates: &[u32] = bytemuck::cast_slice(&self.slot_updates);
        let used = layout.updates + updates.len() + slot_updates.len() + self.rules.len();
        let header = Header {
            rows: shape.rows(),
            tokens: shape.tokens,
            samples: shape.samples,
            updates: self.updates.len() as u32,
            output,
            slot_updates: self.slot_updates.len() as u32,
            words: used as u32,
            reserved: [0; 9],
        };
        words[..HEADER_WORDS].copy_from_slice(bytemuck::cast_slice(&[header]));
        let rows = packed_rows_mut(layout, shape.rows() as usize, words);
        rows[..self.rows.len()].copy_from_slice(&self.rows);
        let first_padding_token = self.tokens.len() as u32;
        for (i, row) in rows[self.rows.len()..].iter_mut().enumerate() {
            *row = dummy.row(first_padding_token + i as u32);
        }
        let (pages, rest) = words[layout.updates..].split_at_mut(updates.len());
        let (slots, rest) = rest.split_at_mut(slot_updates.len());
        pages.copy_from_slice(updates);
        slots.copy_from_slice(slot_updates);
        rest[..self.rules.len()].copy_from_slice(&self.rules);
        let tokens: &mut [Token] =
            bytemuck::cast_slice_mut(&mut words[layout.tokens..][..shape.tokens as usize * TOKEN_WORDS]);
        tokens[..self.tokens.len()].copy_from_slice(&self.tokens);
        tokens[self.tokens.len()..].fill(dummy.token());
        used
    }

    /// Writes the part for scored tokens into `words`, and returns which words it is; `None` where no token is scored.
    pub fn pack_scored(&self, layout: &Layout, words: &mut [u32]) -> Option<Range<usize>> {
        let count = self.scored.len();
        if count == 0 {
            return None;
        }
        let rows_at = layout.scored + HEADER_WORDS;
        let ids_at = rows_at + count * ROW_WORDS;
        let header = Header { rows: count as u32, samples: count as u32, ..Header::default() };
        words[layout.scored..rows_at].copy_from_slice(bytemuck::cast_slice(&[header]));
        let (rows, ids) = words[rows_at..ids_at + count].split_at_mut(count * ROW_WORDS);
        let rows: &mut [Row] = bytemuck::cast_slice_mut(rows);
        for ((row, id), scored) in rows.iter_mut().zip(ids).zip(&self.scored) {
            let token = self.tokens[scored.token as usize];
            *row = Row {
                slot: token.slot,
                first_token: scored.token,
                tokens: 1,
                position: token.position,
                kv_len: token.position + 1,
                sampled: 1,
                logprobs: scored.logprobs,
                mask: 0,
            };
            *id = scored.next;
        }
        Some(layout.scored..ids_at + count)
    }
}

/// Where padding rows point: a slot and a page that no request has.
#[derive(Clone, Copy, Debug)]
pub struct Dummy {
    /// The slot behind the last one.
    pub slot: u32,
    /// Location of the first token of the page behind the last one.
    pub location: u32,
}

impl Dummy {
    /// Of an engine of these capacities.
    pub fn of(limits: &Limits) -> Dummy {
        Dummy { slot: limits.running, location: limits.pages * limits.page_size }
    }

    pub(crate) fn row(self, first_token: u32) -> Row {
        Row { slot: self.slot, first_token, tokens: 1, position: 0, kv_len: 1, sampled: 1, ..Row::default() }
    }

    pub(crate) fn token(self) -> Token {
        Token { id: 0, slot: self.slot, position: 0, location: self.location }
    }
}

/// The rows of a packed batch.
pub fn packed_rows<'a>(layout: &Layout, rows: usize, words: &'a [u32]) -> &'a [Row] {
    bytemuck::cast_slice(&words[layout.rows..][..rows * ROW_WORDS])
}

fn packed_rows_mut<'a>(layout: &Layout, rows: usize, words: &'a mut [u32]) -> &'a mut [Row] {
    bytemuck::cast_slice_mut(&mut words[layout.rows..][..rows * ROW_WORDS])
}

/// The tokens of a packed batch.
pub fn packed_tokens<'a>(layout: &Layout, tokens: usize, words: &'a [u32]) -> &'a [Token] {
    bytemuck::cast_slice(&words[layout.tokens..][..tokens * TOKEN_WORDS])
}

/// The page-table updates of a packed batch.
pub fn packed_updates<'a>(layout: &Layout, words: &'a [u32]) -> &'a [PageUpdate] {
    let updates = words[3] as usize;
    bytemuck::cast_slice(&words[layout.updates..][..updates * UPDATE_WORDS])
}

/// The slot updates of a packed batch.
pub fn packed_slot_updates<'a>(layout: &Layout, words: &'a [u32]) -> &'a [SlotUpdate] {
    let (updates, slots) = (words[3] as usize, words[5] as usize);
    let first = layout.updates + updates * UPDATE_WORDS;
    bytemuck::cast_slice(&words[first..][..slots * SLOT_UPDATE_WORDS])
}

/// The words of a packed batch's rules, and what lies behind them.
pub fn packed_rules<'a>(layout: &Layout, words: &'a [u32]) -> &'a [u32] {
    let (updates, slots) = (words[3] as usize, words[5] as usize);
    &words[layout.updates + updates * UPDATE_WORDS + slots * SLOT_UPDATE_WORDS..]
}

/// A packed batch of zeros, for a backend's own tests.
pub fn zeroed_words(layout: &Layout) -> Vec<u32> {
    vec![0; layout.words]
}
