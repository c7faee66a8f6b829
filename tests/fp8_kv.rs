//! Keys and values in fp8 on the CPU backend, through the public API: tokens depend on the sequence alone, logits are near
//! those of bf16, and pages take half the bytes.

mod common;

use std::process::Command;

use common::logits::{Logits, checkpoint};
use common::{
    CHECKPOINTS, FAMILIES, FP8, Golden, Scratch, family, fixture, greedy_request, mixed_requests,
    relative_error,
};
use minisgl::{Completion, GenerateRequest, KvFormat, LlmBuilder, Policy, Speculation, Stats};
use minisgl_cpu::Cpu;

fn in_fp8(name: &str) -> LlmBuilder {
    family(name).kv_dtype(Some(KvFormat::Fp8))
}

fn all() -> impl Iterator<Item = &'static str> {
    CHECKPOINTS.into_iter().chain(FAMILIES).chain(FP8)
}

/// The golden prompts, and others of which some are drawn and some share a prefix.
fn requests(name: &str) -> Vec<GenerateRequest> {
    let golden = Golden::open(name);
    let examples = golden.examples.iter();
    let greedy = examples.map(|example| greedy_request(&example.prompt, example.greedy.len() as u32));
    let mixed = mixed_requests(6, 200).into_iter().map(|mut request| {
        if let minisgl::Prompt::Tokens(ids) = &mut request.prompt {
            ids.truncate(120);
        }
        request
    });
    greedy.chain(mixed).collect()
}

fn run(builder: LlmBuilder, requests: &[GenerateRequest], together: usize) -> (Vec<Completion>, Stats) {
    let mut llm = builder.build().unwrap();
    let completions = requests.chunks(together).flat_map(|some| llm.generate(some).unwrap());
    // However much of the prompts was cached.
    let completions = completions.map(|completion| Completion { cached_tokens: 0, ..completion }).collect();
    llm.check();
    (completions, llm.stats())
}

#[test]
fn tokens_are_the_same_however_they_are_computed() {
    let mut differ = 0;
    for (i, name) in (0..).zip(all()) {
        let requests = requests(name);
        let (expected, _) = run(in_fp8(name), &requests, requests.len());
        assert!(expected.iter().all(|completion| completion.error.is_none()), "{name}");
        // Eight of the 32 ways, chosen so that any two settings meet in all four combinations: four for one checkpoint, four for
        // the next.
        for bits in (0..8_u32).filter(|bits| bits.count_ones() % 2 == i % 2) {
            let [a, b, c] = [1, 2, 4].map(|bit| bits & bit != 0);
            let builder = in_fp8(name)
                .page_size([32, 8][usize::from(a)])
                .num_pages(Some(if a { 256 } else { 64 }))
                .max_prefill_tokens(if b { 512 } else { 7 })
                .prefix_cache(c)
                .overlap(a == b)
                .max_graph_batch(if b == c { 8 } else { 0 })
                .policy(if a == c { Policy::Throughput } else { Policy::Latency });
            let (got, _) = run(builder, &requests, if a { requests.len() } else { 1 });
            assert!(got == expected, "{name}, way {bits}");
        }
        let bf16 = run(family(name), &requests, requests.len()).0;
        differ += usize::from(bf16.iter().zip(&expected).any(|(a, b)| a.token_ids != b.token_ids));
    }
    assert!(differ > 0, "no model tells fp8 from what the CPU keeps otherwise");
}

#[test]
fn retraction_and_drafts_change_no_token() {
    // Some models' texts repeat nothing, and pages behind a window go back by themselves.
    let (mut drafts_made, mut retracting) = (0, 0);
    for name in all() {
        let mut requests = requests(name);
        // They grow by pages enough to be retracted, whichever prompts come into a step together.
        requests
            .iter_mut()
            .for_each(|request| request.sampling.max_tokens = request.sampling.max_tokens.max(60));
        let (expected, without) = run(in_fp8(name), &requests, requests.len());
        let few = in_fp8(name).num_pages(Some(256 / 16 + 2)).prefix_cache(false);
        let (retracted, stats) = run(few, &requests, requests.len());
        assert!(retracted == expected, "{name}, {} retractions", stats.retractions);
        retracting += usize::from(stats.retractions > 0);
        let drafts = in_fp8(name).max_running(16).speculation(Speculation::Always);
        let (drafted, stats) = run(drafts, &requests, requests.len());
        assert!(drafted == expected, "{name}, {} drafts", stats.drafted);
        assert_eq!(without.drafted, 0);
        drafts_made += stats.drafted;
    }
    assert!(drafts_made > 0 && retracting > 8, "{drafts_made} drafts, {retracting} models retracted");
}

