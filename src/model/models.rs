//! The model families that can be run: where a new one is entered.

use minisgl_decoder::Family;
use minisgl_gemma::GEMMA3;
use minisgl_llama::{LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, SEED_OSS, SMOLLM3};
use minisgl_qwen3::{QWEN3, QWEN3_MOE};

/// By `architectures` of `config.json`, each at most once.
pub const FAMILIES: &[&Family] =
    &[&QWEN3, &QWEN3_MOE, &QWEN2, &LLAMA, &MISTRAL, &SMOLLM3, &SEED_OSS, &PHI3, &OLMO2, &GEMMA3];

/// The presets' names.
pub fn preset_names() -> impl Iterator<Item = &'static str> {
    minisgl_decoder::preset_names(FAMILIES)
}

/// The sizes of a preset.
#[cfg(test)]
pub(crate) fn dims_of(preset: &str) -> minisgl_core::spec::Dims {
    minisgl_decoder::Checkpoint::preset(preset, FAMILIES).expect("a preset").config().spec.dims
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_architecture_and_no_preset_is_there_twice() {
        let architectures: HashSet<&str> = FAMILIES.iter().map(|family| family.architecture).collect();
        assert_eq!(architectures.len(), FAMILIES.len());
        let names: HashSet<&str> = preset_names().collect();
        assert_eq!(names.len(), preset_names().count());
    }
}
