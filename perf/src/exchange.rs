//! What ranks' sums cost on their way: exchanges of several GPUs, each a thread, one behind the other in a recorded step. Before each a
//! kernel of its own pushes the sums, as a product's epilogue does beside multiplying.
//!
//! ```text
//!   rank 0   graph of exchanges ── e0 [graph] e1 [graph] e2 …       the slowest rank's mean counts: they end together
//!   rank 1   graph of exchanges ── …
//! ```
//!
//! Ranks meet where one would allocate or record while another's kernels wait for it: both wait for kernels to end. Who fails ends the
//! others' waiting.
//!
//! Beside them, where the machine has it, NCCL's all-reduce of as many f32, which adds up and no more.
//!
//! Invariant: what an exchange gives is checked before its time is reported.

use std::thread;
use std::time::Duration;

use half::bf16;
use minisgl_core::backend::{Device, Dims, Element, Purpose, Queue};
use minisgl_core::config::Limits;
use minisgl_core::tensor::uniform_element;
use minisgl_cuda::ops::exchange::{Exchange, Stream, Way};
use minisgl_cuda::{Buffer, Comm, Cuda, CudaError, Grid, KernelSet, Launcher, Link};

use crate::case::PerfError;
use crate::timer::{PerfOptions, Timing, measure};

const FAMILY: &str = "exchange";
/// Width of the rows that are exchanged.
const HIDDEN: usize = 1024;
/// Bytes of f32 that a rank has.
const BYTES: [usize; 7] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20];
/// Longer than a rank takes to set up its buffers.
const PATIENCE: Duration = Duration::from_secs(20);

/// An exchange, timed: sums of all ranks added up and to the residual stream, with its squares.
#[derive(Clone, Copy, Debug)]
pub struct ExchangeRow {
    /// GPUs.
    pub ranks: u32,
    /// Of f32 that each has.
    pub bytes: usize,
    /// In the way that a step takes.
    pub timing: Timing,
    /// All to all.
    pub one_shot: Timing,
    /// By shares.
    pub two_shot: Timing,
    /// The sums alone, by NCCL, where it is there.
    pub nccl: Option<Timing>,
}

/// Times exchanges of all sizes over these GPUs.
///
/// # Errors
/// GPUs that don't reach each other's memory, a wrong result, and what the devices report.
pub fn exchanges(
    devices: &[usize],
    kernels: KernelSet,
    options: &PerfOptions,
) -> Result<Vec<ExchangeRow>, PerfError> {
    let links = Link::group(devices, kernels, PATIENCE)?;
    let comms = match Link::comms(&links) {
        Ok(comms) => comms.into_iter().map(Some).collect(),
        Err(CudaError::NoNccl { .. }) => links.iter().map(|_| None).collect(),
        Err(error) => return Err(error.into()),
    };
    let comms: Vec<Option<Comm>> = comms;
    let each: Vec<Result<Vec<ExchangeRow>, PerfError>> = thread::scope(|scope| {
        let time = |(link, comm): (Link, Option<Comm>)| {
            scope.spawn(move || {
                let end = link.aborter();
                rank(link, comm, options).inspect_err(|_| end())
            })
        };
        let threads: Vec<_> = links.into_iter().zip(comms).map(time).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    });
    let each: Vec<_> = each.into_iter().collect::<Result<_, _>>()?;
    let slower = |one: Timing, two: Timing| if one.mean_ms > two.mean_ms { one } else { two };
    let rows = each.into_iter().reduce(|all, of_rank| {
        let joined = all.into_iter().zip(of_rank).map(|(one, two)| ExchangeRow {
            timing: slower(one.timing, two.timing),
            one_shot: slower(one.one_shot, two.one_shot),
            two_shot: slower(one.two_shot, two.two_shot),
            nccl: one.nccl.zip(two.nccl).map(|(one, two)| slower(one, two)),
            ..one
        });
        joined.collect()
    });
    Ok(rows.unwrap_or_default())
}

