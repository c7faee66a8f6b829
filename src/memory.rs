//! How many KV pages there are: what memory is left when everything else has its share.
//!
//! ```text
//!   GPU   free after the weights ── scratch ── graphs ──┬── memory_ratio ──> pages
//!                                                       └── the rest stays free for the driver and others
//!   CPU   what max_running sequences of full length need, but at most a quarter of the free memory
//! ```
//!
//! Activations and recorded steps are allocated after the pages are counted, so they are estimated here: the model's
//! buffers exactly, 128 MiB for a backend's own scratch, and 2 MiB for each recorded step.

use minisgl_core::backend::{DeviceInfo, Dims, Memory};
use minisgl_core::config::Limits;

use crate::error::Error;

/// Sees to it that the host can hold what an engine of these capacities keeps there.
///
/// # Errors
/// It can't.
pub fn check_host(limits: &Limits) -> Result<(), Error> {
    let Limits { running, queued, sequence, .. } = *limits;
    let (needed, free) = (limits.host_bytes(), host_free());
    match needed <= free {
        true => Ok(()),
        false => Err(Error::HostMemory { running, queued, sequence, needed, free }),
    }
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

/// A backend's own scratch (split attention alone takes up to 64 MiB), and what allocations are rounded up by.
const BACKEND_BYTES: u64 = 128 << 20;
/// A recorded step, in driver memory.
const GRAPH_BYTES: u64 = 2 << 20;

/// What the KV cache is fitted into.
pub struct Room<'a> {
    /// The device.
    pub device: &'a DeviceInfo,
    /// Its memory, the weights being loaded.
    pub memory: Memory,
    /// Sizes of the model.
    pub dims: &'a Dims,
    /// Activations that a token takes in the backend's buffers.
    pub activation_width: usize,
    /// Bytes of a page.
    pub page_bytes: u64,
}

impl Room<'_> {
    /// Pages for a GPU: `ratio` of what is left.
    ///
    /// # Errors
    /// Not a page fits.
    pub fn pages_by_ratio(&self, limits: &Limits, ratio: f64) -> Result<u32, Error> {
        let scratch = self.scratch(limits);
        let bytes = (self.memory.free.saturating_sub(scratch) as f64 * ratio) as u64;
        self.pages_in(bytes, scratch, limits)
    }

    /// Pages for the CPU: enough for every running request, within a quarter of the memory.
    ///
    /// # Errors
    /// Not a page fits.
    pub fn pages_by_need(&self, limits: &Limits) -> Result<u32, Error> {
        let need = u64::from(limits.running) * u64::from(limits.table_width());
        let pages = self.pages_in(self.memory.free / 4, 0, limits)?;
        Ok(need.min(u64::from(pages)) as u32)
    }

    /// One page is the dummy page; token locations must fit 32 bits.
    fn pages_in(&self, bytes: u64, scratch: u64, limits: &Limits) -> Result<u32, Error> {
        let addressable = u64::from(u32::MAX / limits.page_size) - 1;
        match (bytes / self.page_bytes.max(1)).min(addressable + 1) {
            0 | 1 => Err(Error::NoRoomForPages { free: self.memory.free, scratch, page: self.page_bytes }),
            pages => Ok((pages - 1) as u32),
        }
    }

    /// Bytes allocated behind the pages.
    fn scratch(&self, limits: &Limits) -> u64 {
        let dims = self.dims;
        let gathered = limits.running as usize * dims.hidden as usize;
        let activations =
            (limits.step_tokens() * self.activation_width + gathered) * self.device.activation_bytes;
        let logits = limits.running as usize * dims.vocab as usize * self.device.logit_bytes;
        let rope = limits.sequence as usize * dims.head_dim as usize * size_of::<f32>();
        let graphs = recorded_sizes(limits.graph_rows.min(limits.running));
        (activations + logits + rope) as u64 + BACKEND_BYTES + graphs * GRAPH_BYTES
    }
}

/// How many decode steps are recorded for up to `rows` rows: of 1, 2, 4, 8, 16, then every 8, and of `rows` itself.
fn recorded_sizes(rows: u32) -> u64 {
    let small = [1, 2, 4, 8].into_iter().filter(|size| *size < rows).count();
    (small + (16..rows).step_by(8).count()) as u64 + u64::from(rows > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const LIMITS: Limits = Limits {
        running: 256,
        queued: 1024,
        sequence: 4096,
        prefill_tokens: 8192,
        page_size: 16,
        pages: 1,
        graph_rows: 256,
    };
    /// Qwen3-0.6B.
    const DIMS: Dims = Dims {
        layers: 28,
        hidden: 1024,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 3072,
        vocab: 151_936,
        norm_eps: 1e-6,
    };

    fn pages(free: u64, ratio: f64) -> Result<u32, Error> {
        let device = DeviceInfo {
            name: String::new(),
            activation_bytes: 2,
            kv_bytes: 2,
            logit_bytes: 2,
            page_size_min: 16,
        };
        let memory = Memory { free, total: 80 * GIB };
        let page_bytes = 16 * 28 * 2 * 8 * 128 * 2;
        Room { device: &device, memory, dims: &DIMS, activation_width: 8192, page_bytes }
            .pages_by_ratio(&LIMITS, ratio)
    }

    #[test]
    fn pages_take_their_share_and_leave_room_for_what_is_allocated_behind_them() {
        let page_bytes = 16 * 28 * 2 * 8 * 128 * 2;
        let bytes = |ratio| (u64::from(pages(70 * GIB, ratio).unwrap()) + 1) * page_bytes;
        // Activations of 8192 tokens, 256 rows of logits, and 35 recorded steps are less than a GiB.
        assert!((69 * GIB..70 * GIB).contains(&bytes(1.0)));
        assert!((bytes(0.5) as f64 / bytes(1.0) as f64 - 0.5).abs() < 1e-3);
    }

    #[test]
    fn no_room_for_a_page_is_an_error_that_says_what_took_it() {
        let error = pages(GIB / 4, 0.9).unwrap_err().to_string();
        assert!(
            error.contains("268435456 bytes are free") && error.contains("--max-prefill-tokens"),
            "{error}"
        );
    }

    #[test]
    fn the_steps_that_core_records_are_counted() {
        assert_eq!([0, 1, 3, 4, 8, 16, 24, 30, 256].map(recorded_sizes), [0, 1, 3, 3, 4, 5, 6, 7, 35]);
    }
}
