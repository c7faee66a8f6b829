//! A checkpoint's files: its folder, and tensors in it by name, or in memory in their places.

pub(crate) mod checkpoint;
pub(crate) mod folder;
pub(crate) mod safetensors;
pub(crate) mod stored;
pub(crate) mod update;
