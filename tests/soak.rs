//! A soak on a GPU, or on several as ranks: many short generations in one process, lengths and sampling mixed. Memory stays flat, and a
//! request gives the tokens that it gave on one GPU the first time, whatever was generated in between and beside it.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Numbers, mixed_requests};
use minisgl::{BackendChoice, GenerateRequest, Llm};
use nvml_wrapper::Nvml;

/// Requests to draw generations from.
const REQUESTS: usize = 512;
/// The most in a generation.
const AT_ONCE: u64 = 256;
/// The host's allocator may keep this much more than it had after the warm-up, KiB.
const HOST_GROWTH_KIB: u64 = 4096;
const WARM_UP: Duration = Duration::from_secs(20);

/// A number of the environment's.
fn set(name: &str) -> Option<u32> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// How long: as many seconds as `MINISGL_SOAK_SECONDS` says, or eight minutes.
fn length() -> Duration {
    Duration::from_secs(set("MINISGL_SOAK_SECONDS").unwrap_or(480).into())
}

/// Resident memory of this process, KiB.
fn host_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number of KiB")
}

/// Memory in use on each of the first GPUs, bytes. Nothing else may run there.
fn device_bytes(nvml: &Nvml, gpus: u32) -> Vec<u64> {
    let used = |gpu| nvml.device_by_index(gpu).expect("a GPU").memory_info().expect("its memory").used;
    (0..gpus).map(used).collect()
}

#[test]
#[ignore = "needs a GPU of its own, for eight minutes"]
fn memory_stays_flat_and_requests_keep_their_tokens() {
    let nvml = Nvml::init().expect("the driver's management library");
    let ranks = set("MINISGL_SOAK_RANKS").unwrap_or(1);
    let engine = |ranks| {
        let builder = Llm::builder("qwen3-0.6b").backend(BackendChoice::Cuda).tensor_parallel(ranks);
        builder.max_seq_len(Some(512)).num_pages(Some(9000)).build().expect("an engine on the GPU")
    };
    let requests = mixed_requests(REQUESTS, 2000);
    let first = engine(1).generate(&requests).expect("a run");
    let mut llm = engine(ranks);
    let (start, length, mut numbers) = (Instant::now(), length(), Numbers(7));
    let (mut before, mut generations) = (None, 0u64);
    while start.elapsed() < length {
        let count = 1 + numbers.below(AT_ONCE) as usize;
        let chosen: Vec<usize> = (0..count).map(|_| numbers.below(REQUESTS as u64) as usize).collect();
        let batch: Vec<GenerateRequest> = chosen.iter().map(|i| requests[*i].clone()).collect();
        let completions = llm.generate(&batch).expect("a run");
        llm.check();
        for (i, completion) in chosen.iter().zip(&completions) {
            assert_eq!(completion.token_ids, first[*i].token_ids, "generation {generations}, request {i}");
        }
        generations += 1;
        if before.is_none() && start.elapsed() >= WARM_UP.min(length / 4) {
            before = Some((host_kib(), device_bytes(&nvml, ranks)));
        }
    }
    let (host, device) = before.expect("a warm-up shorter than the soak");
    let (host_after, device_after) = (host_kib(), device_bytes(&nvml, ranks));
    println!("{generations} generations in {} s", start.elapsed().as_secs());
    println!("host {host} KiB, then {host_after}; device {device:?} bytes, then {device_after:?}");
    assert_eq!(device_after, device, "device memory");
    assert!(host_after <= host + HOST_GROWTH_KIB, "host memory grew from {host} to {host_after} KiB");
}