/// How far fp8 may take half of a checkpoint's rows of logits from those of bf16, and the worst, as a share of a row's norm. An
/// element is off by some hundredths of itself, and these checkpoints' weights are random: nothing in them is robust. What real weights
/// lose is in docs/performance.md.
const BOUNDS: [f32; 2] = [0.15, 0.4];

#[test]
fn logits_are_near_those_of_keys_and_values_in_bf16() {
    for name in all() {
        let golden = Golden::open(name);
        let plain = checkpoint(&fixture(name)).with_plain_inputs();
        let [mut own, mut bf16, mut fp8] = [None, Some(KvFormat::Bf16), Some(KvFormat::Fp8)]
            .map(|kv| Logits::new(Cpu::new(), &plain.clone().with_kv(kv), 512, true));
        let [mut in_bf16, mut in_fp8] = [Vec::new(), Vec::new()];
        for example in &golden.examples {
            let tokens = &example.prompt[..example.prompt.len().min(60)];
            let [own, bf16, fp8] = [&mut own, &mut bf16, &mut fp8].map(|model| model.of(tokens));
            let errors = |a: &[Vec<f32>], b: &[Vec<f32>]| -> Vec<f32> {
                a.iter().zip(b).map(|(a, b)| relative_error(a, b)).collect()
            };
            in_bf16.extend(errors(&bf16, &own));
            in_fp8.extend(errors(&fp8, &bf16));
        }
        let [narrow, half] = [&mut in_fp8, &mut in_bf16].map(|errors| {
            errors.sort_by(f32::total_cmp);
            [errors[errors.len() / 2], errors[errors.len() - 1]]
        });
        println!("{name}, median and worst: fp8 {narrow:?}, bf16 {half:?}");
        // Where a router chooses another expert all logits change, so the worst row of these says nothing.
        let bounded = if name.contains("moe") { 1 } else { 2 };
        for i in 0..bounded {
            assert!(narrow[i] < BOUNDS[i], "{name}: fp8 is off by {narrow:?}");
            assert!(half[i] < BOUNDS[i] / 8.0, "{name}: bf16 is off by {half:?}");
        }
        assert!(narrow[0] > half[0], "{name} does not tell fp8 from bf16");
    }
}

#[test]
fn pages_are_half_the_bytes_and_two_for_each_row_of_a_head() {
    for name in all() {
        let [bf16, fp8] = [KvFormat::Bf16, KvFormat::Fp8].map(|kv| {
            let llm = family(name).kv_dtype(Some(kv)).page_size(16).build().unwrap();
            let info = llm.info().clone();
            assert_eq!(info.kv, kv);
            assert!(info.to_string().contains(&format!("of 16 tokens in {kv}")), "{info}");
            info
        });
        // Of a layer's keys, or of its values; in fp8 they fill lines of 128 bytes.
        let (pages, rows) = (2 * u64::from(bf16.dims.layers), u64::from(bf16.dims.kv_heads) * 16);
        let head_dim = u64::from(bf16.dims.head_dim);
        assert_eq!(fp8.page_bytes, pages * (rows * (head_dim + 2)).next_multiple_of(128), "{name}");
        assert_eq!(bf16.page_bytes, pages * rows * head_dim * 2);
    }
}

#[test]
fn programs_take_the_format_by_a_flag() {
    let folder = Scratch::with_text();
    let line = r#"{"id": 1, "prompt_token_ids": [5, 6, 7], "max_tokens": 6}"#;
    let input = folder.write("in.jsonl", line);
    let said = |kv: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
        let output = folder.join(&format!("{kv}.jsonl"));
        command.args(["--backend=cpu", "--max-seq-len=64", &format!("--kv-dtype={kv}")]);
        command.arg("--model").arg(folder.path()).arg("--input").arg(&input).arg("--output").arg(output);
        let output = command.output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    for (flag, format) in [("auto", "f32"), ("bf16", "bf16"), ("fp8", "fp8")] {
        let (good, text) = said(flag);
        assert!(good && text.contains(&format!("tokens in {format}")), "{text}");
    }
    let (good, text) = said("int8");
    assert!(!good && text.contains("auto, bf16 or fp8"), "{text}");
}
