//! By which names a request may call the model that runs.

use std::sync::Arc;

/// A model's names: as `--model` has it, and its last part, so that both `Qwen/Qwen3-0.6B` and `Qwen3-0.6B` are meant
/// by either, and the folder `~/models/Qwen3-0.6B` by its own name.
#[derive(Clone, Debug)]
pub struct ModelName {
    names: Vec<Arc<str>>,
}

impl ModelName {
    /// Of a model as it was asked for: a checkpoint's folder, a preset, or a name.
    pub fn new(model: &str) -> Self {
        let whole = model.trim_end_matches('/');
        let last = whole.rsplit('/').next().unwrap_or(whole);
        let mut names: Vec<Arc<str>> = vec![whole.into()];
        if last != whole {
            names.push(last.into());
        }
        ModelName { names }
    }

    /// As it was asked for.
    pub fn first(&self) -> &Arc<str> {
        &self.names[0]
    }

    /// The name that equals `asked`.
    pub fn find(&self, asked: &str) -> Option<&Arc<str>> {
        let asked = asked.trim_end_matches('/');
        self.names.iter().find(|name| &***name == asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_as_it_was_asked_for_or_by_its_last_part() {
        let name = ModelName::new("Qwen/Qwen3-0.6B/");
        assert_eq!(&**name.first(), "Qwen/Qwen3-0.6B");
        for (asked, found) in [
            ("Qwen/Qwen3-0.6B", true),
            ("Qwen3-0.6B", true),
            ("Qwen3-0.6B/", true),
            ("Qwen", false),
            ("qwen3-0.6b", false),
            ("", false),
        ] {
            assert_eq!(name.find(asked).is_some(), found, "{asked}");
        }
    }
}
