//! What a model is, as data: its layers, its weights on their way to a device, its keys and values in pages.

pub mod fp8;
pub mod kv;
pub mod shard;
pub mod spec;
pub mod tensor;
