//! A repository's folder in the cache: references, snapshots, blobs and their locks. See the crate's page for the picture.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::HubError;
use crate::files;
use crate::name::RepoName;

/// Paths of one repository.
pub(crate) struct RepoFolder {
    root: PathBuf,
    locks: PathBuf,
}

/// A blob's exclusive right to be written, given back when dropped.
pub(crate) struct BlobLock(#[allow(dead_code, reason = "closing the file unlocks it")] File);

impl RepoFolder {
    pub fn new(cache: &Path, name: &RepoName) -> RepoFolder {
        let folder = name.folder();
        RepoFolder { root: cache.join(&folder), locks: cache.join(".locks").join(folder) }
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The commit that a revision is, if it is there whole: the revision itself, or where it was when asked last.
    pub fn whole_commit(&self, revision: &str) -> Option<String> {
        let referenced = fs::read_to_string(self.root.join("refs").join(revision)).ok();
        let commit = referenced.map_or_else(|| revision.to_owned(), |commit| commit.trim().to_owned());
        (is_plain(&commit) && files::is_whole(&self.snapshot(&commit))).then_some(commit)
    }

    /// Remembers where a branch or tag is now.
    pub fn set_reference(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        // Others may write the same one: each its own file, and the last rename counts.
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let fresh = path.with_file_name(format!(".{}-{number}.{commit}", std::process::id()));
        create_parent(&path)?;
        in_cache(&path, fs::write(&fresh, commit).and_then(|()| fs::rename(&fresh, &path)))
    }

    /// Waits until nobody else writes the blob; `waiting` is called if somebody does.
    pub fn lock(&self, etag: &str, waiting: impl FnOnce()) -> Result<BlobLock, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let file = in_cache(&path, File::options().write(true).create(true).truncate(false).open(&path))?;
        if file.try_lock().is_err() {
            waiting();
            in_cache(&path, file.lock())?;
        }
        Ok(BlobLock(file))
    }

    /// Links a snapshot's file to its blob.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(file);
        create_parent(&path)?;
        let up = "../".repeat(2 + file.matches('/').count());
        match link(Path::new(&format!("{up}blobs/{etag}")), &self.blob(etag), &path) {
            // Another process was quicker, or the link's blob had been removed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.exists() => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                in_cache(&path, fs::remove_file(&path))?;
                self.link(commit, file, etag)
            }
            outcome => in_cache(&path, outcome),
        }
    }
}

/// `relative` is `blob` as seen from `path`'s folder, so that the cache can be moved.
#[cfg(unix)]
fn link(relative: &Path, _: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(relative, path)
}

#[cfg(not(unix))]
fn link(_: &Path, blob: &Path, path: &Path) -> io::Result<()> {
    fs::hard_link(blob, path)
}

/// Can it be a file's name that leads nowhere else?
pub(crate) fn is_plain(name: &str) -> bool {
    let is_harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with('.') && name.chars().all(is_harmless)
}

pub(crate) fn create_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().unwrap_or(path);
    in_cache(parent, fs::create_dir_all(parent))
}

/// An outcome as one of the cache's.
pub(crate) fn in_cache<T>(path: &Path, outcome: io::Result<T>) -> Result<T, HubError> {
    outcome.map_err(|reason| HubError::Cache { path: path.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_write_one_reference_do_not_take_each_others_file() {
        let cache = std::env::temp_dir().join(format!("minisgl-hub-references-{}", std::process::id()));
        let folder = RepoFolder::new(&cache, &"tiny/model".parse().unwrap());
        std::thread::scope(|scope| {
            let write = || (0..200).for_each(|_| folder.set_reference("main", "c0ffee").unwrap());
            (0..8).for_each(|_| _ = scope.spawn(write));
        });
        let left: Vec<_> = fs::read_dir(folder.root.join("refs")).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        fs::remove_dir_all(cache).unwrap();
    }
}
