//! What comes of a step: scores, embeddings and tokens are taken in, and requests end.

use crate::batch::{Batch, Embedded};
use crate::request::{Event, FinishReason};
use crate::sampling::{NO_TOKEN, RowLogprobs};
use crate::speculation::Speculation;
use crate::table::{RequestTable, State};

use super::Scheduler;

impl Scheduler {
    /// Takes what has come of a step's scored tokens. The step is completed next, which forgets those that have ended.
    pub fn take_scores(&mut self, batch: &Batch, scores: &[RowLogprobs], sink: &mut impl FnMut(Event<'_>)) {
        let mut scores = scores;
        for tokens in batch.scored().chunk_by(|one, other| one.owner == other.owner) {
            let logprobs;
            (logprobs, scores) = scores.split_at(tokens.len());
            let ticket = tokens[0].owner;
            let Some(entry) = self.table.find(ticket) else { continue };
            if logprobs.iter().any(|row| row.token.is_nan()) {
                self.end(entry, FinishReason::NotNumbers, sink);
            } else {
                sink(Event::PromptLogprobs { ticket, logprobs });
            }
        }
    }

    /// Takes what a completed step gives of a prompt's embedding, all its values. `forget_ended` is due then.
    pub fn take_embedding(&mut self, embedded: Embedded, values: &[f32], sink: &mut impl FnMut(Event<'_>)) {
        let ticket = embedded.owner;
        let Some(entry) = self.table.find(ticket) else { return };
        let reason = match values.iter().all(|value| value.is_finite()) {
            true => FinishReason::Length,
            false => FinishReason::NotNumbers,
        };
        if let (Some(asked), FinishReason::Length) = (self.table.details(entry).params.embed, reason) {
            self.stats.embeddings += 1;
            sink(Event::Embedding { ticket, values: asked.of(values) });
        }
        self.end(entry, reason, sink);
    }

    /// Takes the tokens of a step: of its sampled rows, in order, but for those behind a wrong draft; none where no logits were
    /// wanted. Steps complete in the order they were scheduled.
    pub fn complete(
        &mut self,
        batch: &Batch,
        tokens: &[u32],
        logprobs: &[RowLogprobs],
        sink: &mut impl FnMut(Event<'_>),
    ) {
        let has_drafts = batch.has_drafts();
        // Up to this row, drafts were right.
        let mut is_right = true;
        let owners = batch.owners().iter().zip(tokens).enumerate();
        for (i, (&ticket, &token)) in owners.take(batch.samples() as usize) {
            let draft = if has_drafts { batch.draft(i) } else { None };
            is_right = draft.is_none_or(|draft| is_right && tokens[i - 1] == draft);
            if !is_right {
                continue;
            }
            let Some(entry) = self.table.find(ticket).filter(|entry| self.draws(*entry)) else { continue };
            self.stats.accepted += u64::from(draft.is_some());
            let request = self.table.get(entry);
            // Of a prompt that was to be scored, and nothing drawn.
            if request.known == request.len_max {
                self.end(entry, FinishReason::Length, sink);
                continue;
            }
            if token == NO_TOKEN {
                let reason = match self.leaves_a_token(entry) {
                    true => FinishReason::NotNumbers,
                    false => FinishReason::NoTokenLeft,
                };
                self.end(entry, reason, sink);
                continue;
            }
            self.table.push_token(entry, token);
            if self.settings.speculation != Speculation::Never {
                let predicted = batch.draft(i + 1).unwrap_or(self.table.details(entry).predicted);
                self.table.judge(entry, predicted, token);
            }
            if has_drafts {
                self.table.settle(entry);
            }
            self.stats.output_tokens += 1;
            // Without log-probabilities the rows are left alone: since they were packed they have gone cold.
            let logprobs = logprobs.get(i).filter(|_| batch.rows()[i].logprobs > 0);
            sink(Event::Token { ticket, token, logprobs });
            if let Some(reason) = self.end_of(entry, token) {
                self.end(entry, reason, sink);
            } else if let Some(constraint) = self.table.constraint(entry) {
                constraint.accept(token);
            }
        }
        self.forget_ended();
    }

    /// Is a request's sampled row there for more than its hidden state?
    #[inline]
    fn draws(&self, entry: u32) -> bool {
        self.table.get(entry).is_plain || self.table.details(entry).params.embed.is_none()
    }

    /// Why a request ends with the token that it has just drawn, if it does.
    #[inline]
    fn end_of(&self, entry: u32, token: u32) -> Option<FinishReason> {
        let request = self.table.get(entry);
        if self.eos.contains(&token) && !self.table.details(entry).params.ignore_eos {
            Some(FinishReason::Eos)
        } else if !request.is_plain && self.table.rules(entry).stop().contains(&token) {
            Some(FinishReason::Stop)
        } else {
            (request.known == request.len_max).then_some(FinishReason::Length)
        }
    }

    /// Ends a request; it stays in its queue, or among the running, until [`Scheduler::forget_ended`].
    pub(super) fn end(&mut self, entry: u32, reason: FinishReason, sink: &mut impl FnMut(Event<'_>)) {
        let ticket = self.table.ticket(entry);
        let request = self.table.get(entry);
        let cached_tokens = self.table.details(entry).cached_tokens;
        if request.state == State::Running {
            self.table.stop(entry, &mut self.pool, self.settings.prefix_cache);
            self.ended_running = true;
        } else {
            self.ended_waiting = true;
        }
        self.stats.finished += 1;
        sink(Event::Finished { ticket, reason, cached_tokens, tokens: self.table.output(entry) });
        self.table.vacate(entry);
        self.forget_unshared();
    }

    /// Removes the requests that have ended from their lists, all at once: many may end in one step.
    pub(crate) fn forget_ended(&mut self) {
        let in_state = |table: &RequestTable, entry: &u32, state| table.get(*entry).state == state;
        if core::mem::take(&mut self.ended_running) {
            self.running.retain(|entry| in_state(&self.table, entry, State::Running));
        }
        if core::mem::take(&mut self.ended_waiting) {
            self.retracted.retain(|entry| in_state(&self.table, entry, State::Waiting));
            self.waiting.retain(|entry| in_state(&self.table, &entry, State::Waiting));
        }
    }
}
