//! Models by name: a repository of the Hugging Face hub as a folder in the cache that all its clients share.
//!
//! ```text
//!   CACHE/models--OWNER--NAME/
//!     refs/main ─────────────> the commit that the branch was at when the hub was asked last
//!     snapshots/COMMIT/        what a model is opened from: a link for each file
//!       config.json ─────────> ../../blobs/ETAG
//!     blobs/ETAG               contents, whole
//!           ETAG.incomplete    as much as has come; a download goes on where it ends
//!   CACHE/.locks/models--OWNER--NAME/ETAG.lock    held by the one who writes the blob
//! ```
//!
//! The layout is huggingface_hub's, locks and incomplete files too, so that what Python has fetched is not fetched again,
//! and the other way round. Only files that a model is opened from are fetched.
//!
//! Invariant: a blob appears whole, by a rename; a link appears after its blob, and the weights' links after all others.
//! So a snapshot that has its weights has everything, and a commit that is there whole is never asked for again.

mod authorities;
mod cache;
mod client;
mod error;
mod fetch;
mod files;
mod index;
mod name;
mod settings;

pub use authorities::{Authorities, BadAuthorities};
pub use error::HubError;
pub use fetch::{Event, Hub, Snapshot};
pub use name::RepoName;
pub use settings::Settings;
