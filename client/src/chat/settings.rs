//! How answers are drawn, and who said so: what is left open is the model's or the service's affair.
//!
//! ```text
//!   the model's makers, or the service ── environment ── flags ── /set      the last one counts
//! ```
//!
//! The environment's names are those of mini-sglang's shell.

use std::fmt;
use std::str::FromStr;

use minisgl::{JsonObject, SamplingParams};

/// Tokens of an answer at most, where nobody says.
const MAX_TOKENS: u32 = 2048;

/// What has been said about drawing tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// How freely tokens are drawn.
    pub temperature: Option<f32>,
    /// Draw among so many, 0 for all.
    pub top_k: Option<u32>,
    /// Draw among those that hold this mass.
    pub top_p: Option<f32>,
    /// Draw among those at least this many times as probable as the most probable.
    pub min_p: Option<f32>,
    /// Tokens of an answer at most.
    pub max_tokens: Option<u32>,
    /// The same seed draws the same answer to the same conversation.
    pub seed: Option<u64>,
}

impl Settings {
    /// Those of the environment, whose variables `get` gives.
    ///
    /// # Errors
    /// A variable whose value can't be.
    pub fn from_env(get: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let mut settings = Settings::default();
        for (variable, name) in [
            ("MINISGL_SHELL_MAX_TOKENS", "max_tokens"),
            ("MINISGL_SHELL_TEMPERATURE", "temperature"),
            ("MINISGL_SHELL_TOP_K", "top_k"),
            ("MINISGL_SHELL_TOP_P", "top_p"),
        ] {
            if let Some(value) = get(variable) {
                settings.set(name, &value).map_err(|error| format!("the variable {variable}: {error}"))?;
            }
        }
        Ok(settings)
    }

    /// These, and where they say nothing `other`.
    pub fn or(self, other: Settings) -> Settings {
        Settings {
            temperature: self.temperature.or(other.temperature),
            top_k: self.top_k.or(other.top_k),
            top_p: self.top_p.or(other.top_p),
            min_p: self.min_p.or(other.min_p),
            max_tokens: self.max_tokens.or(other.max_tokens),
            seed: self.seed.or(other.seed),
        }
    }

    /// Changes one by its name; `default` leaves it open again.
    ///
    /// # Errors
    /// No such name, or a value that can't be; nothing is changed then.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let mut changed = self.clone();
        match name {
            "temperature" => changed.temperature = read(name, value)?,
            // As vLLM and mini-sglang say it, -1 asks for all tokens.
            "top_k" => changed.top_k = read(name, if value == "-1" { "0" } else { value })?,
            "top_p" => changed.top_p = read(name, value)?,
            "min_p" => changed.min_p = read(name, value)?,
            "max_tokens" => changed.max_tokens = read(name, value)?,
            "seed" => changed.seed = read(name, value)?,
            _ => {
                return Err(format!(
                    "{name} can't be set; temperature, top_k, top_p, min_p, max_tokens and seed can"
                ));
            }
        }
        changed.check()?;
        *self = changed;
        Ok(())
    }

    /// Finds values that can't be.
    ///
    /// # Errors
    /// Names the first.
    pub fn check(&self) -> Result<(), String> {
        self.sampling(SamplingParams::default()).check().map_err(|error| error.to_string())
    }

    /// Tokens of an answer at most.
    pub fn max_tokens(&self) -> u32 {
        self.max_tokens.unwrap_or(MAX_TOKENS)
    }

    /// For an engine: where nothing is said, as in `default`.
    pub fn sampling(&self, default: SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            max_tokens: self.max_tokens(),
            seed: self.seed.unwrap_or(default.seed),
            ..default
        }
    }

    /// For a service: the fields of a request, where something is said.
    pub fn fields(&self) -> JsonObject {
        let mut fields = JsonObject::new();
        let mut field = |name: &str, value: Option<serde_json::Value>| {
            if let Some(value) = value {
                fields.insert(name.to_owned(), value);
            }
        };
        field("max_tokens", Some(self.max_tokens().into()));
        field("temperature", self.temperature.map(Into::into));
        field("top_k", self.top_k.map(Into::into));
        field("top_p", self.top_p.map(Into::into));
        field("min_p", self.min_p.map(Into::into));
        field("seed", self.seed.map(Into::into));
        fields
    }
}

