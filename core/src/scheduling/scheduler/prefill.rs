//! The prefill rows of a step: prompts, the chunks of a prompt that is cut, and what requests resume from.

use crate::batch::{Batch, Row, Token};
use crate::sampling::PromptLogprobs;

use super::{Scheduler, row};

impl Scheduler {
    pub(super) fn schedule_prefill(&mut self, tokens: u32, batch: &mut Batch) {
        let left = |batch: &Batch| tokens.saturating_sub(batch.shape().prefill_tokens());
        // At most one request, the youngest, is between two chunks: a prompt that is cut leaves no room behind it.
        if let Some(&entry) = self.running.last()
            && self.table.get(entry).is_prefilling()
            && (left(batch) == 0 || !self.push_chunk(entry, left(batch), batch))
        {
            return;
        }
        while left(batch) > 0 && batch.has_room_for_row() {
            let Some(entry) = self.next_waiting() else { return };
            if !self.admit(entry, batch) || !self.push_chunk(entry, left(batch), batch) {
                return;
            }
        }
    }

    /// Adds the request's next tokens, so many at most, as a prefill row; false if there is no page for them.
    fn push_chunk(&mut self, entry: u32, tokens: u32, batch: &mut Batch) -> bool {
        self.table.drop_behind_window(entry, &mut self.pool);
        let request = *self.table.get(entry);
        let count = tokens.min(request.prefill_len - request.computed);
        let end = request.computed + count;
        let missing = end.div_ceil(self.limits.page_size).saturating_sub(request.pages);
        if missing > self.pool.available() {
            return false;
        }
        let last = end == request.prefill_len;
        let embeds = last && self.table.details(entry).params.embed.is_some();
        if embeds && !batch.has_room_for_embedded() {
            return false;
        }
        for _ in 0..missing {
            self.grow(entry, batch);
        }
        let mask = if last { self.push_mask(entry, batch) } else { 0 };
        let tokens = batch.tokens().len() as u32;
        let row = row(&request, tokens, request.computed..end, self.table.row_logprobs(entry));
        batch.push_prefill_row(self.table.ticket(entry), Row { mask, sampled: u32::from(last), ..row });
        if embeds {
            batch.push_embedded(self.table.ticket(entry));
        }
        for position in request.computed..end {
            let (id, location) = (self.table.token(entry, position), self.table.location(entry, position));
            batch.push_token(Token { id, slot: request.slot, position, location });
            self.push_scored(entry, position, batch);
        }
        let request = self.table.get_mut(entry);
        request.computed = end;
        // Where no token is wanted, the row is sampled for nothing, and has told that its logits are numbers.
        request.planned += u32::from(last && request.planned < request.len_max);
        if self.shares_prefixes(entry) {
            self.table.keep_prefix(entry, &mut self.pool, false);
        }
        true
    }

    /// Has the token behind `position`, whose own token was pushed last, scored, if its turn has come.
    fn push_scored(&mut self, entry: u32, position: u32, batch: &mut Batch) {
        let next = position + 1;
        if self.table.get(entry).unscored == next
            && let Some(PromptLogprobs { top, .. }) = self.table.details(entry).params.prompt_logprobs
        {
            batch.push_scored(self.table.ticket(entry), self.table.token(entry, next), top);
            self.table.get_mut(entry).score_from(next + 1);
        }
    }
}
