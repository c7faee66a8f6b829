//! What a request's output must obey, as the engine sees it: after each token, which tokens may be next.
//!
//! ```text
//!   step N        draws token t of a constrained request                step N + 1            step N + 2
//!   host          | completes N: accept(t) | ……………… the mask is found …… | write_mask ──> upload ──> the row's mask
//!   other rows    run in every step                                       no row of its own
//! ```
//!
//! The next mask depends on the last token, so a request with a constraint has no row while a token of its own is in flight,
//! and none before its mask is known. Who finds masks, and on which threads, is the constraint's affair. Rows without a constraint
//! never wait for it. Where nothing else can run, the engine waits for the mask that it asked for last, and takes nothing in
//! meanwhile: neither other masks, which may be there earlier, nor requests.
//!
//! A mask has a bit for each token of the model's vocabulary: bit `i % 32` of word `i / 32`, set where token i may be next. The
//! sampler takes the logits of all others as minus infinity, before temperature and filters.
//!
//! A request may also name the only tokens that may be drawn ([`Rules::allowing`](crate::rules::Rules::allowing)). They narrow each
//! mask of its constraint; without one, they are a mask that never changes: it goes to the device when the request takes a slot, and
//! its rows, drafts among them, wait for nothing.
//!
//! ```text
//!   masks on the device   0 …………………………………………………………………… slots ………………………………………………………… 2 slots
//!                         | of this step's constrained rows, in order … | of the request that has slot 0, 1, … |
//! ```

use core::fmt::Debug;

/// Words of a mask.
pub fn mask_words(vocab: u32) -> usize {
    vocab.div_ceil(32) as usize
}

/// How far a constraint is with the tokens that it has been told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConstraintState {
    /// The mask is being found.
    Computing,
    /// The mask is known, and allows a token.
    Ready,
    /// The output is complete: nothing may follow.
    Complete,
    /// What may follow can't be found.
    Failed,
}

/// What a request's tokens must obey; see the module. A request has one of its own.
pub trait Constraint: Debug + Send + Sync {
    /// The request's next token is `token`, one that the mask allowed. Returns at once; the next mask may be found elsewhere.
    fn accept(&self, token: u32);

    /// How far it is. Returns at once.
    fn state(&self) -> ConstraintState;

    /// Waits while it is [`ConstraintState::Computing`].
    fn wait(&self);

    /// Writes the mask into as many words as [`mask_words`] says, while it is [`ConstraintState::Ready`].
    fn write_mask(&self, mask: &mut [u32]);
}
