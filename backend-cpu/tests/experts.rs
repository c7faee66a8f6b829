//! A layer's experts against their definition, computed in f64, and what a token's bits depend on.

mod common;

use std::collections::BTreeSet;

use common::{Machine, Random, Sequence, assert_close, bits, dims, greedy, limits, spec, tensor};
use minisgl_core::backend::{ExpertWeights, Ops, Step, WeightRole};
use minisgl_core::batch::StepShape;
use minisgl_core::spec::{Activation, DecoderSpec, Experts, LayerSpec, Mlp};
use minisgl_core::tensor::{Dtype, HostTensor};
use minisgl_cpu::{Buffer, Weight};

const HIDDEN: usize = 40;

/// Experts on a machine, and the values of their weights.
struct Layer {
    machine: Machine,
    experts: Experts,
    weights: ExpertWeights<Weight>,
    router: Vec<f32>,
    /// `[expert][2 * intermediate, hidden]`.
    gate_up: Vec<Vec<f32>>,
    /// `[expert][hidden, intermediate]`.
    down: Vec<Vec<f32>>,
}

impl Layer {
    fn new(random: &mut Random, experts: Experts) -> Layer {
        let mut spec = spec(dims(HIDDEN as u32, 2, 1, 4, 8, 16));
        spec.layers[1] = LayerSpec { mlp: Mlp::Experts(experts), ..spec.layers[1] };
        let machine = Machine::of(&DecoderSpec { ..spec }, limits(12, 32, 4), random);
        let (count, mlp) = (experts.count as usize, experts.intermediate as usize);
        let mut matrix = |rows: usize, cols: usize| tensor(rows, &random.floats(rows * cols), Dtype::Bf16);
        let (router, router_values) = matrix(count, HIDDEN);
        // Gate and up of an expert are a tensor each, as most checkpoints have them.
        let all: Vec<[(HostTensor, Vec<f32>); 3]> =
            (0..count).map(|_| [matrix(mlp, HIDDEN), matrix(mlp, HIDDEN), matrix(HIDDEN, mlp)]).collect();
        let mut layer = Layer {
            machine,
            experts,
            weights: ExpertWeights { router: unloaded(), gate_up: unloaded(), down: unloaded() },
            router: router_values,
            gate_up: all.iter().map(|[gate, up, _]| [&gate.1[..], &up.1[..]].concat()).collect(),
            down: all.iter().map(|[_, _, down]| down.1.clone()).collect(),
        };
        let part = |i: usize| all.iter().map(move |one| one[i].0.clone());
        let gate_up: Vec<_> = part(0).zip(part(1)).flat_map(|(gate, up)| [gate, up]).collect();
        let down: Vec<_> = part(2).collect();
        layer.weights = layer.load(&[router], &gate_up, &down);
        layer
    }

    /// Another router.
    fn route_by(&mut self, router: Vec<f32>) {
        let (tensor, values) = tensor(self.experts.count as usize, &router, Dtype::Bf16);
        self.weights.router = self.machine.cpu.load(WeightRole::Linear, &[tensor]).unwrap();
        self.router = values;
    }

    fn load(
        &mut self,
        router: &[HostTensor],
        gate_up: &[HostTensor],
        down: &[HostTensor],
    ) -> ExpertWeights<Weight> {
        let cpu = &mut self.machine.cpu;
        ExpertWeights {
            router: cpu.load(WeightRole::Linear, router).unwrap(),
            gate_up: cpu.load(WeightRole::ExpertsGateUp(self.experts.count), gate_up).unwrap(),
            down: cpu.load(WeightRole::ExpertsDown(1), down).unwrap(),
        }
    }

    /// The same weights out of one tensor for all experts.
    fn stacked(&mut self) -> ExpertWeights<Weight> {
        let whole = |parts: &[Vec<f32>], cols: usize| {
            let values = parts.concat();
            tensor(values.len() / cols, &values, Dtype::Bf16).0
        };
        let (gate_up, down) =
            (whole(&self.gate_up, HIDDEN), whole(&self.down, self.experts.intermediate as usize));
        let (router, _) = tensor(self.experts.count as usize, &self.router, Dtype::Bf16);
        self.load(&[router], &[gate_up], &[down])
    }

    /// What tokens `[tokens, hidden]` get, by the definition.
    fn expected(&self, x: &[f32]) -> Vec<f64> {
        x.chunks(HIDDEN).flat_map(|x| self.expected_of_one(x)).collect()
    }

