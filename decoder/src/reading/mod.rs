//! What a configuration says, read strictly: by its family, field by field.

pub(crate) mod config;
pub(crate) mod family;
pub(crate) mod fields;
pub(crate) mod presets;
pub(crate) mod quantization;
mod read;
