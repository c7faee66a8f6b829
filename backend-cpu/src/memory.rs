//! The device's memory: segments of 32-bit words, one for each allocation, and buffers, which are ranges of them.
//!
//! Every element of this backend, activation, logit, word or angle, is 32 bits wide, so one kind of segment serves all.
//! A buffer is a handle, free to copy, as an address is on a GPU; an operation turns its handles into slices with
//! [`Memory::borrow`], all at once.
//!
//! Invariant: the slices of one `borrow` are disjoint; handles that overlap are an error.

use minisgl_core::backend::Purpose;

use crate::error::CpuError;

/// A range of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    segment: usize,
    start: usize,
    len: usize,
}

impl Buffer {
    /// The part `range`, in words.
    ///
    /// # Panics
    /// If the range reaches beyond the buffer.
    pub fn slice(self, range: std::ops::Range<usize>) -> Buffer {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of a buffer of {} words",
            self.len
        );
        Buffer { segment: self.segment, start: self.start + range.start, len: range.len() }
    }
}

/// All segments.
#[derive(Default)]
pub struct Memory {
    segments: Vec<Box<[u32]>>,
}

impl Memory {
    /// A new segment of zeros. The operating system provides its pages when they are first written.
    pub fn alloc(&mut self, purpose: Purpose, words: usize) -> Result<Buffer, CpuError> {
        let free = available().0;
        let bytes = (words as u64).saturating_mul(4);
        let error = CpuError::OutOfMemory { purpose, bytes, free };
        if bytes > free {
            return Err(error);
        }
        let Ok(segment) = bytemuck::allocation::try_zeroed_slice_box(words) else { return Err(error) };
        self.segments.push(segment);
        Ok(Buffer { segment: self.segments.len() - 1, start: 0, len: words })
    }

    /// Gives a segment back, by a buffer that is all of it.
    pub fn free(&mut self, buffer: Buffer) {
        self.segments[buffer.segment] = Box::default();
    }

    /// The words of several buffers at once.
    pub fn borrow<const N: usize>(&mut self, buffers: [Buffer; N]) -> Result<[&mut [u32]; N], CpuError> {
        let mut order: [usize; N] = std::array::from_fn(|i| i);
        order.sort_unstable_by_key(|&i| (buffers[i].segment, buffers[i].start, buffers[i].len));

        let mut slices = [const { None }; N];
        let mut segments = self.segments.iter_mut().enumerate();
        let (mut segment, mut rest, mut rest_start) = (None, &mut [][..], 0);
        for i in order {
            let buffer = buffers[i];
            while segment != Some(buffer.segment) {
                let Some((number, words)) = segments.next() else { return Err(CpuError::Overlap) };
                (segment, rest, rest_start) = (Some(number), &mut words[..], 0);
            }
            let Some(gap) = buffer.start.checked_sub(rest_start) else { return Err(CpuError::Overlap) };
            let (slice, tail) = rest[gap..].split_at_mut(buffer.len);
            slices[i] = Some(slice);
            (rest, rest_start) = (tail, buffer.start + buffer.len);
        }
        Ok(slices.map(|slice| slice.unwrap_or_default()))
    }
}

/// Words as the floats that they hold.
pub fn floats(words: &mut [u32]) -> &mut [f32] {
    bytemuck::cast_slice_mut(words)
}

/// Bytes available and installed, by the operating system; where it does not say, a size that most machines have.
pub fn available() -> (u64, u64) {
    const UNKNOWN: u64 = 8 << 30;
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    };
    let total = field("MemTotal:").unwrap_or(UNKNOWN);
    (field("MemAvailable:").unwrap_or(total), total)
}
