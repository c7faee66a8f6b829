//! A tokenizer.json that is cut off or damaged is an error that names it; nothing panics.

mod common;

use std::sync::atomic::{AtomicU32, Ordering};

use common::{Numbers, Scratch};
use minisgl::{Prompt, Text};

static PANICS: AtomicU32 = AtomicU32::new(0);

/// Opens a checkpoint with this tokenizer; where it opens, it encodes and decodes.
fn try_out(scratch: &Scratch, file: &[u8]) -> bool {
    scratch.write("tokenizer.json", file);
    match Text::open(scratch.path()) {
        Ok(text) => {
            if let Ok(ids) = text.encode(Prompt::Text("Größe: 🦀 <|im_start|>".to_owned())) {
                text.decode(&ids);
            }
            true
        }
        Err(error) => {
            assert!(error.to_string().contains("tokenizer.json"), "{error}");
            false
        }
    }
}

#[test]
fn a_damaged_tokenizer_is_an_error_that_names_the_file_and_never_a_panic() {
    let whole = std::fs::read("tests/fixtures/text/tokenizer.json").unwrap();
    let scratch = Scratch::new();
    assert!(try_out(&scratch, &whole));
    std::panic::set_hook(Box::new(|_| {
        PANICS.fetch_add(1, Ordering::Relaxed);
    }));
    let mut numbers = Numbers(3);
    let mut places: Vec<usize> = (0..150).map(|_| numbers.below(whole.len() as u64) as usize).collect();
    // Within the decoder, which the parser trusts.
    let decoder = whole.windows(9).position(|window| window == b"\"decoder\"").unwrap();
    places.extend(decoder..decoder + 120);
    let opened = places.iter().filter(|place| try_out(&scratch, &whole[..**place])).count();
    let mut failed = places.len() - opened;
    for place in &places {
        // A byte changed, a piece missing, a piece doubled.
        let mut changed = whole.clone();
        changed[*place] = b"{}[]\",:0a\xff "[numbers.below(11) as usize];
        let end = (place + 1 + numbers.below(40) as usize).min(whole.len());
        let missing = [&whole[..*place], &whole[end..]].concat();
        let doubled = [&whole[..end], &whole[*place..]].concat();
        failed += [changed, missing, doubled].iter().filter(|file| !try_out(&scratch, file)).count();
    }
    let panics = PANICS.load(Ordering::Relaxed);
    let _ = std::panic::take_hook();
    assert_eq!((opened, panics), (0, 0));
    assert!(failed > places.len() * 2, "{failed}");
}
