//! The request table: what is known of each request, and the pages of those that run.
//!
//! An entry lasts as long as its request; a slot (a row of the page table, here and on the device) only while the
//! request runs. Three numbers say how far a request is:
//!
//! ```text
//!   tokens    0 ........ prompt_len ........ known ...... planned
//!             |<---- prompt ---->|<- received ->|<- in flight ->|
//!   keys and values   0 ............. computed                     (computed or enqueued, in this order)
//! ```
//!
//! - `known` tokens have been received by the host; `planned` counts those still in flight as well.
//! - `computed` positions have their keys and values in pages, or will have when the steps now enqueued have run.
//!
//! Where every layer has a window, pages behind it go back while the request runs: those of its own, for what the prefix tree
//! has of a sequence's beginning, a window's worth at most, the request holds to its end.
//!
//! ```text
//!   pages   0 ....... node_depth ....... dropped ............ pages
//!           |<- held ->|<---- the hole ---->|<- its own, seen ->|
//! ```

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use crate::config::Limits;
use crate::pages::{NO_PAGE, PagePool};
use crate::request::Ticket;
use crate::sampling::SamplingParams;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The entry has no tenant.
    Vacant,
    /// In the queue, new or retracted.
    Waiting,
    /// Has a slot.
    Running,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub state: State,
    pub generation: u32,
    pub params: SamplingParams,
    pub prompt_len: u32,
    /// Prompt and output tokens at most.
    pub len_max: u32,
    pub known: u32,
    pub planned: u32,
    pub computed: u32,
    /// Tokens to run before the next is sampled, set at admission: all that were known.
    pub prefill_len: u32,
    pub slot: u32,
    /// Pages in the slot's row of the page table.
    pub pages: u32,
    /// Deepest node of the prefix tree that it holds, and how many full pages lead there.
    pub node: u32,
    pub node_depth: u32,
    /// Pages below it that are the request's own have gone back: they lie behind the window.
    pub dropped: u32,
    /// Prompt tokens found in the prefix cache at the first admission.
    pub cached_tokens: u32,
    pub admitted_before: bool,
    /// Full pages of its prefix that the cache held when it was first looked at; `None` before.
    pub pages_expected: Option<u32>,
}

impl Entry {
    const VACANT: Entry = Entry {
        state: State::Vacant,
        generation: 0,
        params: SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            max_tokens: 0,
            ignore_eos: false,
            logprobs: None,
        },
        prompt_len: 0,
        len_max: 0,
        known: 0,
        planned: 0,
        computed: 0,
        prefill_len: 0,
        slot: 0,
        pages: 0,
        node: NO_PAGE,
        node_depth: 0,
        dropped: 0,
        cached_tokens: 0,
        admitted_before: false,
        pages_expected: None,
    };

    /// Is its prompt, or what it resumes from, not wholly enqueued yet?
    pub fn is_prefilling(&self) -> bool {
        self.computed < self.prefill_len
    }

    /// The pages that have gone back.
    pub fn hole(&self) -> Range<u32> {
        self.node_depth..self.dropped.max(self.node_depth)
    }

    /// Can it have a row in a decode step?
    pub fn can_decode(&self) -> bool {
        !self.is_prefilling() && self.planned < self.len_max
    }
}

/// See the module. All arrays have their final size from the start.
pub(crate) struct RequestTable {
    entries: Vec<Entry>,
    /// `[entries, sequence]` token ids.
    tokens: Vec<u32>,
    /// `[slots, table_width]` pages.
    page_table: Vec<u32>,
    vacant: Vec<u32>,
    slots: Vec<u32>,
    sequence: usize,
    width: usize,
    page_size: u32,
    /// Positions that a token sees at most.
    window: Option<u32>,
}

impl RequestTable {
    pub fn new(limits: &Limits, window: Option<u32>) -> Self {
        let entries = limits.running + limits.queued;
        let (sequence, width) = (limits.sequence as usize, limits.table_width() as usize);
        RequestTable {
            entries: vec![Entry::VACANT; entries as usize],
            tokens: vec![0; entries as usize * sequence],
            page_table: vec![0; limits.running as usize * width],
            vacant: (0..entries).rev().collect(),
            slots: (0..limits.running).rev().collect(),
            sequence,
            width,
            page_size: limits.page_size,
            window,
        }
    }

    /// Positions that a token sees at most.
    pub fn window(&self) -> Option<u32> {
        self.window
    }

    pub fn get(&self, entry: u32) -> &Entry {
        &self.entries[entry as usize]
    }

    pub fn get_mut(&mut self, entry: u32) -> &mut Entry {
        &mut self.entries[entry as usize]
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Entry)> {
        self.entries.iter().enumerate().map(|(i, entry)| (i as u32, entry))
    }

    pub fn ticket(&self, entry: u32) -> Ticket {
        Ticket { entry, generation: self.get(entry).generation }
    }

    /// The ticket's entry, if its request has not ended.
    pub fn find(&self, ticket: Ticket) -> Option<u32> {
        let entry = self.entries.get(ticket.entry as usize)?;
        (entry.generation == ticket.generation && entry.state != State::Vacant).then_some(ticket.entry)
    }

