//! How an engine is to be built: what `Llm::builder` and the command lines set.

use std::ffi::OsString;
use std::fmt;
use std::str::FromStr;

use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_core::policy::Policy;
use minisgl_core::scheduler::Order;
use minisgl_core::shard::RANKS_MAX;
use minisgl_core::speculation::Speculation;
use minisgl_cuda::KernelSet;

use crate::device::{self, BackendChoice, Choice};
use crate::error::Error;
use crate::simulated::SimulatedDevice;

/// What weights are made when they are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantize {
    /// e4m3, with a scale for each tile of 128 rows by 256 columns, or by 128 where there are experts.
    Fp8,
}

/// All settings. `None` leaves the choice to the engine; [`Info`](crate::Info) reports what it chose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which device computes.
    pub backend: BackendChoice,
    /// Instead of a device: one whose steps only take time.
    pub simulate: Option<SimulatedDevice>,
    /// Which GPUs, one for each rank of the first engine, then of the next; naming one asks for GPUs. Empty: the first ones, as many
    /// as are needed.
    pub devices: Vec<usize>,
    /// How many engines take requests out of one queue; `None`: as many as [`Options::devices`] are enough for, else a single one.
    /// Tokens are the same. Capacities are those of each engine.
    pub data_parallel: Option<usize>,
    /// How many ranks compute each step of an engine together, each with a part of the weights: 1, 2, 4 or 8.
    /// Tokens are the same.
    /// Each has a GPU of its own, all of which reach each other's memory; on the CPU ranks are threads.
    pub tensor_parallel: u32,
    /// Let the GPUs of ranks have more and less memory free, though all get as many KV pages as the one with the least.
    pub allow_imbalance: bool,
    /// Which GPU kernels run.
    pub kernels: KernelSet,
    /// Requests that run at once; `None`: as many as decoding gains from, if memory holds them.
    pub max_running: Option<u32>,
    /// Tokens of a usual sequence, prompt and output, where that is known: [`Options::max_running`] is chosen by it.
    pub usual_tokens: Option<u32>,
    /// Requests that wait inside the engine; more are pulled from the caller as these are admitted.
    pub max_queued: u32,
    /// Tokens of prompts in a step; `None`: 16384 on a GPU, 1024 on the CPU.
    pub max_prefill_tokens: Option<u32>,
    /// Tokens of a KV page; `None`: 16, or the least that the device takes.
    pub page_size: Option<u32>,
    /// What keys and values are kept as; `None`: bf16 on a GPU, f32 on the CPU.
    pub kv_dtype: Option<KvFormat>,
    /// KV pages; `None`: as many as memory holds, see [`Options::memory_ratio`].
    pub num_pages: Option<u32>,
    /// Share, in (0, 1], of the memory left beside weights and buffers that the KV pages take.
    pub memory_ratio: f64,
    /// Instead of it: the share, in (0, 1], of all of the GPU's memory that weights and pages take together at most. Buffers and
    /// recorded steps come on top, unlike in what vLLM's `gpu_memory_utilization` counts.
    pub memory_utilization: Option<f64>,
    /// Tokens of a sequence, prompt and output together; `None`: all that the model's positions reach.
    pub max_seq_len: Option<u32>,
    /// Rows of the largest recorded decode step; 0 records none, `None` as many as run.
    pub max_graph_batch: Option<u32>,
    /// Schedule a step while the one before runs; off, every step is waited for. Both give the same tokens. On, unless
    /// the variable MINISGL_DISABLE_OVERLAP_SCHEDULING is 1.
    pub overlap: bool,
    /// Reuse the KV pages of equal prefixes.
    pub prefix_cache: bool,
    /// In which order waiting requests are admitted.
    pub order: Order,
    /// What a step is made of: most tokens a second, or no long wait for a running request's next token. Tokens are the same.
    pub policy: Policy,
    /// Whether tokens are drafted from what a text said before, where few requests run. Tokens are the same.
    pub speculation: Speculation,
    /// What weights in bf16, f16 or f32 are made when they are loaded; `None` leaves them.
    pub quantize: Option<Quantize>,
    /// Apply fp8 matrices to activations as they are, whatever the checkpoint says of rounding them: more exact.
    pub plain_inputs: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            backend: BackendChoice::Auto,
            simulate: None,
            devices: Vec::new(),
            data_parallel: None,
            tensor_parallel: 1,
            allow_imbalance: false,
            kernels: KernelSet::Auto,
            max_running: None,
            usual_tokens: None,
            max_queued: 1024,
            max_prefill_tokens: None,
            page_size: None,
            kv_dtype: None,
            num_pages: None,
            memory_ratio: 0.9,
            memory_utilization: None,
            max_seq_len: None,
            max_graph_batch: None,
            overlap: !is_set(std::env::var_os(DISABLE_OVERLAP)),
            prefix_cache: true,
            order: Order::Given,
            policy: Policy::Throughput,
            speculation: Speculation::Never,
            quantize: None,
            plain_inputs: false,
        }
    }
}

