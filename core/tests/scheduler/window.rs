//! Pages behind the window.

use std::sync::Arc;

use minisgl_core::batch::Batch;
use minisgl_core::costs::StepCosts;
use minisgl_core::request::Request;
use minisgl_core::rules::Rules;
use minisgl_core::sampling::SamplingParams;
use minisgl_core::scheduler::{Scheduler, Settings};

use super::submit;
use crate::support::{SETTINGS, SMALL, exactly};

/// A sequence of 60 tokens, 8 of which are seen: pages of its own never exceed the window, the page that it begins in and the
/// one that is being filled, but for the prefix tree's, which hold a window's worth.
#[test]
fn pages_behind_the_window_go_back_while_a_request_runs() {
    for prefix_cache in [false, true] {
        let settings = Settings { prefix_cache, ..SETTINGS };
        let mut scheduler =
            Scheduler::new(SMALL, settings, StepCosts::default(), &[], Some(8)).expect("host memory");
        submit(&mut scheduler, &[1; 20], 40);
        let mut batch = Batch::new(&SMALL);
        while !scheduler.is_idle() {
            assert!(scheduler.schedule(&mut batch));
            scheduler.check();
            if batch.shape().is_decode() {
                let held = if prefix_cache { 2 } else { 0 };
                assert!(scheduler.load().pages_used <= held + 4, "{} pages", scheduler.load().pages_used);
            }
            let samples = batch.samples() as usize;
            scheduler.complete(&batch, &[3, 3][..samples], &[], &mut |_| ());
            scheduler.check();
        }
    }
}

/// Most pages that a sequence of 60 tokens, 8 of which are seen, holds in a decode step.
fn held_within_a_window(params: SamplingParams, rules: Option<&Arc<Rules>>) -> u32 {
    let settings = Settings { prefix_cache: false, ..SETTINGS };
    let mut scheduler =
        Scheduler::new(SMALL, settings, StepCosts::default(), &[], Some(8)).expect("host memory");
    scheduler.submit(Request { rules, ..Request::new(&[1; 20], params) }).expect("it can run");
    let (mut batch, mut held) = (Batch::new(&SMALL), 0);
    while !scheduler.is_idle() {
        assert!(scheduler.schedule(&mut batch));
        if batch.shape().is_decode() {
            held = held.max(scheduler.load().pages_used);
        }
        let samples = batch.samples() as usize;
        scheduler.complete(&batch, &[3][..samples], &[], &mut |_| ());
        scheduler.check();
    }
    held
}

#[test]
fn pages_behind_the_window_stay_where_the_device_reads_their_tokens() {
    let (plain, all) = (exactly(40), 59_u32.div_ceil(SMALL.page_size));
    assert!(held_within_a_window(plain, None) <= 4);
    for penalized in [
        SamplingParams { repetition_penalty: 1.5, ..plain },
        SamplingParams { presence_penalty: 0.5, ..plain },
        SamplingParams { frequency_penalty: 0.5, ..plain },
    ] {
        assert_eq!(held_within_a_window(penalized, None), all, "{penalized:?}");
    }
    let bad = |words: &[Vec<u32>]| Arc::new(Rules::new(vec![], vec![], words).unwrap());
    assert_eq!(held_within_a_window(plain, Some(&bad(&[vec![4], vec![1, 2]]))), all);
    assert!(
        held_within_a_window(plain, Some(&bad(&[vec![4], vec![5]]))) <= 4,
        "a single token needs no history"
    );
}
