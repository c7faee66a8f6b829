//! What memory an engine may take: of the host, and of the device for its KV pages.
//!
//! ```text
//!   GPU   weights ── buffers ── free ──┬── memory_ratio ──> pages (and recorded steps behind them: `core::fit`)
//!                                      └── the rest stays free for the driver and others
//!   CPU   what max_running sequences of full length need, but at most a quarter of the free memory for all engines
//! ```
//!
//! Pages are counted by the engine, when all else is there. Here is what it is told: the most, the least, and the share.

use minisgl_core::backend::{Dims, Memory};
use minisgl_core::config::Limits;
use minisgl_core::fit::Fit;

use crate::error::Error;

/// Sees to it that the host can hold what so many engines of these capacities, each of so many ranks, for a model of these sizes,
/// keep there.
///
/// # Errors
/// It can't.
pub fn check_host(limits: &Limits, dims: &Dims, engines: usize, ranks: u32) -> Result<(), Error> {
    let Limits { running, queued, sequence, .. } = *limits;
    let needed = limits.host_bytes(dims.vocab, dims.hidden, ranks).saturating_mul(engines as u64);
    let free = host_free();
    match needed <= free {
        true => Ok(()),
        false => Err(Error::HostMemory { engines, ranks, running, queued, sequence, needed, free }),
    }
}

/// Bytes that the free memory of ranks may differ by.
const APART_BYTES: u64 = 2 << 30;
/// Likewise, as a part of the most that one has.
const APART: u64 = 10;

/// Sees to it that GPUs of one engine's ranks have about as much memory free: all have as many pages as the one with the least.
///
/// # Errors
/// They have not: something else has part of one.
pub fn check_balance(devices: &[usize], memory: &[Memory]) -> Result<(), Error> {
    let free = || memory.iter().map(|memory| memory.free);
    let (most, least) = (free().max().unwrap_or(0), free().min().unwrap_or(0));
    if most - least <= APART_BYTES.min(most / APART) {
        return Ok(());
    }
    let each = devices.iter().zip(free()).map(|(device, free)| format!("GPU {device}: {} MiB", free >> 20));
    Err(Error::Imbalance { free: each.collect::<Vec<_>>().join(", ") })
}

/// Bytes that this process can still have: what the system has free, within the process's address-space limit.
pub fn host_free() -> u64 {
    let (free, _) = minisgl_cpu::available();
    address_space_left().map_or(free, |left| left.min(free))
}

/// What a limit on the process's addresses (`ulimit -v`) leaves; `None` without one.
fn address_space_left() -> Option<u64> {
    const PAGE: u64 = 4096;
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
    let used = std::fs::read_to_string("/proc/self/statm").ok()?;
    let used: u64 = used.split_whitespace().next()?.parse().ok()?;
    Some(limit.saturating_sub(used * PAGE))
}

/// Share of the free memory that the pages of all engines may take on the CPU, whose memory is everybody's.
const CPU_SHARE: f64 = 0.25;
/// Tokens that the pages hold at least where nobody says how long sequences are.
const TOKENS_LEAST: u32 = 1024;

/// How pages are counted, and how many there are at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PagePlan {
    pub most: u32,
    pub fit: Fit,
}

impl PagePlan {
    /// For a GPU, as many pages as memory holds: what no request has keeps prefixes.
    pub fn on_gpu(limits: &Limits, asked: Sequence, ratio: f64) -> PagePlan {
        PagePlan { most: addressable(limits), fit: Fit { share: ratio, least: least(limits, asked) } }
    }

    /// For one of so many engines on the CPU, as many as running requests can need.
    pub fn on_cpu(limits: &Limits, asked: Sequence, engines: usize) -> PagePlan {
        let need = u64::from(limits.running) * u64::from(limits.table_width());
        let most = need.min(u64::from(addressable(limits))) as u32;
        PagePlan { most, fit: Fit { share: CPU_SHARE / engines as f64, least: least(limits, asked) } }
    }
}

/// The share of the memory left by weights that makes an engine's weights and pages `utilization` of the whole device, the
/// weights being what became of `before` when they were `loaded`.
pub fn share_within(utilization: f64, before: Memory, loaded: Memory) -> f64 {
    let weights = before.free.saturating_sub(loaded.free) as f64;
    let left = utilization * loaded.total as f64 - weights;
    // Nothing left is found, and said with the flags to turn, when pages are counted.
    (left / loaded.free.max(1) as f64).clamp(f64::MIN_POSITIVE, 1.0)
}

/// Who says how long a sequence may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sequence {
    /// Somebody wants sequences of that length to run.
    Asked,
    /// It is what the model's positions reach.
    OfModel,
}

/// Token locations must fit 32 bits; one page is the dummy page.
fn addressable(limits: &Limits) -> u32 {
    u32::MAX / limits.page_size - 1
}

/// Pages of a sequence.
fn least(limits: &Limits, asked: Sequence) -> u32 {
    match asked {
        Sequence::Asked => limits.table_width(),
        Sequence::OfModel => limits.table_width().min(TOKENS_LEAST.div_ceil(limits.page_size)),
    }
}

/// Sees to it that so many pages, which somebody asked for, hold a sequence.
///
/// # Errors
/// They don't.
pub fn check_asked(pages: u32, limits: &Limits, asked: Sequence) -> Result<(), Error> {
    let (least, page_size) = (least(limits, asked), limits.page_size);
    match pages >= least {
        true => Ok(()),
        false => Err(Error::TooFewPages { asked: pages, least, page_size }),
    }
}

