//! Edits of a row's logits before a token is drawn, by the definition in [`minisgl_core::rules`].

use minisgl_core::batch::Row;
use minisgl_core::rules::{RULE_WORDS, RuleParts, biased, penalized};
use minisgl_core::sampling::SlotState;

/// In a token's count: the prompt has it.
const IN_PROMPT: u32 = 1 << 31;

/// What the device knows of its slots.
#[derive(Clone, Copy)]
pub struct Slots<'a> {
    /// `[slots + 1]`.
    pub states: &'a [SlotState],
    /// `[slots + 1, RULE_WORDS]`.
    pub rules: &'a [u32],
    /// `[slots + 1, table_width]`.
    pub page_table: &'a [u32],
    pub table_width: usize,
    pub page_size: u32,
    /// `[pages + 1, page_size]`.
    pub history: &'a [u32],
}

impl Slots<'_> {
    /// Edits the logits of a row as its slot asks for; `counts` is as long as `logits`.
    pub fn edit(&self, row: &Row, logits: &mut [f32], counts: &mut [u32]) {
        let slot = row.slot as usize;
        let state = &self.states[slot];
        if state.edits == 0 {
            return;
        }
        let rules = RuleParts::of(state, &self.rules[slot * RULE_WORDS..][..RULE_WORDS]);
        if row.kv_len < state.endings_from {
            rules.endings.iter().for_each(|id| forbid(&mut logits[*id as usize]));
        }
        for (last, before) in rules.bad_words().filter_map(<[u32]>::split_last) {
            if self.ends_with(row, state.prompt_len, before) {
                forbid(&mut logits[*last as usize]);
            }
        }
        for [id, bias] in rules.biases {
            edit_finite(&mut logits[*id as usize], |logit| biased(logit, f32::from_bits(*bias)));
        }
        if state.penalizes() {
            self.count(row, state.prompt_len, counts);
            for (logit, count) in logits.iter_mut().zip(counts).filter(|(_, count)| **count > 0) {
                edit_finite(logit, |logit| penalized(logit, *count & !IN_PROMPT, state));
            }
        }
    }

    /// Does the output end with these tokens?
    fn ends_with(&self, row: &Row, prompt_len: u32, tokens: &[u32]) -> bool {
        let first = row.kv_len.checked_sub(tokens.len() as u32).filter(|first| *first >= prompt_len);
        first.is_some_and(|first| {
            (first..).zip(tokens).all(|(position, id)| self.token(row.slot, position) == *id)
        })
    }

    /// How often the output has each token, and whether the prompt does.
    fn count(&self, row: &Row, prompt_len: u32, counts: &mut [u32]) {
        counts.fill(0);
        for position in 0..row.kv_len {
            let count = &mut counts[self.token(row.slot, position) as usize];
            match position < prompt_len {
                true => *count |= IN_PROMPT,
                false => *count += 1,
            }
        }
    }

    /// The token at a slot's position.
    fn token(&self, slot: u32, position: u32) -> u32 {
        let entry = slot as usize * self.table_width + (position / self.page_size) as usize;
        let location = self.page_table[entry] * self.page_size + position % self.page_size;
        self.history[location as usize]
    }
}

fn forbid(logit: &mut f32) {
    edit_finite(logit, |_| f32::NEG_INFINITY);
}

fn edit_finite(logit: &mut f32, edit: impl FnOnce(f32) -> f32) {
    if logit.is_finite() {
        *logit = edit(*logit);
    }
}
