//! Ranks of which one fails, panics or hangs, anywhere in a step: all end, with the cause named, and no thread is left.

mod common;
#[path = "../core/tests/support/fault.rs"]
mod fault;

use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use common::logits::checkpoint;
use common::{Numbers, fixture, greedy};
use fault::{Fault, Faulty, FaultyError};
use minisgl::{Policy, Speculation};
use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, EngineError, EngineOptions};
use minisgl_core::executor::Executor;
use minisgl_core::local::Local;
use minisgl_core::request::Request;
use minisgl_core::scheduler::{Order, Settings};
use minisgl_cpu::{Cpu, CpuError, Link};
use minisgl_decoder::{Decoder, LoadError};
use minisgl_ranks::Ranks;

type Device = Faulty<Cpu>;

/// The tests look at this process's threads, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

/// An engine of ranks over devices that may be told to fail; who waits for a rank gives up after `patience`.
fn engine(ranks: u32, patience: Duration) -> Engine<Ranks<Local<Device, Decoder<Device>>>> {
    let checkpoint = checkpoint(&fixture("tiny-tied"));
    let links = Link::group(ranks, patience);
    let abort = links[0].aborter();
    let builder = |link: Link| {
        let (rank, checkpoint) = (link.rank(), checkpoint.clone());
        move || {
            let mut device = Faulty::new(Cpu::of_rank(1, link));
            let model = Decoder::load_part(&mut device, &checkpoint, rank)?;
            Ok::<_, LoadError<FaultyError<CpuError>>>(Local::new(device, model))
        }
    };
    let executor = Ranks::start(links.into_iter().map(builder).collect(), patience, abort).unwrap();
    let (running, sequence, pages) = (4, 128, 32);
    let limits =
        Limits { running, queued: 8, sequence, prefill_tokens: 32, page_size: 16, pages, graph_rows: 4 };
    let scheduler = Settings {
        policy: Policy::Throughput,
        prefix_cache: true,
        order: Order::Given,
        speculation: Speculation::Never,
        vocab: executor.model().vocab,
    };
    let options = EngineOptions { limits, fit: None, scheduler, eos: Vec::new(), overlap: true };
    Engine::of(executor, options).unwrap()
}

/// Lets a rank's operation behind `well` others become what `fault` says, and runs requests until that is found; what is said of
/// it.
fn found(ranks: u32, faulty: u32, well: u64, fault: Fault, patience: Duration) -> String {
    let mut engine = engine(ranks, patience);
    let arm = move |rank: &mut Local<Device, Decoder<Device>>| {
        if rank.backend().device.rank().index == faulty {
            rank.backend().arm(well, fault);
        }
        Ok(())
    };
    engine.executor().each(arm).unwrap();
    for prompt in [&[1, 2, 3][..], &[5; 40], &[7, 8]] {
        engine.submit(Request::new(prompt, greedy(60))).unwrap();
    }
    let error = loop {
        assert!(
            !engine.is_idle(),
            "nothing was found of {fault:?} on rank {faulty}, after {well} operations"
        );
        if let Err(error) = engine.step(&mut |_| ()) {
            break error;
        }
    };
    assert!(matches!(error, EngineError::Step { .. }), "{error:?}");
    assert!(matches!(engine.step(&mut |_| ()), Err(EngineError::Stopped)));
    engine.check();
    error.to_string()
}

/// Do all threads of ranks end? One that was joined is listed a moment longer.
fn rank_threads_end() -> bool {
    (0..500).any(|_| {
        rank_threads() == 0 || {
            std::thread::sleep(Duration::from_millis(20));
            false
        }
    })
}

/// Threads of ranks that there are.
fn rank_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("minisgl-rank")).count()
}

#[test]
fn a_rank_that_fails_or_panics_anywhere_in_a_step_ends_all_with_its_error() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut numbers = Numbers(3);
    for round in 0..24 {
        let ranks = [2, 4][round % 2];
        let (faulty, well) = (numbers.below(u64::from(ranks)) as u32, numbers.below(200));
        let fault = if round % 3 == 0 { Fault::Panics } else { Fault::Fails };
        let said = found(ranks, faulty, well, fault, Duration::from_secs(60));
        let named = said.contains(&format!("rank {faulty}")) && said.contains("on purpose");
        assert!(named, "rank {faulty} of {ranks}, {fault:?} after {well}: {said}");
        assert!(
            rank_threads_end(),
            "{fault:?} on rank {faulty} after {well} operations leaves a thread behind"
        );
    }
}

#[test]
fn a_rank_that_hangs_is_named_by_those_who_wait_for_it() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Within a step, and when nothing is left of it that is done together.
    for (faulty, well) in [(1, 9), (0, 70)] {
        let hangs = Fault::Hangs(Duration::from_secs(7));
        let said = found(2, faulty, well, hangs, Duration::from_secs(3));
        assert!(said.contains(&format!("rank {faulty} ")) && said.contains("within 3 s"), "{said}");
        assert!(said.contains("did not"), "{said}");
        assert!(rank_threads_end());
    }
}

#[test]
fn a_rank_that_cannot_be_built_is_named_and_the_others_end() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let checkpoint = checkpoint(&fixture("tiny-tied"));
    let links = Link::group(2, Duration::from_secs(60));
    let abort = links[0].aborter();
    let builder = |link: Link| {
        let (rank, checkpoint) = (link.rank(), checkpoint.clone());
        move || {
            let mut device = Cpu::of_rank(1, link);
            let model = Decoder::load_part(&mut device, &checkpoint, rank)?;
            match rank.index {
                0 => Ok(Local::new(device, model)),
                _ => Err(LoadError::Device(CpuError::NotReserved)),
            }
        }
    };
    let executor = Ranks::start(links.into_iter().map(builder).collect(), Duration::from_secs(60), abort);
    let said = executor.err().unwrap().to_string();
    assert!(said.contains("rank 1") && said.contains("call reserve"), "{said}");
    assert!(rank_threads_end(), "the other rank goes on");
}
