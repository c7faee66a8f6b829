//! A GPU: its memory, its streams, the kernels that are loaded on it, and its link to other ranks. Operations take it; of
//! models it knows nothing.
//!
//! ```text
//!   host ── pinned ──> [upload stream]   upload ── event ──┐
//!   host ── pinned ──> [compute stream]  upload,      wait ┴ kernels or a graph of them ── event ──┐
//!   host <── pinned ── [copy stream]     download <───────────────────────────────────────── wait ─┘
//! ```
//!
//! Invariant: every driver call's status is looked at, and an error that a kernel caused earlier is reported as the
//! kernel's, not as the call's that happened to notice it.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use minisgl_core::backend::{DeviceInfo, Element, Memory, Purpose, Queue};
use minisgl_core::shard::Rank;

use crate::context::{Context, KernelSet, Properties};
use crate::error::{CudaError, Named, is_out_of_memory};
use crate::info::info_of;
use crate::launch::Launcher;
use crate::link::Link;
use crate::memory::{Address, Buffer, Event, Pinned, element_bytes};
use crate::module::Modules;
use crate::telemetry::Telemetry;
use crate::turns;

/// Which device to open, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The device's number, from 0.
    pub device: usize,
    /// Which kernels to run.
    pub kernels: KernelSet,
}

/// A GPU. Used from the thread that made it.
#[derive(Debug)]
pub struct Gpu {
    allocations: Allocations,
    pub(crate) modules: Modules,
    pub(crate) launcher: Launcher,
    /// To the other ranks, where there are some. Last: what lies above waits for the device before it goes.
    pub(crate) link: Option<Link>,
}

impl Gpu {
    /// Opens a device and loads the kernels for it.
    pub fn new(options: &Options) -> Result<Gpu, CudaError> {
        Gpu::on(&Context::open(options.device, options.kernels)?, None)
    }

    /// The device of one of several ranks that compute each step together. What it is given to load and to reserve is that rank's
    /// part of a model ([`minisgl_core::shard`]).
    pub fn of_rank(link: Link) -> Result<Gpu, CudaError> {
        let context = link.context().clone();
        context.make_current()?;
        Gpu::on(&context, Some(link))
    }

    fn on(context: &Arc<Context>, link: Option<Link>) -> Result<Gpu, CudaError> {
        Ok(Gpu {
            allocations: Allocations::new(context),
            modules: Modules::load(context)?,
            launcher: Launcher::new(context)?,
            link,
        })
    }

    /// Which of the ranks that compute each step together it is.
    pub fn rank(&self) -> Rank {
        self.link.as_ref().map_or(Rank::ALONE, Link::rank)
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.context().properties
    }

    /// Where to ask for the device's clocks and what holds them down; `None` where the driver's management library does
    /// not say.
    pub fn telemetry(&self) -> Option<Telemetry> {
        Telemetry::open(&self.properties().uuid)
    }

    /// The loaded kernels.
    pub fn modules(&self) -> &Modules {
        &self.modules
    }

    /// The device's streams.
    pub fn launcher(&self) -> &Launcher {
        &self.launcher
    }

    /// Streams of their own on the device, for whoever times kernels: nothing orders them beside the device's.
    pub fn another_launcher(&self) -> Result<Launcher, CudaError> {
        Launcher::new(self.context())
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        self.launcher.context()
    }

    /// Waits on the host for an event.
    fn wait_on_host(&self, operation: &'static str, event: &Event) -> Result<(), CudaError> {
        if let Some(link) = self.link.as_ref().filter(|link| link.is_carried()) {
            self.launcher.waiting(|| link.wait_for(|| event.has_passed()))?;
        }
        self.check(operation, self.launcher.waiting(|| event.synchronize()))?;
        self.check_ranks()
    }

    /// Has an exchange with other ranks been given up?
    fn check_ranks(&self) -> Result<(), CudaError> {
        self.link.as_ref().map_or(Ok(()), Link::check)
    }