/// Element `index` of a rank's sums.
fn sum(rank: u32, index: usize) -> f32 {
    uniform_element(u64::from(rank) << 32, index as u64, -1.0, 1.0).to_f32()
}

/// One rank's part; all ranks do the same.
fn rank(link: Link, comm: Option<Comm>, options: &PerfOptions) -> Result<Vec<ExchangeRow>, PerfError> {
    let (mut cuda, rank) = (Cuda::of_rank(link.clone())?, link.rank());
    let tokens = BYTES.into_iter().max().unwrap_or_default() / (4 * HIDDEN);
    let (heads, kv_heads, intermediate, vocab) = (8, 8, 1024, 1024);
    let dims = Dims {
        layers: 1,
        hidden: HIDDEN as u32,
        heads,
        kv_heads,
        head_dim: 128,
        intermediate,
        vocab,
        norm_eps: 1e-6,
    };
    let limits = Limits {
        running: tokens as u32 * rank.count, // room for one shot of whatever size
        queued: 1,
        sequence: 16,
        prefill_tokens: 1,
        page_size: 16,
        pages: 1,
        graph_rows: 0,
    };
    let exchange = Exchange::new(&mut cuda, &link, &dims, &limits, 0)?;
    let residual = cuda.alloc(Purpose::Scratch, Element::Activation, tokens * HIDDEN)?;
    let sumsq = cuda.alloc(Purpose::Scratch, Element::Float, tokens * HIDDEN.div_ceil(64))?;
    let own: Vec<u32> = (0..tokens * HIDDEN).map(|index| sum(rank.index, index).to_bits()).collect();
    let sums = cuda.alloc(Purpose::Scratch, Element::Float, own.len())?;
    upload(&mut cuda, &own, sums)?;
    let added = cuda.alloc(Purpose::Scratch, Element::Float, own.len())?;
    let push = cuda.modules().kernel("perf", "push_sums", 0)?;
    // An even number of exchanges: each replay begins with the inbox that the one before it did not end with.
    let calls = 2 * options.graph_repetitions.max(10);
    let mut rows = Vec::new();
    for bytes in BYTES {
        let tokens = bytes / (4 * HIDDEN);
        let stream = Stream { residual: residual.address(), sumsq: sumsq.address(), tokens: tokens as u32 };
        let mut timed = |way: Option<Way>| {
            let reduce = |launcher: &Launcher| {
                let to = match way {
                    None => exchange.sums(stream.tokens)?,
                    Some(way) => exchange.sums_by(stream.tokens, way)?,
                };
                let grid = Grid::new(stream.tokens, 256).dependent();
                // SAFETY: the kernel reads as many sums as there are, and writes where an exchange of so many takes them from.
                unsafe { launcher.launch_raw(&push, grid, [&sums, &dims.hidden, &to])? };
                match way {
                    None => exchange.reduce(launcher, stream),
                    Some(way) => exchange.reduce_by(launcher, stream, way),
                }
            };
            exchange.begin_step();
            cuda.clear(residual)?;
            cuda.synchronize()?;
            link.meet()?;
            reduce(cuda.launcher())?;
            let complaint = complaint(&mut cuda, rank.count, residual, tokens)?;
            // All ranks have the same, and so the same to complain of.
            if let Some(complaint) = complaint {
                let shape = format!("ranks={} bytes={bytes}", rank.count);
                return Err(PerfError::Wrong { family: FAMILY, shape, complaint });
            }
            link.meet()?;
            exchange.begin_step();
            recorded(&mut cuda, &link, calls, options, reduce)
        };
        let (timing, one_shot, two_shot) =
            (timed(None)?, timed(Some(Way::OneShot))?, timed(Some(Way::TwoShot))?);
        let nccl = |comm: &Comm| all_reduces(&mut cuda, &link, comm, [sums, added], bytes / 4, options);
        let nccl = comm.as_ref().map(nccl).transpose()?;
        rows.push(ExchangeRow { ranks: rank.count, bytes, timing, one_shot, two_shot, nccl });
    }
    Ok(rows)
}

