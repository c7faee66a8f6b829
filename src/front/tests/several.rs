//! Promises of several engines behind one queue, simulated.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use minisgl_core::config::Limits;
use minisgl_core::scheduler::Order;
use minisgl_core::stats::Load;
use minisgl_decoder::Checkpoint;

use super::{post, slow};
use crate::error::Error;
use crate::front::{Front, Next, SessionEvent, SessionOptions};
use crate::models::FAMILIES;
use crate::pooling::Pooling;
use crate::request::{Completion, FinishReason, GenerateRequest, RequestError, SamplingParams};
use crate::runner::Runner;
use crate::simulated::{Control, LIMITS, request, start_engines};

fn engines(controls: impl IntoIterator<Item = Control>) -> (Front, Vec<Arc<Control>>) {
    let controls: Vec<_> = controls.into_iter().map(Arc::new).collect();
    (start_engines(controls.clone(), Arc::default(), Order::Given).unwrap(), controls)
}

/// Of an engine that runs as many at once as there are.
const DEEP: Limits = Limits { running: 512, ..LIMITS };

fn deep_engines() -> (Front, Vec<Arc<Control>>) {
    engines((0..2).map(|_| Control { limits: DEEP, ..Control::default() }))
}

fn admitted(control: &Control) -> Vec<u32> {
    control.admitted.lock().unwrap().clone()
}

/// Completions by tag, and how the session ended.
fn run(front: &Front, requests: Vec<GenerateRequest>) -> (Vec<Option<Completion>>, Result<(), Error>) {
    let mut completions = vec![None; requests.len()];
    let options = SessionOptions { capacity: Some(requests.len()), ..SessionOptions::default() };
    let (mut submitter, mut events) = front.handle().session(options);
    submitter.submit_all((0..).zip(requests)).unwrap();
    drop(submitter);
    loop {
        match events.next_timeout(Duration::from_secs(60)) {
            Ok(Next::Event(SessionEvent::Finished { tag, completion, .. })) => {
                completions[tag as usize] = Some(*completion);
            }
            Ok(Next::Event(_)) => {}
            Ok(Next::Over) => return (completions, Ok(())),
            Ok(Next::TimedOut) => panic!("a request waits for ever"),
            Err(error) => return (completions, Err(error)),
        }
    }
}

/// What each engine has admitted when all of these requests run, which go on until they are aborted.
fn spread(front: &Front, controls: &[Arc<Control>], requests: Vec<GenerateRequest>) -> Vec<Vec<u32>> {
    let count = requests.len() as u64;
    let options = SessionOptions { capacity: Some(requests.len()), ..SessionOptions::default() };
    let (mut submitter, mut events) = front.handle().session(options);
    submitter.submit_all((0..).zip(requests)).unwrap();
    drop(submitter);
    let running = || controls.iter().map(|control| control.running.load(Ordering::Relaxed)).sum::<u64>();
    while running() < count {
        std::thread::yield_now();
    }
    assert_eq!(u64::from(front.handle().load().unwrap().running), count, "all engines are counted");
    let spread = controls.iter().map(|control| std::mem::take(&mut *control.admitted.lock().unwrap()));
    let spread = spread.collect();
    events.abort_all();
    assert_eq!(
        events.filter(|event| matches!(event, Ok(SessionEvent::Finished { .. }))).count() as u64,
        count
    );
    spread
}

/// An engine is at work until what this gives is dropped.
fn keep_at_work(front: &Front, engine: usize) -> Sender<()> {
    let (begun, is_at_work) = channel();
    let (end, ended) = channel::<()>();
    post(front, engine, false, move |_| {
        begun.send(()).unwrap();
        let _ = ended.recv();
    });
    is_at_work.recv().unwrap();
    end
}

#[test]
fn requests_are_spread_over_idle_engines() {
    let (front, controls) = engines((0..3).map(|_| slow()));
    let admitted = spread(&front, &controls, (0..9).map(|i| request(i, 90_000)).collect());
    assert_eq!(admitted.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 3]);
}

