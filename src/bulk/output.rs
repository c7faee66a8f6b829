//! The result lines, as they are written: whole ones, whatever happens.
//!
//! ```text
//!   plain       a line is one write                                    │line│line│line│
//!   gz, zst     a chunk of lines is a member, is one write             │ lines │ lines │ lines │
//!   a failed write is cut back to where it began; what a kill cuts off is cut back by the next --resume
//! ```
//!
//! A regular file is locked while it is written, so that there is one writer. What goes to anything else (a pipe, a FIFO, a
//! terminal) is written without a look back.
//!
//! Invariant: a regular file consists of whole lines, and of whole members, whenever the process ends, but for at most one
//! write that was cut off at its end.

use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::compression::Compression;
use super::earlier::{Earlier, ResultLines, Unreadable};
use super::error::BulkError;
use super::place::{Identity, PAUSE, Place, beside, standard};

/// A member of a compressed output ends with this much text …
const CHUNK_BYTES: usize = 1 << 20;
/// … or when its first line is this old: so much of what has ended a kill can lose.
pub(super) const CHUNK_AGE: Duration = Duration::from_secs(1);

/// An output.
pub(super) struct Output {
    file: File,
    compression: Compression,
    /// Whole lines of a member to come.
    chunk: Vec<u8>,
    chunk_since: Instant,
    /// Nothing was written to it.
    is_empty: bool,
    /// What is known of a regular file; `None` for all others.
    regular: Option<Regular>,
}

struct Regular {
    /// Not a link to it.
    path: PathBuf,
    /// Where what is whole ends.
    end: u64,
    /// Files that had this name before: they stay locked, for whoever opened them meanwhile.
    replaced: Vec<File>,
}

impl Output {
    /// Opens what is there, or makes a file, and locks it. Nothing is changed in it. It must not be what has the `input`'s
    /// identity. Opening a FIFO waits for its reader.
    pub(super) fn open(place: &Place, input: Option<Identity>) -> Result<Self, BulkError> {
        let failed = |cause| BulkError::Output { place: place.clone(), cause };
        let differs = |metadata: &Metadata| match input.is_some() && Identity::of_data(metadata) == input {
            true => Err(BulkError::SameFile(place.clone())),
            false => Ok(()),
        };
        let path = match place {
            Place::Path(path) if !is_stdout(path) => path,
            _ => {
                let file = standard(io::stdout()).map_err(failed)?;
                differs(&file.metadata().map_err(failed)?)?;
                return Ok(Output::stream(file, Compression::None));
            }
        };
        let compression = Compression::of(path);
        if let Ok(metadata) = fs::metadata(path)
            && !metadata.is_file()
            && !metadata.is_dir()
        {
            differs(&metadata)?;
            let file = File::options().write(true).open(path).map_err(failed)?;
            return Ok(Output::stream(file, compression));
        }
        let file = open_locked(path).map_err(failed)?.ok_or_else(|| BulkError::Locked(path.clone()))?;
        differs(&file.metadata().map_err(failed)?)?;
        let path = path.canonicalize().map_err(failed)?;
        let regular = Some(Regular { path, end: 0, replaced: Vec::new() });
        Ok(Output { regular, ..Output::stream(file, compression) })
    }

    fn stream(file: File, compression: Compression) -> Self {
        Output {
            file,
            compression,
            chunk: Vec::new(),
            chunk_since: Instant::now(),
            is_empty: true,
            regular: None,
        }
    }

    /// The path of a regular file, links followed.
    pub(super) fn path(&self) -> Option<&Path> {
        self.regular.as_ref().map(|regular| regular.path.as_path())
    }

    /// Bytes that a regular file has.
    pub(super) fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// What an earlier run left in it.
    pub(super) fn earlier(&self) -> Result<Earlier, Unreadable> {
        Earlier::read(self.reread().map_err(Unreadable::Io)?, self.compression)
    }

    /// A second view of the file, at its beginning.
    fn reread(&self) -> io::Result<File> {
        let mut file = self.file.try_clone()?;
        file.rewind()?;
        Ok(file)
    }

    /// Makes it ready to go on behind what is kept of an earlier run: nothing, or its good results.
    pub(super) fn begin(&mut self, earlier: &Earlier) -> io::Result<()> {
        let Some(regular) = &mut self.regular else { return Ok(()) };
        // Left by a run that was killed while it wrote this.
        remove(&beside(&regular.path, "run.partial"))?;
        if let Some(places) = earlier.places() {
            return self.replace(&places);
        }
        regular.end = earlier.whole_end;
        self.is_empty = regular.end == 0;
        self.cut()
    }

