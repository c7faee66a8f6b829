//! What results depend on beside their lines, kept beside the output so that a later run can tell whether it may go on.
//!
//! ```text
//!   results.jsonl             a result for each line of the input, with the line's number and fingerprint
//!   results.jsonl.run.json    which checkpoint, rounded how, which sampling, which version made them
//! ```
//!
//! A checkpoint is known by its content, not by its path: small files whole, weights by their size and blocks spread over
//! them. The input is known by its lines: each result has its own line's fingerprint.

use std::fs::{self, File};
use std::hash::Hasher;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::job::Job;
use super::place::beside;
use crate::{Options, SamplingParams};

/// The content of `OUTPUT.run.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Settings {
    /// The version that made the results.
    minisgl: String,
    /// As it was asked for.
    model: String,
    /// The fingerprint of a checkpoint's content; a preset has none.
    checkpoint: Option<String>,
    /// Where the requests came from; only for people.
    input: String,
    sampling: Sampling,
    /// Results that don't say are taken for those without these flags: they are of a build that did not note them.
    #[serde(default)]
    rounding: Rounding,
}

/// The flags that round weights, keys and values, or inputs, and so change tokens; see docs/flags.md.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Rounding {
    kv_dtype: Option<String>,
    quantize: Option<String>,
    plain_inputs: bool,
}

impl From<&Options> for Rounding {
    fn from(options: &Options) -> Self {
        Rounding {
            kv_dtype: options.kv_dtype.map(|format| format.to_string()),
            quantize: options.quantize.map(|quantize| quantize.to_string()),
            plain_inputs: options.plain_inputs,
        }
    }
}

/// What lines leave out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Sampling {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    seed: u64,
    max_tokens: u32,
    ignore_eos: bool,
    logprobs: Option<u32>,
}

impl From<&SamplingParams> for Sampling {
    fn from(sampling: &SamplingParams) -> Self {
        // The rest has no flags.
        let SamplingParams {
            temperature, top_k, top_p, min_p, seed, max_tokens, ignore_eos, logprobs, ..
        } = *sampling;
        Sampling { temperature, top_k, top_p, min_p, seed, max_tokens, ignore_eos, logprobs }
    }
}

impl Settings {
    /// Those of a job.
    pub(super) fn of(job: &Job) -> Self {
        Settings {
            minisgl: env!("CARGO_PKG_VERSION").to_owned(),
            model: job.model.clone(),
            checkpoint: job.checkpoint.as_deref().map(|folder| format!("{:016x}", fingerprint(folder))),
            input: job.input.to_string(),
            sampling: Sampling::from(&job.defaults.sampling),
            rounding: job.rounding.clone(),
        }
    }

