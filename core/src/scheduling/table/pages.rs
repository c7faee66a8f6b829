//! A running request's pages: where its keys and values lie, what the prefix tree has of them, and what goes back while it runs.
//!
//! Where every layer has a window, a request's own pages behind it go back; what the prefix tree has of its beginning, a window's
//! worth at most, it holds to its end. Where the device reads its tokens there, for penalties or bad words, all its pages stay.
//!
//! ```text
//!   pages   0 ....... node_depth ....... dropped ............ pages
//!           |<- held ->|<---- the hole ---->|<- its own, seen ->|
//! ```

use super::{GAP, RequestTable};
use crate::pages::PagePool;

impl RequestTable {
    /// A running request's i-th page.
    #[inline]
    pub fn page(&self, entry: u32, i: u32) -> u32 {
        let request = self.get(entry);
        match i == request.last_page_at {
            true => request.last_page,
            false => self.pages[self.page_place(entry, i)],
        }
    }

    /// Sets it.
    pub fn set_page(&mut self, entry: u32, i: u32, page: u32) {
        let place = self.page_place(entry, i);
        self.pages[place] = page;
        let request = self.get_mut(entry);
        (request.last_page, request.last_page_at) = (page, i);
    }

    /// Index of a slot's i-th page in the device's page table.
    #[inline]
    pub fn page_index(&self, slot: u32, i: u32) -> u32 {
        slot * self.width + i
    }

    /// Where the keys and values of a running request's position go.
    #[inline]
    pub fn location(&self, entry: u32, position: u32) -> u32 {
        let i = position >> self.page_size.trailing_zeros();
        self.page(entry, i) * self.page_size + (position & (self.page_size - 1))
    }

    /// Puts the request's full pages of known tokens into the prefix tree.
    ///
    /// Where another request's page already spells the same prefix, a request that goes on (`ending` is false) stops
    /// there: to hold that page beside its own would cost a page more than its sequence needs, and alone it might not
    /// fit any more. One that is ending goes on along the other's path, and its own page is given back.
    pub fn keep_prefix(&mut self, entry: u32, pool: &mut PagePool, ending: bool) {
        let (request, mut details) = (self.get(entry), *self.details(entry));
        let full_pages = request.computed.min(request.known) / self.page_size;
        while details.node_depth < full_pages.min(self.pages_kept()) && details.hole().is_empty() {
            let tokens = self.page_tokens(entry, details.node_depth);
            let page = self.page(entry, details.node_depth);
            details.node = match pool.find(details.node, tokens) {
                Some(_) if !ending => break,
                Some(same) => {
                    pool.hold(same);
                    same
                }
                None => {
                    pool.insert(details.node, page, tokens);
                    page
                }
            };
            details.node_depth += 1;
        }
        *self.details_mut(entry) = details;
    }

    /// Gives back the request's own pages that none of its tokens to come sees. The step that is scheduled next may take them:
    /// steps in flight run before it.
    #[inline]
    pub fn drop_behind_window(&mut self, entry: u32, pool: &mut PagePool) {
        let Some(window) = self.window else { return };
        let request = self.get(entry);
        if request.reads_history {
            return;
        }
        let behind = (request.computed + 1).saturating_sub(window) / self.page_size;
        for i in self.details(entry).hole().end..behind {
            pool.give(self.page(entry, i));
        }
        self.details_mut(entry).dropped = behind;
    }

    /// Pages of a sequence that the prefix tree has at most.
    pub(super) fn pages_kept(&self) -> u32 {
        self.window.map_or(u32::MAX, |window| window.div_ceil(self.page_size))
    }

    fn page_place(&self, entry: u32, i: u32) -> usize {
        let block = self.block(entry, i >> self.block_pages.trailing_zeros()) as usize;
        block * (self.block_pages + GAP) as usize + (i & (self.block_pages - 1)) as usize
    }

    /// Gives a request's own pages back, and lets go of those of the tree.
    pub(super) fn give_pages(&self, entry: u32, pool: &mut PagePool) {
        let (request, details) = (self.get(entry), self.details(entry));
        for i in (0..request.pages).rev().filter(|i| !details.hole().contains(i)) {
            let page = self.page(entry, i);
            if pool.is_private(page) {
                pool.give(page);
            }
        }
        pool.release_path(details.node);
    }
}
