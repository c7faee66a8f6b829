//! What a repository is called: `OWNER/NAME`, checked, since folders and addresses are made of it.

use std::fmt;
use std::str::FromStr;

use crate::error::HubError;

/// A model's name on a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoName(String);

impl RepoName {
    /// Its folder in the cache.
    pub(crate) fn folder(&self) -> String {
        format!("models--{}", self.0.replace('/', "--"))
    }
}

impl FromStr for RepoName {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let is_part = |part: &str| {
            let is_inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            let is_edge = |c: char| c.is_ascii_alphanumeric() || c == '_';
            part.chars().all(is_inner) && part.starts_with(is_edge) && !part.ends_with(['.', '-'])
        };
        let parts = text.split_once('/');
        match parts.is_some_and(|(owner, name)| is_part(owner) && is_part(name)) && !text.contains("--") {
            true => Ok(RepoName(text.to_owned())),
            false => Err(HubError::Name(text.to_owned())),
        }
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_an_owner_and_a_name_and_never_leads_out_of_a_folder() {
        for good in ["Qwen/Qwen3-0.6B", "a/b", "meta-llama/Llama-3.2-1B", "_x/y_1.z"] {
            assert_eq!(good.parse::<RepoName>().unwrap().to_string(), good);
        }
        for bad in [
            "", "Qwen", "/", "a/", "/b", "a/b/c", "../b", "a/..", "./b", "~/b", "a b/c", "a/b--c", "a/b?",
            "a\\b/c",
        ] {
            assert!(bad.parse::<RepoName>().is_err(), "{bad}");
        }
        assert_eq!("Qwen/Qwen3-0.6B".parse::<RepoName>().unwrap().folder(), "models--Qwen--Qwen3-0.6B");
    }
}