    /// Reads those of an output; `None` if there are none.
    pub(super) fn read(output: &Path) -> io::Result<Option<Self>> {
        match fs::read(path(output)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Puts them beside an output: the old ones or these are there, whenever the process ends.
    pub(super) fn write(&self, output: &Path) -> io::Result<()> {
        let partial = beside(output, "run.json.partial");
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        let mut file = File::create(&partial)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path(output))
    }

    /// What differs from `earlier` ones, each thing named as its flag.
    pub(super) fn differences(&self, earlier: &Settings) -> Vec<String> {
        let changed = |(now, then): ((&str, String), (&str, String))| {
            (now.1 != then.1).then(|| format!("{} was {}, is {}", now.0, then.1, now.1))
        };
        let model = (self.content() != earlier.content())
            .then(|| format!("--model was {}, is {}", earlier.described(), self.described()));
        model.into_iter().chain(self.rows().into_iter().zip(earlier.rows()).filter_map(changed)).collect()
    }

    /// What a model is known by: a checkpoint may move, a preset has nothing but its name.
    fn content(&self) -> &str {
        self.checkpoint.as_ref().unwrap_or(&self.model)
    }

    fn described(&self) -> String {
        match &self.checkpoint {
            Some(content) => format!("{} (content {content})", self.model),
            None => self.model.clone(),
        }
    }

    fn rows(&self) -> [(&'static str, String); 12] {
        let Sampling { temperature, top_k, top_p, min_p, seed, max_tokens, ignore_eos, logprobs } =
            &self.sampling;
        let Rounding { kv_dtype, quantize, plain_inputs } = &self.rounding;
        let given = |word: &Option<String>, default: &str| word.as_deref().unwrap_or(default).to_owned();
        [
            ("--temperature", temperature.to_string()),
            ("--top-k", top_k.to_string()),
            ("--top-p", top_p.to_string()),
            ("--min-p", min_p.to_string()),
            ("--seed", seed.to_string()),
            ("--max-tokens", max_tokens.to_string()),
            ("--ignore-eos", ignore_eos.to_string()),
            ("logprobs", format!("{logprobs:?}")),
            ("--kv-dtype", given(kv_dtype, "auto")),
            ("--quantize", given(quantize, "not given")),
            ("--plain-inputs", plain_inputs.to_string()),
            ("minisgl's version", self.minisgl.clone()),
        ]
    }
}

/// Where the settings of an output are.
pub(super) fn path(output: &Path) -> PathBuf {
    beside(output, "run.json")
}

/// The files that decide tokens, beside the weights.
const FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
];

/// Of a file of weights so many blocks are looked at, the first and the last among them.
const BLOCKS: u64 = 64;
const BLOCK_BYTES: u64 = 4096;

/// What can't be read is left out: whoever loads the checkpoint says what is wrong with it.
fn fingerprint(checkpoint: &Path) -> u64 {
    let mut hasher = XxHash3_64::new();
    for name in FILES {
        if let Ok(bytes) = fs::read(checkpoint.join(name)) {
            hasher.write(name.as_bytes());
            hasher.write_u64(bytes.len() as u64);
            hasher.write(&bytes);
        }
    }
    let entries = fs::read_dir(checkpoint).into_iter().flatten().flatten();
    let mut weights: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    weights.sort_unstable();
    for path in weights {
        let _ = sample(&path, &mut hasher);
    }
    hasher.finish()
}

fn sample(path: &Path, hasher: &mut impl Hasher) -> io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    hasher.write(path.file_name().unwrap_or_default().as_encoded_bytes());
    hasher.write_u64(length);
    let last = length.saturating_sub(BLOCK_BYTES);
    let mut block = Vec::new();
    for i in 0..BLOCKS {
        let start = (u128::from(last) * u128::from(i) / u128::from(BLOCKS - 1)) as u64;
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        Read::by_ref(&mut file).take(BLOCK_BYTES).read_to_end(&mut block)?;
        hasher.write(&block);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bulk::Existing;
    use crate::lines::Defaults;
    use crate::openai::ModelName;

    fn settings(sampling: &SamplingParams) -> Settings {
        Settings::of(&Job {
            input: PathBuf::from("in.jsonl").into(),
            output: PathBuf::from("out.jsonl").into(),
            existing: Existing::Resume,
            defaults: Defaults { sampling: *sampling, model: ModelName::new("tiny") },
            model: "tiny".to_owned(),
            checkpoint: None,
            rounding: Rounding::default(),
            max_line_bytes: 1000,
            tokens: false,
        })
    }

    #[test]
    fn what_is_written_reads_back_as_the_same() {
        let sampling =
            SamplingParams { temperature: 0.6, top_p: 0.95, seed: u64::MAX, ..SamplingParams::default() };
        let now = settings(&sampling);
        let then: Settings = serde_json::from_slice(&serde_json::to_vec(&now).unwrap()).unwrap();
        assert_eq!(now.differences(&then), Vec::<String>::new());
    }

    #[test]
    fn settings_that_say_nothing_of_rounding_are_those_without_its_flags() {
        let now = settings(&SamplingParams::default());
        let mut then = serde_json::to_value(&now).unwrap();
        assert!(then.as_object_mut().unwrap().remove("rounding").is_some());
        let then: Settings = serde_json::from_value(then).unwrap();
        assert_eq!(now.differences(&then), Vec::<String>::new());
    }

    #[test]
    fn what_differs_is_named_with_both_values() {
        let now = settings(&SamplingParams { temperature: 0.6, ..SamplingParams::default() });
        let then = settings(&SamplingParams { max_tokens: 5, ..SamplingParams::default() });
        let expected = ["--temperature was 0, is 0.6", "--max-tokens was 5, is 128"];
        assert_eq!(now.differences(&then), expected);
    }

    #[test]
    fn a_checkpoint_is_known_by_its_content_wherever_it_is() {
        let folder = std::env::temp_dir().join(format!("minisgl-settings-{}", std::process::id()));
        let [a, b] = ["a", "b"].map(|name| folder.join(name));
        let weights = vec![7; 1 << 20];
        for copy in [&a, &b] {
            fs::create_dir_all(copy).unwrap();
            fs::write(copy.join("config.json"), "{}").unwrap();
            fs::write(copy.join("model.safetensors"), &weights).unwrap();
        }
        let print = fingerprint(&a);
        assert_eq!(print, fingerprint(&b));
        // What is no part of the model may lie beside it.
        fs::write(b.join("results.jsonl.run.json"), "{}").unwrap();
        assert_eq!(print, fingerprint(&b));
        let retrained: Vec<u8> = weights.iter().enumerate().map(|(i, w)| w + (i > 1 << 19) as u8).collect();
        fs::write(b.join("model.safetensors"), retrained).unwrap();
        assert_ne!(print, fingerprint(&b));
        fs::write(a.join("config.json"), "{ }").unwrap();
        assert_ne!(print, fingerprint(&a));
        fs::remove_dir_all(&folder).unwrap();
    }
}
