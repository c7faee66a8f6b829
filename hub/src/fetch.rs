//! Bringing a repository's files into the cache, each once, whatever breaks on the way.
//!
//! ```text
//!   listing ─> needed files ─> metadata of each that the snapshot lacks ─> blob under its lock ─> link
//!                                                                           │   ^
//!                                   a connection that breaks goes on where  └───┘ the incomplete file ends
//! ```

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use ureq::http::StatusCode;

use crate::cache::{self, RepoFolder, in_cache};
use crate::client::{ATTEMPTS, Client, Metadata, text};
use crate::error::HubError;
use crate::files::{self, Needed};
use crate::index::{self, INDEX};
use crate::name::RepoName;
use crate::settings::Settings;

/// Bytes that are taken from the network and written at once.
const PIECE: usize = 1 << 18;

/// A model's files at one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The folder that they are in.
    pub folder: PathBuf,
    /// The commit.
    pub commit: String,
}

/// What happens while a snapshot is fetched.
#[derive(Debug)]
pub enum Event<'a> {
    /// So much is to be fetched.
    Plan {
        /// Files.
        files: usize,
        /// Their bytes, as far as the hub says.
        bytes: u64,
    },
    /// A file's turn has come.
    File {
        /// Its name.
        name: &'a str,
        /// Its bytes, where the hub says so.
        size: Option<u64>,
    },
    /// So many bytes of it are there.
    Bytes(u64),
    /// Another process fetches the file; it is waited for.
    Waiting {
        /// Its name.
        name: &'a str,
    },
    /// A download broke off and is going to go on.
    Broken {
        /// The file.
        name: &'a str,
        /// What the network says.
        reason: &'a str,
    },
    /// The hub can't be asked; what the cache has is used.
    Cached {
        /// Why not.
        reason: &'a HubError,
        /// The commit that is there.
        commit: &'a str,
    },
}

/// A hub and its cache.
pub struct Hub {
    client: Client,
    settings: Settings,
}

/// What the hub lists of a repository.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Hub {
    /// The hub that these settings name. Nobody is asked yet.
    pub fn new(settings: Settings) -> Hub {
        Hub { client: Client::new(&settings), settings }
    }

    /// Sees to it that a model's files are in the cache, and says where. `watch` is told what happens.
    ///
    /// A commit that is there whole is not asked for again; a branch is looked up each time, and is what it was when it
    /// was looked up last where the hub can't be reached.
    ///
    /// # Errors
    /// See [`HubError`]. What has come by then is kept, and the next call goes on.
    pub fn snapshot(
        &self,
        name: &RepoName,
        revision: &str,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<Snapshot, HubError> {
        let unknown = || HubError::NoRevision { name: name.to_string(), revision: revision.to_owned() };
        if !revision.split('/').all(cache::is_plain) {
            return Err(unknown());
        }
        let folder = RepoFolder::new(&self.settings.cache, name);
        let cached = folder.whole_commit(revision);
        let whole = |commit: String| Snapshot { folder: folder.snapshot(&commit), commit };
        if self.settings.offline || cached.as_deref() == Some(revision) {
            let (name, revision, cache) =
                (name.to_string(), revision.to_owned(), self.settings.cache.clone());
            return cached.map(whole).ok_or(HubError::NotCached { name, revision, cache });
        }
        match self.client.listing(name, revision) {
            Ok(listing) => {
                Fetch { hub: self, name, folder: &folder, watch }.run(revision, &listing).map(whole)
            }
            Err(
                reason @ (HubError::Unreachable { .. } | HubError::Busy { .. } | HubError::Authorities(_)),
            ) => {
                let Some(commit) = cached else { return Err(reason) };
                watch(Event::Cached { reason: &reason, commit: &commit });
                Ok(whole(commit))
            }
            Err(error) => Err(error),
        }
    }
}

/// A snapshot being fetched.
struct Fetch<'a> {
    hub: &'a Hub,
    name: &'a RepoName,
    folder: &'a RepoFolder,
    watch: &'a mut dyn FnMut(Event<'_>),
}

