//! Requests with a [constraint](crate::constraint): whose mask is known, whose output is complete; and which row has which mask.

use crate::batch::Batch;
use crate::constraint::ConstraintState;
use crate::request::{Event, FinishReason, Ticket};
use crate::table::RequestTable;

use super::Scheduler;

impl Scheduler {
    /// Ends the requests whose constraint allows nothing more, or can't tell what it allows.
    pub fn end_constrained(&mut self, sink: &mut impl FnMut(Event<'_>)) {
        if self.table.constrained() == 0 {
            return;
        }
        let reason = |table: &RequestTable, entry| match table.constraint(entry)?.state() {
            ConstraintState::Complete => Some(FinishReason::Complete),
            ConstraintState::Failed => Some(FinishReason::ConstraintFailed),
            ConstraintState::Computing | ConstraintState::Ready => None,
        };
        for i in 0..self.candidates() {
            let entry = self.candidate(i);
            if let Some(reason) = reason(&self.table, entry) {
                self.end(entry, reason, sink);
            }
        }
        self.forget_ended();
    }

    /// Waits for a mask for want of which a request had no row in the step scheduled last; false if there is none.
    pub fn wait_for_mask(&mut self) -> bool {
        let constraint = self.unmasked.take().and_then(|entry| self.table.constraint(entry));
        constraint.map(|constraint| constraint.wait()).is_some()
    }

    /// Writes the mask of a request's next token; of one that has ended meanwhile, one that allows everything.
    pub fn write_mask(&self, ticket: Ticket, mask: &mut [u32]) {
        let entry = self.table.find(ticket);
        match entry.and_then(|entry| self.table.constraint(entry)) {
            Some(constraint) => constraint.write_mask(mask),
            None => mask.fill(u32::MAX),
        }
        if let Some(entry) = entry {
            self.table.rules(entry).narrow(mask);
        }
    }

    /// Do a request's rules leave it a token to be drawn next, whatever its logits are? Its constraint has not heard of another one
    /// since it was asked for the mask.
    pub(super) fn leaves_a_token(&mut self, entry: u32) -> bool {
        let mut mask = core::mem::take(&mut self.mask);
        self.write_mask(self.table.ticket(entry), &mut mask);
        let (request, rules) = (self.table.get(entry), self.table.rules(entry));
        let params = &self.table.details(entry).params;
        let is_short = request.known < request.prompt_len.saturating_add(params.min_tokens);
        let endings = self.endings(params, rules).filter(|_| is_short);
        let bad = rules.bad_words().filter_map(|word| {
            let (last, before) = word.split_last()?;
            self.table.output_ends_with(entry, before).then_some(*last)
        });
        for id in endings.chain(bad) {
            mask[id as usize / 32] &= !(1 << (id % 32));
        }
        let is_left = (0..self.settings.vocab).any(|id| mask[id as usize / 32] >> (id % 32) & 1 == 1);
        self.mask = mask;
        is_left
    }

    /// Requests that may have a row in the next step: those running, and who is to be admitted next.
    fn candidates(&self) -> usize {
        self.running.len() + self.retracted.len() + usize::from(self.waiting.next().is_some())
    }

    fn candidate(&self, i: usize) -> u32 {
        let retracted = i.wrapping_sub(self.running.len());
        let entry = self.running.get(i).or(self.retracted.get(retracted)).copied();
        entry.or(self.waiting.next()).unwrap_or_else(|| unreachable!("there are fewer candidates"))
    }

    /// Can the request's next token be drawn in this step? Without a constraint always.
    pub(super) fn can_draw(&mut self, entry: u32) -> bool {
        let Some(constraint) = self.table.constraint(entry) else { return true };
        let request = self.table.get(entry);
        if request.planned > request.known {
            return false;
        }
        let is_ready = constraint.state() == ConstraintState::Ready;
        if !is_ready {
            self.unmasked = Some(entry);
        }
        is_ready
    }

    /// The mask of a row that draws the request's next token.
    #[inline]
    pub(super) fn push_mask(&self, entry: u32, batch: &mut Batch) -> u32 {
        match () {
            () if self.table.get(entry).is_plain => 0,
            () if self.table.is_constrained(entry) => batch.push_mask(self.table.ticket(entry)),
            () if self.keeps_mask(entry) => batch.kept_mask(self.table.get(entry).slot),
            () => 0,
        }
    }

    /// Has the request one mask for all its tokens?
    pub(super) fn keeps_mask(&self, entry: u32) -> bool {
        self.table.rules(entry).narrows() && !self.table.is_constrained(entry)
    }
}
