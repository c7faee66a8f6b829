//! Copies between a GPU's memory and pinned memory of the host's.

use std::ops::Range;

use cudarc::driver::sys;
use minisgl_core::backend::{Element, Queue};

use super::Gpu;
use crate::error::CudaError;
use crate::memory::{Address, Buffer, Pinned};

impl Gpu {
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
}

/// Does a copy stay within the memory that it is from or to?
fn within(operation: &'static str, range: Range<usize>, len: usize) -> Result<(), CudaError> {
    match range.start <= range.end && range.end <= len {
        true => Ok(()),
        false => Err(CudaError::OutOfRange { operation, range, len }),
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
