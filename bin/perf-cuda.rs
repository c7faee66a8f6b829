//! Times every GPU kernel against what the device can do: `perf-cuda`, `perf-cuda gemm --rows 1,64 --json times.json`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use argh::FromArgs;
use minisgl::progress::Stderr;
use minisgl_cuda::{Cuda, KernelSet, Options};
use minisgl_perf::{
    Ceilings, Cold, ExchangeRow, ExplainedStep, Filter, ModelShape, PerfOptions, Row, Timing, cases,
    exchanges, run,
};
use serde_json::{Value, json};

/// times GPU kernels at the shapes of Qwen3-0.6B and 14B, cold, in a graph and as plain launches, after checking their
/// results; give words to run only the cases that hold them all
#[derive(FromArgs)]
struct Flags {
    /// words that a case's name or shape must hold, for example `sample rows=256`
    #[argh(positional)]
    words: Vec<String>,
    /// print what a step launches on an H100 or H200, run nothing: rows=128 decode rows, of context=1024, and tokens=2048 of
    /// a prompt, behind=16384 others, separated by commas; the model is 0.6B or --model's. An engine pads decode rows
    /// to a size that it records: 33 to 40
    #[argh(option)]
    explain: Option<ExplainedStep>,
    /// print the cases, run none
    #[argh(switch)]
    list: bool,
    /// rows of decode steps and small operations, separated by commas; products take --tokens too
    #[argh(option, default = "Numbers::default()")]
    rows: Numbers,
    /// context lengths of decode attention, separated by commas
    #[argh(option, default = "Numbers::default()")]
    contexts: Numbers,
    /// tokens of prefill steps, separated by commas
    #[argh(option, default = "Numbers::default()")]
    tokens: Numbers,
    /// sizes where the model differs from Qwen3-0.6B, instead of its and 14B's: heads=32,head_dim=64 (layers, hidden,
    /// vocab, heads, kv_heads, head_dim, intermediate, window; bias=1: q, k and v have biases, heads no norms)
    #[argh(option)]
    model: Option<ModelShape>,
    /// measurements of a case (default 10)
    #[argh(option, default = "10")]
    repetitions: u32,
    /// calls in a graph (default 10, more where buffers would fit the cache; 0: plain launches only)
    #[argh(option, default = "10")]
    graph_repetitions: u32,
    /// use the same buffers in every call, so that small ones stay in the cache
    #[argh(switch)]
    hot: bool,
    /// write the rows to this file too
    #[argh(option)]
    json: Option<PathBuf>,
    /// time what so many GPUs exchange, 2, 4 or 8 from the first on, instead of one's kernels
    #[argh(option)]
    ranks: Option<u32>,
    /// which GPU (default 0)
    #[argh(option, default = "0")]
    device: usize,
    /// auto, portable or hopper (default auto)
    #[argh(option, default = "KernelSet::Auto")]
    kernels: KernelSet,
}

/// Numbers separated by commas.
#[derive(Clone, Default)]
struct Numbers(Vec<u32>);

impl FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Numbers, String> {
        let number =
            |word: &str| word.trim().parse().map_err(|_| format!("`{word}` in `{text}` is no number"));
        Ok(Numbers(text.split(',').map(number).collect::<Result<_, _>>()?))
    }
}

