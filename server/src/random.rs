//! Random numbers that nobody can foretell: seeds of requests that have none, and names.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Another one each time: the standard library keys its hashers from the system's randomness.
pub fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A name that no other thing has.
pub fn random_id(prefix: &str) -> String {
    format!("{prefix}-{:016x}{:016x}", random(), random())
}