/// NCCL's, timed in a recorded step of as many.
fn all_reduces(
    cuda: &mut Cuda,
    link: &Link,
    comm: &Comm,
    [from, to]: [Buffer; 2],
    count: usize,
    options: &PerfOptions,
) -> Result<Timing, PerfError> {
    let ranks = link.rank().count;
    let reduce = |launcher: &Launcher| {
        let stream = launcher.stream(Queue::Compute);
        // SAFETY: both buffers hold so many, and are used by this stream alone.
        unsafe { comm.all_reduce(stream, from.address(), to.address(), count) }
    };
    // The first call connects the ranks.
    reduce(cuda.launcher())?;
    let words = download(cuda, to, count)?;
    let expected = |index| (0..ranks).map(|rank| sum(rank, index)).sum::<f32>();
    let wrong = words.iter().enumerate().find(|(index, word)| {
        let off = f32::from_bits(**word) - expected(*index);
        off.abs() > 1e-5
    });
    if let Some((index, word)) = wrong {
        let complaint =
            format!("NCCL's element {index} is {}, not {}", f32::from_bits(*word), expected(index));
        return Err(PerfError::Wrong {
            family: FAMILY,
            shape: format!("ranks={ranks} bytes={}", 4 * count),
            complaint,
        });
    }
    link.meet()?;
    let calls = 2 * options.graph_repetitions.max(10);
    recorded(cuda, link, calls, options, reduce)
}

/// The time of a call of so many in a recorded step, which all ranks begin and end together.
fn recorded(
    cuda: &mut Cuda,
    link: &Link,
    calls: u32,
    options: &PerfOptions,
    call: impl Fn(&Launcher) -> Result<(), CudaError>,
) -> Result<Timing, PerfError> {
    cuda.begin_capture()?;
    let called = (0..calls).try_for_each(|_| call(cuda.launcher()));
    let graph = cuda.end_capture();
    called?;
    let graph = graph?;
    link.meet()?;
    let timing = measure(cuda.launcher(), options.repetitions, calls, || cuda.launcher().replay(&graph))?;
    link.meet()?;
    Ok(timing)
}

fn download(cuda: &mut Cuda, from: Buffer, words: usize) -> Result<Vec<u32>, CudaError> {
    let mut pinned = cuda.alloc_pinned(words)?;
    cuda.download(Queue::Compute, from, words, &mut pinned)?;
    Ok(cuda.words(&pinned)?.to_vec())
}

fn upload(cuda: &mut Cuda, words: &[u32], to: Buffer) -> Result<(), CudaError> {
    let mut pinned = cuda.alloc_pinned(words.len())?;
    cuda.words_mut(&mut pinned)?.copy_from_slice(words);
    cuda.upload(&mut pinned, 0..words.len(), to)?;
    cuda.synchronize()
}

/// What is wrong with a residual stream of zeros that an exchange has added to.
fn complaint(
    cuda: &mut Cuda,
    ranks: u32,
    residual: Buffer,
    tokens: usize,
) -> Result<Option<String>, CudaError> {
    let words = download(cuda, residual, tokens * HIDDEN / 2)?;
    let given: &[bf16] = bytemuck::cast_slice(&words);
    let wrong = given.iter().enumerate().find_map(|(index, given)| {
        let mut sums: Vec<f32> = (0..ranks).map(|rank| sum(rank, index)).collect();
        while sums.len() > 1 {
            sums = sums.chunks(2).map(|pair| pair.iter().sum()).collect();
        }
        let expected = bf16::from_f32(sums.first().copied().unwrap_or_default());
        (*given != expected).then(|| format!("element {index} is {given}, not {expected}"))
    });
    Ok(wrong)
}