/// What the user should hear of pages that are few for what is asked of them.
pub fn warning(limits: &Limits, asked: Sequence) -> Option<String> {
    let Limits { pages, page_size, running, sequence, .. } = *limits;
    let held = u64::from(pages) * u64::from(page_size);
    let say = |what: String, flags: &str| {
        Some(format!("the KV cache holds {held} tokens, fewer than {what}; {flags}"))
    };
    match asked {
        _ if held < u64::from(sequence) => say(
            format!("a sequence may have ({sequence}): longer ones are refused"),
            "raise --num-pages or --memory-ratio, or lower --max-running or --max-prefill-tokens",
        ),
        Sequence::Asked if held < u64::from(running) * u64::from(sequence) => say(
            format!("{running} sequences of {sequence} tokens at once: requests may be preempted"),
            "lower --max-running if they are that long",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::dims_of;

    const LIMITS: Limits = Limits {
        running: 256,
        queued: 1024,
        sequence: 4096,
        prefill_tokens: 8192,
        page_size: 16,
        pages: 1,
        graph_rows: 256,
    };

    #[test]
    fn pages_hold_a_sequence_that_is_asked_for_and_part_of_one_that_the_model_could_have() {
        for (sequence, asked, least) in [
            (4096, Sequence::Asked, 256),
            (4096, Sequence::OfModel, 64),
            (100, Sequence::OfModel, 7),
            (262_144, Sequence::Asked, 16_384),
        ] {
            let limits = Limits { sequence, ..LIMITS };
            assert_eq!(PagePlan::on_gpu(&limits, asked, 0.9).fit, Fit { share: 0.9, least });
            assert_eq!(PagePlan::on_cpu(&limits, asked, 1).fit.least, least);
        }
        assert_eq!(PagePlan::on_cpu(&LIMITS, Sequence::Asked, 1).most, 256 * 256);
        let shares = [1, 4].map(|engines| PagePlan::on_cpu(&LIMITS, Sequence::Asked, engines).fit.share);
        assert_eq!(shares[0], 4.0 * shares[1], "all engines' pages lie in one memory");
        let most = PagePlan::on_gpu(&LIMITS, Sequence::Asked, 0.9).most;
        assert!(Limits { pages: most, ..LIMITS }.check().is_ok());
        assert!(Limits { pages: most + 1, ..LIMITS }.check().is_err());
    }

    #[test]
    fn a_share_of_the_whole_device_is_what_weights_and_pages_make_together() {
        let before = Memory { free: 80, total: 100 };
        let loaded = Memory { free: 50, total: 100 };
        // 30 of weights and 20 of pages are half of 100.
        assert_eq!(share_within(0.5, before, loaded) * 50.0, 20.0);
        assert_eq!(share_within(0.9, before, loaded), 1.0, "what others have is not there to be taken");
        assert!(share_within(0.2, before, loaded) < 1e-9);
    }

    #[test]
    fn the_host_holds_what_all_engines_keep() {
        let dims = dims_of("qwen3-0.6b");
        assert!(check_host(&LIMITS, &dims, 1, 1).is_ok());
        let engines = (host_free() / LIMITS.host_bytes(dims.vocab, dims.hidden, 1)) as usize * 2 + 1;
        let error = check_host(&LIMITS, &dims, engines, 1).unwrap_err().to_string();
        assert!(error.contains("fewer engines") && error.contains(&engines.to_string()), "{error}");
        // What engines of one rank need is too much for as many of eight.
        let engines = (host_free() / LIMITS.host_bytes(dims.vocab, dims.hidden, 1)) as usize / 2;
        assert!(check_host(&LIMITS, &dims, engines, 1).is_ok());
        let error = check_host(&LIMITS, &dims, engines, 8).unwrap_err().to_string();
        assert!(error.contains("8 ranks"), "{error}");
    }

    #[test]
    fn ranks_whose_free_memory_differs_are_listed() {
        let of = |mib: &[u64]| {
            let memory: Vec<_> = mib.iter().map(|free| Memory { free: free << 20, total: 1 << 40 }).collect();
            check_balance(&[0, 2, 5][..mib.len()], &memory)
        };
        assert!(of(&[140_000, 138_000]).is_ok() && of(&[10_000, 9_100]).is_ok() && of(&[0, 0]).is_ok());
        let error = of(&[140_000, 137_900, 139_000]).unwrap_err().to_string();
        assert!(error.contains("GPU 2: 137900 MiB, GPU 5: 139000 MiB"), "{error}");
        assert!(error.contains("--allow-imbalance"), "{error}");
        assert!(of(&[10_000, 8_900]).is_err());
    }

    #[test]
    fn fewer_pages_than_a_sequence_takes_are_refused() {
        let of = |pages, asked| check_asked(pages, &LIMITS, asked);
        assert!(of(256, Sequence::Asked).is_ok() && of(64, Sequence::OfModel).is_ok());
        let error = of(255, Sequence::Asked).unwrap_err().to_string();
        assert!(error.contains("255") && error.contains("--num-pages 256"), "{error}");
        assert!(of(63, Sequence::OfModel).is_err());
    }

    #[test]
    fn few_pages_are_told_of_with_the_flags_to_turn() {
        let of = |pages, asked| warning(&Limits { pages, ..LIMITS }, asked);
        assert!(of(255, Sequence::OfModel).is_some_and(|text| text.contains("--num-pages")));
        assert_eq!(of(256, Sequence::OfModel), None);
        assert!(of(256, Sequence::Asked).is_some_and(|text| text.contains("--max-running")));
        assert_eq!(of(256 * 256, Sequence::Asked), None);
    }
}
