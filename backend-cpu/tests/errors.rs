//! What goes wrong says what, how much, and what to do.

mod common;

use std::sync::Arc;

use common::{Random, tensor};
use minisgl_core::backend::{Device, Element, Ops, Purpose, WeightRole};
use minisgl_core::tensor::{Dtype, HostTensor, TensorData, uniform_element};
use minisgl_cpu::{Cpu, CpuError};

#[test]
fn memory_that_the_machine_does_not_have_is_refused_with_sizes_and_a_remedy() {
    let mut cpu = Cpu::new();
    let memory = cpu.memory().unwrap();
    assert!(0 < memory.free && memory.free <= memory.total);
    for words in [memory.total as usize, usize::MAX] {
        let error = cpu.alloc(Purpose::KvCache, Element::Activation, words).unwrap_err();
        assert!(matches!(error, CpuError::OutOfMemory { purpose: Purpose::KvCache, .. }));
        let text = error.to_string();
        assert!(text.contains("the KV pages") && text.contains("--num-pages"), "{text}");
    }
}

#[test]
fn a_tensor_that_does_not_fit_is_named() {
    let mut cpu = Cpu::new();
    let random = &mut Random(1);
    let (good, _) = tensor(4, &random.floats(12), Dtype::F32);
    let (narrow, _) = tensor(6, &random.floats(12), Dtype::F32);
    let bytes = |len: usize, range| HostTensor {
        name: "model.damaged".into(),
        data: TensorData::Bytes { owner: Arc::new(vec![0; len]), range, dtype: Dtype::F32 },
        ..good.clone()
    };
    let cases = [vec![good.clone(), narrow], vec![bytes(48, 0..44)], vec![bytes(40, 0..48)]];
    for parts in cases {
        let error = cpu.load(WeightRole::Linear, &parts).unwrap_err();
        let name = &parts.last().unwrap().name;
        assert!(matches!(error, CpuError::Tensor { .. }) && error.to_string().contains(name), "{error}");
    }
    assert!(cpu.load(WeightRole::Linear, &[good]).is_ok());
}

#[test]
fn operations_need_sizes_and_memory_of_their_own() {
    let random = &mut Random(2);
    let mut cpu = Cpu::new();
    let (weight, _) = tensor(4, &random.floats(16), Dtype::F32);
    let weight = cpu.load(WeightRole::Linear, &[weight]).unwrap();
    let x = cpu.alloc(Purpose::Scratch, Element::Activation, 8).unwrap();
    let (low, high) = (cpu.slice(x, 0..4), cpu.slice(x, 3..7));
    assert!(matches!(cpu.linear(1, low, weight, high), Err(CpuError::NotReserved)));
    let dims = common::dims(4, 1, 1, 2, 4, 4);
    cpu.reserve(&common::spec(dims), &common::limits(1, 4, 4)).unwrap();
    assert!(matches!(cpu.linear(1, low, weight, high), Err(CpuError::Overlap)));
    let high = cpu.slice(x, 4..8);
    cpu.linear(1, low, weight, high).unwrap();
}

#[test]
fn dummy_weights_have_the_values_that_every_backend_makes() {
    let mut machine =
        common::Machine::new(common::dims(5, 1, 1, 2, 4, 3), common::limits(1, 4, 4), &mut Random(3));
    let (rows, cols, seed, low, high) = (41, 1000, 77, -0.5, 0.25);
    let data = TensorData::Uniform { seed, low, high };
    let uniform = HostTensor { name: "dummy".into(), rows, cols, data };
    let weight = machine.cpu.load(WeightRole::Linear, &[uniform]).unwrap();
    let x: Vec<f32> = (0..cols).map(|i| if i == 613 { 1.0 } else { 0.0 }).collect();
    let (x, out) = (machine.floats(&x), machine.poisoned(rows));
    machine.cpu.linear(1, x, weight, out).unwrap();
    let element = |row: usize| uniform_element(seed, (row * cols + 613) as u64, low, high).to_f32();
    assert_eq!(machine.read(out, rows), (0..rows).map(element).collect::<Vec<_>>());
}