/// A value; `None` for `default`.
fn read<T: FromStr>(name: &str, value: &str) -> Result<Option<T>, String> {
    match value {
        "default" => Ok(None),
        value => value.parse().map(Some).map_err(|_| format!("{name} can't be {value}")),
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: Option<String>| value.unwrap_or_else(|| "default".to_owned());
        for (name, value) in [
            ("temperature", self.temperature.map(|value| value.to_string())),
            ("top_k", self.top_k.map(|value| value.to_string())),
            ("top_p", self.top_p.map(|value| value.to_string())),
            ("min_p", self.min_p.map(|value| value.to_string())),
            ("seed", self.seed.map(|value| value.to_string())),
        ] {
            writeln!(f, "{name:<12} {}", shown(value))?;
        }
        write!(f, "max_tokens   {}", self.max_tokens())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Result<Settings, String> {
        let value = |name: &str| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned());
        Settings::from_env(value)
    }

    #[test]
    fn the_environments_names_are_those_of_mini_sglangs_shell() {
        let pairs = [
            ("MINISGL_SHELL_MAX_TOKENS", "77"),
            ("MINISGL_SHELL_TEMPERATURE", "0.25"),
            ("MINISGL_SHELL_TOP_K", "-1"),
            ("MINISGL_SHELL_TOP_P", "0.5"),
        ];
        let sampling =
            env(&pairs).unwrap().sampling(SamplingParams { top_k: 9, ..SamplingParams::default() });
        assert_eq!((sampling.max_tokens, sampling.temperature), (77, 0.25));
        assert_eq!((sampling.top_k, sampling.top_p), (0, 0.5));
        assert_eq!(env(&[]).unwrap().max_tokens(), 2048);
        let error = env(&[("MINISGL_SHELL_TOP_P", "2")]).unwrap_err();
        assert!(error.contains("MINISGL_SHELL_TOP_P") && error.contains("top_p"), "{error}");
        assert!(env(&[("MINISGL_SHELL_TOP_K", "many")]).unwrap_err().contains("top_k can't be many"));
    }

    #[test]
    fn flags_come_before_the_environment_and_what_is_set_later_before_both() {
        let flags = Settings { temperature: Some(0.1), ..Settings::default() };
        let environment = Settings { temperature: Some(0.2), top_k: Some(3), ..Settings::default() };
        let mut settings = flags.or(environment);
        assert_eq!((settings.temperature, settings.top_k), (Some(0.1), Some(3)));
        settings.set("temperature", "0.7").unwrap();
        settings.set("top_k", "default").unwrap();
        assert_eq!((settings.temperature, settings.top_k), (Some(0.7), None));
    }

    #[test]
    fn a_service_is_told_what_was_said_and_nothing_else() {
        let mut settings = Settings::default();
        assert_eq!(serde_json::to_string(&settings.fields()).unwrap(), r#"{"max_tokens":2048}"#);
        settings.set("top_k", "5").unwrap();
        settings.set("seed", "1").unwrap();
        let fields = serde_json::to_string(&settings.fields()).unwrap();
        assert_eq!(fields, r#"{"max_tokens":2048,"top_k":5,"seed":1}"#);
    }

    #[test]
    fn a_value_that_cannot_be_changes_nothing() {
        let mut settings = Settings::default();
        for (name, value, complaint) in [
            ("temperature", "warm", "temperature can't be warm"),
            ("temperature", "-1", "temperature is -1"),
            ("top_p", "0", "top_p is 0"),
            ("max_tokens", "-5", "max_tokens can't be -5"),
            ("tempreature", "1", "tempreature can't be set; temperature,"),
        ] {
            let error = settings.set(name, value).unwrap_err();
            assert!(error.contains(complaint), "{error}");
            assert_eq!(settings, Settings::default());
        }
    }
}
