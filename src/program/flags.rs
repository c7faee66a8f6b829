//! The flags that the command lines share, written down once.
//!
//! argh has no way to include one struct's flags in another's, so a macro writes them behind a command's own:
//!
//! ```
//! use argh::FromArgs;
//! use minisgl::SamplingParams;
//!
//! minisgl::with_shared_flags! {
//!     /// does something with a model
//!     struct Flags {
//!         /// where the model is
//!         #[argh(option)]
//!         model: String,
//!     }
//! }
//!
//! # let _ = Flags::source; // As commands use it.
//! let flags = Flags::from_args(&["command"], &["--model", "tiny", "--no-overlap", "--temperature", "0.6"]).unwrap();
//! assert_eq!(flags.model, "tiny");
//! assert!(!flags.engine_options().overlap);
//! assert_eq!(flags.sampling(SamplingParams::default()).temperature, 0.6);
//! ```

use std::io::{Write, stdout};
use std::path::Path;
use std::process::exit;

use argh::TopLevelCommand;

use crate::error::Cause;

/// The process's command line as flags, `--flag=value` like `--flag value`. Where there are none to be had, because help is
/// asked for or a flag is wrong, it says so and ends the process.
pub fn from_command_line<T: TopLevelCommand>() -> T {
    let words: Result<Vec<String>, _> = std::env::args_os().map(|word| word.into_string()).collect();
    let words = words.unwrap_or_else(|word| {
        eprintln!("{} is not UTF-8; flags and file names must be", word.display());
        exit(1)
    });
    let program = words.first().map_or("", String::as_str);
    let program = Path::new(program).file_name().and_then(|name| name.to_str()).unwrap_or(program);
    from_words(program, words.get(1..).unwrap_or_default())
}

/// A flag's number, which must be above 0 where it is given.
///
/// # Errors
/// It is not, or not finite.
pub fn positive(flag: &str, value: Option<f64>) -> Result<Option<f64>, Cause> {
    match value {
        Some(value) if !(value > 0.0 && value.is_finite()) => {
            Err(format!("{flag} is {value}; it must be above 0").into())
        }
        value => Ok(value),
    }
}

/// As [`from_command_line`], of words that stand behind the name `program`.
pub fn from_words<T: TopLevelCommand>(program: &str, words: &[String]) -> T {
    let words = apart(words);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    T::from_args(&[program], &words).unwrap_or_else(|early| match early.status {
        Ok(()) => {
            // Whoever reads it may have seen enough, as `head` has.
            let _ = writeln!(stdout(), "{}", early.output);
            exit(0)
        }
        Err(()) => {
            eprintln!("{}\nRun {program} --help for more information.", early.output);
            exit(1)
        }
    })
}

/// Each `--flag=value` as two words; behind a lone `--` there are no flags.
fn apart(words: &[String]) -> Vec<String> {
    let mut out = Vec::with_capacity(words.len());
    let flags = words.iter().position(|word| word == "--").unwrap_or(words.len());
    for word in &words[..flags] {
        match word.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => out.extend([flag.to_owned(), value.to_owned()]),
            _ => out.push(word.clone()),
        }
    }
    out.extend_from_slice(&words[flags..]);
    out
}

