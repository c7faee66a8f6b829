//! What ranks pass to each other, against the host on random numbers: ranks on as many GPUs as there are two of, or all on one.

#[path = "support/ending.rs"]
mod ending;
mod support;

use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use ending::Ending;
use half::bf16;
use minisgl_core::backend::{Device, Element, Purpose, Queue, Step, WeightRole};
use minisgl_core::batch::{LAST_TOKEN, Layout, StepShape, Token};
use minisgl_core::config::Limits;
use minisgl_core::shard::Rank;
use minisgl_core::spec::Dims;
use minisgl_core::tensor::{HostTensor, TensorData, splitmix64};
use minisgl_cuda::ops::exchange::{Exchange, Stream, Way};
use minisgl_cuda::ops::gemm::{Gemm, Residual, Rows, SmShare};
use minisgl_cuda::ops::shared_rows::SharedRows;
use minisgl_cuda::{Address, Buffer, Cuda, CudaError, Grid, Kernel, KernelSet, Link, SLICING, device_count};
use support::taken;

/// A GPU under a sanitizer takes its time.
const PATIENCE: Duration = Duration::from_secs(30);

fn dims(hidden: u32, vocab: u32) -> Dims {
    let (heads, kv_heads) = (8, 8);
    Dims { layers: 1, hidden, heads, kv_heads, head_dim: 64, intermediate: 64, vocab, norm_eps: 1e-6 }
}

fn limits(tokens: u32) -> Limits {
    let (running, prefill_tokens) = (tokens, 1);
    Limits { running, queued: 1, sequence: 64, prefill_tokens, page_size: 16, pages: 8, graph_rows: 0 }
}

/// Devices for so many ranks, two at most.
fn devices(ranks: u32) -> Vec<usize> {
    let there = device_count().expect("a driver").min(2);
    (0..ranks as usize).map(|rank| rank % there).collect()
}

/// Do words go by NCCL, as this variable has it? That takes a GPU for each rank.
fn is_carried() -> bool {
    std::env::var_os("MINISGL_PEER_ACCESS").is_some_and(|value| value == "0")
}

/// Can there be so many ranks?
fn can_be(ranks: u32) -> bool {
    !is_carried() || ranks as usize <= device_count().expect("a driver")
}

/// A rank's device, and what it exchanges by.
struct Bench {
    cuda: Cuda,
    exchange: Exchange,
    /// What a product does with its sums, alone.
    push: Kernel,
}

impl Bench {
    fn new(link: &Link, dims: &Dims, limits: &Limits) -> Bench {
        let mut cuda = Cuda::of_rank(link.clone()).expect("a GPU");
        let exchange =
            Exchange::new(&mut cuda, link, dims, limits, 8 * dims.intermediate as usize).expect("memory");
        let push = cuda.modules().kernel("perf", "push_sums", 0).expect("a kernel");
        Bench { cuda, exchange, push }
    }

    /// Sums of this rank, `[tokens, hidden]`, added up with the others'.
    fn reduce(&self, sums: Buffer, hidden: u32, stream: Stream, way: Way) -> Result<(), CudaError> {
        let (launcher, to) = (self.cuda.launcher(), self.exchange.sums_by(stream.tokens, way)?);
        // SAFETY: the kernel reads as many sums as there are, and writes where an exchange of so many takes them from.
        unsafe { launcher.launch_raw(&self.push, Grid::new(stream.tokens, 256), [&sums, &hidden, &to])? };
        self.exchange.reduce_by(launcher, stream, way)
    }

    fn words(&mut self, words: &[u32], to: Buffer) {
        let mut pinned = self.cuda.alloc_pinned(words.len()).expect("pinned memory");
        self.cuda.words_mut(&mut pinned).expect("words").copy_from_slice(words);
        self.cuda.upload(&mut pinned, 0..words.len(), to).expect("an upload");
        self.cuda.synchronize().expect("an upload");
    }

    fn holding(&mut self, element: Element, words: &[u32]) -> Buffer {
        let elements = words.len() * 4 / minisgl_cuda::element_bytes(element);
        let buffer = self.cuda.alloc(Purpose::Scratch, element, elements).expect("memory");
        self.words(words, buffer);
        buffer
    }

