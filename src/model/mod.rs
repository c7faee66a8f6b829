//! The model that is run: what its name stands for, which family it is of, and what its makers say of drawing and pooling.

#[cfg(feature = "hub")]
pub mod download;
pub mod generation_config;
pub mod models;
pub mod pooling;
pub mod source;
