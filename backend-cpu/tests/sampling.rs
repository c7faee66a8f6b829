//! Drawn tokens against a naive reading of the definition in `minisgl_core::sampling`: sort, add up, cut, compare.

mod common;

use common::{Draw, Machine, Random, Sequence, dims, limits};
use minisgl_core::backend::{Ops, Sampler, Step};
use minisgl_core::batch::Row;
use minisgl_core::constraint::mask_words;
use minisgl_core::sampling::{LOGPROB_WORDS, NO_TOKEN, RowLogprobs, SlotState, token_uniform};
use minisgl_cpu::Buffer;

/// A machine with a decode step that has begun, whose row i draws as `draws[i]` says, and the rows as packed.
fn sampling_step(random: &mut Random, vocab: usize, draws: &[Draw]) -> (Machine, Step<Buffer>, Vec<Row>) {
    let limits = limits(draws.len() as u32, 64, 16);
    let mut machine = Machine::new(dims(8, 2, 1, 4, 8, vocab as u32), limits, random);
    let slots = random.permutation(draws.len());
    let sequences: Vec<_> =
        slots.iter().map(|slot| Sequence { slot: *slot, cached: random.below(60) as u32, new: 1 }).collect();
    let (step, _, rows) = machine.step(random, &sequences, |i| draws[i].clone(), None);
    machine.cpu.begin_step(&step).unwrap();
    (machine, step, rows)
}

fn seeded(random: &mut Random, temperature: f32) -> SlotState {
    let (seed_low, seed_high) = (random.word() as u32, random.word() as u32);
    SlotState { temperature, seed_low, seed_high, ..SlotState::default() }
}

/// Any mix of parameters, filters off about half of the time.
fn any_draw(random: &mut Random, vocab: usize) -> Draw {
    let temperature = [0.0, 0.2, 0.6, 1.0, 3.0][random.below(5)];
    let mut state = seeded(random, temperature);
    if random.below(2) == 0 {
        state.top_k = random.below(vocab + 3) as u32;
    }
    if random.below(2) == 0 {
        state.top_p = (random.float() + 1.0) / 2.0 + 1e-6;
    }
    if random.below(2) == 0 {
        state.min_p = [0.001, 0.05, 0.5, 1.0][random.below(4)];
    }
    state.into()
}

/// Logits of several shapes: spread, nearly flat, and of so few values that most tie.
fn any_logits(random: &mut Random, vocab: usize) -> Vec<f32> {
    let (spread, ties) = [(8.0, false), (0.01, false), (40.0, false), (3.0, true)][random.below(4)];
    let logit = |x: f32| if ties { (x * spread * 2.0).round() / 2.0 } else { x * spread };
    random.floats(vocab).into_iter().map(logit).collect()
}

/// The definition, step by step.
fn naive(logits: &[f32], state: &SlotState, position: u32) -> u32 {
    let best = |scores: &[(u32, f32)]| {
        scores.iter().fold((u32::MAX, f32::NEG_INFINITY), |a, b| if b.1 > a.1 { *b } else { a }).0
    };
    if state.temperature == 0.0 {
        return best(&(0..).zip(logits.iter().copied()).collect::<Vec<_>>());
    }
    let mut kept: Vec<(u32, f32)> = (0..).zip(logits.iter().map(|logit| logit / state.temperature)).collect();
    let largest = kept.iter().map(|(_, z)| *z).fold(f32::NEG_INFINITY, f32::max);
    let descending = |kept: &[(u32, f32)]| {
        let mut z: Vec<f32> = kept.iter().map(|(_, z)| *z).collect();
        z.sort_by(|a, b| b.total_cmp(a));
        z
    };
    if state.top_k > 0 && (state.top_k as usize) < kept.len() {
        let kth = descending(&kept)[state.top_k as usize - 1];
        kept.retain(|(_, z)| *z >= kth);
    }
    if state.top_p < 1.0 {
        let sorted = descending(&kept);
        let mass = |z: &f32| (f64::from(*z) - f64::from(largest)).exp();
        let target = f64::from(state.top_p) * sorted.iter().map(mass).sum::<f64>();
        let mut sum = 0.0;
        let boundary = sorted.iter().find(|z| {
            sum += mass(z);
            sum >= target
        });
        let boundary = *boundary.unwrap_or(sorted.last().unwrap());
        kept.retain(|(_, z)| *z >= boundary);
    }
    if state.min_p > 0.0 {
        kept.retain(|(_, z)| *z >= largest + state.min_p.ln());
    }
    for (id, z) in &mut kept {
        *z += -(-token_uniform(state.seed(), position, *id).ln()).ln();
    }
    best(&kept)
}

