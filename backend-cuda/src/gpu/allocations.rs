//! A GPU's memory: what is allocated, and given back with it at the latest.

use std::sync::Arc;

use cudarc::driver::result;
use minisgl_core::backend::{Element, Memory, Purpose, Queue};

use super::Gpu;
use crate::context::Context;
use crate::error::{CudaError, Named, is_out_of_memory};
use crate::memory::{Address, Buffer, Pinned, element_bytes};
use crate::turns;

impl Gpu {
    /// Allocates `bytes` bytes for `purpose`.
    pub(crate) fn allocate(&mut self, purpose: Purpose, bytes: usize) -> Result<Address, CudaError> {
        let _turn = turns::synchronize();
        // SAFETY: the context is current; the memory is freed once, with `self`.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => {
                self.allocations.addresses.push(address);
                Ok(Address(address))
            }
            Err(error) if is_out_of_memory(error) => {
                Err(CudaError::OutOfMemory { purpose, needed: bytes as u64, free: self.memory()?.free })
            }
            Err(error) => Err(self.launcher.failed("allocating GPU memory", error)),
        }
    }

    /// The allocations so far; see [`Gpu::free_after`].
    pub fn mark(&self) -> usize {
        self.allocations.addresses.len()
    }

    /// Frees everything allocated since `mark`, which nothing may use any more.
    pub fn free_after(&mut self, mark: usize) -> Result<(), CudaError> {
        self.synchronize()?;
        let _turn = turns::synchronize();
        for address in self.allocations.addresses.drain(mark..) {
            // SAFETY: allocated once, freed once; the device is idle.
            let freed = unsafe { result::memory_free(address) };
            self.launcher.check("freeing GPU memory", freed)?;
        }
        Ok(())
    }

    /// Its memory, and what of it is free.
    pub fn memory(&self) -> Result<Memory, CudaError> {
        let (free, total) = self.check("reading the free GPU memory", result::mem_get_info())?;
        Ok(Memory { free: free as u64, total: total as u64 })
    }

    /// Allocates elements for `purpose`; of pages of keys and values all are zero.
    pub fn alloc(
        &mut self,
        purpose: Purpose,
        element: Element,
        elements: usize,
    ) -> Result<Buffer, CudaError> {
        let bytes = elements * element_bytes(element);
        let address = self.allocate(purpose, bytes)?;
        if purpose == Purpose::KvCache {
            // Attention reads whole pages and masks what lies beyond a sequence; 0 times garbage may be NaN.
            self.zero(address, bytes)?;
        }
        Ok(Buffer::new(address, element, elements))
    }

    /// Frees what was allocated, which nothing may use any more.
    pub fn free(&mut self, buffer: Buffer) -> Result<(), CudaError> {
        self.synchronize()?;
        let _turn = turns::synchronize();
        let Address(address) = buffer.address();
        let Some(at) = self.allocations.addresses.iter().position(|it| *it == address) else {
            return Err(CudaError::NotAllocated);
        };
        self.allocations.addresses.remove(at);
        // SAFETY: allocated once, freed once; the device is idle.
        self.check("freeing GPU memory", unsafe { result::memory_free(address) })
    }

    /// Pinned memory of so many words.
    pub fn alloc_pinned(&mut self, words: usize) -> Result<Pinned, CudaError> {
        Pinned::new(self.context(), words)
    }

    /// Enqueues zeros for all of a buffer on the compute stream.
    pub fn clear(&self, buffer: Buffer) -> Result<(), CudaError> {
        self.zero(buffer.address(), buffer.bytes())
    }

    /// Enqueues zeros on the compute stream.
    pub(crate) fn zero(&self, address: Address, bytes: usize) -> Result<(), CudaError> {
        let stream = self.launcher.stream(Queue::Compute);
        // SAFETY: callers pass a range of one allocation.
        self.check("zeroing GPU memory", unsafe { result::memset_d8_async(address.0, 0, bytes, stream) })
    }
}

/// Device memory that goes when the device goes.
#[derive(Debug)]
pub(super) struct Allocations {
    context: Arc<Context>,
    addresses: Vec<u64>,
}

impl Allocations {
    pub(super) fn new(context: &Arc<Context>) -> Allocations {
        Allocations { context: context.clone(), addresses: Vec::new() }
    }
}

impl Drop for Allocations {
    fn drop(&mut self) {
        let _turn = turns::synchronize();
        // Errors have nobody to go to here: a failed kernel's is returned by every call, and was reported before.
        let _ = self.context.make_current().and(result::ctx::synchronize().named("waiting for the GPU"));
        for address in self.addresses.drain(..) {
            // SAFETY: allocated once, freed once, after everything that could use it.
            let _ = unsafe { result::memory_free(address) };
        }
    }
}
