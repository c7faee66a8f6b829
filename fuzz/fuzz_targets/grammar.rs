//! A JSON schema, an expression and a Lark grammar; some tokens are drawn by each that can be used.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl_core::constraint::{Constraint, ConstraintState, mask_words};
use minisgl_grammar::{Grammars, TokenText, Vocabulary};

/// Each byte is a token, and one ends a text.
const VOCAB: u32 = 257;

static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| {
    let bytes: Vec<u8> = (0..=255).collect();
    let vocabulary = Vocabulary::new(VOCAB, &[256], |id| match bytes.get(id as usize..=id as usize) {
        Some(byte) => TokenText::Bytes(byte),
        None => TokenText::Special(b"<|end|>"),
    });
    Grammars::new(&vocabulary, 1).unwrap()
});

fn draw(constraint: &dyn Constraint) {
    for step in 0..4 {
        constraint.wait();
        if constraint.state() != ConstraintState::Ready {
            return;
        }
        let mut mask = vec![0; mask_words(VOCAB)];
        constraint.write_mask(&mut mask);
        let allowed: Vec<u32> = (0..256).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        match allowed.get(step * 7 % allowed.len().max(1)) {
            Some(id) => constraint.accept(*id),
            None => return,
        }
    }
}

fuzz_target!(|text: &str| {
    if let Ok(schema) = serde_json::from_str(text)
        && let Ok(constraint) = GRAMMARS.json_schema(&schema)
    {
        draw(&*constraint);
    }
    for constraint in [GRAMMARS.regex(text), GRAMMARS.lark(text)].into_iter().flatten() {
        draw(&*constraint);
    }
});