fn draw(machine: &mut Machine, step: &Step<Buffer>, logits: &[f32]) -> Vec<u32> {
    let samples = step.shape.samples as usize;
    let (logits, tokens) = (machine.floats(logits), machine.words(&vec![u32::MAX; samples]));
    machine.cpu.sample(step, logits, tokens).unwrap();
    machine.read_words(tokens, samples)
}

#[test]
fn every_mix_of_parameters_draws_the_definitions_token() {
    let mut random = Random(1);
    for vocab in [1, 2, 3, 63, 64, 65, 500, 1001, 5000] {
        for _ in 0..6 {
            let draws: Vec<Draw> = (0..33).map(|_| any_draw(&mut random, vocab)).collect();
            let (mut machine, step, rows) = sampling_step(&mut random, vocab, &draws);
            let logits: Vec<f32> = (0..33).flat_map(|_| any_logits(&mut random, vocab)).collect();
            let drawn = draw(&mut machine, &step, &logits);
            for (i, (row, logits)) in rows.iter().zip(logits.chunks(vocab)).enumerate() {
                let state = &draws[i].state;
                assert_eq!(drawn[i], naive(logits, state, row.kv_len), "vocabulary of {vocab}, {state:?}");
            }
            let pool = machine.read_words(machine.token_pool, 33);
            for (row, token) in rows.iter().zip(drawn) {
                assert_eq!(pool[row.slot as usize], token, "the token pool holds it too");
            }
        }
    }
}

#[test]
fn a_masked_row_draws_what_it_would_draw_from_the_allowed_logits_and_others_what_they_did() {
    let mut random = Random(5);
    for vocab in [1, 31, 32, 33, 500, 4099] {
        for _ in 0..6 {
            let draw_of = |random: &mut Random| Draw {
                masked: random.below(2) == 0,
                logprobs: 1 + random.below(21) as u32,
                ..any_draw(random, vocab)
            };
            let draws: Vec<Draw> = (0..33).map(|_| draw_of(&mut random)).collect();
            let (mut machine, step, rows) = sampling_step(&mut random, vocab, &draws);
            let words = mask_words(vocab as u32);
            let mut masks = vec![0u32; 33 * words];
            let mut edited: Vec<f32> = (0..33).flat_map(|_| any_logits(&mut random, vocab)).collect();
            let logits = edited.clone();
            let masked = rows.iter().enumerate().filter(|(_, row)| row.mask > 0);
            for (mask, (i, _)) in masks.chunks_mut(words).zip(masked) {
                let allowed = [1, 2, 30, vocab][random.below(4)];
                (0..allowed).map(|_| random.below(vocab)).for_each(|id| mask[id / 32] |= 1 << (id % 32));
                let forbidden = (0..vocab).filter(|id| mask[id / 32] >> (id % 32) & 1 == 0);
                forbidden.for_each(|id| edited[i * vocab + id] = f32::NEG_INFINITY);
            }
            let buffer = machine.masks;
            machine.write(buffer, &masks);
            let drawn = draw(&mut machine, &step, &logits);
            for (i, (row, logits)) in rows.iter().zip(edited.chunks(vocab)).enumerate() {
                let state = &draws[i].state;
                assert_eq!(drawn[i], naive(logits, state, row.kv_len), "vocabulary of {vocab}, {state:?}");
            }
        }
    }
}

#[test]
fn one_candidate_is_the_greedy_token() {
    let mut random = Random(2);
    let vocab = 777;
    let draws: Vec<Draw> = (0..60)
        .map(|i| {
            let state = seeded(&mut random, 2.0);
            let state = match i % 3 {
                0 => SlotState { top_k: 1, ..state },
                1 => SlotState { top_p: 1e-6, ..state },
                _ => SlotState { min_p: 1.0, ..state },
            };
            state.into()
        })
        .collect();
    let logits = random.floats(60 * vocab);
    let (mut machine, step, _) = sampling_step(&mut random, vocab, &draws);
    let filtered = draw(&mut machine, &step, &logits);
    let (mut machine, step, _) = sampling_step(&mut random, vocab, &vec![Draw::default(); 60]);
    assert_eq!(filtered, draw(&mut machine, &step, &logits));
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let mut random = Random(3);
    for vocab in [5, 16, 40, 129] {
        let (mut machine, step, _) = sampling_step(&mut random, vocab, &vec![Draw::default(); 8]);
        let first: Vec<usize> = (0..8).map(|_| random.below(vocab)).collect();
        let mut logits = vec![-1.0; 8 * vocab];
        for (logits, first) in logits.chunks_mut(vocab).zip(&first) {
            logits[*first] = 2.5;
            logits[*first + random.below(vocab - first)] = 2.5;
        }
        let drawn = draw(&mut machine, &step, &logits);
        assert_eq!(drawn, first.iter().map(|id| *id as u32).collect::<Vec<_>>());
    }
}