impl Fetch<'_> {
    /// Fetches what a listing has; returns its commit.
    fn run(mut self, revision: &str, listing: &[u8]) -> Result<String, HubError> {
        let answer = |reason: String| HubError::Answer { url: self.hub.settings.endpoint.clone(), reason };
        let listing: Listing = serde_json::from_slice(listing)
            .map_err(|error| answer(format!("with a listing of {} that is none: {error}", self.name)))?;
        let commit = listing.sha;
        if !cache::is_plain(&commit) {
            return Err(answer(format!("with the commit `{commit}`")));
        }
        let files: Vec<String> = listing.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let Needed { beside, mut weights } = files::needed(self.name, &files)?;
        self.fetch_all(&commit, &beside)?;
        if beside.iter().any(|file| file == INDEX) {
            weights = self.shards(&commit)?;
        }
        self.fetch_all(&commit, &weights)?;
        self.folder.set_reference(revision, &commit)?;
        Ok(commit)
    }

    /// The shards that the snapshot's index names.
    fn shards(&self, commit: &str) -> Result<Vec<String>, HubError> {
        let path = self.folder.snapshot(commit).join(INDEX);
        let contents = in_cache(&path, fs::read(&path))?;
        let name = self.name.to_string();
        index::shards(&contents).ok_or(HubError::NoFile { name, file: format!("usable {INDEX}") })
    }

    /// Fetches those of the files that the snapshot lacks.
    fn fetch_all(&mut self, commit: &str, files: &[String]) -> Result<(), HubError> {
        let snapshot = self.folder.snapshot(commit);
        let mut missing = Vec::new();
        for file in files.iter().filter(|file| !snapshot.join(file).exists()) {
            missing.push((file, self.hub.client.metadata(self.name, commit, file)?));
        }
        let bytes = missing.iter().filter_map(|(_, metadata)| metadata.size).sum();
        if !missing.is_empty() {
            (self.watch)(Event::Plan { files: missing.len(), bytes });
        }
        for (file, metadata) in missing {
            self.fetch_blob(commit, file, &metadata)?;
            self.folder.link(commit, file, &metadata.etag)?;
        }
        Ok(())
    }

    /// Sees to it that a file's blob is there.
    fn fetch_blob(&mut self, commit: &str, file: &str, metadata: &Metadata) -> Result<(), HubError> {
        let blob = self.folder.blob(&metadata.etag);
        cache::create_parent(&blob)?;
        let _lock = self.folder.lock(&metadata.etag, || (self.watch)(Event::Waiting { name: file }))?;
        (self.watch)(Event::File { name: file, size: metadata.size });
        if !blob.exists() {
            let incomplete = blob.with_file_name(format!("{}.incomplete", metadata.etag));
            self.download(commit, file, metadata.size, &incomplete)?;
            in_cache(&blob, fs::rename(&incomplete, &blob))?;
        }
        Ok(())
    }

    /// Fills the incomplete file up to `size`, in as many connections as it takes.
    fn download(&mut self, commit: &str, name: &str, size: Option<u64>, path: &Path) -> Result<(), HubError> {
        let hub = self.hub;
        let client = &hub.client;
        let url = client.url(self.name, commit, name);
        let mut target = Target::open(path, name, size, &hub.settings.cache)?;
        let mut failures = 0;
        // Of an unknown size, only a connection that ends well says that all has come.
        while size.is_none_or(|size| target.len < size) || target.len == 0 {
            let before = target.len;
            let answer = client.contents(&url, before)?;
            let goes_on = match answer.status() {
                StatusCode::OK => false,
                StatusCode::PARTIAL_CONTENT => {
                    first_byte(&text(answer.headers(), "content-range")) == Some(before)
                }
                StatusCode::RANGE_NOT_SATISFIABLE if before > 0 => {
                    target.cut()?;
                    continue;
                }
                _ => return Err(client.refusal(&url, self.name, commit, &answer)),
            };
            if !goes_on {
                target.cut()?;
            }
            let outcome = target.fill(&mut answer.into_body().into_reader(), self.watch)?;
            let reason = match (outcome, size) {
                (Ok(()), None) => break,
                (Ok(()), Some(size)) if target.len == size => break,
                (_, Some(size)) if target.len > size => {
                    target.cut()?;
                    format!("there are more bytes than the {size} of the file")
                }
                (Ok(()), Some(_)) => "the connection ended early".to_owned(),
                (Err(error), _) => error.to_string(),
            };
            failures = if target.len > before && goes_on { 1 } else { failures + 1 };
            if failures >= ATTEMPTS {
                let (file, at) = (name.to_owned(), target.len);
                return Err(HubError::Broken { file, at, attempts: failures, reason });
            }
            (self.watch)(Event::Broken { name, reason: &reason });
            client.pause(failures, None::<Duration>);
        }
        target.close()
    }
}

/// The first byte of a `Content-Range`: `bytes 100-199/200`.
fn first_byte(range: &Option<String>) -> Option<u64> {
    range.as_deref()?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// The incomplete file, and how much of it is there.
struct Target<'a> {
    file: File,
    path: &'a Path,
    name: &'a str,
    size: Option<u64>,
    cache: &'a Path,
    len: u64,
}

impl<'a> Target<'a> {
    fn open(path: &'a Path, name: &'a str, size: Option<u64>, cache: &'a Path) -> Result<Self, HubError> {
        let file = in_cache(path, File::options().append(true).create(true).open(path))?;
        let len = in_cache(path, file.metadata())?.len();
        let mut target = Target { file, path, name, size, cache, len };
        // What is longer than the whole is something else.
        if size.is_some_and(|size| len > size) {
            target.cut()?;
        }
        Ok(target)
    }

    /// Begins anew.
    fn cut(&mut self) -> Result<(), HubError> {
        match std::mem::take(&mut self.len) {
            0 => Ok(()),
            _ => in_cache(self.path, self.file.set_len(0)),
        }
    }

    /// Appends a body; the inner result is the connection's.
    fn fill(
        &mut self,
        body: &mut dyn Read,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<io::Result<()>, HubError> {
        let mut piece = vec![0; PIECE];
        watch(Event::Bytes(self.len));
        loop {
            let count = match body.read(&mut piece) {
                Ok(0) => return Ok(Ok(())),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Err(error)),
            };
            self.file.write_all(&piece[..count]).map_err(|reason| self.refused(reason))?;
            self.len += count as u64;
            watch(Event::Bytes(self.len));
        }
    }

    fn close(self) -> Result<(), HubError> {
        self.file.sync_all().map_err(|reason| self.refused(reason))
    }

    /// A write that failed.
    fn refused(&self, reason: io::Error) -> HubError {
        match reason.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                HubError::DiskFull {
                    cache: self.cache.to_owned(),
                    file: self.name.to_owned(),
                    missing: self.size.unwrap_or_default().saturating_sub(self.len),
                }
            }
            _ => HubError::Cache { path: self.path.to_owned(), reason },
        }
    }
}