    /// Makes a driver call that enqueues something.
    pub(crate) fn enqueue(
        &self,
        operation: &'static str,
        call: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<(), CudaError> {
        self.check(operation, self.launcher.in_driver(call))
    }

    fn check<T>(&self, operation: &'static str, result: Result<T, DriverError>) -> Result<T, CudaError> {
        self.launcher.check(operation, result)
    }

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

    /// Enqueues a copy of `bytes` bytes from byte `start` of pinned memory; the caller records the event behind it.
    pub(crate) fn upload_bytes(
        &self,
        queue: Queue,
        from: &Pinned,
        start: usize,
        bytes: usize,
        to: Address,
    ) -> Result<(), CudaError> {
        within("an upload's source", start..start.saturating_add(bytes), from.len() * 4)?;
        let stream = self.launcher.stream(queue);
        let source = from.start().cast::<u8>().wrapping_add(start);
        // SAFETY: the source's range was checked; callers pass a target that holds as many bytes.
        let copy = || unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, source.cast(), bytes, stream).result() };
        self.enqueue("copying to the GPU", copy)
    }

    /// Enqueues a copy of a whole buffer to the start of pinned memory.
    pub(crate) fn download_bytes(
        &self,
        queue: Queue,
        from: Buffer,
        to: &mut Pinned,
    ) -> Result<(), CudaError> {
        within("a download's target", 0..from.bytes(), to.len() * 4)?;
        let stream = self.launcher.stream(queue);
        // SAFETY: both ranges lie within their memory, and the pinned memory waits for the copy before it is read.
        let copy = || unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.start(), from.address().0, from.bytes(), stream).result()
        };
        self.enqueue("copying from the GPU", copy)?;
        self.enqueue("recording an event", || to.downloaded.record(stream))
    }

    /// Enqueues a copy of `rows` runs of `width` bytes each from pinned memory to places `pitch` bytes apart; the
    /// caller records the event behind it.
    pub(crate) fn upload_strided(
        &self,
        from: &Pinned,
        width: usize,
        rows: usize,
        to: Address,
        pitch: usize,
    ) -> Result<(), CudaError> {
        within("an upload's source", 0..width.saturating_mul(rows), from.len() * 4)?;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype_enum::CU_MEMORYTYPE_HOST,
            srcHost: from.start(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: width,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to.0,
            dstArray: std::ptr::null_mut(),
            dstPitch: pitch,
            WidthInBytes: width,
            Height: rows,
        };
        // SAFETY: the source's range was checked; callers pass targets that hold as many bytes.
        let copied = unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.launcher.stream(Queue::Compute)) };
        self.check("copying to the GPU", copied.result())
    }

    /// What it is, as a backend says it.
    pub fn info(&self) -> DeviceInfo {
        info_of(self.properties())
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

    /// Its words, once they have been downloaded.
    pub fn words<'a>(&self, pinned: &'a Pinned) -> Result<&'a [u32], CudaError> {
        self.wait_on_host("waiting for a download", &pinned.downloaded)?;
        Ok(pinned.words())
    }

    /// Its words, once no copy reads or writes them.
    pub fn words_mut<'a>(&self, pinned: &'a mut Pinned) -> Result<&'a mut [u32], CudaError> {
        self.wait_on_host("waiting for an upload", &pinned.uploaded)?;
        self.wait_on_host("waiting for a download", &pinned.downloaded)?;
        Ok(pinned.words_mut())
    }

    /// Enqueues a copy of words to the same place of a buffer.
    pub fn upload(
        &mut self,
        queue: Queue,
        from: &mut Pinned,
        range: Range<usize>,
        to: Buffer,
    ) -> Result<(), CudaError> {
        let words = from.len().min(to.bytes() / 4);
        within("an upload", range.clone(), words)?;
        let target = to.address().offset(range.start * 4);
        self.upload_bytes(queue, from, range.start * 4, range.len() * 4, target)?;
        let stream = self.launcher.stream(queue);
        self.enqueue("recording an event", || from.uploaded.record(stream))
    }

    /// Enqueues the same beside what the compute stream has so far; what comes there from now on waits for it.
    pub fn upload_ahead(
        &mut self,
        from: &mut Pinned,
        range: Range<usize>,
        to: Buffer,
    ) -> Result<(), CudaError> {
        self.upload(Queue::Upload, from, range, to)?;
        let compute = self.launcher.stream(Queue::Compute);
        self.enqueue("waiting for an event", || from.uploaded.hold(compute))
    }

    /// Enqueues a copy of a buffer's first words.
    pub fn download(
        &mut self,
        queue: Queue,
        from: Buffer,
        words: usize,
        to: &mut Pinned,
    ) -> Result<(), CudaError> {
        within("a download", 0..words, to.len().min(from.bytes() / 4))?;
        let from = Buffer::new(from.address(), Element::Word, words);
        self.download_bytes(queue, from, to)
    }

    /// Milliseconds between two events, after waiting for both.
    pub fn elapsed_ms(&self, from: &Event, to: &Event) -> Result<f32, CudaError> {
        self.wait_on_host("waiting for an event", from)?;
        self.wait_on_host("waiting for an event", to)?;
        self.launcher.ms_between(from, to)
    }

    /// Waits on the host for all that is enqueued.
    pub fn synchronize(&mut self) -> Result<(), CudaError> {
        if let Some(link) = self.link.as_ref().filter(|link| link.is_carried()) {
            link.wait_for(|| self.launcher.is_idle())?;
        }
        self.launcher.synchronize()?;
        self.check_ranks()
    }
}

/// Does a copy stay within the memory that it is from or to?
fn within(operation: &'static str, range: Range<usize>, len: usize) -> Result<(), CudaError> {
    match range.start <= range.end && range.end <= len {
        true => Ok(()),
        false => Err(CudaError::OutOfRange { operation, range, len }),
    }
}

/// Device memory that goes when the device goes.
#[derive(Debug)]
struct Allocations {
    context: Arc<Context>,
    addresses: Vec<u64>,
}

impl Allocations {
    fn new(context: &Arc<Context>) -> Allocations {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_stays_within_what_is_there() {
        let reaches = |range| within("an upload", range, 8).is_ok();
        assert!(reaches(0..8) && reaches(8..8));
        assert!(!reaches(0..9) && !reaches(9..9) && !reaches(Range { start: 4, end: 3 }));
    }
}