    /// Moves a request in; there is a vacant entry, since a queue that is full refuses first.
    pub fn occupy(&mut self, prompt: &[u32], params: SamplingParams, len_max: u32) -> Option<u32> {
        let entry = self.vacant.pop()?;
        self.tokens[entry as usize * self.sequence..][..prompt.len()].copy_from_slice(prompt);
        let len = prompt.len() as u32;
        let generation = self.get(entry).generation;
        *self.get_mut(entry) = Entry {
            state: State::Waiting,
            generation,
            params,
            prompt_len: len,
            len_max,
            known: len,
            planned: len,
            ..Entry::VACANT
        };
        Some(entry)
    }

    /// Moves a request out; its tickets open nothing from here on.
    pub fn vacate(&mut self, entry: u32) {
        let generation = self.get(entry).generation.wrapping_add(1);
        *self.get_mut(entry) = Entry { generation, ..Entry::VACANT };
        self.vacant.push(entry);
    }

    /// Slots that nobody has.
    pub fn vacant_slots(&self) -> usize {
        self.slots.len()
    }

    /// Gives a waiting request a slot (there is one), to run its known tokens; it holds `depth` pages of the path to
    /// `node`. Returns how many prompt tokens the prefix cache saved it, 0 if it ran before.
    pub fn start(&mut self, entry: u32, node: u32, depth: u32) -> u64 {
        let Some(slot) = self.slots.pop() else { unreachable!("the caller saw a slot") };
        let cached_tokens = depth * self.page_size;
        let request = self.get_mut(entry);
        request.state = State::Running;
        request.slot = slot;
        (request.node, request.node_depth, request.pages, request.dropped) = (node, depth, depth, 0);
        (request.computed, request.prefill_len) = (cached_tokens, request.known);
        if core::mem::replace(&mut request.admitted_before, true) {
            return 0;
        }
        request.cached_tokens = cached_tokens;
        u64::from(cached_tokens)
    }

    /// Takes a running request's slot and pages away. What its pages hold stays as a prefix, if that is wanted.
    pub fn stop(&mut self, entry: u32, pool: &mut PagePool, keep_prefix: bool) {
        if keep_prefix {
            self.keep_prefix(entry, pool, true);
        }
        let request = *self.get(entry);
        for i in (0..request.pages).rev().filter(|i| !request.hole().contains(i)) {
            let page = self.page(request.slot, i);
            if pool.is_private(page) {
                pool.give(page);
            }
        }
        pool.release_path(request.node);
        self.slots.push(request.slot);
        let request = self.get_mut(entry);
        request.state = State::Waiting;
        (request.node, request.node_depth, request.pages, request.computed) = (NO_PAGE, 0, 0, 0);
    }

    /// Puts the request's full pages of known tokens into the prefix tree.
    ///
    /// Where another request's page already spells the same prefix, a request that goes on (`ending` is false) stops
    /// there: to hold that page beside its own would cost a page more than its sequence needs, and alone it might not
    /// fit any more. One that is ending goes on along the other's path, and its own page is given back.
    pub fn keep_prefix(&mut self, entry: u32, pool: &mut PagePool, ending: bool) {
        let mut request = *self.get(entry);
        let full_pages = request.computed.min(request.known) / self.page_size;
        let kept = self.window.map_or(u32::MAX, |window| window.div_ceil(self.page_size));
        while request.node_depth < full_pages.min(kept) && request.hole().is_empty() {
            let first = (request.node_depth * self.page_size) as usize;
            let tokens = &self.tokens(entry)[first..first + self.page_size as usize];
            let page = self.page(request.slot, request.node_depth);
            request.node = match pool.find(request.node, tokens) {
                Some(_) if !ending => break,
                Some(same) => {
                    pool.hold(same);
                    same
                }
                None => {
                    pool.insert(request.node, page, tokens);
                    page
                }
            };
            request.node_depth += 1;
        }
        *self.get_mut(entry) = request;
    }

    /// Gives back the request's own pages that none of its tokens to come sees. The step that is scheduled next may take them:
    /// steps in flight run before it.
    pub fn drop_behind_window(&mut self, entry: u32, pool: &mut PagePool) {
        let Some(window) = self.window else { return };
        let request = *self.get(entry);
        let behind = (request.computed + 1).saturating_sub(window) / self.page_size;
        for i in request.hole().end..behind {
            pool.give(self.page(request.slot, i));
        }
        self.get_mut(entry).dropped = behind;
    }

    /// The request's known tokens.
    pub fn tokens(&self, entry: u32) -> &[u32] {
        &self.tokens[entry as usize * self.sequence..][..self.get(entry).known as usize]
    }

    /// Those that were drawn.
    pub fn output(&self, entry: u32) -> &[u32] {
        &self.tokens(entry)[self.get(entry).prompt_len as usize..]
    }

    /// Appends a token that came back from the device.
    pub fn push_token(&mut self, entry: u32, token: u32) {
        let at = entry as usize * self.sequence + self.get(entry).known as usize;
        self.tokens[at] = token;
        self.get_mut(entry).known += 1;
    }

    pub fn page(&self, slot: u32, i: u32) -> u32 {
        self.page_table[self.page_index(slot, i) as usize]
    }

    /// Index of a slot's i-th page in the page table, here and on the device.
    pub fn page_index(&self, slot: u32, i: u32) -> u32 {
        slot * self.width as u32 + i
    }

    pub fn set_page(&mut self, slot: u32, i: u32, page: u32) {
        let index = self.page_index(slot, i) as usize;
        self.page_table[index] = page;
    }

    /// Where the keys and values of a position go.
    pub fn location(&self, slot: u32, position: u32) -> u32 {
        self.page(slot, position / self.page_size) * self.page_size + position % self.page_size
    }
}