#[test]
fn the_sign_of_a_zero_changes_neither_a_token_nor_a_rank() {
    let mut random = Random(8);
    for vocab in [2, 16, 40, 129] {
        let draws: Vec<Draw> =
            (0..60).map(|_| Draw { logprobs: 22, ..any_draw(&mut random, vocab) }).collect();
        let (mut machine, step, _) = sampling_step(&mut random, vocab, &draws);
        let signed: Vec<f32> =
            (0..60 * vocab).map(|_| [0.0, -0.0, 1.0, -1.0, -0.5][random.below(5)]).collect();
        let plain: Vec<f32> = signed.iter().map(|logit| logit + 0.0).collect();
        let [(drawn, told), (expected, expected_told)] = [&signed, &plain].map(|logits| {
            let drawn = draw(&mut machine, &step, logits);
            let (floats, tokens) = (machine.floats(logits), machine.words(&drawn));
            let out = machine.words(&vec![0; 60 * LOGPROB_WORDS]);
            machine.cpu.logprobs(&step, floats, tokens, out).unwrap();
            (drawn, machine.read_words(out, 60 * LOGPROB_WORDS))
        });
        assert_eq!(drawn, expected, "vocabulary of {vocab}");
        assert!(told == expected_told, "log-probabilities of a vocabulary of {vocab}");
    }
}

/// What is no number: its place among the logits, and what takes that place.
const NOT_NUMBERS: [(f32, bool); 4] =
    [(f32::NAN, false), (-f32::NAN, false), (f32::INFINITY, false), (f32::NEG_INFINITY, true)];

#[test]
fn a_row_whose_logits_are_no_numbers_draws_none_and_the_others_theirs() {
    let mut random = Random(6);
    for vocab in [1, 2, 17, 500, 1001] {
        let draws: Vec<Draw> =
            (0..32).map(|_| Draw { logprobs: 2, ..any_draw(&mut random, vocab) }).collect();
        let (mut machine, step, rows) = sampling_step(&mut random, vocab, &draws);
        let mut logits: Vec<f32> = (0..32).flat_map(|_| any_logits(&mut random, vocab)).collect();
        let good = draw(&mut machine, &step, &logits);
        for (i, logits) in logits.chunks_mut(vocab).enumerate().filter(|(i, _)| i % 2 == 1) {
            let (value, everywhere) = NOT_NUMBERS[i / 2 % 4];
            let at = random.below(vocab);
            logits[at] = value;
            if everywhere {
                logits.fill(value);
            }
        }
        let drawn = draw(&mut machine, &step, &logits);
        let pool = machine.read_words(machine.token_pool, 32);
        for (i, token) in drawn.iter().enumerate() {
            let expected = if i % 2 == 1 { (NO_TOKEN, 0) } else { (good[i], good[i]) };
            assert_eq!((*token, pool[rows[i].slot as usize]), expected, "row {i} of {vocab} logits");
        }
        let (floats, tokens) = (machine.floats(&logits), machine.words(&drawn));
        let out = machine.words(&vec![7; 32 * LOGPROB_WORDS]);
        machine.cpu.logprobs(&step, floats, tokens, out).unwrap();
        let words = machine.read_words(out, 32 * LOGPROB_WORDS);
        for (i, row) in words.chunks(LOGPROB_WORDS).enumerate() {
            assert_eq!(row.iter().all(|word| *word == 7), i % 2 == 1, "log-probabilities of row {i}");
        }
    }
}

#[test]
fn a_masked_logit_is_never_drawn() {
    let mut random = Random(7);
    let vocab = 40;
    let draws: Vec<Draw> = (0..200).map(|_| any_draw(&mut random, vocab)).collect();
    let (mut machine, step, _) = sampling_step(&mut random, vocab, &draws);
    let mut logits = random.floats(200 * vocab);
    for (i, logit) in logits.iter_mut().enumerate() {
        if i % 3 != 0 {
            *logit = f32::NEG_INFINITY;
        }
    }
    for (i, token) in draw(&mut machine, &step, &logits).into_iter().enumerate() {
        assert_eq!((i * vocab + token as usize) % 3, 0, "row {i} drew {token}");
    }
}

