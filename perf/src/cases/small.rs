//! Cases of everything that is neither a multiplication nor attention: launches, the step's two ends, sampling.

use minisgl_core::backend::{Device, Element, Purpose, Queue};
use minisgl_core::sampling::SlotState;
use minisgl_cuda::ops::embed::Ends;
use minisgl_cuda::ops::sampling::Sampling;
use minisgl_cuda::{Buffer, Cuda, CudaError, Grid};

use crate::case::{Call, Case, Filter, Run};
use crate::check::first_wrong;
use crate::drawn;
use crate::model::{MODELS, ModelShape};
use crate::random::{random, random_element};
use crate::step::{StepOf, activations, download_words};

pub(crate) fn cases(filter: &Filter) -> Vec<Case> {
    let mut cases = vec![empty(), edge(), read(256 << 20), read(2 << 30)];
    for model in filter.models() {
        for rows in filter.rows() {
            cases.push(embed(model, rows));
            cases.push(final_norm(model, rows));
        }
    }
    for rows in filter.rows() {
        let plain = SlotState { temperature: 0.6, ..SlotState::default() };
        let filtered = SlotState { top_k: 50, top_p: 0.9, ..plain };
        let penalties = SlotState {
            edits: 1,
            repetition: 1.1,
            presence: 0.5,
            frequency: 0.5,
            prompt_len: CONTEXT / 2,
            ..filtered
        };
        cases.push(sample("greedy", SlotState::default(), rows));
        cases.push(sample("temperature", plain, rows));
        cases.push(sample("top-k+top-p", filtered, rows));
        cases.push(sample("top-k+top-p+penalties", penalties, rows));
    }
    cases
}

/// An empty kernel: the plain time is that of a launch, the time in a graph that of a node.
fn empty() -> Case {
    nothing("empty", Grid::new(1, 32))
}

/// An empty kernel behind a dependent launch: the time in a graph is that of the edge, or of a node where there is no
/// dependent launch.
fn edge() -> Case {
    nothing("edge", Grid::new(1, 32).dependent())
}

/// A launch of a kernel that does nothing.
fn nothing(kernel: &'static str, grid: Grid) -> Case {
    Case {
        family: kernel,
        shape: String::new(),
        bytes: 0.0,
        flops: 0.0,
        setup: Box::new(move |cuda, _| {
            let kernel = cuda.modules().kernel("perf", kernel, 0)?;
            Ok(Run {
                // SAFETY: the kernel touches no memory.
                call: Box::new(move |launcher, _| unsafe { launcher.launch_raw(&kernel, grid, []) }),
                check: Box::new(|_| Ok(None)),
                baseline: None,
            })
        }),
    }
}

/// Reading and nothing else, beside a copy that moves as many bytes.
fn read(bytes: usize) -> Case {
    let setup = move |cuda: &mut Cuda, copies: usize| {
        let kernel = cuda.modules().kernel("perf", "read_all", 0)?;
        let sink = cuda.alloc(Purpose::Scratch, Element::Word, 1)?;
        let buffers = buffers(cuda, copies, bytes)?;
        let grid = Grid::new(cuda.properties().multiprocessors * 2, 1024);
        let sources = buffers.clone();
        Ok(Run {
            call: Box::new(move |launcher, call| {
                let count = (bytes / 16) as u64;
                // SAFETY: the kernel reads as many bytes as each source has, and writes the sink's word.
                unsafe { launcher.launch_raw(&kernel, grid, [&sources[call % copies], &count, &sink]) }
            }),
            check: Box::new(|_| Ok(None)),
            baseline: Some(("memcpy", copy(buffers, bytes / 2))),
        })
    };
    Case {
        family: "read",
        shape: format!("mib={}", bytes >> 20),
        bytes: bytes as f64,
        flops: 0.0,
        setup: Box::new(setup),
    }
}

fn buffers(cuda: &mut Cuda, copies: usize, bytes: usize) -> Result<Vec<Buffer>, CudaError> {
    (0..copies)
        .map(|_| {
            let buffer = cuda.alloc(Purpose::Scratch, Element::Word, bytes / 4)?;
            cuda.clear(buffer)?;
            Ok(buffer)
        })
        .collect()
}

/// Copies the lower half of a buffer to its upper half: `bytes` read and `bytes` written.
fn copy(buffers: Vec<Buffer>, bytes: usize) -> Call {
    Box::new(move |launcher, call| {
        let from = buffers[call % buffers.len()].address();
        // SAFETY: each buffer holds at least twice `bytes`.
        let copied = unsafe {
            let stream = launcher.stream(Queue::Compute);
            cudarc::driver::result::memcpy_dtod_async(
                from.offset(bytes).number(),
                from.number(),
                bytes,
                stream,
            )
        };
        launcher.check("copying on the GPU", copied)
    })
}

fn embed(model: ModelShape, rows: u32) -> Case {
    let (hidden, width) = (model.hidden, model.hidden as usize);
    let bytes = rows as usize * width * 4;
    let setup = move |cuda: &mut Cuda, copies: usize| {
        let ends = Ends::new(cuda.modules())?;
        let table = random(cuda, model.vocab as usize, width, 1)?;
        let step_of = StepOf::decode(&vec![1; rows as usize], model.vocab);
        let step = step_of.upload(cuda, 0, |_, _, _| {})?;
        let sumsq = cuda.alloc(Purpose::Scratch, Element::Float, rows as usize * width.div_ceil(64))?;
        // The table's rows are warm after the first call, as they are not in a step; so are the outputs' copies.
        let outs = buffers(cuda, copies, bytes)?;
        let out = outs[0];
        Ok(Run {
            baseline: Some(("memcpy", copy(outs.clone(), bytes / 2))),
            call: Box::new(move |launcher, call| {
                let out = outs[call % copies];
                ends.embed(launcher, &step, table.address(), hidden, out, sumsq.address())
            }),
            check: Box::new(move |cuda| {
                let out = activations(cuda, out, rows as usize * width)?;
                let ids = token_ids(cuda, &step)?;
                Ok(first_wrong(&out, 0.0, |i| random_element(width, 1, ids[i / width], i % width)))
            }),
        })
    };
    Case {
        family: "embed",
        shape: format!("model={} rows={rows}", model.name),
        bytes: bytes as f64,
        flops: 0.0,
        setup: Box::new(setup),
    }
}

