//! What policies give, by the costs of a device's steps: workloads in simulated time (`tests/support/simulation.rs`).
//!
//! ```sh
//! cargo bench -p minisgl-core --bench policies
//! ```

#[path = "../tests/support/simulation.rs"]
mod simulation;

use minisgl_core::config::Limits;
use minisgl_core::costs::{Line, StepCosts};
use minisgl_core::formula::Formula;
use minisgl_core::policy::Policy;
use minisgl_core::scheduler::{Order, Settings};
use minisgl_core::speculation::Speculation;
use simulation::{Asked, Run};

/// Qwen3-0.6B on an H200, as measured when an engine is built there.
const SMALL: Formula = Formula {
    costs: StepCosts {
        decode: Line { fixed_ms: 0.555, token_ms: 3.34e-3 },
        mixed: Line { fixed_ms: 0.897, token_ms: 1.40e-3 },
        attention: Line { fixed_ms: 0.1, token_ms: 6.5e-7 },
    },
    context_ms: 114_688.0 / 4.3e9,
    further_row_ms: 1.8e-3,
    sample_ms: 0.75e-3,
    attention_least_ms: 0.2,
};

/// The same as `serve --max-running 256` measures it (2026-11-29, on another H200).
const SERVED: Formula = Formula {
    costs: StepCosts {
        decode: Line { fixed_ms: 0.640, token_ms: 5.7e-3 },
        mixed: Line { fixed_ms: 0.885, token_ms: 1.405e-3 },
        attention: Line { fixed_ms: 0.05, token_ms: 2.28e-6 },
    },
    ..SMALL
};

/// What the host takes there to launch a step.
const LAUNCH_MS: f64 = 0.08;

/// Numbers between 0 and 1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn within(&mut self, first: u32, last: u32) -> u32 {
        first + (self.next() * f64::from(last - first + 1)) as u32
    }

    fn prompt(&mut self, tokens: u32) -> Vec<u32> {
        (0..tokens).map(|_| self.within(0, 9999)).collect()
    }
}

fn all_at_once(n: u32, input: (u32, u32), output: (u32, u32)) -> Vec<Asked> {
    let mut random = Random(1);
    (0..n)
        .map(|_| {
            let (input, output) = (random.within(input.0, input.1), random.within(output.0, output.1));
            Asked { at_ms: 0.0, prompt: random.prompt(input), output }
        })
        .collect()
}

fn at_rate(per_second: f64, n: u32, input: u32, output: u32) -> Vec<Asked> {
    let (mut random, mut at_ms) = (Random(7), 0.0);
    (0..n)
        .map(|_| {
            at_ms += -(1.0 - random.next()).ln() / per_second * 1e3;
            Asked { at_ms, prompt: random.prompt(input), output }
        })
        .collect()
}

fn sharing(n: u32, shared: u32, own: u32, output: u32) -> Vec<Asked> {
    let mut random = Random(3);
    let prefix = random.prompt(shared);
    let prompt = |random: &mut Random| [prefix.clone(), random.prompt(own)].concat();
    (0..n).map(|_| Asked { at_ms: 0.0, prompt: prompt(&mut random), output }).collect()
}

fn run(device: Formula, policy: Policy, running: u32, asked: &[Asked]) -> Run {
    let longest = asked.iter().map(|one| one.prompt.len() as u32 + one.output).max().unwrap_or(1);
    let limits = Limits {
        running,
        queued: 1024,
        sequence: longest,
        prefill_tokens: 16384,
        page_size: 16,
        pages: 70_000,
        graph_rows: running,
    };
    let settings = Settings {
        policy,
        prefix_cache: true,
        order: Order::Given,
        vocab: 10_000,
        speculation: Speculation::Never,
    };
    simulation::run(&device, LAUNCH_MS, &limits, settings, asked)
}

fn main() {
    println!(
        "all at once                                    policy      running      ms   steps with prompts  without"
    );
    let bulk: [(&str, u32, Vec<Asked>); 5] = [
        ("n 4096, 32..128 in, 16..64 out", 1472, all_at_once(4096, (32, 128), (16, 64))),
        ("n 2000, 512..1024 in, 1..32 out", 256, all_at_once(2000, (512, 1024), (1, 32))),
        ("n 600, 100..1024 in and out", 256, all_at_once(600, (100, 1024), (100, 1024))),
        ("n 256, 100..1024 in and out", 256, all_at_once(256, (100, 1024), (100, 1024))),
        ("n 1000, 1500 shared, 30 own, 32 out", 256, sharing(1000, 1500, 30, 32)),
    ];
    for (name, running, asked) in &bulk {
        for policy in [Policy::Throughput, Policy::Latency] {
            let run = run(SMALL, policy, *running, asked);
            let with = run.steps.iter().filter(|step| step.2 > 0).count();
            let policy = format!("{policy:?}");
            println!(
                "{name:46} {policy:11} {running:6} {:9.0} {with:8} {:18}",
                run.end_ms,
                run.steps.len() - with
            );
        }
    }
    println!();
    println!(
        "as they come                                   policy       TTFT p50    p99   ITL p50    p99   max"
    );
    let service = at_rate(16.0, 2000, 1000, 200);
    let mut late = all_at_once(64, (512, 512), (512, 512));
    late.push(Asked { at_ms: 500.0, prompt: Random(9).prompt(16384), output: 512 });
    let few = at_rate(1.0, 200, 1000, 1);
    for (name, device, asked) in [
        ("alone", SERVED, &few),
        ("16/s, 1000 in, 200 out", SERVED, &service),
        ("64 run, one of 16384", SMALL, &late),
    ] {
        for policy in [Policy::Throughput, Policy::Latency] {
            let run = run(device, policy, 256, asked);
            let gap = |percent| if asked[0].output > 1 { run.gap_ms(percent) } else { 0.0 };
            let policy = format!("{policy:?}");
            println!(
                "{name:46} {policy:11} {:9.2} {:6.2} {:9.2} {:6.2} {:6.2}",
                run.first_ms(50.0),
                run.first_ms(99.0),
                gap(50.0),
                gap(99.0),
                gap(100.0)
            );
        }
    }
}