impl Options {
    /// Finds what can't hold whatever the model is, before anything is fetched or loaded.
    ///
    /// # Errors
    /// Names the capacity, the memory ratio or the GPU.
    pub fn check(&self) -> Result<(), Error> {
        self.device()?;
        match self.tensor_parallel {
            1 => {}
            ranks if !ranks.is_power_of_two() || ranks > RANKS_MAX => return Err(Error::Ranks(ranks)),
            ranks if self.simulate.is_some() => return Err(Error::RanksSimulated(ranks)),
            _ => {}
        }
        self.engines()?;
        let shares =
            [("--memory-ratio", Some(self.memory_ratio)), ("memory_utilization", self.memory_utilization)];
        for (option, share) in shares {
            if let Some(share) = share.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
                return Err(Error::MemoryShare { option, share });
            }
        }
        // What is left open fits: the least of each.
        let limits = Limits {
            running: self.max_running.unwrap_or(1),
            queued: self.max_queued,
            sequence: self.max_seq_len.unwrap_or(1),
            prefill_tokens: self.max_prefill_tokens.unwrap_or(1),
            page_size: self.page_size.unwrap_or(1),
            pages: self.num_pages.unwrap_or(1),
            graph_rows: self.max_graph_batch.unwrap_or(0),
        };
        Ok(limits.check()?)
    }

    /// Which device computes.
    ///
    /// # Errors
    /// A GPU is named that can't be had, or the driver can't be asked.
    pub(crate) fn device(&self) -> Result<Choice, Error> {
        device::choose(self.backend, &self.devices, self.simulate.is_some())
    }

    /// How many engines there are to be.
    ///
    /// # Errors
    /// None, or others than the devices are enough for.
    pub fn engines(&self) -> Result<usize, Error> {
        let ranks = self.tensor_parallel.max(1) as usize;
        let mut named = self.devices.iter().enumerate();
        let twice = named.find(|(at, device)| self.devices[..*at].contains(device));
        if let Some((_, device)) = twice.filter(|_| ranks > 1) {
            return Err(Error::DeviceTwice(*device));
        }
        match (self.data_parallel, self.devices.len()) {
            (None, devices) if !devices.is_multiple_of(ranks) => {
                Err(Error::DevicesLeftOver { ranks, devices })
            }
            (None, devices) => Ok((devices / ranks).max(1)),
            (Some(0), _) => Err(Error::NoEngine),
            (Some(engines), _) if engines > ENGINES_MAX => Err(Error::TooManyEngines(engines)),
            (Some(engines), devices) if devices > 0 && engines.checked_mul(ranks) != Some(devices) => {
                Err(Error::DevicesDiffer { engines, ranks, devices })
            }
            (Some(engines), _) => Ok(engines),
        }
    }
}

/// Engines behind one queue at most, each of which has threads of its own.
pub const ENGINES_MAX: usize = 256;

/// The environment's way to ask for every step to be waited for.
const DISABLE_OVERLAP: &str = "MINISGL_DISABLE_OVERLAP_SCHEDULING";

/// As mini-sglang reads it.
fn is_set(variable: Option<OsString>) -> bool {
    variable.is_some_and(|value| ["1", "true", "yes"].iter().any(|yes| value.eq_ignore_ascii_case(yes)))
}

impl fmt::Display for Quantize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quantize::Fp8 => "fp8",
        })
    }
}

impl FromStr for Quantize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "fp8" => Ok(Quantize::Fp8),
            _ => Err(format!("weights can't be made {text}; use fp8")),
        }
    }
}