#[test]
fn engines_have_as_much_work_each_however_it_comes() {
    let orders: [fn(u32) -> bool; 3] = [|i| i < 20, |i| i >= 20, |i| i % 2 == 0];
    for is_heavy in orders {
        let (front, controls) = engines((0..2).map(|_| Control { limits: DEEP, ..slow() }));
        let requests = (0..40).map(|i| request(i, if is_heavy(i) { 90_000 } else { 45_000 })).collect();
        let heavy = spread(&front, &controls, requests).into_iter().map(|admitted| {
            assert_eq!(admitted.len(), 20);
            admitted.into_iter().filter(|first| is_heavy(*first)).count()
        });
        assert!(heavy.clone().all(|heavy| (9..=11).contains(&heavy)), "{:?}", heavy.collect::<Vec<_>>());
    }
}

#[test]
fn max_tokens_beyond_a_sequence_are_no_work() {
    let limits = Limits { running: 512, sequence: 20, ..LIMITS };
    let (front, controls) = engines((0..2).map(|_| Control { limits, ..Control::default() }));
    // The second one is at work for as long as this test likes.
    let end = keep_at_work(&front, 1);
    // The first ones ask for all that they can get. None of them gets more than the others, so none is overtaken.
    let tokens = |i: u32| if i < 8 { u32::MAX } else { 19 };
    let (completions, outcome) = run(&front, (0..100).map(|i| request(i, tokens(i))).collect());
    outcome.unwrap();
    assert!(completions.into_iter().all(|completion| completion.unwrap().token_ids.len() == 19));
    assert_eq!(admitted(&controls[0]), (0..100).collect::<Vec<_>>());
    drop(end);
}

#[test]
fn no_request_is_overtaken_by_many_for_its_weight() {
    let (front, controls) = deep_engines();
    // The second one is at work for as long as this test likes. The first has a request that outweighs many, then one that would
    // leave it with yet more.
    let end = keep_at_work(&front, 1);
    let tokens = |i: u32| match i {
        0 => 400,
        1 => 20,
        _ => 3,
    };
    let (completions, outcome) = run(&front, (0..300).map(|i| request(i, tokens(i))).collect());
    outcome.unwrap();
    assert!(completions.iter().all(Option::is_some));
    let order = admitted(&controls[0]);
    let place = order.iter().position(|first| *first == 1).unwrap();
    assert!((2..=65).contains(&place), "{order:?}");
    drop(end);
}

#[test]
fn a_session_does_not_wait_for_the_weight_of_another() {
    let (front, controls) = deep_engines();
    // Both are at work while two sessions come; then the first takes what waits.
    let [first, second] = [0, 1].map(|engine| keep_at_work(&front, engine));
    let session = |requests: Vec<GenerateRequest>| {
        let options = SessionOptions { capacity: Some(requests.len()), ..SessionOptions::default() };
        let (mut submitter, events) = front.handle().session(options);
        submitter.submit_all((0..).zip(requests)).unwrap();
        events
    };
    // A file whose first request outweighs all others, and a question that is heavier than most.
    let tokens = |i: u32| if i == 0 { 400 } else { 3 };
    let sessions =
        [session((0..200).map(|i| request(i, tokens(i))).collect()), session(vec![request(1000, 100)])];
    drop(first);
    for mut events in sessions {
        while !matches!(events.next_timeout(Duration::from_secs(60)), Ok(Next::Over)) {}
    }
    let order = admitted(&controls[0]);
    let place = order.iter().position(|first| *first == 1000).unwrap();
    assert!(place <= 2, "{order:?}");
    drop(second);
}

