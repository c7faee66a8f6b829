//! A soak on a GPU: many short generations in one process, lengths and sampling mixed. Memory stays flat, and a request gives
//! the tokens that it gave the first time, whatever was generated in between and beside it.

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

/// How long: as many seconds as `MINISGL_SOAK_SECONDS` says, or eight minutes.
fn length() -> Duration {
    let seconds =
        std::env::var("MINISGL_SOAK_SECONDS").map(|text| text.parse().expect("seconds")).unwrap_or(480);
    Duration::from_secs(seconds)
}

/// Resident memory of this process, KiB.
fn host_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number of KiB")
}

/// Memory in use on the first GPU, bytes. Nothing else may run there.
fn device_bytes(nvml: &Nvml) -> u64 {
    nvml.device_by_index(0).expect("a GPU").memory_info().expect("its memory").used
}

#[test]
#[ignore = "needs a GPU of its own, for eight minutes"]
fn memory_stays_flat_and_requests_keep_their_tokens() {
    let nvml = Nvml::init().expect("the driver's management library");
    let builder = Llm::builder("qwen3-0.6b").backend(BackendChoice::Cuda);
    let mut llm = builder.max_seq_len(Some(512)).num_pages(Some(9000)).build().expect("an engine on the GPU");
    let requests = mixed_requests(REQUESTS, 2000);
    let first = llm.generate(&requests).expect("a run");
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
            before = Some((host_kib(), device_bytes(&nvml)));
        }
    }
    let (host, device) = before.expect("a warm-up shorter than the soak");
    let (host_after, device_after) = (host_kib(), device_bytes(&nvml));
    println!("{generations} generations in {} s", start.elapsed().as_secs());
    println!("host {host} KiB, then {host_after}; device {device} bytes, then {device_after}");
    assert_eq!(device_after, device, "device memory");
    assert!(host_after <= host + HOST_GROWTH_KIB, "host memory grew from {host} to {host_after} KiB");
}
