//! What the backend can't compute it refuses by name, before a weight is loaded.

mod common;

use common::{dims, spec};
use minisgl_core::backend::Ops;
use minisgl_core::spec::{
    Activation, Attention, Bias, DecoderSpec, Experts, LayerSpec, Mixer, Mlp, Norms, QkNorm, Rope, RopePairs,
};
use minisgl_cpu::Cpu;

/// The error's text.
#[track_caller]
fn refused(spec: &DecoderSpec) -> String {
    Cpu::new().supports(spec).expect_err("it should be refused").to_string()
}

fn with_attention(change: impl Fn(Attention) -> Attention) -> DecoderSpec {
    let spec = spec(dims(8, 2, 1, 4, 8, 16));
    let Mixer::Attention(attention) = spec.layers[1].mixer else { unreachable!("it has attention") };
    let changed = LayerSpec { mixer: Mixer::Attention(change(attention)), ..spec.layers[1] };
    DecoderSpec { layers: vec![spec.layers[0], changed], ..spec }
}

#[test]
fn what_is_not_computed_is_refused_by_name_and_layer() {
    let rope = Rope { pairs: RopePairs::Neighbours, ..Rope::plain(1e4, 4) };
    let attentions = [
        (with_attention(|it| Attention { sinks: true, ..it }), "attention sinks"),
        (with_attention(|it| Attention { score_cap: Some(50.0), ..it }), "soft cap"),
        (with_attention(|it| Attention { bias: Bias::QkvAndO, ..it }), "bias on attention's output"),
        (with_attention(|it| Attention { rope: Some(rope), ..it }), "neighbouring"),
    ];
    let plain = spec(dims(8, 2, 1, 4, 8, 16));
    let layer = |layer| DecoderSpec { layers: vec![plain.layers[0], layer], ..plain.clone() };
    let activation = Activation::Silu;
    let experts = Experts { activation, count: 8, per_token: 9, intermediate: 8, normalized: true };
    let delta = Mixer::GatedDelta { key_heads: 2, value_heads: 4, head_dim: 8, convolution: 4 };
    let layers = [
        (layer(LayerSpec { mlp: Mlp::Experts(experts), ..plain.layers[0] }), "fewer experts"),
        (layer(LayerSpec { mixer: delta, ..plain.layers[0] }), "gated delta"),
    ];
    for (spec, name) in attentions.into_iter().chain(layers) {
        let text = refused(&spec);
        assert!(text.contains(name) && text.contains("layer 1") && text.contains("CPU"), "{text}");
    }
    assert!(refused(&DecoderSpec { logit_cap: Some(30.0), ..plain }).contains("soft cap"));
}

#[test]
fn what_families_have_is_computed() {
    let cpu = Cpu::new();
    for norms in [Norms::Before, Norms::After, Norms::Around] {
        for qk_norm in [QkNorm::None, QkNorm::PerHead, QkNorm::FullWidth] {
            let mut spec = with_attention(|it| Attention {
                qk_norm,
                bias: Bias::Qkv,
                rope: None,
                window: Some(32),
                scale: Some(0.5),
                ..it
            });
            spec.layers[0] = LayerSpec { norms, mlp: Mlp::Dense(Activation::GeluTanh), ..spec.layers[0] };
            cpu.supports(&spec).unwrap();
        }
    }
}