/// Defines a command line: its own flags, then those of the engine and of sampling. It gets the methods
/// `engine_options` and `sampling`, the latter changing the parameters given to it as the flags say.
#[macro_export]
macro_rules! with_shared_flags {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($own:tt)* }) => {
        $(#[$meta])*
        #[derive(::argh::FromArgs)]
        $vis struct $name {
            $($own)*

            /// which revision of a model by name: a branch, a tag or a commit (default main)
            #[argh(option)]
            revision: Option<String>,
            /// where to compute: auto (default: a GPU where there is one), cpu or cuda
            #[argh(option, default = "::std::default::Default::default()")]
            backend: $crate::BackendChoice,
            /// which GPUs, an engine on each, or a rank: numbers and commas; naming one asks for GPUs (default: the first)
            #[argh(option, from_str_fn($crate::parse_devices), default = "::std::default::Default::default()")]
            devices: $crate::Devices,
            /// how many engines take requests out of one queue, each on a GPU of its own, or on several (default: as many as --devices
            /// are enough for)
            #[argh(option)]
            data_parallel: Option<usize>,
            /// how many ranks compute each step together, each on a GPU of its own with a part of the weights: 1 (default), 2, 4 or 8
            #[argh(option, default = "1")]
            tensor_parallel: u32,
            /// let the GPUs of ranks have more and less memory free: all get as many KV pages as the one with the least
            #[argh(switch)]
            allow_imbalance: bool,
            /// which GPU kernels: auto (default), portable or hopper
            #[argh(option, default = "::std::default::Default::default()")]
            kernels: $crate::KernelSet,
            /// requests that run at once: a number, or auto (default: as many as decoding gains from and memory holds)
            #[argh(option, from_str_fn($crate::parse_max_running), default = "::std::default::Default::default()")]
            max_running: $crate::MaxRunning,
            /// tokens of prompts in a step (default 16384 on a GPU, 1024 on the CPU)
            #[argh(option)]
            max_prefill_tokens: Option<u32>,
            /// tokens of a KV page, a power of two (default 16, or the device's least)
            #[argh(option)]
            page_size: Option<u32>,
            /// what keys and values are kept as: auto (default: bf16 on a GPU, f32 on the CPU), bf16 or fp8
            #[argh(option, from_str_fn($crate::parse_kv_dtype), default = "::std::default::Default::default()")]
            kv_dtype: $crate::KvDtype,
            /// pages of the KV cache (default: as many as memory holds)
            #[argh(option)]
            num_pages: Option<u32>,
            /// share of the free memory that KV pages take (default 0.9)
            #[argh(option)]
            memory_ratio: Option<f64>,
            /// tokens of a sequence, prompt and output (default: all that the model takes)
            #[argh(option)]
            max_seq_len: Option<u32>,
            /// rows of the largest recorded decode step (default: as many as run; 0 records none)
            #[argh(option)]
            max_graph_batch: Option<u32>,
            /// wait for each step before the next is scheduled
            #[argh(switch)]
            no_overlap: bool,
            /// compute equal prefixes anew for each request
            #[argh(switch)]
            no_prefix_cache: bool,
            /// order of admission: given (default), longest-output-first, or prefix (prompts that begin alike together)
            #[argh(option, from_str_fn($crate::parse_order), default = "::std::default::Default::default()")]
            order: $crate::Order,
            /// what a step is made of: throughput (most tokens a second; the default, but in a service) or latency (no long
            /// wait for the next token)
            #[argh(option, from_str_fn($crate::parse_policy))]
            policy: Option<$crate::Policy>,
            /// draft tokens from what a text said before, where few requests run: off (default), ngram (where it pays by what
            /// steps cost and how many drafts were right) or ngram-always; tokens are the same
            #[argh(option, from_str_fn($crate::parse_speculation), default = "::std::default::Default::default()")]
            speculate: $crate::Speculation,
            /// make weights fp8 when they are loaded, where the checkpoint's are not: fp8
            #[argh(option)]
            quantize: Option<$crate::Quantize>,
            /// apply fp8 matrices to activations as they are, whatever the checkpoint says of rounding them
            #[argh(switch)]
            plain_inputs: bool,
            /// how freely tokens are drawn; 0 takes the most probable one
            #[argh(option)]
            temperature: Option<f32>,
            /// draw among the k most probable tokens (0 or -1: all)
            #[argh(option, from_str_fn($crate::parse_top_k))]
            top_k: Option<u32>,
            /// draw among the most probable tokens that hold this mass, in (0, 1]
            #[argh(option)]
            top_p: Option<f32>,
            /// draw among tokens at least this many times as probable as the most probable one
            #[argh(option)]
            min_p: Option<f32>,
        }

        impl $name {
            /// The model that `name` stands for, its files at hand; flags that can't hold are found first.
            fn source(&self, name: &str, stderr: &$crate::progress::Stderr) -> Result<$crate::ModelSource, $crate::Error> {
                self.engine_options().check()?;
                $crate::ModelSource::find(name, self.revision.as_deref(), Some(stderr))
            }

            /// The engine that the flags ask for.
            fn engine_options(&self) -> $crate::Options {
                let default = $crate::Options::default();
                $crate::Options {
                    backend: self.backend,
                    devices: self.devices.0.clone(),
                    data_parallel: self.data_parallel,
                    tensor_parallel: self.tensor_parallel,
                    allow_imbalance: self.allow_imbalance,
                    kernels: self.kernels,
                    max_running: self.max_running.0,
                    max_prefill_tokens: self.max_prefill_tokens,
                    page_size: self.page_size,
                    kv_dtype: self.kv_dtype.0,
                    num_pages: self.num_pages,
                    memory_ratio: self.memory_ratio.unwrap_or(default.memory_ratio),
                    max_seq_len: self.max_seq_len,
                    max_graph_batch: self.max_graph_batch,
                    overlap: default.overlap && !self.no_overlap,
                    prefix_cache: !self.no_prefix_cache,
                    order: self.order,
                    policy: self.policy.unwrap_or_default(),
                    speculation: self.speculate,
                    quantize: self.quantize,
                    plain_inputs: self.plain_inputs,
                    ..default
                }
            }

            /// Sampling as the flags ask for, and as `default` where they don't.
            fn sampling(&self, default: $crate::SamplingParams) -> $crate::SamplingParams {
                $crate::SamplingParams {
                    temperature: self.temperature.unwrap_or(default.temperature),
                    top_k: self.top_k.unwrap_or(default.top_k),
                    top_p: self.top_p.unwrap_or(default.top_p),
                    min_p: self.min_p.unwrap_or(default.min_p),
                    ..default
                }
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_and_its_value_may_be_one_word() {
        let apart = |line: &str| apart(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).join(" ");
        assert_eq!(apart("--model=a/b --n 3 --json=x=y.json"), "--model a/b --n 3 --json x=y.json");
        assert_eq!(apart("--output= -x=1 a=b"), "--output  -x=1 a=b");
        assert_eq!(apart("--n=1 -- --n=2"), "--n 1 -- --n=2");
    }
}
