//! The word by which ranks' kernels and hosts know that exchanges have ended.

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{result, sys};

use crate::error::{CudaError, cause};
use crate::memory::Address;
use crate::turns;

/// The word's value once there is to be no further exchange; where a rank did not come, its number and one more come on top.
pub(crate) const ENDED: u32 = 1;

/// A word of the host's memory that all devices may read and write.
pub(super) struct HostWord(NonNull<AtomicU32>);

// SAFETY: the word is reached by atomic operations alone.
unsafe impl Send for HostWord {}
// SAFETY: atomic operations order what several threads do.
unsafe impl Sync for HostWord {}

impl HostWord {
    /// Zero. A context is current.
    pub(super) fn new() -> Result<HostWord, CudaError> {
        const BYTES: usize = size_of::<AtomicU32>();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let pinned = |error| CudaError::Pinned { bytes: BYTES, cause: cause(error) };
        let _turn = turns::synchronize();
        // SAFETY: the memory is freed once, in `drop`.
        let pointer = unsafe { result::malloc_host(BYTES, flags) }.map_err(pinned)?.cast::<AtomicU32>();
        let pointer = NonNull::new(pointer).ok_or(CudaError::NotAllocated)?;
        // SAFETY: as many writable bytes begin there, aligned to a page.
        unsafe { pointer.write(AtomicU32::new(0)) };
        Ok(HostWord(pointer))
    }

    /// Where kernels find it.
    pub(super) fn address(&self) -> Address {
        Address(self.0.as_ptr() as u64)
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: written in `new`, and alive as long as `self`.
        unsafe { self.0.as_ref() }
    }

    pub(super) fn load(&self) -> u32 {
        self.word().load(Ordering::Acquire)
    }

    pub(super) fn store(&self, value: u32) {
        self.word().store(value, Ordering::Release);
    }

    /// Ends what has not ended: who ended it first is kept.
    pub(super) fn end(&self) {
        let _ = self.word().compare_exchange(0, ENDED, Ordering::AcqRel, Ordering::Acquire);
    }
}

impl fmt::Debug for HostWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostWord").field(&self.load()).finish()
    }
}

impl Drop for HostWord {
    fn drop(&mut self) {
        let _turn = turns::synchronize();
        // SAFETY: allocated once, freed once; no kernel is left that could read it. An error has nobody to go to.
        let _ = unsafe { result::free_host(self.0.as_ptr().cast()) };
    }
}