    fn expected_of_one(&self, x: &[f32]) -> Vec<f64> {
        let Experts { per_token, intermediate, normalized, .. } = self.experts;
        let logits: Vec<f64> = self.router.chunks(HIDDEN).map(|row| dot(row, x)).collect();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let chosen = &order[..per_token as usize];
        let sum_of = |some: &[usize]| some.iter().map(|expert| logits[*expert].exp()).sum::<f64>();
        let sum = sum_of(if normalized { chosen } else { &order });
        let mut out = vec![0.0; HIDDEN];
        for expert in chosen {
            let both: Vec<f64> = self.gate_up[*expert].chunks(HIDDEN).map(|row| dot(row, x)).collect();
            let (gates, ups) = both.split_at(intermediate as usize);
            let activated: Vec<f64> =
                gates.iter().zip(ups).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
            for (out, row) in out.iter_mut().zip(self.down[*expert].chunks(activated.len())) {
                let given: f64 = row.iter().zip(&activated).map(|(w, x)| f64::from(*w) * x).sum();
                *out += logits[*expert].exp() / sum * given;
            }
        }
        out
    }

    /// What the tokens of a step get.
    fn run(&mut self, weights: &ExpertWeights<Weight>, step: &Step<Buffer>, x: &[f32]) -> Vec<f32> {
        let (x_buffer, out) = (self.machine.floats(x), self.machine.poisoned(x.len()));
        self.machine.cpu.experts(step, &self.experts, weights, x_buffer, out).unwrap();
        self.machine.read(out, x.len())
    }

    /// A step of one sequence for each of `new`, which has so many tokens.
    fn step(&mut self, random: &mut Random, new: &[u32], shape: Option<StepShape>) -> Step<Buffer> {
        let sequences: Vec<_> =
            (0..).zip(new).map(|(slot, &new)| Sequence { slot, cached: 0, new }).collect();
        self.machine.step(random, &sequences, greedy, shape).0
    }
}

