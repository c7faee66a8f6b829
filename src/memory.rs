//! How many KV pages there are: what memory is left when everything else has its share.
//!
//! ```text
//!   GPU   free after the weights ── scratch ── graphs ──┬── memory_ratio ──> pages
//!                                                       └── the rest stays free for the driver and others
//!   CPU   what max_running sequences of full length need, but at most a quarter of the free memory
//! ```
//!
//! Activations and recorded steps are allocated after the pages are counted, so they are estimated here: the model's
//! buffers exactly, 64 MiB for a backend's own scratch, and 2 MiB for each recorded step.

use minisgl_core::backend::{DeviceInfo, Dims, Memory};
use minisgl_core::config::Limits;

use crate::error::Error;

/// A backend's own scratch: split attention, sampling, staging.
const BACKEND_BYTES: u64 = 64 << 20;
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
        let width = 3 * dims.hidden as usize + dims.qkv_width() + dims.q_width() + dims.intermediate as usize;
        let activations = limits.step_tokens() * width * self.device.activation_bytes;
        let logits = limits.running as usize * dims.vocab as usize * self.device.logit_bytes;
        let rope = limits.sequence as usize * dims.head_dim as usize * size_of::<f32>();
        let graphs = recorded_sizes(limits.graph_rows.min(limits.running));
        (activations + logits + rope) as u64 + BACKEND_BYTES + graphs * GRAPH_BYTES
    }
}

/// How many decode steps are recorded for up to `rows` rows: of 1, 2, 4, 8, 16 and then every 8.
fn recorded_sizes(rows: u32) -> u64 {
    let small = [1, 2, 4].into_iter().filter(|size| *size <= rows).count() as u64;
    small + u64::from(rows / 8)
}
