//! Edits of logits against a naive reading of the definition in `minisgl_core::rules`: a list of tokens and a loop.

mod common;

use common::{Draw, Drawn, Random, edit_and_draw};
use minisgl_core::rules::{LOGIT_MAX, Rules};
use minisgl_core::sampling::{NO_TOKEN, SamplingParams, SlotState};

/// What a row asks for, and the tokens of its sequence.
struct Case {
    params: SamplingParams,
    biases: Vec<(u32, f32)>,
    endings: Vec<u32>,
    bad_words: Vec<Vec<u32>>,
    prompt_len: u32,
    tokens: Vec<u32>,
}

impl Case {
    fn random(random: &mut Random, vocab: usize) -> Case {
        let len = 1 + random.below(60);
        // Few ids, so that they repeat.
        let ids = 1 + random.below(vocab);
        let tokens: Vec<u32> = (0..len).map(|_| random.below(ids) as u32).collect();
        let prompt_len = random.below(len + 1) as u32;
        let params = SamplingParams {
            repetition_penalty: [1.0, 1.2, 0.5, 1e30, 1e-30][random.below(5)],
            presence_penalty: [0.0, 0.7, -2.0, 2.0][random.below(4)],
            frequency_penalty: [0.0, 0.3, -2.0, 2.0][random.below(4)],
            min_tokens: [0, 5, 60][random.below(3)],
            ..SamplingParams::default()
        };
        let mut biases: Vec<(u32, f32)> =
            (0..random.below(9)).map(|_| (random.below(vocab) as u32, random.float() * 100.0)).collect();
        biases.sort_by_key(|(id, _)| *id);
        biases.dedup_by_key(|(id, _)| *id);
        let endings = (0..random.below(4)).map(|_| random.below(vocab) as u32).collect();
        // Words that end as the sequence does are what is to be found.
        let bad_words = (0..random.below(6)).map(|_| {
            let mut word = tokens[len - random.below(len.min(4))..].to_vec();
            word.push(random.below(vocab) as u32);
            if random.below(3) == 0 {
                word[0] = random.below(vocab) as u32;
            }
            word
        });
        let bad_words = bad_words.collect();
        Case { params, biases, endings, bad_words, prompt_len, tokens }
    }

    fn draw(&self) -> Draw {
        let rules = Rules::new(self.biases.clone(), vec![], &self.bad_words).unwrap();
        let mut state: SlotState = self.params.slot_state(self.prompt_len);
        rules.apply(self.endings.len(), &mut state);
        Draw { state, rules: rules.words(self.endings.iter().copied()).collect(), logprobs: 0, masked: false }
    }

    fn edited(&self, logits: &[f32]) -> Vec<f32> {
        let mut logits = logits.to_vec();
        let output = &self.tokens[self.prompt_len as usize..];
        let mut forbidden = vec![];
        if (output.len() as u32) < self.params.min_tokens {
            forbidden.extend(&self.endings);
        }
        for word in &self.bad_words {
            let (last, before) = word.split_last().unwrap();
            if output.ends_with(before) {
                forbidden.push(*last);
            }
        }
        forbidden.iter().for_each(|id| logits[*id as usize] = f32::NEG_INFINITY);
        let saturated = |logit: f32| logit.clamp(-LOGIT_MAX, LOGIT_MAX);
        for (id, bias) in &self.biases {
            logits[*id as usize] = saturated(logits[*id as usize] + bias);
        }
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.params;
        for (id, logit) in (0..).zip(&mut logits) {
            let count = output.iter().filter(|other| **other == id).count() as f32;
            if self.tokens.contains(&id) {
                *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
                *logit -= frequency_penalty * count;
                *logit -= if count > 0.0 { presence_penalty } else { 0.0 };
                *logit = saturated(*logit);
            }
        }
        forbidden.iter().for_each(|id| logits[*id as usize] = f32::NEG_INFINITY);
        logits
    }
}

/// Edits the cases' logits, and draws.
fn edit(random: &mut Random, cases: &[Case], vocab: usize, logits: &[f32]) -> (Vec<f32>, Vec<u32>) {
    let drawn = |case: &Case| Drawn { tokens: case.tokens.clone(), draw: case.draw() };
    edit_and_draw(random, &cases.iter().map(drawn).collect::<Vec<_>>(), vocab, logits)
}

#[test]
fn every_mix_of_edits_gives_the_definitions_logits() {
    let mut random = Random(21);
    for vocab in [1, 7, 64, 501] {
        for _ in 0..20 {
            let cases: Vec<Case> = (0..9).map(|_| Case::random(&mut random, vocab)).collect();
            let logits: Vec<f32> = random.floats(9 * vocab).into_iter().map(|x| x * 12.0).collect();
            let (edited, tokens) = edit(&mut random, &cases, vocab, &logits);
            let rows = cases.iter().zip(logits.chunks(vocab)).zip(edited.chunks(vocab)).zip(tokens);
            for (((case, logits), edited), token) in rows {
                let expected = case.edited(logits);
                assert_eq!(common::bits(edited), common::bits(&expected), "{:?}", case.params);
                let greedy = expected.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                match expected.iter().position(|logit| *logit == greedy && greedy.is_finite()) {
                    Some(id) => assert_eq!(token as usize, id),
                    None => assert_eq!(token, NO_TOKEN, "all tokens are forbidden"),
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_what_it_is() {
    let mut random = Random(22);
    let vocab = 40;
    let cases: Vec<Case> = (0..8).map(|_| Case::random(&mut random, vocab)).collect();
    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let logits: Vec<f32> = (0..8 * vocab).map(|i| values[i % 3]).collect();
    let (edited, tokens) = edit(&mut random, &cases, vocab, &logits);
    assert_eq!(common::bits(&edited), common::bits(&logits));
    assert!(tokens.iter().all(|token| *token == NO_TOKEN));
}
