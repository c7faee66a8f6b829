//! What a device's memory is for, and what a user does where it is too little: the same in every backend's error.

use alloc::borrow::Cow;
use alloc::format;

/// What memory is asked for; an out-of-memory error names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Model weights.
    Weights,
    /// The KV pages.
    KvCache,
    /// Activations, staging and step metadata.
    Scratch,
    /// Recorded decode steps.
    Graphs,
}

/// What advice on memory says of a kind of devices.
#[derive(Clone, Copy, Debug)]
pub struct DeviceWords {
    /// What has room for larger weights, such as `a machine with more memory`.
    pub larger: &'static str,
    /// The flag that gives KV pages a share of its memory, which recorded steps take theirs out of too; none where pages are counted.
    pub share: Option<&'static str>,
}

impl Purpose {
    /// As a sentence names it.
    pub fn noun(self) -> &'static str {
        match self {
            Purpose::Weights => "the weights",
            Purpose::KvCache => "the KV pages",
            Purpose::Scratch => "activations and scratch",
            Purpose::Graphs => "recorded decode steps",
        }
    }

    /// What makes it fit.
    pub fn advice(self, device: DeviceWords) -> Cow<'static, str> {
        let DeviceWords { larger, share } = device;
        match (self, share) {
            (Purpose::Weights, _) => format!("use a smaller model, or {larger}").into(),
            (Purpose::KvCache, Some(flag)) => format!("lower {flag} or --num-pages").into(),
            (Purpose::KvCache, None) => "lower --num-pages".into(),
            (Purpose::Scratch, _) => "lower --max-prefill-tokens or --max-running".into(),
            (Purpose::Graphs, Some(flag)) => {
                format!("lower {flag}, or record fewer steps with --max-graph-batch (0 records none)").into()
            }
            (Purpose::Graphs, None) => "record fewer steps with --max-graph-batch (0 records none)".into(),
        }
    }
}