fn final_norm(model: ModelShape, rows: u32) -> Case {
    let (hidden, width) = (model.hidden, model.hidden as usize);
    let bytes = rows as usize * width * 4;
    let setup = move |cuda: &mut Cuda, copies: usize| {
        let ends = Ends::new(cuda.modules())?;
        let weight = random(cuda, 1, width, 3)?;
        let step = StepOf::decode(&vec![1; rows as usize], model.vocab).upload(cuda, 0, |_, _, _| {})?;
        let residual =
            (0..copies).map(|_| random(cuda, rows as usize, width, 2)).collect::<Result<Vec<_>, _>>()?;
        let outs = buffers(cuda, copies, bytes)?;
        let out = outs[0];
        Ok(Run {
            baseline: Some(("memcpy", copy(outs.clone(), bytes / 2))),
            call: Box::new(move |launcher, call| {
                let (x, out) = (residual[call % copies].into(), outs[call % copies]);
                ends.final_norm(launcher, &step, x, weight.address(), hidden, 1e-6, out)
            }),
            check: Box::new(move |cuda| {
                let out = activations(cuda, out, rows as usize * width)?;
                let scales: Vec<f64> = (0..rows as usize)
                    .map(|row| {
                        let squares = (0..width).map(|col| random_element(width, 2, row, col).powi(2));
                        1.0 / (squares.sum::<f64>() / width as f64 + 1e-6).sqrt()
                    })
                    .collect();
                Ok(first_wrong(&out, 1.0 / 128.0, |i| {
                    let (row, col) = (i / width, i % width);
                    random_element(width, 2, row, col) * scales[row] * random_element(width, 3, 0, col)
                }))
            }),
        })
    };
    Case {
        family: "final_norm",
        shape: format!("model={} rows={rows}", model.name),
        bytes: bytes as f64,
        flops: 0.0,
        setup: Box::new(setup),
    }
}

/// Tokens of a row's sequence, which penalties read.
const CONTEXT: u32 = 1024;

/// Drawing a token for each of `rows` rows. Logits are uniform bits read as f16, made positive and finite: all values
/// differ little in how often they occur, so filters have work to do. Edits add up from call to call.
fn sample(kind: &'static str, state: SlotState, rows: u32) -> Case {
    let vocab = MODELS[0].vocab as usize;
    let bytes = rows as usize * vocab * 2;
    let setup = move |cuda: &mut Cuda, copies: usize| {
        let sampling = Sampling::new(cuda, rows)?;
        let mut step_of = StepOf::decode(&vec![CONTEXT; rows as usize], vocab as u32);
        step_of.state = SlotState { seed_low: 5, ..state };
        let step = step_of.upload(cuda, 0, |_, _, _| {})?;
        let (state, packed) = (step_of.state, step_of.packed_rows());
        let logits = (0..copies)
            .map(|_| random(cuda, rows as usize, vocab, 4).map(Buffer::from))
            .collect::<Result<Vec<_>, _>>()?;
        let tokens = cuda.alloc(Purpose::Scratch, Element::Word, rows as usize)?;
        let checked = logits.clone();
        Ok(Run {
            call: Box::new(move |launcher, call| {
                sampling.sample(launcher, &step, logits[call % copies], vocab as u32, tokens)
            }),
            check: Box::new(move |cuda| {
                let tokens = download_words(cuda, tokens, rows as usize)?;
                for row in [0, rows as usize - 1] {
                    // Of whichever copy the last call had, as the call left it.
                    let mut complaints = vec![];
                    for copy in &checked {
                        let logits = logits_of(cuda, *copy, vocab, row)?;
                        complaints.push(drawn::complaint(&state, packed[row].kv_len, &logits, tokens[row]));
                    }
                    if complaints.iter().all(Option::is_some) {
                        return Ok(complaints.remove(0));
                    }
                }
                Ok(None)
            }),
            baseline: None,
        })
    };
    Case {
        family: "sample",
        shape: format!("{kind} rows={rows} vocab={vocab}"),
        bytes: bytes as f64,
        flops: 0.0,
        setup: Box::new(setup),
    }
}

/// Row `row` of f16 logits.
fn logits_of(cuda: &mut Cuda, logits: Buffer, vocab: usize, row: usize) -> Result<Vec<f32>, CudaError> {
    let row = cuda.slice(logits, row * vocab..(row + 1) * vocab);
    let words = download_words(cuda, row, vocab / 2)?;
    let halves: &[u16] = bytemuck::cast_slice(&words);
    Ok(halves.iter().map(|bits| half::f16::from_bits(*bits).to_f32()).collect())
}

fn token_ids(cuda: &mut Cuda, step: &minisgl_core::backend::Step<Buffer>) -> Result<Vec<usize>, CudaError> {
    let words = download_words(cuda, step.batch, step.layout.words)?;
    let tokens = &words[step.layout.tokens..][..step.shape.tokens as usize * 4];
    Ok(tokens.chunks_exact(4).map(|token| token[0] as usize).collect())
}
