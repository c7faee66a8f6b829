//! The golden checkpoints through the engine: the expected greedy tokens, however the work is cut and ordered.

mod support;

use std::collections::BTreeMap;

use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::local::Local;
use minisgl_core::policy::Policy;
use minisgl_core::request::{Event, FinishReason, Request, Ticket};
use minisgl_core::sampling::SamplingParams;
use minisgl_core::scheduler::{Order, Settings};
use minisgl_core::speculation::Speculation;
use minisgl_cpu::Cpu;
use minisgl_decoder::{Checkpoint, Decoder};
use support::FAMILIES;
use support::golden::{Example, FIXTURES, examples, fixture};

/// How the same work is done.
#[derive(Clone, Copy, Debug)]
struct Way {
    page_size: u32,
    pages: u32,
    prefill_tokens: u32,
    prefix_cache: bool,
    overlap: bool,
    graph_rows: u32,
    policy: Policy,
}

const PLAIN: Way = Way {
    page_size: 16,
    pages: 64,
    prefill_tokens: 512,
    prefix_cache: false,
    overlap: false,
    graph_rows: 0,
    policy: Policy::Throughput,
};

type CpuEngine = Engine<Local<Cpu, Decoder<Cpu>>>;

fn engine(checkpoint: &Checkpoint, way: Way) -> CpuEngine {
    let mut cpu = Cpu::new();
    let model = Decoder::load(&mut cpu, checkpoint).unwrap();
    let limits = Limits {
        running: 4,
        queued: 8,
        sequence: 160,
        prefill_tokens: way.prefill_tokens,
        page_size: way.page_size,
        pages: way.pages,
        graph_rows: way.graph_rows,
    };
    let vocab = checkpoint.config().spec.dims.vocab;
    let scheduler = Settings {
        policy: way.policy,
        prefix_cache: way.prefix_cache,
        order: Order::Given,
        speculation: Speculation::Never,
        vocab,
    };
    let eos = checkpoint.config().eos.clone();
    Engine::new(cpu, model, EngineOptions { limits, fit: None, scheduler, eos, overlap: way.overlap })
        .unwrap()
}

/// Runs the examples at once to their end; gives how many prompt tokens each took from the prefix cache.
#[track_caller]
fn check(engine: &mut CpuEngine, examples: &[Example], what: &str) -> Vec<u32> {
    let params = SamplingParams { ignore_eos: true, logprobs: Some(1), ..SamplingParams::default() };
    let submit = |example: &Example| {
        let params = SamplingParams { max_tokens: example.greedy.len() as u32, ..params };
        engine.submit(Request::new(&example.prompt, params)).unwrap().ticket
    };
    let tickets: Vec<Ticket> = examples.iter().map(submit).collect();
    let mut greedy: BTreeMap<Ticket, Vec<u32>> = BTreeMap::new();
    let mut cached: BTreeMap<Ticket, u32> = BTreeMap::new();
    while !engine.is_idle() {
        let mut sink = |event: Event<'_>| match event {
            Event::Token { ticket, token, logprobs } => {
                greedy.entry(ticket).or_default().push(token);
                let logprobs = logprobs.expect("asked for");
                assert_eq!(logprobs.top().collect::<Vec<_>>(), [(token, logprobs.token)], "{what}");
            }
            Event::PromptLogprobs { .. } | Event::Embedding { .. } => {
                panic!("nobody asks for those of the prompt")
            }
            Event::Finished { ticket, reason, cached_tokens, tokens } => {
                assert_eq!(reason, FinishReason::Length, "{what}");
                assert_eq!(greedy[&ticket], tokens, "{what}");
                cached.insert(ticket, cached_tokens);
            }
        };
        engine.step(&mut sink).unwrap();
    }
    engine.check();
    for (i, (ticket, example)) in tickets.iter().zip(examples).enumerate() {
        assert_eq!(greedy[ticket], example.greedy, "{what}, example {i}");
    }
    tickets.iter().map(|ticket| cached[ticket]).collect()
}

#[test]
fn the_same_tokens_whole_or_in_chunks_of_any_page_size_cached_overlapped_or_recorded() {
    for name in FIXTURES {
        let dir = fixture(name);
        let checkpoint = Checkpoint::open(&dir, FAMILIES).unwrap();
        let examples = examples(&dir);
        // Eight of the 32 ways, chosen so that any two settings meet in all four combinations.
        for bits in 0..8 {
            let [a, b, c] = [1, 2, 4].map(|bit| bits & bit != 0);
            let way = Way {
                page_size: if a { 16 } else { 32 },
                prefill_tokens: if b { 512 } else { 7 },
                prefix_cache: c,
                overlap: a == b,
                graph_rows: if b == c { 4 } else { 0 },
                policy: if a == c { Policy::Throughput } else { Policy::Latency },
                ..PLAIN
            };
            let what = format!("{name}, {way:?}");
            check(&mut engine(&checkpoint, way), &examples, &format!("{what}, together"));
            let mut alone = engine(&checkpoint, way);
            for example in examples.chunks(1) {
                check(&mut alone, example, &format!("{what}, one by one"));
            }
            for example in examples.chunks(1) {
                let cached = check(&mut alone, example, &format!("{what}, once more"))[0];
                let reusable = example[0].prompt.len() as u32 > way.page_size && way.prefix_cache;
                assert_eq!(cached > 0, reusable, "{what}: {cached} tokens from the cache");
            }
        }
    }
}

#[test]
fn the_same_tokens_when_the_pool_is_too_small_for_all_at_once() {
    for name in FIXTURES {
        let dir = fixture(name);
        let checkpoint = Checkpoint::open(&dir, FAMILIES).unwrap();
        let examples = examples(&dir);
        let pages = |tokens: usize| tokens.div_ceil(16) as u32;
        let longest = examples.iter().map(|one| pages(one.prompt.len() + one.greedy.len())).max().unwrap();
        let prompts: u32 = examples.iter().map(|one| pages(one.prompt.len())).sum();
        let mut retractions = 0;
        // Room for the longest alone; room to admit all (a prompt, and a page for each one that runs already), but not
        // for all that comes out.
        for pages in [longest, prompts + examples.len() as u32 - 1] {
            for overlap in [false, true] {
                let way = Way { pages, prefix_cache: true, overlap, graph_rows: 4, ..PLAIN };
                let mut engine = engine(&checkpoint, way);
                check(&mut engine, &examples, &format!("{name}, {way:?}"));
                retractions += engine.stats().retractions;
            }
        }
        assert!(retractions > 0, "{name}: no pool was small enough to retract a request");
    }
}
