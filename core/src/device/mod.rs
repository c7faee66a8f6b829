//! What is asked of a device, what lies on it, and a model that runs on one.

pub mod backend;
pub mod batch;
pub mod computes;
pub mod fit;
pub(crate) mod graphs;
pub(crate) mod host;
pub mod local;
pub(crate) mod purpose;
pub(crate) mod resident;