#[test]
fn who_is_free_takes_the_next() {
    let (front, controls) = engines((0..2).map(|_| Control::default()));
    // The first one is at work for as long as this test likes.
    let end = keep_at_work(&front, 0);
    let (completions, outcome) = run(&front, (0..100).map(|i| request(10 * i, 3)).collect());
    outcome.unwrap();
    for (i, completion) in (0..).zip(completions) {
        assert_eq!(completion.unwrap().token_ids, [10 * i, 10 * i + 1, 10 * i + 2]);
    }
    assert_eq!([&controls[0], &controls[1]].map(|control| admitted(control).len()), [0, 100]);
    drop(end);
    let (_, outcome) = run(&front, (0..4).map(|i| request(i, 3)).collect());
    outcome.unwrap();
    let steps: u64 = controls.iter().map(|control| control.steps.load(Ordering::Relaxed)).sum();
    assert_eq!(front.handle().stats().unwrap().decode_steps, steps, "all engines are counted");
}

#[test]
fn prompts_that_begin_alike_go_to_one_engine_as_far_as_that_has_its_share() {
    let prompt = |group: u32, i: u32| {
        let tokens = std::iter::repeat_n(group, 80).chain([i]);
        let sampling = SamplingParams { max_tokens: 90_000, ..SamplingParams::default() };
        GenerateRequest::tokens(tokens.collect::<Vec<_>>()).sampling(sampling)
    };
    let (front, controls) = engines((0..2).map(|_| slow()));
    let groups = spread(&front, &controls, (0..8).map(|i| prompt(1 + i % 2, i)).collect());
    for group in &groups {
        assert!(group.len() == 4 && group.iter().all(|one| one == &group[0]), "{groups:?}");
    }
    // They are known again.
    let again = spread(&front, &controls, (0..8).map(|i| prompt(2 - i % 2, i)).collect());
    assert_eq!(again, groups);
    // One group alone is everybody's.
    assert_eq!(spread(&front, &controls, (0..8).map(|i| prompt(9, i)).collect()), [[9; 4]; 2]);
}

#[test]
fn a_prompt_is_left_to_the_engine_that_has_its_beginning_while_that_may_take_it() {
    let prompt = |group: u32, max_tokens| {
        let sampling = SamplingParams { max_tokens, ..SamplingParams::default() };
        GenerateRequest::tokens(vec![group; 80]).sampling(sampling)
    };
    let (front, controls) = engines((0..2).map(|_| Control::default()));
    run(&front, vec![prompt(1, 2)]).1.unwrap();
    let home = usize::from(admitted(&controls[0]).is_empty());
    // That one is at work for as long as this test likes, and has its share to come: also of the heavier ones, which are the other's.
    let end = keep_at_work(&front, home);
    let alike = front.handle().submit(prompt(1, 50)).unwrap();
    assert!(front.handle().submit(prompt(2, 2)).unwrap().last().unwrap().is_ok());
    assert_eq!(admitted(&controls[1 - home]).len(), 1);
    drop(end);
    assert!(alike.last().unwrap().is_ok());
    assert_eq!([home, 1 - home].map(|engine| admitted(&controls[engine]).len()), [2, 1]);
}