    /// Writes the lines at `places` to a new file, which then takes the old one's name.
    fn replace(&mut self, places: &[u64]) -> io::Result<()> {
        let Some(regular) = self.regular.take() else { return Ok(()) };
        let partial = beside(&regular.path, "run.partial");
        let replaced = self.write_copy(&partial, places).and_then(|mut copy| {
            copy.file.set_permissions(self.file.metadata()?.permissions())?;
            copy.file.sync_all()?;
            fs::rename(&partial, &regular.path)?;
            let end = copy.length()?;
            std::mem::swap(&mut copy.file, &mut self.file);
            Ok((end, copy.file))
        });
        match replaced {
            Ok((end, old)) => {
                self.is_empty = end == 0;
                let mut files = regular.replaced;
                files.push(old);
                self.regular = Some(Regular { path: regular.path, end, replaced: files });
                Ok(())
            }
            Err(error) => {
                // What went wrong is said already; the old file is as it was.
                let _ = fs::remove_file(&partial);
                Err(error)
            }
        }
    }

    fn write_copy(&self, partial: &Path, places: &[u64]) -> io::Result<Output> {
        let file = File::options().read(true).write(true).create_new(true).open(partial)?;
        // Nobody else has it yet.
        lock(&file)?;
        let mut copy = Output::stream(file, self.compression);
        let mut lines = ResultLines::new(self.reread()?, self.compression);
        let (mut line, mut place, mut places) = (Vec::new(), 0, places.iter().peekable());
        while places.peek().is_some() && lines.next(&mut line)? {
            if places.next_if_eq(&&place).is_some() {
                copy.write(&line)?;
            }
            place += 1;
        }
        copy.flush()?;
        Ok(copy)
    }

    /// Takes whole lines. They are in the file when this returns, or, in a compressed one, when [`Self::is_flushed`].
    pub(super) fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.compression == Compression::None {
            return self.put(lines);
        }
        if self.chunk.is_empty() {
            self.chunk_since = Instant::now();
        }
        self.chunk.extend_from_slice(lines);
        self.flush_if_due()
    }

    /// Is it compressed?
    pub(super) fn holds_back(&self) -> bool {
        self.compression != Compression::None
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.chunk.is_empty()
    }

    /// Ends the member at hand if it is large or old enough.
    pub(super) fn flush_if_due(&mut self) -> io::Result<()> {
        let due = self.chunk.len() >= CHUNK_BYTES || self.chunk_since.elapsed() >= CHUNK_AGE;
        if due { self.flush() } else { Ok(()) }
    }

    /// Writes all that was taken.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let member = self.compression.encode(&self.chunk)?;
        self.put(&member)?;
        self.chunk.clear();
        Ok(())
    }

    /// Writes what is left; a regular file is on its disk when this returns. Of no lines an empty member is made, since
    /// nothing at all is no compressed text.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.flush()?;
        if self.holds_back() && self.is_empty {
            self.put(&self.compression.encode(b"")?)?;
        }
        if self.regular.is_some() { self.file.sync_all() } else { Ok(()) }
    }

    /// Lets others have a regular file, though this one may live on.
    pub(super) fn release(&mut self) {
        if let Some(regular) = &mut self.regular {
            regular.replaced.clear();
            // Without locks there is none to give back.
            let _ = self.file.unlock();
        }
    }

    /// One write. One that fails leaves nothing.
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = write_patiently(&mut self.file, bytes) {
            // If this fails too, the next --resume does it.
            let _ = self.cut();
            return Err(error);
        }
        self.is_empty = false;
        if let Some(regular) = &mut self.regular {
            regular.end += bytes.len() as u64;
        }
        Ok(())
    }

    /// Cuts a regular file back to what is whole.
    fn cut(&mut self) -> io::Result<()> {
        let Some(Regular { end, .. }) = self.regular else { return Ok(()) };
        self.file.set_len(end)?;
        self.file.seek(SeekFrom::Start(end)).map(|_| ())
    }
}

/// Files beside an output that a job may write.
pub(super) fn neighbours(output: &Path) -> [PathBuf; 3] {
    ["run.json", "run.json.partial", "run.partial"].map(|suffix| beside(output, suffix))
}

/// Opened by its name, what standard output leads to would be written from its beginning.
fn is_stdout(path: &Path) -> bool {
    ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == Path::new(name))
}

/// Opens a file at `path`, made if need be, that is still there once it is locked. `None`: somebody else has the lock.
fn open_locked(path: &Path) -> io::Result<Option<File>> {
    loop {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        if !lock(&file)? {
            return Ok(None);
        }
        // Whoever had it may have put another in its place.
        if Identity::at(path) == Some(Identity::of(&file.metadata()?)) {
            return Ok(Some(file));
        }
    }
}

/// False if somebody else has the lock. On a file system without locks there is nothing to hold.
fn lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes all, to a descriptor that another process made non-blocking too.
fn write_patiently(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