/// Reads how many requests run at once: a number, or `auto` for none.
///
/// # Errors
/// Anything else.
pub fn parse_max_running(text: &str) -> Result<MaxRunning, String> {
    match (text, text.parse()) {
        ("auto", _) => Ok(MaxRunning(None)),
        (_, Ok(requests)) => Ok(MaxRunning(Some(requests))),
        _ => Err(format!("{text} is no number of requests; use auto, or a number")),
    }
}

/// Reads among how many tokens one is drawn: a number, or 0 for all, which vLLM and mini-sglang call -1.
///
/// # Errors
/// Anything else.
pub fn parse_top_k(text: &str) -> Result<u32, String> {
    match (text, text.parse()) {
        ("-1", _) => Ok(0),
        (_, Ok(k)) => Ok(k),
        _ => Err(format!("{text} is no number of tokens; use one from 1 on, or 0 or -1 for all")),
    }
}

/// Reads which GPUs: numbers and commas.
///
/// # Errors
/// Anything else, or a GPU named twice.
pub fn parse_devices(text: &str) -> Result<Devices, String> {
    let devices: Result<Vec<usize>, _> = text.split(',').map(|number| number.trim().parse()).collect();
    let devices =
        devices.map_err(|_| format!("{text} names no GPUs; use their numbers, such as 0 or 0,2"))?;
    match devices.iter().enumerate().find(|(i, device)| devices[..*i].contains(device)) {
        Some((_, twice)) => {
            Err(format!("{text} names GPU {twice} twice; an engine, or a rank of it, needs one of its own"))
        }
        None => Ok(Devices(devices)),
    }
}

/// A flag's value: [`Options::devices`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices(pub Vec<usize>);

/// A flag's value: [`Options::max_running`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaxRunning(pub Option<u32>);

/// A flag's value: [`Options::kv_dtype`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvDtype(pub Option<KvFormat>);

/// Reads what keys and values are kept as.
///
/// # Errors
/// Another word than `auto`, `bf16` or `fp8`.
pub fn parse_kv_dtype(text: &str) -> Result<KvDtype, String> {
    match text {
        "auto" => Ok(KvDtype(None)),
        "bf16" => Ok(KvDtype(Some(KvFormat::Bf16))),
        "fp8" => Ok(KvDtype(Some(KvFormat::Fp8))),
        _ => Err(format!("{text} is nothing that keys and values are kept as; use auto, bf16 or fp8")),
    }
}

/// Reads an order of admission.
///
/// # Errors
/// Another word than `given`, `longest-output-first` or `prefix`.
pub fn parse_order(text: &str) -> Result<Order, String> {
    match text {
        "given" => Ok(Order::Given),
        "longest-output-first" => Ok(Order::LongestOutputFirst),
        "prefix" => Ok(Order::Prefix),
        _ => Err(format!("{text} is no order; use given, longest-output-first or prefix")),
    }
}

/// Reads a policy.
///
/// # Errors
/// Another word than `throughput` or `latency`.
pub fn parse_policy(text: &str) -> Result<Policy, String> {
    match text {
        "throughput" => Ok(Policy::Throughput),
        "latency" => Ok(Policy::Latency),
        _ => Err(format!("{text} is no policy; use throughput or latency")),
    }
}