#[test]
fn an_engine_that_sleeps_beside_what_is_anothers_is_woken_when_that_one_has_its_share() {
    let prompt = |max_tokens| {
        let sampling = SamplingParams { max_tokens, ..SamplingParams::default() };
        GenerateRequest::tokens(vec![1; 80]).sampling(sampling)
    };
    let (front, controls) = engines((0..2).map(|_| slow()));
    run(&front, vec![prompt(2)]).1.unwrap();
    let home = usize::from(admitted(&controls[0]).is_empty());
    let end = keep_at_work(&front, home);
    let looks = || controls[1 - home].polls.load(Ordering::Relaxed);
    let before = looks();
    let options = SessionOptions { capacity: Some(8), ..SessionOptions::default() };
    let (mut submitter, mut events) = front.handle().session(options);
    submitter.submit_all((0..8).map(|tag| (tag, prompt(90_000)))).unwrap();
    // The other one looks, sees that nothing is for it, and sleeps again.
    while looks() == before {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(controls[1 - home].running.load(Ordering::Relaxed), 0);
    drop(end);
    let deadline = Instant::now() + Duration::from_secs(60);
    while controls.iter().any(|control| control.running.load(Ordering::Relaxed) < 4) {
        assert!(Instant::now() < deadline, "requests wait beside an engine that runs none");
        std::thread::sleep(Duration::from_millis(1));
    }
    events.abort_all();
}

#[test]
fn a_failed_engine_ends_its_own_requests_and_the_others_go_on() {
    let failing = Control { fails_at: Some(1), ..Control::default() };
    let (front, controls) = engines([failing, Control::default()]);
    // The other is at work until that one has had its share.
    let of_failing = controls[0].clone();
    post(&front, 1, false, move |_| {
        while of_failing.steps.load(Ordering::Relaxed) < 2 {
            std::thread::yield_now();
        }
    });
    let (completions, outcome) = run(&front, (0..40).map(|i| request(i, 4)).collect());
    outcome.unwrap();
    let mut failed = Vec::new();
    for (i, completion) in (0..).zip(completions) {
        match completion.unwrap() {
            Completion { error: Some(RequestError::EngineFailed { cause }), finish_reason, .. } => {
                assert_eq!(finish_reason, FinishReason::Failed);
                assert!(cause.contains("`down` failed"), "{cause}");
                failed.push(i);
            }
            completion => assert_eq!(completion.token_ids, (i..i + 4).collect::<Vec<_>>()),
        }
    }
    let mut of_failed = admitted(&controls[0]);
    of_failed.sort_unstable();
    assert_eq!(failed, of_failed, "its requests and no others");
    assert!(!failed.is_empty() && failed.len() <= 4);
    // What comes later runs on the other.
    let (completions, outcome) = run(&front, vec![request(7, 2)]);
    outcome.unwrap();
    assert_eq!(completions[0].as_ref().unwrap().token_ids, [7, 8]);
    assert_eq!(front.handle().load().unwrap(), Load::default(), "what it left undone is no load");
}

/// Ends an engine's thread.
fn end_thread(front: &Front, engine: usize) {
    post(front, engine, false, |_| panic!("a bug between two steps"));
}

#[test]
fn requests_of_an_engine_whose_thread_ends_fail_and_the_others_go_on() {
    let (front, controls) = engines((0..2).map(|_| slow()));
    let options = SessionOptions { capacity: Some(6), ..SessionOptions::default() };
    let (mut submitter, mut events) = front.handle().session(options);
    submitter.submit_all((0..6).map(|i| (i, request(i as u32, 90_000)))).unwrap();
    while controls.iter().any(|control| control.running.load(Ordering::Relaxed) < 3) {
        std::thread::yield_now();
    }
    end_thread(&front, 0);
    let mut failed = Vec::new();
    while failed.len() < 3 {
        let Some(Ok(SessionEvent::Finished { tag, completion, .. })) = events.next() else {
            panic!("the session goes on")
        };
        assert!(matches!(completion.error, Some(RequestError::EngineFailed { .. })), "{completion:?}");
        assert_eq!(completion.finish_reason, FinishReason::Failed);
        failed.push(tag as u32);
    }
    let mut of_ended = admitted(&controls[0]);
    of_ended.sort_unstable();
    failed.sort_unstable();
    assert_eq!(failed, of_ended);
    submitter.submit(7, request(7, 2)).unwrap();
    let completion = match events.next() {
        Some(Ok(SessionEvent::Finished { tag: 7, completion, .. })) => completion,
        other => panic!("{other:?}"),
    };
    assert_eq!(completion.token_ids, [7, 8]);
}

#[test]
fn a_prompt_is_not_left_to_an_engine_that_has_ended() {
    let (front, controls) = engines((0..2).map(|_| Control::default()));
    let sampling = SamplingParams { max_tokens: 2, ..SamplingParams::default() };
    let prompt = || vec![GenerateRequest::tokens(vec![1; 80]).sampling(sampling)];
    run(&front, prompt()).1.unwrap();
    let home = usize::from(admitted(&controls[0]).is_empty());
    end_thread(&front, home);
    let (completions, outcome) = run(&front, prompt());
    outcome.unwrap();
    assert_eq!(completions[0].as_ref().unwrap().token_ids.len(), 2);
    assert_eq!(admitted(&controls[1 - home]).len(), 1);
}

#[test]
fn nothing_waits_for_an_engine_whose_thread_has_ended() {
    for others in [0, 1] {
        let (front, controls) = engines((0..1 + others).map(|_| Control::default()));
        end_thread(&front, 0);
        while Arc::strong_count(&controls[0]) > 1 {
            std::thread::yield_now();
        }
        match others {
            0 => assert!(matches!(front.handle().submit(request(1, 2)), Err(Error::Failed))),
            _ => {
                let (completions, outcome) = run(&front, (0..20).map(|i| request(10 * i, 2)).collect());
                outcome.unwrap();
                assert!(completions.iter().flatten().all(|completion| completion.token_ids.len() == 2));
            }
        }
    }
}

#[test]
fn when_the_last_engine_fails_all_is_lost_and_later_requests_are_refused() {
    let failing = |step| Control { fails_at: Some(step), ..Control::default() };
    let (front, controls) = engines([failing(2), failing(5)]);
    let (completions, outcome) = run(&front, (0..60).map(|i| request(i, 50)).collect());
    let Err(Error::Step { cause, .. }) = outcome else { panic!("the engines fail") };
    assert!(cause.to_string().contains("`down` failed"));
    assert!(completions.iter().flatten().all(|completion| completion.error.is_some()));
    assert!(matches!(front.handle().submit(request(1, 1)), Err(Error::Failed)));
    assert!(controls.iter().all(|control| control.steps.load(Ordering::Relaxed) > 2));
}

#[test]
fn an_abort_reaches_every_engine_and_what_waits() {
    let (front, controls) = engines((0..2).map(|_| slow()));
    let options = SessionOptions { capacity: Some(100), ..SessionOptions::default() };
    let (mut submitter, mut events) = front.handle().session(options);
    submitter.submit_all((0..20).map(|i| (i, request(i as u32, 90_000)))).unwrap();
    drop(submitter);
    while controls.iter().any(|control| control.running.load(Ordering::Relaxed) < 4) {
        std::thread::yield_now();
    }
    events.abort_all();
    let mut aborted = 0;
    for event in events {
        if let SessionEvent::Finished { completion, .. } = event.unwrap() {
            assert_eq!(completion.finish_reason, FinishReason::Abort);
            aborted += 1;
        }
    }
    assert_eq!(aborted, 20);
}

#[test]
fn an_engine_that_cannot_be_built_ends_the_others_and_says_why() {
    let build = |engine: usize| {
        move || match engine {
            1 => Err(Error::NoEngine),
            _ => panic!("the device is on fire"),
        }
    };
    let builds: Vec<_> = (0..2).map(build).collect();
    let started = Front::start::<()>(Arc::default(), Pooling::default(), Order::Given, builds);
    assert!(matches!(started, Err(Error::Device(cause)) if cause.to_string().contains("on fire")));
}

#[test]
fn an_engine_whose_weights_cannot_be_written_takes_no_requests_any_more_and_the_others_go_on() {
    let failing = Control { update_fails: true, ..Control::default() };
    let (front, controls) = engines([failing, Control::default()]);
    let checkpoint = Checkpoint::preset("tiny", FAMILIES).unwrap();
    let update = move || {
        let checkpoint = checkpoint.clone();
        move |runner: &mut dyn Runner| runner.update_weights(&checkpoint, &HashSet::new()).is_ok()
    };
    assert_eq!(front.handle().call_working(true, update()).unwrap(), [false, true]);
    let (completions, outcome) = run(&front, (0..20).map(|i| request(i, 3)).collect());
    outcome.unwrap();
    assert!(completions.iter().flatten().all(|completion| completion.error.is_none()));
    assert_eq!([&controls[0], &controls[1]].map(|control| admitted(control).len()), [0, 20]);
    assert_eq!(front.handle().call_working(true, update()).unwrap(), [true], "it is not asked again");
}
