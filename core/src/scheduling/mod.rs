//! Who is in the next step: requests, their pages, and what decides between them.

pub mod pages;
pub mod policy;
pub mod queue;
pub mod request;
pub mod scheduler;
pub mod speculation;
pub mod stats;
pub(crate) mod table;
