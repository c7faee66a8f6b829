//! Wakes an event loop: a pipe with a byte in it while there is something to look at.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

/// See the module.
pub struct Bell {
    reader: PipeReader,
    writer: PipeWriter,
    rung: AtomicBool,
}

impl Bell {
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        Ok(Bell { reader, writer, rung: AtomicBool::new(false) })
    }

    /// Becomes readable when it rings.
    pub fn descriptor(&self) -> i32 {
        self.reader.as_raw_fd()
    }

    /// One byte at most lies in the pipe, so that writing never waits.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // A pipe of our own with room in it takes a byte.
            let _ = (&self.writer).write(&[0]);
        }
    }

    /// Whoever clears it looks behind that: a ring meanwhile may have been for what was there before.
    pub fn clear(&self) {
        if self.rung.load(Ordering::Acquire) {
            let _ = (&self.reader).read(&mut [0]);
            self.rung.store(false, Ordering::Release);
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }
}
