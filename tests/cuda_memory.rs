//! Engines on a card that others have filled, in a process of its own.

mod common;

use std::sync::{Mutex, PoisonError};

use common::{family, greedy};
use minisgl::{BackendChoice, GenerateRequest, Llm, LlmBuilder};
use minisgl_core::backend::{Device, Element, Purpose};
use minisgl_cuda::Cuda;

/// The card is one test's at a time.
static CARD: Mutex<()> = Mutex::new(());

fn builder() -> LlmBuilder {
    family("tiny-tied").backend(BackendChoice::Cuda).num_pages(None).max_graph_batch(8)
}

/// Runs a request as long as one may be.
fn runs_the_longest(llm: &mut Llm) {
    let request = GenerateRequest::tokens(vec![1; 128]).sampling(greedy(128));
    let done = llm.generate(&[request]).unwrap();
    assert_eq!(done[0].token_ids.len(), 128, "{:?}", done[0].error);
}

#[test]
#[ignore = "needs a GPU"]
fn a_nearly_full_card_runs_an_engine_or_says_what_is_missing() {
    let _card = CARD.lock().unwrap_or_else(PoisonError::into_inner);
    let mut others = Cuda::new(&minisgl_cuda::Options::default()).unwrap();
    let mut enough = None;
    for mib in (32..=512).step_by(16) {
        let free = others.memory().unwrap().free - (mib << 20);
        let held = others.alloc(Purpose::Scratch, Element::Word, free as usize / 4).unwrap();
        match builder().build() {
            Ok(mut llm) => {
                enough.get_or_insert(mib);
                runs_the_longest(&mut llm);
            }
            Err(error) => {
                assert_eq!(enough, None, "{mib} MiB are too little, and fewer were enough: {error}");
                let said = error.to_string();
                assert!(said.contains("--") && (said.contains("MiB") || said.contains("bytes")), "{said}");
            }
        }
        others.free(held).unwrap();
    }
    assert!(enough.is_some_and(|mib| mib < 512), "{enough:?}");
}

#[test]
#[ignore = "needs a GPU"]
fn a_second_engine_takes_its_share_of_what_the_first_leaves() {
    let _card = CARD.lock().unwrap_or_else(PoisonError::into_inner);
    let [mut first, mut second] = [builder().build().unwrap(), builder().build().unwrap()];
    let [most, rest] = [&first, &second].map(|llm| llm.info().kv_bytes());
    assert!(rest < most / 4, "{rest} bytes beside {most}");
    runs_the_longest(&mut second);
    runs_the_longest(&mut first);
}
