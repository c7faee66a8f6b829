//! A request's known tokens: those of its blocks, and behind them those of its tail.
//!
//! A prompt is in blocks as a whole, though what is behind its last full tail is in the tail, too.

use core::cmp::Ordering;

use super::{Entry, GAP, RequestTable};

impl RequestTable {
    /// The token at a position; it is known.
    pub fn token(&self, entry: u32, position: u32) -> u32 {
        match position < self.in_blocks(entry) {
            true => self.tokens[self.place(entry, position)],
            false => self.tails.get(entry, position..position + 1)[0],
        }
    }

    /// The tokens of its i-th page; all are known.
    pub fn page_tokens(&self, entry: u32, i: u32) -> &[u32] {
        &self.tokens[self.place(entry, i * self.page_size)..][..self.page_size as usize]
    }

    /// The tokens of a prompt.
    pub fn prompt(&self, entry: u32) -> impl Iterator<Item = u32> {
        self.runs(entry, 0).flatten().copied().take(self.get(entry).prompt_len as usize)
    }

    /// Which of two prompts comes first, token by token. Neither request has drawn any.
    pub fn compare_prompts(&self, one: u32, other: u32) -> Ordering {
        let runs = self.runs(one, 0).zip(self.runs(other, 0));
        let differ = runs.map(|(one, other)| one.cmp(other)).find(|order| order.is_ne());
        differ.unwrap_or_else(|| self.get(one).known.cmp(&self.get(other).known))
    }

    /// Are these the last tokens of what was drawn?
    pub fn output_ends_with(&self, entry: u32, tokens: &[u32]) -> bool {
        let Entry { known, prompt_len, .. } = *self.get(entry);
        let first = known.checked_sub(tokens.len() as u32).filter(|first| *first >= prompt_len);
        first.is_some_and(|first| (first..).zip(tokens).all(|(at, token)| self.token(entry, at) == *token))
    }

    /// The tokens that were drawn.
    pub fn output(&mut self, entry: u32) -> &[u32] {
        let mut output = core::mem::take(&mut self.output);
        let mut len = 0;
        for run in self.runs(entry, self.get(entry).prompt_len) {
            output[len..len + run.len()].copy_from_slice(run);
            len += run.len();
        }
        self.output = output;
        &self.output[..len]
    }

    /// The known tokens from a position on, in runs.
    fn runs(&self, entry: u32, mut position: u32) -> impl Iterator<Item = &[u32]> {
        let (known, in_blocks) = (self.get(entry).known, self.in_blocks(entry));
        core::iter::from_fn(move || {
            let end = match position < in_blocks {
                true => in_blocks.min((position / self.block_tokens + 1) * self.block_tokens),
                false => known,
            };
            let run = (position < end).then(|| match position < in_blocks {
                true => &self.tokens[self.place(entry, position)..][..(end - position) as usize],
                false => self.tails.get(entry, position..end),
            });
            position = end;
            run
        })
    }

    /// The tokens before a position that lie in one piece with the one before it.
    pub(super) fn run_before(&self, entry: u32, end: u32) -> &[u32] {
        let in_blocks = self.in_blocks(entry);
        if end > in_blocks {
            return self.tails.get(entry, in_blocks..end);
        }
        let begin = (end - 1) & !(self.block_tokens - 1);
        &self.tokens[self.place(entry, begin)..][..(end - begin) as usize]
    }

    /// Appends a token that came back from the device; there is room for it since its step was scheduled.
    #[inline]
    pub fn push_token(&mut self, entry: u32, token: u32) {
        let known = &mut self.entries[entry as usize].known;
        let position = *known;
        *known += 1;
        if self.tails.push(entry, position, token) {
            self.move_tail(entry, position + 1);
        }
    }

    /// Writes a full tail, which ends at a position, to the block.
    fn move_tail(&mut self, entry: u32, end: u32) {
        let first = self.place(entry, self.tails.begin(end - 1));
        let tail = self.tails.full(entry);
        self.tokens[first..first + tail.len()].copy_from_slice(tail);
    }

    /// Where a position's token lies.
    #[inline]
    fn place(&self, entry: u32, position: u32) -> usize {
        let block = self.block(entry, position >> self.block_tokens.trailing_zeros()) as usize;
        block * (self.block_tokens + GAP) as usize + (position & (self.block_tokens - 1)) as usize
    }

    /// How many of a request's known tokens its blocks have. The others are in its tail.
    #[inline]
    fn in_blocks(&self, entry: u32) -> u32 {
        let request = self.get(entry);
        request.prompt_len.max(self.tails.begin(request.known))
    }

    /// Writes a prompt to blocks, for which there is room.
    pub(super) fn write_prompt(&mut self, entry: u32, prompt: &[u32]) {
        for tokens in prompt.chunks(self.block_tokens as usize) {
            let Some(block) = self.take_block(entry) else { unreachable!("the caller saw room") };
            let first = block as usize * (self.block_tokens + GAP) as usize;
            self.tokens[first..first + tokens.len()].copy_from_slice(tokens);
        }
        self.tails.set(entry, prompt);
    }
}