/// Reads when tokens are drafted.
///
/// # Errors
/// Another word than `off`, `ngram` or `ngram-always`.
pub fn parse_speculation(text: &str) -> Result<Speculation, String> {
    match text {
        "off" => Ok(Speculation::Never),
        "ngram" => Ok(Speculation::WhereItPays),
        "ngram-always" => Ok(Speculation::Always),
        _ => Err(format!("{text} is no way to speculate; use off, ngram or ngram-always")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_no_choice_is_refused_with_those_there_are() {
        assert_eq!(parse_speculation("ngram"), Ok(Speculation::WhereItPays));
        assert_eq!(parse_speculation("ngram-always"), Ok(Speculation::Always));
        assert_eq!(parse_speculation("off"), Ok(Speculation::default()));
        assert!(parse_speculation("on").is_err_and(|why| why.contains("off, ngram or ngram-always")));
        assert_eq!(parse_kv_dtype("auto"), Ok(KvDtype::default()));
        assert_eq!(parse_kv_dtype("fp8"), Ok(KvDtype(Some(KvFormat::Fp8))));
        assert!(parse_kv_dtype("fp8_e5m2").is_err_and(|why| why.contains("auto, bf16 or fp8")));
        assert_eq!([parse_top_k("-1"), parse_top_k("0"), parse_top_k("50")], [Ok(0), Ok(0), Ok(50)]);
        assert!(
            ["-2", "5.0", ""]
                .iter()
                .all(|text| parse_top_k(text).is_err_and(|why| why.contains("or 0 or -1")))
        );
        assert!(parse_policy("fast").is_err_and(|why| why.contains("throughput") && why.contains("latency")));
        assert!(parse_order("random").is_err_and(|why| why.contains("given") && why.contains("prefix")));
    }

    #[test]
    fn gpus_are_named_once_each_and_there_are_as_many_engines() {
        assert_eq!(parse_devices("0, 2"), Ok(Devices(vec![0, 2])));
        assert!(parse_devices("0,x").is_err_and(|why| why.contains("0,2")));
        assert!(parse_devices("1,0,1").is_err_and(|why| why.contains("GPU 1 twice")));
        let engines = |devices: &[usize], data_parallel| {
            Options { devices: devices.to_vec(), data_parallel, ..Options::default() }.engines()
        };
        let number = |devices, data_parallel| engines(devices, data_parallel).unwrap();
        assert_eq!([number(&[], None), number(&[2], None), number(&[2, 0], None)], [1, 1, 2]);
        assert_eq!([number(&[], Some(3)), number(&[2, 0], Some(2))], [3, 2]);
        assert!(matches!(engines(&[], Some(0)), Err(Error::NoEngine)));
        let many = engines(&[], Some(1_000_000)).unwrap_err().to_string();
        assert!(many.contains("--data-parallel 1000000") && many.contains("256"), "{many}");
        let differ = engines(&[0], Some(2)).unwrap_err().to_string();
        assert!(differ.contains("--data-parallel 2") && differ.contains("--devices"), "{differ}");
        let of_ranks = |devices: &[usize], data_parallel| {
            let devices = devices.to_vec();
            Options { devices, data_parallel, tensor_parallel: 2, ..Options::default() }.engines()
        };
        let number = |devices, data_parallel| of_ranks(devices, data_parallel).unwrap();
        assert_eq!([number(&[], None), number(&[3, 1], None), number(&[0, 1, 2, 3], None)], [1, 1, 2]);
        assert_eq!([number(&[], Some(2)), number(&[0, 1, 2, 3], Some(2))], [2, 2]);
        let differ = of_ranks(&[0, 1], Some(2)).unwrap_err().to_string();
        assert!(differ.contains("2 of them") && differ.contains("4 GPUs"), "{differ}");
        let twice = of_ranks(&[0, 1, 0, 1], None).unwrap_err().to_string();
        assert!(twice.contains("GPU 0 is named twice"), "{twice}");
        let left_over = of_ranks(&[0, 1, 2], None).unwrap_err().to_string();
        assert!(left_over.contains("3 GPUs") && left_over.contains("2 ranks"), "{left_over}");
    }

    #[test]
    fn ranks_are_a_power_of_two() {
        let refusal = |tensor_parallel| {
            let error = Options { tensor_parallel, ..Options::default() }.check().unwrap_err();
            error.to_string()
        };
        for ranks in [0, 3, 16] {
            let text = refusal(ranks);
            assert!(
                text.contains(&format!("--tensor-parallel {ranks}")) && text.contains("1, 2, 4 or 8"),
                "{text}"
            );
        }
        let ranks =
            |backend, tensor_parallel| Options { backend, tensor_parallel, ..Options::default() }.check();
        for backend in [BackendChoice::Cpu, BackendChoice::Cuda] {
            assert!([1, 2, 4, 8].into_iter().all(|count| ranks(backend, count).is_ok()));
        }
    }

    #[test]
    fn overlap_is_disabled_by_what_mini_sglang_takes_for_yes() {
        assert!(["1", "true", "True", "YES"].into_iter().all(|value| is_set(Some(value.into()))));
        let others = [Some("0"), Some(""), Some("false"), Some("11"), None];
        assert!(!others.into_iter().any(|value| is_set(value.map(OsString::from))));
    }
}
