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
use minisgl_core::fit::Fit;
use minisgl_core::local::Local;
use minisgl_core::request::{Event, Request};
use minisgl_core::scheduler::{Order, Settings};
use minisgl_cpu::{Cpu, CpuError, Link};
use minisgl_decoder::{Decoder, LoadError};
use minisgl_ranks::Ranks;

type Device = Faulty<Cpu>;

/// Of the requests that run.
const PROMPTS: [&[u32]; 3] = [&[1, 2, 3], &[5; 40], &[7, 8]];

/// The tests look at this process's threads, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

type Rank = Local<Device, Decoder<Device>>;
type Failure = <Ranks<Rank> as Executor>::Error;

/// Ranks over devices that may be told to fail; who waits for one gives up after `patience`.
fn executor(ranks: u32, patience: Duration) -> Ranks<Rank> {
    let checkpoint = checkpoint(&fixture("tiny-tied"));
    let links = Link::group(ranks, patience);
    let (abort, renew) = (links[0].aborter(), links[0].renewer());
    let builder = |link: Link| {
        let (rank, checkpoint) = (link.rank(), checkpoint.clone());
        move || {
            let mut device = Faulty::new(Cpu::of_rank(1, link));
            let model = Decoder::load_part(&mut device, &checkpoint, rank)?;
            Ok::<_, LoadError<FaultyError<CpuError>>>(Local::new(device, model))
        }
    };
    Ranks::start(links.into_iter().map(builder).collect(), patience, abort, renew).unwrap()
}

/// Lets a rank's operation behind `well` others become what `fault` says.
fn arm(executor: &Ranks<Rank>, faulty: u32, well: u64, fault: Fault) {
    let arm = move |rank: &mut Rank| {
        if rank.backend().device.rank().index == faulty {
            rank.backend().arm(well, fault);
        }
        Ok(())
    };
    executor.each(arm).unwrap();
}

/// An engine with the pages that are asked for, or as many as fit.
fn engine(executor: Ranks<Rank>, fit: Option<Fit>) -> Result<Engine<Ranks<Rank>>, EngineError<Failure>> {
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
    let options = EngineOptions { limits, fit, scheduler, eos: Vec::new(), overlap: true };
    Engine::of(executor, options)
}

/// Lets a rank fail, and runs requests until that is found; what is said of it.
fn found(ranks: u32, faulty: u32, well: u64, fault: Fault, patience: Duration) -> String {
    let mut engine = engine(executor(ranks, patience), None).unwrap();
    arm(engine.executor(), faulty, well, fault);
    for prompt in PROMPTS {
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

/// What requests draw, those of [`PROMPTS`] in their order.
fn drawn(engine: &mut Engine<Ranks<Rank>>) -> Vec<Vec<u32>> {
    let tickets = PROMPTS.map(|prompt| engine.submit(Request::new(prompt, greedy(60))).unwrap());
    let mut drawn = vec![Vec::new(); PROMPTS.len()];
    while !engine.is_idle() {
        let mut take = |event: Event<'_>| {
            if let Event::Finished { ticket, tokens, .. } = event {
                let of = tickets.iter().position(|submitted| submitted.ticket == ticket).unwrap();
                drawn[of] = tokens.to_vec();
            }
        };
        engine.step(&mut take).unwrap();
    }
    drawn
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
fn a_rank_whose_memory_runs_out_while_pages_and_steps_are_made_ready_gets_fewer_pages() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let patience = Duration::from_secs(60);
    let expected = drawn(&mut engine(executor(2, patience), None).unwrap());
    let fit = Fit { share: 1.0, least: 8 };
    let mut recovered = 0;
    for well in (0..).step_by(5) {
        let (executor, faulty) = (executor(2, patience), (well % 2) as u32);
        arm(&executor, faulty, well, Fault::RunsOut);
        match engine(executor, Some(fit)) {
            Ok(engine) if engine.limits().pages == 32 => break, // Nothing comes so late.
            Ok(mut engine) => {
                recovered += 1;
                let pages = engine.limits().pages;
                assert!(pages >= fit.least && pages < 32, "{pages} pages");
                assert_eq!(drawn(&mut engine), expected, "rank {faulty} ran out after {well} operations");
                engine.check();
            }
            // What is planned before the pages is not planned anew, and what steps cost is not measured again.
            Err(error) => {
                let said = error.to_string();
                assert!(matches!(error, EngineError::Setup(_)), "{well}: {said}");
                assert!(said.contains(&format!("rank {faulty}: no memory is left")), "{well}: {said}");
            }
        }
    }
    assert!(recovered > 5, "{recovered} engines had fewer pages");
    // A number of pages that is asked for is not lowered.
    let executor = executor(2, patience);
    arm(&executor, 1, 40, Fault::RunsOut);
    let said = engine(executor, None).err().unwrap().to_string();
    assert!(said.contains("rank 1") && said.contains("no memory is left"), "{said}");
    assert!(rank_threads_end());
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
    let (abort, renew) = (links[0].aborter(), links[0].renewer());
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
    let executor =
        Ranks::start(links.into_iter().map(builder).collect(), Duration::from_secs(60), abort, renew);
    let said = executor.err().unwrap().to_string();
    assert!(said.contains("rank 1") && said.contains("call reserve"), "{said}");
    assert!(rank_threads_end(), "the other rank goes on");
}
