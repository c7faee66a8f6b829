//! What lives on the device or is known to it: buffers, pinned host memory, events, recorded work.
//!
//! A buffer is an address with a length; copying one copies no data. Pinned memory carries two events, one for the last
//! copy that reads it and one for the last that writes it, so that the host waits for exactly what it must.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUevent_flags};
use minisgl_core::backend::Element;

use crate::context::Context;
use crate::error::{CudaError, Named, cause};
use crate::param::Param;
use crate::turns;

/// An address in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Address(pub(crate) u64);

impl Address {
    /// No memory: for a pointer parameter that a kernel does not use.
    pub const NULL: Address = Address(0);

    /// What the driver and its libraries call it.
    pub fn number(self) -> u64 {
        self.0
    }

    /// `bytes` further on.
    pub fn offset(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

impl Param for Address {
    fn raw(&self) -> (*const c_void, usize) {
        self.0.raw()
    }
}

/// A range of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    address: Address,
    element: Element,
    elements: usize,
}

/// Bytes of an element: bf16 activations, f16 logits, 32-bit words and floats.
pub fn element_bytes(element: Element) -> usize {
    match element {
        Element::Activation | Element::Logit => 2,
        Element::Kv | Element::Word | Element::Float => 4,
    }
}

impl Buffer {
    pub(crate) fn new(address: Address, element: Element, elements: usize) -> Buffer {
        Buffer { address, element, elements }
    }

    /// Where it begins.
    pub fn address(&self) -> Address {
        self.address
    }

    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        self.elements * element_bytes(self.element)
    }

    /// The elements in `range`.
    ///
    /// # Panics
    /// If the range reaches beyond the buffer.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Buffer {
        assert!(
            range.start <= range.end && range.end <= self.elements,
            "{range:?} of a buffer of {} elements",
            self.elements
        );
        let address = self.address.offset(range.start * element_bytes(self.element));
        Buffer { address, element: self.element, elements: range.len() }
    }
}

impl Param for Buffer {
    fn raw(&self) -> (*const c_void, usize) {
        self.address.raw()
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    pub(crate) handle: sys::CUevent,
    context: Arc<Context>,
}

impl Event {
    /// An event that tells the time.
    pub(crate) fn timed(context: &Arc<Context>) -> Result<Event, CudaError> {
        Event::new(context, CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// An event that only orders, and costs the device less.
    pub(crate) fn untimed(context: &Arc<Context>) -> Result<Event, CudaError> {
        Event::new(context, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn new(context: &Arc<Context>, flags: CUevent_flags) -> Result<Event, CudaError> {
        let handle = result::event::create(flags).named("making an event")?;
        Ok(Event { handle, context: context.clone() })
    }

    /// Waits on the host. An event that was never recorded has nothing to wait for.
    pub(crate) fn synchronize(&self) -> Result<(), DriverError> {
        // SAFETY: the event lives as long as `self`.
        unsafe { result::event::synchronize(self.handle) }
    }

    /// Has the device come by, or failed?
    pub(crate) fn has_passed(&self) -> bool {
        // SAFETY: the event lives as long as `self`.
        let passed = unsafe { result::event::query(self.handle) };
        passed != Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY))
    }

    pub(crate) fn record(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(self.handle, stream) }
    }

    /// Makes later work of a stream wait. The host does not wait.
    pub(crate) fn hold(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: stream and event are alive.
        unsafe { sys::cuStreamWaitEvent(stream, self.handle, 0).result() }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // Errors have nobody to go to here.
        let _ = self.context.make_current();
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::event::destroy(self.handle) };
    }
}

/// Pinned host memory, cached by the CPU: quick to read.
#[derive(Debug)]
pub struct Pinned {
    pointer: *mut u32,
    words: usize,
    /// Behind the last copy that reads this memory.
    pub(crate) uploaded: Event,
    /// Behind the last copy that writes this memory.
    pub(crate) downloaded: Event,
}

impl Pinned {
    pub(crate) fn new(context: &Arc<Context>, words: usize) -> Result<Pinned, CudaError> {
        let bytes = words.max(1) * 4;
        let turn = turns::synchronize();
        // SAFETY: the memory is freed once, in `drop`.
        let pointer = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|error| CudaError::Pinned { bytes, cause: cause(error) })?
            .cast::<u32>();
        drop(turn);
        // SAFETY: `bytes` writable bytes begin at `pointer`.
        unsafe { pointer.cast::<u8>().write_bytes(0, bytes) };
        let [uploaded, downloaded] = [Event::untimed(context)?, Event::untimed(context)?];
        Ok(Pinned { pointer, words, uploaded, downloaded })
    }

    /// Its words. No copy may be writing them.
    pub(crate) fn words(&self) -> &[u32] {
        // SAFETY: `words` initialised words begin at `pointer`, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.pointer, self.words) }
    }

    /// Its words. No copy may be reading or writing them.
    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: `words` initialised words begin at `pointer`, which lives as long as `self`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.words) }
    }

    pub(crate) fn len(&self) -> usize {
        self.words
    }

    /// Where it begins, for a copy.
    pub(crate) fn start(&self) -> *mut c_void {
        self.pointer.cast()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A copy may still run; errors have nobody to go to.
        let _ = self.uploaded.context.make_current();
        let _ = self.uploaded.synchronize().and(self.downloaded.synchronize());
        let _turn = turns::synchronize();
        // SAFETY: allocated once, freed once.
        let _ = unsafe { result::free_host(self.pointer.cast()) };
    }
}

/// Recorded work, ready to be replayed.
#[derive(Debug)]
pub struct Graph {
    pub(crate) handle: sys::CUgraphExec,
    context: Arc<Context>,
}

impl Graph {
    pub(crate) fn new(context: &Arc<Context>, handle: sys::CUgraphExec) -> Graph {
        Graph { handle, context: context.clone() }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // Errors have nobody to go to here.
        let _ = self.context.make_current();
        // SAFETY: instantiated once, destroyed once.
        let _ = unsafe { result::graph::exec_destroy(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_lies_within_its_buffer() {
        let buffer = Buffer::new(Address(4096), Element::Activation, 8);
        let part = buffer.slice(3..8);
        assert_eq!((part.address(), part.elements(), part.bytes()), (Address(4102), 5, 10));
        let (beyond, backwards) = (3..9, std::ops::Range { start: 4, end: 3 });
        for range in [beyond, backwards] {
            assert!(std::panic::catch_unwind(|| buffer.slice(range)).is_err());
        }
    }
}