    fn read(&mut self, buffer: Buffer, words: usize) -> Vec<u32> {
        let mut pinned = self.cuda.alloc_pinned(words).expect("pinned memory");
        self.cuda.download(Queue::Compute, buffer, words, &mut pinned).expect("a download");
        self.cuda.words(&pinned).expect("a download").to_vec()
    }
}

/// Keeps the GPUs open from group to group.
static HELD: OnceLock<Vec<Link>> = OnceLock::new();

/// What each of several ranks makes of its bench; all end when one fails.
fn each<R: Send>(
    ranks: u32,
    kernels: KernelSet,
    patience: Duration,
    (dims, limits): (&Dims, &Limits),
    work: impl Fn(&Link, &mut Bench) -> R + Sync,
) -> Vec<R> {
    let open = |ranks| Link::group(&devices(ranks), kernels, patience).expect("GPUs that reach each other");
    HELD.get_or_init(|| open(2));
    let links = open(ranks);
    let work = &work;
    thread::scope(|scope| {
        let rank = |link: Link| {
            scope.spawn(move || {
                let _ending = Ending(link.aborter());
                let mut bench = Bench::new(&link, dims, limits);
                meet(&link);
                work(&link, &mut bench)
            })
        };
        let threads: Vec<_> = links.into_iter().map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn meet(link: &Link) {
    link.meet().expect("no other rank has failed");
}

fn random(seed: u64, index: usize) -> f32 {
    (splitmix64(seed.wrapping_add(index as u64)) >> 40) as f32 / (1 << 22) as f32 - 2.0
}

/// Each rank's sums, of which some are no numbers.
fn sums(rank: u32, elements: usize) -> Vec<f32> {
    let odd = |index: usize| match splitmix64(index as u64) % 97 {
        0 => f32::from_bits(u32::MAX), // what an inbox is empty by
        1 => f32::INFINITY,
        2 => -0.0,
        _ => random(u64::from(rank) << 32, index),
    };
    (0..elements).map(odd).collect()
}

/// Added in pairs, as `core/src/model/shard.rs` draws it.
fn tree(mut sums: Vec<f32>) -> f32 {
    while sums.len() > 1 {
        sums = sums.chunks(2).map(|pair| pair[0] + pair[1]).collect();
    }
    sums[0]
}

/// The squares of a segment, in the order of a warp that has two elements a lane.
fn squares(segment: &[bf16]) -> f32 {
    let square = |i: usize| segment.get(i).map_or(0.0, |x| x.to_f32());
    let mut lanes: Vec<f32> = (0..32)
        .map(|lane| {
            let (x, y) = (square(2 * lane), square(2 * lane + 1));
            x.mul_add(x, y * y)
        })
        .collect();
    for apart in [16, 8, 4, 2, 1] {
        lanes = (0..32).map(|lane| lanes[lane] + lanes[lane ^ apart]).collect();
    }
    lanes[0]
}

/// Equal, or neither is a number.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

fn pairs(values: &[bf16]) -> Vec<u32> {
    let bits = |value: Option<&bf16>| value.map_or(0, |value| u32::from(value.to_bits()));
    values.chunks(2).map(|pair| bits(pair.first()) | bits(pair.get(1)) << 16).collect()
}

fn unpaired(words: &[u32]) -> Vec<bf16> {
    words.iter().flat_map(|word| [*word as u16, (word >> 16) as u16]).map(bf16::from_bits).collect()
}

fn assert_stream(bench: &mut Bench, stream: [Buffer; 2], expected: &[bf16], hidden: usize, what: &str) {
    let given = unpaired(&bench.read(stream[0], expected.len() / 2));
    let wrong = (0..expected.len()).find(|i| !same(given[*i].to_f32(), expected[*i].to_f32()));
    assert_eq!(wrong.map(|i| (i, given[i], expected[i])), None, "{what}");
    let segments = hidden.div_ceil(64);
    let sumsq = bench.read(stream[1], expected.len() / hidden * segments);
    for (token, row) in expected.chunks(hidden).enumerate() {
        for (i, segment) in row.chunks(64).enumerate() {
            let given = f32::from_bits(sumsq[token * segments + i]);
            assert!(same(given, squares(segment)), "{what}: squares of token {token}, segment {i}");
        }
    }
}

/// Four exchanges one behind the other, then as many that are recorded, twice: the residual stream is what the host makes it.
fn assert_reduces(ranks: u32, kernels: KernelSet, [tokens, hidden]: [usize; 2], ways: &[Way]) {
    if !can_be(ranks) {
        return;
    }
    // Room for one shot of whatever size.
    let (dims, limits) = (dims(hidden as u32, 64), limits(8 * tokens as u32));
    each(ranks, kernels, PATIENCE, (&dims, &limits), |link, bench| {
        let rank = link.rank();
        let what = format!("rank {} of {ranks}, {kernels:?}, {tokens} x {hidden}", rank.index);
        let elements = tokens * hidden;
        let own = sums(rank.index, elements).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let of_ranks: Vec<_> = (0..ranks).map(|rank| sums(rank, elements)).collect();
        let mut expected: Vec<bf16> = (0..elements).map(|i| bf16::from_f32(random(77, i))).collect();
        let sums = bench.holding(Element::Float, &own);
        let residual = bench.holding(Element::Activation, &pairs(&expected));
        let sumsq = bench.holding(Element::Float, &vec![u32::MAX; tokens * hidden.div_ceil(64)]);
        let stream = Stream { residual: residual.address(), sumsq: sumsq.address(), tokens: tokens as u32 };
        let four = |bench: &Bench, way| {
            bench.exchange.begin_step();
            // An even number: a step has two a layer.
            (0..4).try_for_each(|_| bench.reduce(sums, hidden as u32, stream, way))
        };
        let mut add = |times: usize| {
            for (i, x) in expected.iter_mut().enumerate() {
                let sum = tree(of_ranks.iter().map(|sums| sums[i]).collect());
                (0..times).for_each(|_| *x = bf16::from_f32(x.to_f32() + sum));
            }
            expected.clone()
        };
        for way in ways {
            let what = format!("{what}, {way:?}");
            // Allocating and recording wait for all kernels on a device, also for those that wait for this rank.
            meet(link);
            four(bench, *way).expect("launches");
            assert_stream(bench, [residual, sumsq], &add(4), hidden, &what);
            meet(link);
            bench.cuda.begin_capture().expect("a recording");
            let recorded = four(bench, *way);
            let graph = bench.cuda.end_capture().expect("a recording");
            recorded.expect("launches");
            meet(link);
            (0..2).for_each(|_| bench.cuda.replay(&graph).expect("a replay"));
            assert_stream(bench, [residual, sumsq], &add(8), hidden, &format!("{what}, recorded"));
            meet(link);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn sums_of_all_ranks_are_added_in_pairs_either_way_and_the_same_by_all() {
    for shape in taken([[1, 64], [3, 72], [7, 576], [5, 1000], [64, 1024], [130, 2560], [1, 8], [9, 5120]]) {
        for ranks in [2, 4, 8] {
            assert_reduces(ranks, KernelSet::Auto, shape, &[Way::OneShot, Way::TwoShot]);
        }
    }
    assert_reduces(2, KernelSet::Portable, [33, 1000], &[Way::OneShot, Way::TwoShot]);
    assert_reduces(4, KernelSet::Portable, [33, 1000], &[Way::TwoShot, Way::OneShot]);
}

#[test]
#[ignore = "needs a GPU"]
fn sums_of_many_tokens_are_added_likewise() {
    assert_reduces(2, KernelSet::Auto, [5000, 1024], &[Way::OneShot, Way::TwoShot]);
    assert_reduces(4, KernelSet::Auto, [9000, 1024], &[Way::TwoShot]);
}

/// Element `col` of the table's row `id`.
fn table(id: usize, col: usize) -> bf16 {
    bf16::from_f32(random(13, id * 8192 + col))
}

#[test]
#[ignore = "needs a GPU"]
fn every_rank_has_the_rows_of_the_one_that_has_them() {
    for (ranks, tokens, hidden, vocab) in taken([
        (2, 1, 64, 2),
        (4, 37, 1000, 103),
        (2, 300, 1024, 5000),
        (8, 77, 576, 1001),
        (2, 900, 5120, 999),
    ]) {
        if !can_be(ranks) {
            continue;
        }
        let (dims, limits) = (dims(hidden as u32, vocab as u32), limits(tokens as u32));
        let id = |token: usize| splitmix64(token as u64) as usize % vocab;
        each(ranks, KernelSet::Auto, PATIENCE, (&dims, &limits), |link, bench| {
            let rank = link.rank();
            let own: Vec<bf16> =
                rank.share(vocab).flat_map(|id| (0..hidden).map(move |col| table(id, col))).collect();
            let part = bench.holding(Element::Activation, &pairs(&own));
            let layout = Layout::new(&limits, 0);
            let mut words = vec![0; layout.words];
            let mut pool = vec![0; tokens + 1];
            let entries: Vec<Token> = (0..tokens)
                .map(|token| {
                    let (slot, location) = (token as u32, (tokens - token) as u32);
                    // Every third is known by its slot alone.
                    let known = if token % 3 == 2 { LAST_TOKEN } else { id(token) as u32 };
                    pool[token] = if token % 3 == 2 { id(token) as u32 } else { u32::MAX };
                    Token { id: known, slot, position: 0, location }
                })
                .collect();
            let entries: &[u32] = bytemuck::cast_slice(&entries);
            words[layout.tokens..][..entries.len()].copy_from_slice(entries);
            let batch = bench.holding(Element::Word, &words);
            let residual = bench.holding(Element::Activation, &vec![u32::MAX; tokens * hidden / 2]);
            let sumsq = bench.holding(Element::Float, &vec![u32::MAX; tokens * hidden.div_ceil(64)]);
            let none = bench.holding(Element::Word, &[0]);
            let step = Step {
                shape: StepShape::decode(tokens as u32),
                batch,
                layout,
                page_table: none,
                table_width: 4,
                page_size: 16,
                token_pool: bench.holding(Element::Word, &pool),
                slots: none,
                rules: none,
                history: bench.holding(Element::Word, &vec![u32::MAX; tokens + 1]),
                masks: none,
            };
            let stream =
                Stream { residual: residual.address(), sumsq: sumsq.address(), tokens: tokens as u32 };
            let expected: Vec<bf16> =
                (0..tokens).flat_map(|token| (0..hidden).map(move |col| table(id(token), col))).collect();
            let what = format!("rank {} of {ranks}, {tokens} x {hidden} of {vocab}", rank.index);
            for _ in 0..2 {
                meet(link);
                bench.exchange.embed(bench.cuda.launcher(), &step, part.address(), stream).expect("a launch");
                assert_stream(bench, [residual, sumsq], &expected, hidden, &what);
                let history = bench.read(step.history, tokens + 1);
                assert!((0..tokens).all(|token| history[tokens - token] == id(token) as u32), "{what}");
            }
        });
    }
}

/// Element `col` of row `row` of so many columns: of 16 bits, none a NaN.
fn column(row: usize, col: usize, columns: usize) -> u16 {
    (splitmix64((row * columns + col) as u64) % 0x7c00) as u16
}

/// A rank's share of the columns of so many rows, two elements a word.
fn share_of(rank: Rank, [rows, columns]: [usize; 2]) -> Vec<u32> {
    let share = rank.share(columns);
    let own = (0..rows).flat_map(|row| share.clone().map(move |col| column(row, col, columns)));
    let mut own: Vec<u16> = own.collect();
    own.resize(own.len().next_multiple_of(2), u16::MAX);
    own.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect()
}

/// `gather` makes all columns of what each rank has a share of, three times.
fn assert_gathered(
    bench: &mut Bench,
    link: &Link,
    [rows, columns]: [usize; 2],
    gather: impl Fn(&Bench, Address) -> Result<(), CudaError>,
) {
    let words = (rows * columns).div_ceil(2);
    for turn in 0..3 {
        let out = bench.holding(Element::Word, &vec![u32::MAX; words]);
        meet(link);
        gather(bench, out.address()).expect("a launch");
        let given = bench.read(out, words);
        let given: Vec<u16> = given.iter().flat_map(|word| [*word as u16, (word >> 16) as u16]).collect();
        let wrong = (0..rows * columns).find(|i| given[*i] != column(i / columns, i % columns, columns));
        let what = format!("{:?}, {rows} x {columns}, turn {turn}", link.rank());
        assert_eq!(wrong.map(|i| (i / columns, i % columns)), None, "{what}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_rank_has_all_columns_of_the_logits() {
    for (ranks, samples, vocab) in
        taken([(2, 1, 2), (2, 5, 103), (4, 33, 1001), (8, 7, 4099), (2, 64, 15_104), (4, 9, 151_936)])
    {
        if !can_be(ranks) {
            continue;
        }
        let (dims, limits) = (dims(64, vocab as u32), limits(samples as u32));
        each(ranks, KernelSet::Auto, PATIENCE, (&dims, &limits), |link, bench| {
            bench.words(&share_of(link.rank(), [samples, vocab]), bench.exchange.share());
            assert_gathered(bench, link, [samples, vocab], |bench, out| {
                bench.exchange.gather_logits(bench.cuda.launcher(), samples as u32, out)
            });
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_rank_has_all_columns_of_what_experts_have_within() {
    for (ranks, pairs, inner) in
        taken([(2, 8, 768), (4, 8 * 3, 64), (8, 8 * 9, 128), (2, 8 * 130, 768), (4, 8 * 2000, 768)])
    {
        if !can_be(ranks) {
            continue;
        }
        let (mut dims, limits) = (dims(64, 64), limits(pairs as u32 / 8));
        dims.intermediate = inner as u32;
        each(ranks, KernelSet::Auto, PATIENCE, (&dims, &limits), |link, bench| {
            let share = bench.holding(Element::Word, &share_of(link.rank(), [pairs, inner]));
            // The next word of the same part comes behind others that all ranks have from all: logits.
            let logits = bench.holding(Element::Word, &[0; 32]);
            assert_gathered(bench, link, [pairs, inner], |bench, out| {
                let (launcher, shape) = (bench.cuda.launcher(), [pairs as u32, inner as u32]);
                bench.exchange.gather_inner(launcher, shape, share.address(), out)?;
                bench.exchange.gather_logits(launcher, 1, logits.address())
            });
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_rank_has_what_each_made_of_its_columns_of_the_residual_stream() {
    for (ranks, tokens, hidden) in
        taken([(2, 1, 128), (8, 3, 512), (4, 77, 1024), (8, 130, 5120), (8, 900, 1024)])
    {
        if !can_be(ranks) {
            continue;
        }
        let (dims, limits) = (dims(hidden as u32, 64), limits(tokens as u32));
        each(ranks, KernelSet::Auto, PATIENCE, (&dims, &limits), |link, bench| {
            let (rank, elements) = (link.rank(), tokens * hidden);
            let what = format!("rank {} of {ranks}, {tokens} x {hidden}", rank.index);
            let before: Vec<bf16> = (0..elements).map(|i| bf16::from_f32(random(5, i))).collect();
            // Some are no numbers, one is what an inbox is empty by.
            let after: Vec<bf16> = (0..elements)
                .map(|i| if i % 89 < 2 { bf16::from_bits(u16::MAX) } else { bf16::from_f32(random(6, i)) })
                .collect();
            let own = |stream: &[bf16]| -> Vec<bf16> {
                stream.chunks(hidden).flat_map(|row| row[rank.share(hidden)].iter().copied()).collect()
            };
            let residual = bench.holding(Element::Activation, &pairs(&before));
            let sumsq = bench.holding(Element::Float, &vec![u32::MAX; elements / 64]);
            let columns = bench.holding(Element::Activation, &vec![0; elements / 2 / ranks as usize]);
            let stream =
                Stream { residual: residual.address(), sumsq: sumsq.address(), tokens: tokens as u32 };
            bench.exchange.own_columns(bench.cuda.launcher(), columns.address(), stream).expect("a launch");
            let given = unpaired(&bench.read(columns, elements / 2 / ranks as usize));
            assert!(given == own(&before), "{what}: its own");
            bench.words(&pairs(&own(&after)), columns);
            meet(link);
            bench.exchange.begin_step();
            // An even number, in turns of two places.
            for _ in 0..4 {
                let launcher = bench.cuda.launcher();
                bench.exchange.join_columns(launcher, columns.address(), stream).expect("a launch");
            }
            meet(link);
            assert_stream(bench, [residual, sumsq], &after, hidden, &what);
            meet(link);
        });
    }
}

/// What a product of ranks that share its rows adds to the residual stream, twice, beside what one rank does with the whole matrix.
fn assert_shared_rows(ranks: u32, [tokens, hidden, cols]: [usize; 3]) {
    if !can_be(ranks) {
        return;
    }
    let (mut dims, limits) = (dims(hidden as u32, 64), limits(tokens as u32));
    dims.intermediate = (cols / ranks as usize) as u32;
    each(ranks, KernelSet::Auto, PATIENCE, (&dims, &limits), |link, bench| {
        let rank = link.rank();
        let what = format!("rank {} of {ranks}, {tokens} x {cols} x {hidden}", rank.index);
        let gemm = Gemm::new(&mut bench.cuda).expect("kernels");
        let shared = SharedRows::new(&mut bench.cuda, &dims, tokens).expect("memory");
        let shared = shared.unwrap_or_else(|| panic!("{what}: rows are shared"));
        let data = TensorData::Uniform { seed: 3, low: -0.1, high: 0.1 };
        let w = HostTensor { name: "w".into(), rows: hidden, cols, data };
        let own = w.window(rank.share(hidden), 0..cols);
        let slices = SLICING.slices(cols);
        let load = |bench: &mut Bench, role, tensor: &HostTensor| {
            bench.cuda.load_weight(role, std::slice::from_ref(tensor)).expect("memory")
        };
        let whole = load(bench, WeightRole::Sliced(slices), &w);
        let own = load(bench, WeightRole::SlicedRows(slices), &own);
        let bf16s =
            |seed, count: usize| (0..count).map(|i| bf16::from_f32(random(seed, i))).collect::<Vec<_>>();
        let (x, before) = (bf16s(21, tokens * cols), bf16s(22, tokens * hidden));
        let columns: Vec<bf16> =
            x.chunks(cols).flat_map(|row| row[rank.share(cols)].iter().copied()).collect();
        let stream = |bench: &mut Bench| {
            let residual = bench.holding(Element::Activation, &pairs(&before));
            let sumsq = bench.holding(Element::Float, &vec![u32::MAX; tokens * hidden / 64]);
            [residual, sumsq]
        };
        let ([alone, alone_sumsq], given) = (stream(bench), stream(bench));
        let (x, columns) = (
            bench.holding(Element::Activation, &pairs(&x)),
            bench.holding(Element::Activation, &pairs(&columns)),
        );
        let added = Residual { residual: alone.address(), sumsq: alone_sumsq.address() };
        let inputs = |buffer: Buffer| Rows { address: buffer.address(), there: tokens as u32 };
        let count = tokens as u32;
        for _ in 0..2 {
            let launcher = bench.cuda.launcher();
            gemm.launch(launcher, whole, inputs(x), count, SmShare::Whole, &added).expect("a launch");
        }
        let expected = unpaired(&bench.read(alone, tokens * hidden / 2));
        meet(link);
        bench.exchange.begin_step();
        let [residual, sumsq] = given;
        let stream = Stream { residual: residual.address(), sumsq: sumsq.address(), tokens: count };
        for _ in 0..2 {
            let (launcher, by) = (bench.cuda.launcher(), (&gemm, &bench.exchange));
            shared.add(launcher, by, own, inputs(columns), stream).expect("launches");
        }
        // Reading takes pinned memory, which waits for kernels that others have not launched yet.
        meet(link);
        assert_stream(bench, given, &expected, hidden, &what);
        meet(link);
    });
}

#[test]
#[ignore = "needs two GPUs"]
fn products_whose_rows_ranks_share_have_the_bits_of_the_whole_one() {
    // Products take places early, which ranks of one device would need for what they send.
    if device_count().expect("a driver") < 2 {
        eprintln!("skipped: two GPUs are needed");
        return;
    }
    // An odd number of blocks of columns, so that two ranks have no slices of their own.
    for shape in taken([
        [1, 512, 320],
        [33, 1024, 192],
        [128, 256, 960],
        [700, 512, 1600],
        [4100, 1024, 320],
        [5, 128, 320],
    ]) {
        assert_shared_rows(2, shape);
    }
}

/// Sums of zeros, and what they are added to.
fn zeros(bench: &mut Bench, dims: &Dims, tokens: usize) -> (Buffer, Stream) {
    let hidden = dims.hidden as usize;
    let sums = bench.holding(Element::Float, &vec![0; tokens * hidden]);
    let residual = bench.holding(Element::Activation, &vec![0; tokens * hidden / 2]);
    let sumsq = bench.holding(Element::Float, &vec![0; tokens * hidden.div_ceil(64)]);
    (sums, Stream { residual: residual.address(), sumsq: sumsq.address(), tokens: tokens as u32 })
}

/// Rank 1 comes to none of so many exchanges. All ranks know who did not come, in bounded time.
fn assert_missed(exchanges: usize, tokens: usize, way: Way) {
    const PATIENCE: Duration = Duration::from_secs(2);
    let (dims, limits) = (dims(1024, 64), limits(2 * tokens as u32));
    let found = each(2, KernelSet::Auto, PATIENCE, (&dims, &limits), |link, bench| {
        let (sums, stream) = zeros(bench, &dims, tokens);
        meet(link);
        let started = Instant::now();
        if link.rank().index == 0 {
            (0..exchanges).try_for_each(|_| bench.reduce(sums, 1024, stream, way)).expect("launches");
        }
        let mut found = bench.cuda.synchronize();
        while found.is_ok() && started.elapsed() < 4 * PATIENCE {
            thread::sleep(Duration::from_millis(10));
            found = bench.cuda.synchronize();
        }
        let took = started.elapsed();
        assert!(took < 3 * PATIENCE, "{exchanges} exchanges of {tokens} tokens, {way:?}: {took:?}");
        found
    });
    let late = || Err(CudaError::RankLate { rank: 1, seconds: PATIENCE.as_secs_f32() });
    assert_eq!(found, [late(), late()], "{exchanges} exchanges of {tokens} tokens, {way:?}");
}

#[test]
#[ignore = "needs a GPU"]
fn who_does_not_come_is_named_in_bounded_time_however_much_is_missing() {
    // By kernels that wait, as NCCL's don't.
    if is_carried() {
        return;
    }
    assert_missed(50, 64, Way::OneShot);
    // Dozens of words a thread in each, as in a step of many tokens.
    for way in [Way::OneShot, Way::TwoShot] {
        assert_missed(160, 16_384, way);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn who_waits_is_called_back_and_may_meet_the_others_again() {
    let (dims, limits) = (dims(1024, 64), limits(64));
    let links = Link::group(&devices(2), KernelSet::Auto, PATIENCE).expect("GPUs that reach each other");
    let (abort, renew) = (links[0].aborter(), links[0].renewer());
    // Who fails drops its ends, and nobody waits for it.
    let rank = |link: Link, done: Sender<()>, go_on: Receiver<()>| {
        let mut bench = Bench::new(&link, &dims, &limits);
        let (sums, stream) = zeros(&mut bench, &dims, 64);
        let next = || {
            done.send(()).expect("the test goes on");
            go_on.recv().expect("no other rank has failed");
        };
        next();
        if link.rank().index == 1 {
            bench.reduce(sums, 1024, stream, Way::OneShot).expect("a launch");
            let started = Instant::now();
            assert_eq!(bench.cuda.synchronize(), Err(CudaError::RanksEnded));
            assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        }
        // Both may meet again, as if nothing had been.
        next();
        bench.exchange.begin_step();
        (0..4).try_for_each(|_| bench.reduce(sums, 1024, stream, Way::OneShot)).expect("launches");
        assert_eq!(bench.cuda.synchronize(), Ok(()));
    };
    thread::scope(|scope| {
        let rank = &rank;
        let ends = links.into_iter().map(|link| {
            let ((done, is_done), (go_on, goes_on)) = (channel(), channel());
            scope.spawn(move || rank(link, done, goes_on));
            (is_done, go_on)
        });
        let ends: Vec<(Receiver<()>, Sender<()>)> = ends.collect();
        let all = |then: &dyn Fn()| {
            ends.iter().for_each(|(is_done, _)| is_done.recv().expect("no rank has failed"));
            then();
            ends.iter().for_each(|(_, go_on)| go_on.send(()).expect("no rank has failed"));
        };
        all(&|| ());
        thread::sleep(Duration::from_millis(300));
        abort();
        all(&renew);
    });
}