/// Pearson's statistic of the drawn tokens against the softmax of what the filters keep; seeds and positions vary.
#[test]
fn tokens_are_drawn_as_often_as_they_are_probable() {
    let mut random = Random(4);
    let vocab = 11;
    let rows = 20_000;
    let logits: Vec<f32> = random.floats(vocab).iter().map(|x| x * 2.0).collect();
    let (temperature, top_k) = (0.8, 8);
    let draws: Vec<Draw> =
        (0..rows).map(|_| SlotState { top_k, ..seeded(&mut random, temperature) }.into()).collect();
    let (mut machine, step, _) = sampling_step(&mut random, vocab, &draws);
    let drawn = draw(&mut machine, &step, &logits.repeat(rows));

    let mut order: Vec<usize> = (0..vocab).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let kept = &order[..top_k as usize];
    let mass = |id: usize| f64::from(logits[id] / temperature).exp();
    let total: f64 = kept.iter().map(|id| mass(*id)).sum();
    let mut statistic = 0.0;
    for id in 0..vocab {
        let count = drawn.iter().filter(|token| **token as usize == id).count() as f64;
        if kept.contains(&id) {
            let expected = rows as f64 * mass(id) / total;
            statistic += (count - expected).powi(2) / expected;
        } else {
            assert_eq!(count, 0.0, "token {id} is not among the {top_k} most probable");
        }
    }
    // 7 degrees of freedom: above 29.9 once in ten thousand trials, below 0.3 as seldom.
    assert!((0.3..29.9).contains(&statistic), "chi square is {statistic}");
}

#[test]
fn a_row_draws_the_same_token_whatever_is_drawn_beside_it() {
    let mut random = Random(5);
    let vocab = 300;
    let draws: Vec<Draw> = (0..40).map(|_| any_draw(&mut random, vocab)).collect();
    let (mut machine, step, packed) = sampling_step(&mut random, vocab, &draws);
    let logits = random.floats(40 * vocab);
    let together = draw(&mut machine, &step, &logits);
    for i in [0, 7, 39] {
        let sequence = Sequence { slot: packed[i].slot, cached: packed[i].position, new: 1 };
        let (step, _, _) = machine.step(&mut random, &[sequence], |_| draws[i].clone(), None);
        assert_eq!(draw(&mut machine, &step, &logits[i * vocab..][..vocab]), [together[i]]);
    }
}

#[test]
fn log_probabilities_are_of_the_unfiltered_softmax() {
    let mut random = Random(6);
    for vocab in [1, 3, 20, 21, 1000] {
        let draws: Vec<Draw> =
            (0..24).map(|i| Draw { logprobs: (i % 22) as u32, ..any_draw(&mut random, vocab) }).collect();
        let (mut machine, step, rows) = sampling_step(&mut random, vocab, &draws);
        let logits: Vec<f32> = (0..24).flat_map(|_| any_logits(&mut random, vocab)).collect();
        let tokens = draw(&mut machine, &step, &logits);
        let (tokens_buffer, logits_buffer) = (machine.words(&tokens), machine.floats(&logits));
        let out = machine.words(&vec![u32::MAX; 24 * LOGPROB_WORDS]);
        machine.cpu.logprobs(&step, logits_buffer, tokens_buffer, out).unwrap();
        let words = machine.read_words(out, 24 * LOGPROB_WORDS);

        for (i, (row, logits)) in rows.iter().zip(logits.chunks(vocab)).enumerate() {
            let words = &words[i * LOGPROB_WORDS..][..LOGPROB_WORDS];
            if row.logprobs == 0 {
                assert!(words.iter().all(|word| *word == u32::MAX), "not asked for, not written");
                continue;
            }
            let got: RowLogprobs = bytemuck::cast_slice(words)[0];
            let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
            let logprob = |id: u32| f64::from(logits[id as usize]) - total.ln();
            let mut order: Vec<u32> = (0..vocab as u32).collect();
            order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            order.truncate(row.logprobs as usize - 1);
            let (ids, values): (Vec<u32>, Vec<f32>) = got.top().unzip();
            assert_eq!(ids, order, "most probable first, the lower id first among equals");
            for (value, id) in values.into_iter().chain([got.token]).zip(order.into_iter().chain([tokens[i]]))
            {
                let error = (f64::from(value) - logprob(id)).abs();
                assert!(error < 1e-5, "log-probability of {id} is {value}, off by {error}");
            }
        }
    }
}

#[test]
fn tokens_that_are_impossible_are_no_alternatives() {
    let mut random = Random(12);
    let asked = Draw { logprobs: 6, ..any_draw(&mut random, 21) };
    let (mut machine, step, _) = sampling_step(&mut random, 21, &[asked]);
    let mut logits = [f32::NEG_INFINITY; 21];
    (logits[4], logits[17]) = (-3.0, 2.0);
    let tokens = draw(&mut machine, &step, &logits);
    let (tokens_buffer, logits_buffer) = (machine.words(&tokens), machine.floats(&logits));
    let out = machine.words(&[0; LOGPROB_WORDS]);
    machine.cpu.logprobs(&step, logits_buffer, tokens_buffer, out).unwrap();
    let words = machine.read_words(out, LOGPROB_WORDS);
    let got: RowLogprobs = bytemuck::cast_slice(&words)[0];
    assert_eq!(got.top().map(|(id, _)| id).collect::<Vec<_>>(), [17, 4]);
}
