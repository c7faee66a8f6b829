//! Where the hub and its cache are, as the variables of huggingface_hub say.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::authorities;
use crate::error::HubError;

/// How to reach the hub, and where to keep what it gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The cache's folder.
    pub cache: PathBuf,
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// Says who asks, for private and gated repositories.
    pub token: Option<String>,
    /// A file of the authorities whose certificates are trusted; `None`: Mozilla's are.
    pub authorities: Option<PathBuf>,
    /// Ask nobody; use what the cache has.
    pub offline: bool,
    /// Waited before the first retry; doubled for each further one.
    pub pause: Duration,
}

impl Settings {
    /// As the environment says:
    ///
    /// | variable | meaning | without it |
    /// |---|---|---|
    /// | `HF_HOME` | folder of all that belongs to the hub | `~/.cache/huggingface` (`$XDG_CACHE_HOME/huggingface`) |
    /// | `HF_HUB_CACHE` | the cache | `$HF_HOME/hub` |
    /// | `HF_ENDPOINT` | the hub's address | `https://huggingface.co` |
    /// | `HF_TOKEN` | the token | the file `$HF_TOKEN_PATH`, else `$HF_HOME/token`, if there is one |
    /// | `SSL_CERT_FILE` | whose certificates are trusted (PEM) | Mozilla's authorities |
    /// | `HF_HUB_OFFLINE` | 1 asks nobody | 0 |
    ///
    /// # Errors
    /// There is no home directory, and no variable that makes it unnecessary.
    pub fn from_env() -> Result<Settings, HubError> {
        Settings::read(|name| env::var_os(name))
    }

    /// As these variables say.
    ///
    /// # Errors
    /// As [`Settings::from_env`].
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Settings, HubError> {
        // An empty variable is one that is not set.
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| set(name).map(|value| value.to_string_lossy().trim().to_owned());
        let user = set("HOME").map(PathBuf::from).or_else(env::home_dir);
        let path = |name: &str| set(name).map(|path| expand(PathBuf::from(path), user.as_deref()));
        let cache_home = || path("XDG_CACHE_HOME").or_else(|| Some(user.as_deref()?.join(".cache")));
        let home = path("HF_HOME").or_else(|| Some(cache_home()?.join("huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let cache = cache.or_else(|| Some(home.as_deref()?.join("hub"))).ok_or(HubError::NoHome)?;
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(home.as_deref()?.join("token")));
        let in_file = || Some(fs::read_to_string(token_file?).ok()?.trim().to_owned());
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(in_file);
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Settings {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.filter(|token| !token.is_empty()),
            authorities: set(authorities::VARIABLE).map(PathBuf::from),
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].iter().any(|name| is_on(text(name))),
            pause: Duration::from_secs(1),
        })
    }
}

fn is_on(value: Option<String>) -> bool {
    value.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
}

/// `~` at the beginning is the user's folder, as Python's expanduser has it.
fn expand(path: PathBuf, user: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), user) {
        (Ok(rest), Some(user)) => user.join(rest),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        let find = |name: &str| variables.iter().find(|it| it.0 == name).map(|it| OsString::from(it.1));
        Settings::read(find).unwrap()
    }

    #[test]
    fn variables_mean_what_they_mean_to_huggingface_hub() {
        let cache = |variables: &[_]| settings(variables).cache.display().to_string();
        assert_eq!(cache(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/hf")]), "/h/hf/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), "/c");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", ""), ("HUGGINGFACE_HUB_CACHE", "/old")]), "/old");

        let plain = settings(&[("HOME", "/nowhere")]);
        assert_eq!(
            (plain.endpoint.as_str(), plain.token, plain.offline),
            ("https://huggingface.co", None, false)
        );
        assert_eq!(plain.authorities, None);
        let trusting = settings(&[("HOME", "/h"), ("SSL_CERT_FILE", "/etc/proxy.pem")]);
        assert_eq!(trusting.authorities, Some(PathBuf::from("/etc/proxy.pem")));
        assert_eq!(settings(&[("HF_ENDPOINT", "http://127.0.0.1:80/")]).endpoint, "http://127.0.0.1:80");
        for (value, on) in [("1", true), ("true", true), ("Yes", true), ("0", false), ("", false)] {
            assert_eq!(settings(&[("HF_HUB_OFFLINE", value)]).offline, on, "{value}");
        }
    }

    #[test]
    fn a_token_comes_from_its_variable_else_from_its_file() {
        let folder = env::temp_dir().join(format!("minisgl-hub-token-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("token"), "hf_file\n").unwrap();
        let home = ("HF_HOME", folder.to_str().unwrap());
        assert_eq!(settings(&[home]).token.as_deref(), Some("hf_file"));
        assert_eq!(settings(&[home, ("HF_TOKEN", " hf_variable ")]).token.as_deref(), Some("hf_variable"));
        assert_eq!(settings(&[home, ("HF_TOKEN_PATH", "/nowhere/token")]).token, None);
        fs::remove_dir_all(folder).unwrap();
    }
}
