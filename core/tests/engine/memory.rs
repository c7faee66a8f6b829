//! How many pages memory holds.

use minisgl_core::backend::Device;
use minisgl_core::config::{Limits, LimitsError};
use minisgl_core::engine::{Engine, EngineError, EngineOptions};
use minisgl_core::executor::Executor;
use minisgl_core::fit::Fit;
use minisgl_core::local::Local;

use super::{expected_tokens, prompt, tokens};
use crate::support::expected::VOCAB;
use crate::support::hashing::Hashing;
use crate::support::lazy::{Lazy, LazyError, Pace};
use crate::support::{SMALL, exactly, options, run_all};

/// A device of so many words whose recorded steps take 7 words each, and pages as many as it holds, 6 at least.
fn fitted(words: usize) -> Result<Engine<Local<Lazy, Hashing>>, EngineError<LazyError>> {
    let mut device = Lazy::new(Pace::AtOnce);
    (device.memory_limit, device.graph_words) = (words, 7);
    let fit = Some(Fit { share: 0.95, least: 6 });
    Engine::new(device, Hashing::default(), EngineOptions { fit, ..options(SMALL) })
}

#[test]
fn pages_are_as_many_as_memory_holds_beside_everything_else_however_little_there_is() {
    let enough = (0..).find(|words| fitted(*words).is_ok()).expect("some number suffices");
    let roomy = fitted(enough + 10_000).expect("that is more");
    assert_eq!(roomy.limits().pages, SMALL.pages, "no more than are asked for");
    let mut most = 0;
    for words in enough..enough + 400 {
        let mut engine =
            fitted(words).unwrap_or_else(|error| panic!("of {words} words, {enough} do: {error}"));
        let (pages, free) = (engine.limits().pages, engine.backend().memory().expect("it has").free / 4);
        assert!(
            pages >= 6 && free < 4 * 7 * 3 + u64::from(pages) / 2,
            "{pages} pages, {free} words to spare"
        );
        most = most.max(pages);
        let requests: Vec<_> = (0..3).map(|text| (prompt(text, 8), exactly(10))).collect();
        assert_eq!(tokens(run_all(&mut engine, &requests)), expected_tokens(&requests, &SMALL));
    }
    assert!(most > 50, "{most} pages");
    match fitted(enough - 1).map(|_| ()) {
        Err(EngineError::Pages { least: 6, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn pages_take_their_share_of_the_memory_though_more_could_be_addressed() {
    let pages = |share| {
        let mut device = Lazy::new(Pace::AtOnce);
        device.memory_limit = 50_000;
        let (fit, limits) =
            (Some(Fit { share, least: 1 }), Limits { pages: u32::MAX / SMALL.page_size - 1, ..SMALL });
        let engine = Engine::new(device, Hashing::default(), EngineOptions { fit, ..options(limits) });
        engine.expect("memory suffices").limits().pages
    };
    let (all, half) = (pages(1.0), pages(0.5));
    assert!(all > 1000 && all.abs_diff(2 * half) <= 3, "{all} pages, and of half the memory {half}");
}

#[test]
fn pages_go_with_the_steps_that_were_recorded_on_them() {
    let mut device = Lazy::new(Pace::AtOnce);
    (device.memory_limit, device.graph_words) = (1 << 20, 7);
    let mut executor = Local::new(device, Hashing::default());
    executor.reserve(&SMALL).expect("memory suffices");
    let free = |executor: &Local<Lazy, Hashing>| executor.memory().expect("it has").free;
    let before = free(&executor);
    for _ in 0..2 {
        executor.alloc_pages(&SMALL).expect("memory suffices");
        let with_pages = free(&executor);
        executor.record(&SMALL).map_err(|error| error.source).expect("memory suffices");
        assert_eq!(free(&executor), with_pages - 4 * 7 * 3, "steps of 1, 2 and 4 rows");
        executor.free_pages().expect("the device does not fail");
        assert_eq!(free(&executor), before);
    }
}

#[test]
fn capacities_that_make_no_engine_are_refused_with_the_reason() {
    let build = |change: fn(&mut Limits)| {
        let mut limits = SMALL;
        change(&mut limits);
        Engine::new(Lazy::new(Pace::Late), Hashing::default(), options(limits)).map(|_| ())
    };
    assert!(build(|_| ()).is_ok() && build(|limits| limits.sequence = 4096).is_ok());
    let pages = build(|limits| limits.pages = 0);
    assert!(matches!(pages, Err(EngineError::Limits(LimitsError::Zero("number of pages")))));
    let size = build(|limits| limits.page_size = 12);
    assert!(matches!(size, Err(EngineError::Limits(LimitsError::PageSize(12)))));
    let sequence = build(|limits| limits.sequence = 5000);
    assert!(matches!(sequence, Err(EngineError::Sequence { sequence: 5000, max_positions: 4096 })));
    let mut wide = options(SMALL);
    wide.scheduler.vocab = VOCAB + 1;
    let wide = Engine::new(Lazy::new(Pace::Late), Hashing::default(), wide).map(|_| ());
    assert!(matches!(wide, Err(EngineError::Vocabulary { .. })));
}
