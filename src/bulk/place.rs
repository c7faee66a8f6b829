//! Where a job reads and writes: a path, or a standard stream.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// An end of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Standard input or standard output, written `-`.
    Standard,
    /// A file, a FIFO, a device.
    Path(PathBuf),
}

impl From<PathBuf> for Place {
    fn from(path: PathBuf) -> Self {
        if path.as_os_str() == "-" { Place::Standard } else { Place::Path(path) }
    }
}

impl FromStr for Place {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(PathBuf::from(text).into())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Standard => f.write_str("-"),
            Place::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

/// `PATH.suffix`
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}

/// Until a non-blocking descriptor is tried again.
pub(super) const PAUSE: Duration = Duration::from_millis(5);

/// A standard stream as a file: unbuffered, and with nobody else's lock on it.
pub(super) fn standard(stream: impl AsFd) -> io::Result<File> {
    stream.as_fd().try_clone_to_owned().map(|descriptor: OwnedFd| File::from(descriptor))
}

/// What tells a file from every other, whatever its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Identity { device: metadata.dev(), inode: metadata.ino() }
    }

    /// The identity of what holds data: a file or a FIFO. A terminal or `/dev/null` may well be both ends of a job.
    pub(super) fn of_data(metadata: &Metadata) -> Option<Self> {
        let holds_data = metadata.is_file() || metadata.file_type().is_fifo();
        holds_data.then(|| Self::of(metadata))
    }

    /// That of whatever a path leads to now.
    pub(super) fn at(path: &std::path::Path) -> Option<Self> {
        fs::metadata(path).ok().map(|metadata| Self::of(&metadata))
    }
}
