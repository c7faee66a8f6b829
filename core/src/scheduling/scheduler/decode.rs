//! The decode rows of a step, their drafts, and who is retracted for want of a page.

use crate::batch::{Batch, LAST_TOKEN, Row, Token};
use crate::sampling::NO_TOKEN;
use crate::table::State;

use super::{Scheduler, row};

impl Scheduler {
    pub(super) fn schedule_decode(&mut self, batch: &mut Batch) {
        let requests = self.running.len() as u32;
        let may_draft = self.drafting.is_possible(requests);
        let mut i = 0;
        while i < self.running.len() {
            let entry = self.running[i];
            i += 1;
            if !self.table.has_place(entry) && !self.make_place(entry, batch) {
                continue;
            }
            let request = self.table.get(entry);
            let position = request.computed;
            let id = match request.known > position {
                true => self.table.token(entry, position),
                false => LAST_TOKEN,
            };
            self.push_decode_row(entry, id, batch);
            if may_draft {
                self.push_drafts(entry, requests, batch);
            }
        }
    }

    /// Sees to a page for the request's next token; false if it has no row in this step. Of a step of thousands few come here.
    #[inline(never)]
    fn make_place(&mut self, entry: u32, batch: &mut Batch) -> bool {
        if !self.table.get(entry).can_decode()
            || !self.can_draw(entry)
            || !self.table.make_room(entry, self.running[0])
        {
            return false;
        }
        self.table.drop_behind_window(entry, &mut self.pool);
        while self.needs_page(entry) && self.pool.available() == 0 {
            self.retract_youngest();
        }
        // It may have been the youngest itself, and then no other one is behind it.
        let runs = self.table.get(entry).state == State::Running;
        if runs && self.needs_page(entry) {
            self.grow(entry, batch);
        }
        runs
    }

    #[inline]
    fn push_decode_row(&mut self, entry: u32, id: u32, batch: &mut Batch) {
        let (mask, tokens) = (self.push_mask(entry, batch), batch.tokens().len() as u32);
        let request = self.table.get(entry);
        let (slot, position) = (request.slot, request.computed);
        let row = row(request, tokens, position..position + 1, self.table.row_logprobs(entry));
        let token = Token { id, slot, position, location: self.table.location(entry, position) };
        batch.push_decode_row(self.table.ticket(entry), Row { mask, ..row }, token);
        let request = self.table.get_mut(entry);
        request.computed += 1;
        request.planned += 1;
    }

    fn retract_youngest(&mut self) {
        let Some(entry) = self.running.pop() else { return };
        self.table.stop(entry, &mut self.pool, self.settings.prefix_cache);
        self.retracted.push_front(entry);
        self.forget_unshared();
        self.stats.retractions += 1;
    }

    /// Is the step in flight, of this batch, to be completed before the next one is scheduled? Where it has drafts, nobody knows
    /// yet which positions are next; where others could be made when its tokens are known, waiting may pay.
    pub fn waits_for(&mut self, in_flight: &Batch) -> bool {
        if in_flight.has_drafts() {
            return true;
        }
        let requests = self.running.len() as u32;
        if !self.drafting.is_possible(requests) {
            return false;
        }
        let mut saved_ms = 0.0;
        for i in 0..self.running.len() {
            let entry = self.running[i];
            let request = self.table.get(entry);
            if request.can_decode() && !self.table.is_constrained(entry) && self.predict(entry).is_some() {
                saved_ms += self.drafting.drafts(requests, self.table.details(entry).hits).1;
            }
        }
        self.drafting.pays_to_wait(saved_ms)
    }

    /// A step began so many milliseconds after the end of the one before it, because that was waited for.
    pub fn has_waited(&mut self, ms: f32) {
        self.drafting.has_waited(ms);
    }

    /// Where the known tokens of a request have an earlier continuation; the next one is predicted to be its first.
    fn predict(&mut self, entry: u32) -> Option<u32> {
        let continuation = self.table.find_continuation(entry);
        let predicted = continuation.map_or(NO_TOKEN, |at| self.table.token(entry, at));
        self.table.details_mut(entry).predicted = predicted;
        continuation
    }

    /// Adds rows for what the request, whose last token is known and has its row, is expected to draw. None of them makes others
    /// give pages back.
    fn push_drafts(&mut self, entry: u32, requests: u32, batch: &mut Batch) {
        let request = self.table.get(entry);
        if self.table.is_constrained(entry) || request.planned != request.known + 1 {
            return;
        }
        let (known, hits) = (request.known, self.table.details(entry).hits);
        let Some(continuation) = self.predict(entry) else { return };
        let drafts = self.drafting.drafts(requests, hits).0.min(self.table.unplanned_tokens(entry));
        for draft in 0..drafts {
            // A continuation that reaches the end goes on with what it says itself.
            let at = continuation + draft % (known - continuation);
            if self.needs_page(entry) {
                if self.pages_above_watermark() <= 0 {
                    return;
                }
                self.grow(entry, batch);
            }
            self.push_decode_row(entry, self.table.token(entry, at), batch);
            self.stats.drafted += 1;
        }
    }
}