fn main() -> ExitCode {
    let flags: Flags = minisgl::from_command_line();
    let stderr = Stderr::open();
    stderr.log();
    match perf(&flags, &stderr) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            stderr.say(format!("perf-cuda: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn perf(flags: &Flags, stderr: &Stderr) -> Result<(), Box<dyn std::error::Error>> {
    let cases = cases(&Filter {
        words: flags.words.clone(),
        rows: flags.rows.0.clone(),
        contexts: flags.contexts.0.clone(),
        tokens: flags.tokens.0.clone(),
        model: flags.model,
    });
    let mut out = io::stdout().lock();
    if let Some(step) = &flags.explain {
        let text = step.text(&flags.model.unwrap_or_default(), flags.kernels)?;
        return Ok(out.write_all(text.as_bytes())?);
    }
    if flags.list {
        return Ok(cases.iter().try_for_each(|case| writeln!(out, "{} {}", case.family, case.shape))?);
    }
    let (repetitions, graph_repetitions) = (flags.repetitions.max(1), flags.graph_repetitions);
    let options = PerfOptions { repetitions, graph_repetitions, ..PerfOptions::default() };
    if let Some(ranks) = flags.ranks {
        if !matches!(ranks, 2 | 4 | 8) {
            return Err(format!("--ranks {ranks}: exchanges are of 2, 4 or 8 GPUs").into());
        }
        let devices: Vec<usize> = (0..ranks as usize).collect();
        let rows = exchanges(&devices, flags.kernels, &options)?;
        print_exchanges(&mut out, &rows)?;
        return flags.json.as_ref().map_or(Ok(()), |file| Ok(write_exchanges(file, &rows)?));
    }
    let mut cuda = Cuda::new(&Options { device: flags.device, kernels: flags.kernels })?;
    let ceilings = Ceilings::measure(&mut cuda)?;
    print_head(&mut out, &cuda, &ceilings)?;
    let cold = if flags.hot { Cold::No } else { Cold::Yes };
    let mut rows = Vec::new();
    let mut failed = Ok(());
    for case in &cases {
        match run(&mut cuda, case, cold, &options) {
            Ok(row) => {
                print_row(&mut out, &row, &ceilings)?;
                rows.push(row);
            }
            Err(error) => {
                stderr.say(format!("perf-cuda: {error}"));
                failed = Err(error);
            }
        }
    }
    if let Some(file) = &flags.json {
        write_json(file, &cuda, &ceilings, &rows)?;
    }
    Ok(failed?)
}

/// Microseconds of an exchange in a chain of them.
fn print_exchanges(out: &mut impl Write, rows: &[ExchangeRow]) -> io::Result<()> {
    let us = |timing: Timing| 1e3 * timing.mean_ms;
    writeln!(
        out,
        "{:<10} {:>5} {:>10} {:>9} {:>6} {:>9} {:>9} {:>9}",
        "", "ranks", "bytes", "us", "± %", "one shot", "two shots", "NCCL"
    )?;
    rows.iter().try_for_each(|row| {
        let ExchangeRow { ranks, bytes, timing, one_shot, two_shot, nccl } = *row;
        let spread = 100.0 * timing.spread_ms / timing.mean_ms;
        let (one_shot, two_shot) = (us(one_shot), us(two_shot));
        let nccl = nccl.map_or("not there".into(), |timing| format!("{:.2}", us(timing)));
        writeln!(
            out,
            "{:<10} {ranks:>5} {bytes:>10} {:>9.2} {spread:>6.1} {one_shot:>9.2} {two_shot:>9.2} {nccl:>9}",
            "exchange",
            us(timing)
        )
    })
}

fn write_exchanges(file: &Path, rows: &[ExchangeRow]) -> io::Result<()> {
    let row = |row: &ExchangeRow| {
        json!({
            "ranks": row.ranks,
            "bytes": row.bytes,
            "us": 1e3 * row.timing.mean_ms,
            "one_shot_us": 1e3 * row.one_shot.mean_ms,
            "two_shot_us": 1e3 * row.two_shot.mean_ms,
            "nccl_us": row.nccl.map(|timing| 1e3 * timing.mean_ms),
        })
    };
    let report = json!({ "exchanges": rows.iter().map(row).collect::<Vec<_>>() });
    std::fs::write(file, format!("{report:#}\n"))
}

fn print_head(out: &mut impl Write, cuda: &Cuda, ceilings: &Ceilings) -> io::Result<()> {
    writeln!(out, "{}, {} kernels", cuda.properties().name, kernels(cuda))?;
    let matmul = ceilings
        .matmul_flop_s
        .map_or("not measured, there is no cuBLASLt".into(), |rate| format!("{:.0} TFLOP/s", rate / 1e12));
    writeln!(out, "ceilings: read {:.0} GB/s, bf16 matmul {matmul}", ceilings.read_bytes_s / 1e9)?;
    writeln!(out, "times of one call in ms; GB/s, TFLOP/s and % of the ceiling are the graph's")?;
    writeln!(
        out,
        "{:<14} {:<44} {:>9} {:>8} {:>9} {:>7} {:>8} {:>6}  baseline",
        "kernels", "shape", "graph", "± %", "plain", "GB/s", "TFLOP/s", "%"
    )
}

fn kernels(cuda: &Cuda) -> &'static str {
    if cuda.properties().hopper { "hopper" } else { "portable" }
}

fn print_row(out: &mut impl Write, row: &Row, ceilings: &Ceilings) -> io::Result<()> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let timing = row.timing();
    let baseline = row.baseline.zip(row.speed()).map(|((name, timing), speed)| {
        format!("{name} {:.4} ms, we are {speed:.2} times as fast", timing.mean_ms)
    });
    writeln!(
        out,
        "{:<14} {:<44} {:>9} {:>8.1} {:>9.4} {:>7} {:>8} {:>6}  {}{}",
        row.family,
        row.shape,
        or_dash(row.graph.map(|timing| format!("{:.4}", timing.mean_ms))),
        100.0 * timing.spread_ms / timing.mean_ms,
        row.plain.mean_ms,
        or_dash((row.bytes > 0.0).then(|| format!("{:.0}", row.gb_s()))),
        or_dash((row.flops > 0.0).then(|| format!("{:.1}", row.tflop_s()))),
        or_dash(row.ceiling_percent(ceilings).map(|percent| format!("{percent:.1}"))),
        or_dash(baseline),
        if row.cold { "" } else { "  (not cold)" },
    )
}

fn write_json(file: &Path, cuda: &Cuda, ceilings: &Ceilings, rows: &[Row]) -> io::Result<()> {
    let report = json!({
        "device": cuda.properties().name,
        "kernels": kernels(cuda),
        "read_gb_s": ceilings.read_bytes_s / 1e9,
        "matmul_tflop_s": ceilings.matmul_flop_s.map(|rate| rate / 1e12),
        "rows": rows.iter().map(|row| row_json(row, ceilings)).collect::<Vec<_>>(),
    });
    std::fs::write(file, format!("{report:#}\n"))
}

fn row_json(row: &Row, ceilings: &Ceilings) -> Value {
    let timing = |timing: Timing| json!({ "mean_ms": timing.mean_ms, "spread_ms": timing.spread_ms, "least_ms": timing.least_ms });
    json!({
        "kernels": row.family,
        "shape": row.shape,
        "cold": row.cold,
        "bytes": row.bytes,
        "flops": row.flops,
        "graph": row.graph.map(timing),
        "plain": timing(row.plain),
        "gb_s": row.gb_s(),
        "tflop_s": row.tflop_s(),
        "ceiling_percent": row.ceiling_percent(ceilings),
        "baseline": row.baseline.map(|(name, baseline)| json!({ "name": name, "time": timing(baseline) })),
        "speed": row.speed(),
    })
}