/// A handle that is replaced before anything is done with it.
fn unloaded() -> Weight {
    let mut cpu = minisgl_cpu::Cpu::new();
    cpu.load(WeightRole::Linear, &[tensor(1, &[0.0], Dtype::Bf16).0]).unwrap()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn experts(count: u32, per_token: u32, normalized: bool) -> Experts {
    Experts { activation: Activation::Silu, count, per_token, intermediate: 24, normalized }
}

const SHAPES: [(u32, u32, bool); 6] =
    [(8, 1, true), (8, 2, false), (8, 8, true), (5, 3, false), (256, 16, true), (128, 8, false)];

#[test]
fn a_token_gets_the_shares_of_what_its_experts_give() {
    let mut random = Random(1);
    for (count, per_token, normalized) in SHAPES {
        let mut layer = Layer::new(&mut random, experts(count, per_token, normalized));
        for new in [&[1][..], &[1; 12], &[9, 30, 1, 2]] {
            let step = layer.step(&mut random, new, None);
            let x = random.floats(step.shape.tokens as usize * HIDDEN);
            let (weights, expected) = (layer.weights, layer.expected(&x));
            let what = format!("{per_token} of {count}, normalized: {normalized}, {new:?} tokens");
            let got = layer.run(&weights, &step, &x);
            assert_close(&what, &got, &expected, 1e-4);
            let stacked = layer.stacked();
            assert_eq!(bits(&layer.run(&stacked, &step, &x)), bits(&got), "{what}, stacked");
        }
    }
}

#[test]
fn a_tokens_bits_do_not_depend_on_the_tokens_beside_it() {
    let mut random = Random(2);
    let mut layer = Layer::new(&mut random, experts(16, 4, true));
    let weights = layer.weights;
    let x = random.floats(150 * HIDDEN);
    let together = layer.step(&mut random, &[30, 30, 30, 30, 30], None);
    let together = layer.run(&weights, &together, &x);
    for first in [0, 1, 77, 149] {
        let alone = layer.step(&mut random, &[1], None);
        let part = first * HIDDEN..(first + 1) * HIDDEN;
        assert_eq!(
            bits(&layer.run(&weights, &alone, &x[part.clone()])),
            bits(&together[part]),
            "token {first}"
        );
    }
}

/// A router whose logit for expert e is the token's element e, and the rest of a token is what experts tell tokens apart by.
fn plain_router(count: usize) -> Vec<f32> {
    (0..count * HIDDEN).map(|i| f32::from(u8::from(i / HIDDEN == i % HIDDEN))).collect()
}

/// A token that chooses these experts, the first by most.
fn token_for(random: &mut Random, count: usize, chosen: &[usize]) -> Vec<f32> {
    let mut token = random.floats(HIDDEN);
    token[..count].iter_mut().for_each(|x| *x -= 2.0);
    chosen.iter().enumerate().for_each(|(i, expert)| token[*expert] = 3.0 - 0.25 * i as f32);
    token
}

/// Routers at their worst.
#[test]
fn however_a_router_deals_tokens_out_each_gets_its_experts_and_the_bits_that_it_has_alone() {
    const COUNT: usize = 24;
    const EACH: usize = 8;
    type Deal = fn(usize) -> Vec<usize>;
    let deals: [(&str, Deal); 5] = [
        ("all the same eight", |_| (8..16).collect()),
        ("evenly", |t| (0..EACH).map(|j| (t * EACH + j) % COUNT).collect()),
        ("one chosen by nobody", |t| (0..EACH).map(|j| (t * EACH + j) % (COUNT - 1)).collect()),
        ("the last one by everybody", |t| (0..EACH).map(|j| (COUNT - 1 + j * (2 * t + 1)) % COUNT).collect()),
        ("in descending order", |t| (0..EACH).map(|j| (t + EACH - j) % COUNT).collect()),
    ];
    let mut random = Random(4);
    let mut layer = Layer::new(&mut random, experts(COUNT as u32, EACH as u32, true));
    layer.route_by(plain_router(COUNT));
    let weights = layer.weights;
    for (what, deal) in deals {
        let x: Vec<f32> = (0..48).flat_map(|t| token_for(&mut random, COUNT, &deal(t))).collect();
        let before = layer.machine.cpu.experts_read().unwrap();
        let mut together = Vec::new();
        for x in x.chunks(12 * HIDDEN) {
            let step = layer.step(&mut random, &[1; 12], None);
            together.extend(layer.run(&weights, &step, x));
        }
        let after = layer.machine.cpu.experts_read().unwrap();
        let of_step = |step: usize| (0..12).flat_map(|t| deal(12 * step + t)).collect::<BTreeSet<_>>().len();
        let read: usize = (0..4).map(of_step).sum();
        assert_eq!(
            (after.layers - before.layers, after.experts - before.experts),
            (4, read as u64),
            "{what}"
        );
        assert_close(what, &together, &layer.expected(&x), 1e-4);
        let prompt = layer.step(&mut random, &[20, 28], None);
        assert_eq!(bits(&layer.run(&weights, &prompt, &x)), bits(&together), "{what}, as prompts");
        for (x, together) in x.chunks(HIDDEN).zip(together.chunks(HIDDEN)) {
            let alone = layer.step(&mut random, &[1], None);
            assert_eq!(bits(&layer.run(&weights, &alone, x)), bits(together), "{what}, alone");
        }
    }
}

#[test]
fn of_equal_logits_the_lower_experts_are_chosen_whatever_is_beside_a_token() {
    for (count, per_token) in [(8, 1), (16, 4), (256, 16)] {
        let mut random = Random(5);
        let mut layer = Layer::new(&mut random, experts(count, per_token, true));
        layer.route_by(vec![0.0; count as usize * HIDDEN]);
        let weights = layer.weights;
        let x = random.floats(12 * HIDDEN);
        let before = layer.machine.cpu.experts_read().unwrap();
        let step = layer.step(&mut random, &[1; 12], None);
        let got = layer.run(&weights, &step, &x);
        let after = layer.machine.cpu.experts_read().unwrap();
        assert_eq!(after.experts - before.experts, u64::from(per_token));
        assert_close("ties", &got, &layer.expected(&x), 1e-4);
    }
}

#[test]
fn padding_gets_nothing_and_an_expert_is_read_once_a_step() {
    let mut random = Random(3);
    let mut layer = Layer::new(&mut random, experts(32, 2, true));
    let weights = layer.weights;
    // Both rows are the same token, so they choose the same two experts; the padding would choose others.
    let token = random.floats(HIDDEN);
    let mut x = [&token[..], &token[..]].concat();
    x.extend(random.floats(6 * HIDDEN));
    let step = layer.step(&mut random, &[1, 1], Some(StepShape::decode(8)));
    let got = layer.run(&weights, &step, &x);
    assert_close("two tokens", &got[..2 * HIDDEN], &layer.expected(&x[..2 * HIDDEN]), 1e-4);
    assert!(got[2 * HIDDEN..].iter().all(|x| *x == 0.0));
    let read = layer.machine.cpu.experts_read().unwrap();
    assert_eq!((read.layers, read.experts), (1, 2));
    let prompt = layer.step(&mut random, &[3], None);
    layer.run(&weights, &prompt, &x[..3 * HIDDEN]);
    assert_eq!(layer.machine.cpu.experts_read().unwrap(), read, "only steps of decode rows count");
}
