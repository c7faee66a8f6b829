//! Who is let in: the order of admission, the pages that a new request needs, and what its slot holds from then on.

use crate::batch::Batch;
use crate::pages::{NO_PAGE, PagePool};
use crate::policy::Demand;
use crate::rules::Rules;
use crate::sampling::SamplingParams;

use super::Scheduler;

impl Scheduler {
    /// What could run now.
    pub(super) fn demand(&mut self) -> Demand {
        let unfinished = self.running.last().map(|entry| self.table.get(*entry));
        let rest =
            unfinished.map_or(0, |request| request.prefill_len - request.computed.min(request.prefill_len));
        let has_chunk = u32::from(rest > 0);
        let mut context = unfinished.filter(|_| rest > 0).map(|request| request.computed);
        let (mut prompts, mut tokens, mut pages) = (0, rest, self.pages_above_watermark());
        let places = self.table.vacant_slots().min(self.waiting());
        for i in 0..places {
            let entry = match i.checked_sub(self.retracted.len()) {
                None => self.retracted[i],
                Some(i) => self.waiting.at(i),
            };
            if tokens >= self.limits.prefill_tokens {
                break;
            }
            let cached = self.expect_cached_pages(entry);
            let known = self.table.get(entry).known;
            pages -= i64::from(known.div_ceil(self.limits.page_size) - cached);
            if pages < 0 {
                break;
            }
            pages -= 1;
            prompts += 1;
            let cached_tokens = cached * self.limits.page_size;
            tokens += known - cached_tokens;
            context.get_or_insert(cached_tokens);
        }
        let all_fit = pages >= 0 && self.waiting() as u32 + self.backlog <= self.table.vacant_slots() as u32;
        Demand {
            decode_rows: self.running.len() as u32 - has_chunk,
            prompts: has_chunk + prompts,
            prompt_tokens: tokens,
            context: context.unwrap_or(0),
            prompt_tokens_max: self.limits.prefill_tokens,
            places_are_short: !all_fit,
            has_arrivals: core::mem::take(&mut self.has_arrivals),
        }
    }

    /// Full pages of a waiting request's prefix that the cache has, or had when they were first counted: each step would be
    /// too often.
    fn expect_cached_pages(&mut self, entry: u32) -> u32 {
        if let Some(pages) = self.table.details(entry).pages_expected {
            return pages;
        }
        let path = self.cached_prefix(entry, |_, _| ());
        self.table.details_mut(entry).pages_expected = Some(path.1);
        path.1
    }

    /// The request to be admitted next. If it was retracted, its last token has come in by now: the step that was in
    /// flight then has completed since.
    pub(super) fn next_waiting(&self) -> Option<u32> {
        let entry = self.retracted.front().copied().or(self.waiting.next())?;
        let request = self.table.get(entry);
        assert_eq!(request.known, request.planned, "too many steps in flight");
        Some(entry)
    }

    /// Gives a waiting request a slot and the cached pages of its prefix, if the pool can hold the rest and a page for
    /// each running request.
    ///
    /// One that was refused is not looked at again before there are more pages: walking a long prefix in vain would cost
    /// every decode step. With nobody running there are more than ever before, so nobody is refused for good.
    pub(super) fn admit(&mut self, entry: u32, batch: &mut Batch) -> bool {
        let (ticket, available) = (self.table.ticket(entry), self.pages_above_watermark());
        if self.table.vacant_slots() == 0
            || self.refused.is_some_and(|it| it.0 == ticket && available <= it.1)
            || self.rule_words(entry).count() > batch.room_for_rules()
            || !self.can_draw(entry)
            || !self.table.make_room(entry, self.oldest().unwrap_or(entry))
        {
            return false;
        }
        let (node, depth) = self.hold_cached_prefix(entry);
        let pages = self.table.get(entry).known.div_ceil(self.limits.page_size);
        let fits = i64::from(pages - depth) <= self.pages_above_watermark();
        if !fits || pages as usize > batch.room_for_updates() {
            self.pool.release_path(node);
            if !fits {
                self.refused = Some((ticket, available));
            }
            return false;
        }
        self.stats.cached_tokens += self.table.start(entry, node, depth);
        self.forget_unshared();
        self.push_slot(entry, batch);
        let mut page = node;
        for i in (0..depth).rev() {
            self.set_page(entry, i, page, batch);
            page = self.pool.parent(page);
        }
        if self.retracted.pop_front().is_none() {
            self.waiting.pop(&self.table);
        }
        self.running.push(entry);
        true
    }

    /// Pages that a new request may have: those available, but for the watermark, a page for each running request, so that an
    /// admission is not undone at once.
    pub(super) fn pages_above_watermark(&self) -> i64 {
        i64::from(self.pool.available()) - self.running.len() as i64
    }

    /// Holds the longest cached path that the request's tokens spell. Returns the path's end and length.
    fn hold_cached_prefix(&mut self, entry: u32) -> (u32, u32) {
        self.cached_prefix(entry, PagePool::hold)
    }

    /// The longest cached path that the request's tokens spell, but for those that must be run. Each node of it is passed to
    /// `visit`. Returns the path's end and length.
    fn cached_prefix(&mut self, entry: u32, visit: impl Fn(&mut PagePool, u32)) -> (u32, u32) {
        let (mut node, mut depth) = (NO_PAGE, 0);
        if self.shares_prefixes(entry) {
            let full_pages = self.table.get(entry).cacheable() / self.limits.page_size;
            while depth < full_pages
                && let Some(next) = self.pool.find(node, self.table.page_tokens(entry, depth))
            {
                visit(&mut self.pool, next);
                (node, depth) = (next, depth + 1);
            }
        }
        (node, depth)
    }

    /// Says how the tokens of a request that has just got its slot are drawn.
    fn push_slot(&self, entry: u32, batch: &mut Batch) {
        let (request, rules) = (self.table.get(entry), self.table.rules(entry));
        let params = &self.table.details(entry).params;
        let mut state = params.slot_state(request.prompt_len);
        rules.apply(self.endings(params, rules).count(), &mut state);
        batch.push_slot(request.slot, state, self.rule_words(entry));
        if self.keeps_mask(entry) {
            batch.push_kept_mask(self.table.ticket(entry), request.slot);
        }
    }

    /// The words of its slot's region of rules.
    fn rule_words(&self, entry: u32) -> impl Iterator<Item = u32> {
        let rules = self.table.rules(entry);
        rules.words(self.endings(&self.table.details(entry).params, rules))
    }

    /// The tokens that must not be drawn while the output has fewer than `min_tokens`.
    pub(super) fn endings<'a>(
        &'a self,
        params: &SamplingParams,
        rules: &'a Rules,
    ) -> impl Iterator<Item = u32> + use<'a> {
        let (eos, stop) = match params.min_tokens {
            0 => (&[][..], &[][..]),
            _ if params.ignore_eos => (&[][..], rules.stop()),
            _ => (&self.eos[..], rules.stop()),
        };
        eos.iter().chain(stop).copied()
    }
}
