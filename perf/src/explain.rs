//! What a step launches, as a text: `perf-cuda --explain rows=128`.
//!
//! Tilings, grids, stages and plans are asked of those who decide them when the step is launched, for a device that is described
//! and need not be there.

use std::fmt::{self, Write};
use std::str::FromStr;

use minisgl_cuda::ops::explain::{Described, Explained, ExplainedLayers, Launch, explain};
use minisgl_cuda::ops::halves::Part;
use minisgl_cuda::{CudaError, KernelSet};

use crate::model::ModelShape;
use crate::step::StepOf;

/// The step that is asked about: `rows=128`, `rows=64,context=4096`, `tokens=2048,behind=16384`, `rows=128,ranks=2`.
#[derive(Clone, Copy, Debug)]
pub struct ExplainedStep {
    /// Decode rows,
    rows: u32,
    /// and tokens that each attends to.
    context: u32,
    /// Tokens of one prompt,
    tokens: u32,
    /// and what is cached before them.
    behind: u32,
    /// GPUs that compute it together.
    ranks: u32,
}

impl FromStr for ExplainedStep {
    type Err = String;

    fn from_str(text: &str) -> Result<ExplainedStep, String> {
        let mut step = ExplainedStep { rows: 0, context: 1024, tokens: 0, behind: 0, ranks: 1 };
        for word in text.split(',') {
            let (name, value) = word.split_once('=').ok_or_else(|| format!("`{word}` is no NAME=NUMBER"))?;
            let value: u32 = value.parse().map_err(|_| format!("`{value}` in `{word}` is no number"))?;
            match name {
                "rows" => step.rows = value,
                "context" => step.context = value.max(1),
                "tokens" => step.tokens = value,
                "behind" => step.behind = value,
                "ranks" => step.ranks = value.max(1),
                _ => {
                    return Err(format!(
                        "a step has no `{name}`: take rows, context, tokens, behind or ranks"
                    ));
                }
            }
        }
        if step.rows == 0 && step.tokens == 0 {
            return Err("the step has neither rows nor tokens".into());
        }
        if step.rows > ROWS_MAX || [step.context, step.tokens, step.behind].iter().any(|n| *n > LENGTH_MAX) {
            return Err(format!("up to {ROWS_MAX} rows, and {LENGTH_MAX} tokens of each, can be explained"));
        }
        Ok(step)
    }
}

/// More than any device has pages for, and few enough that their products are numbers of 32 bits.
const ROWS_MAX: u32 = 4096;
const LENGTH_MAX: u32 = 1 << 19;

impl fmt::Display for ExplainedStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rows > 0 {
            write!(f, "{} decode rows of context {}", self.rows, self.context)?;
        }
        let and = if self.rows > 0 { " and " } else { "" };
        match (self.tokens, self.behind) {
            (0, _) => Ok(()),
            (tokens, 0) => write!(f, "{and}a prompt of {tokens} tokens"),
            (tokens, behind) => write!(f, "{and}{tokens} tokens of a prompt behind {behind}"),
        }
    }
}

impl ExplainedStep {
    /// The step's launches for a model, one a line, in their order.
    ///
    /// # Errors
    /// A step beyond what the kernels count.
    pub fn text(&self, model: &ModelShape, kernels: KernelSet) -> Result<String, CudaError> {
        let device = if kernels == KernelSet::Portable { Described::PORTABLE } else { Described::HOPPER };
        let decode = StepOf::decode(&vec![self.context; self.rows as usize], model.vocab);
        let prefill = (self.tokens > 0).then_some((self.behind, self.tokens));
        let step = StepOf { rows: decode.rows.iter().copied().chain(prefill).collect(), ..decode };
        let rows = step.packed_rows();
        let explained = explain(&device, &model.spec(), self.ranks, &step.limits(), step.shape(), &rows)?;
        let set = if device.hopper { "Hopper" } else { "portable" };
        let by = if self.ranks > 1 { format!(" by one of {} ranks", self.ranks) } else { String::new() };
        let mut text = format!(
            "{self}, model {}{by}, on {} SMs as an H100 or H200 has, {set} kernels\n",
            model.name, device.multiprocessors
        );
        // Writing to a string does not fail.
        let _ = write_launches(&mut text, &explained, model.layers);
        Ok(text)
    }
}

fn write_launches(text: &mut String, explained: &Explained, layers: u32) -> fmt::Result {
    writeln!(text, "\nbefore the layers")?;
    explained.before.iter().try_for_each(|launch| write_launch(text, launch))?;
    match &explained.layers {
        ExplainedLayers::Each(parts) => write_each_layer(text, parts, layers)?,
        ExplainedLayers::All(launches) => {
            writeln!(
                text,
                "\nall {layers} layers in one kernel, but for the first one's qkv and the last products of the second half"
            )?;
            launches.iter().try_for_each(|launch| write_launch(text, launch))?;
        }
    }
    writeln!(text, "\nbehind the layers")?;
    explained.behind.iter().try_for_each(|launch| write_launch(text, launch))
}

fn write_each_layer(text: &mut String, parts: &[(Part, Vec<Launch>)], layers: u32) -> fmt::Result {
    let texts = parts.iter().map(|(part, launches)| {
        let mut text = String::new();
        launches.iter().try_for_each(|launch| write_launch(&mut text, launch))?;
        Ok((*part, text))
    });
    let texts = texts.collect::<Result<Vec<_>, _>>()?;
    if let [(_, first), (_, second)] = texts.as_slice()
        && first == second
    {
        writeln!(
            text,
            "\na layer, {layers} times: each half of the rows, the second's on a stream of its own"
        )?;
        text.push_str(first);
    } else {
        for (part, launches) in texts {
            let whose = match part {
                Part::Whole => "all rows",
                Part::First => "the first half of the rows",
                Part::Second => "the second half, beside it on a stream of its own",
            };
            write!(text, "\na layer, {layers} times: {whose}\n{launches}")?;
        }
    }
    Ok(())
}

fn write_launch(text: &mut String, launch: &Launch) -> fmt::Result {
    let Launch { what, kernel, grid, work } = launch;
    writeln!(text, "  {what:<10} {kernel:<24} {grid}\n  {:<10} {work}", "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LARGEST;

    fn text(step: &str, model: &str, kernels: KernelSet) -> String {
        let model: ModelShape = model.parse().unwrap();
        step.parse::<ExplainedStep>().unwrap().text(&model, kernels).unwrap()
    }

    #[test]
    fn one_of_several_ranks_leaves_sums_that_are_added_up_or_has_rows_that_are_joined() {
        let large = "hidden=5120,heads=40,intermediate=17408";
        let two = text("rows=64,ranks=2", large, KernelSet::Auto);
        for part in ["embed_share", "few_sums_128x64_rows", "2 slices", "reduce_two_shot_2", "gather_columns"]
        {
            assert!(two.contains(part), "{part}: {two}");
        }
        let four = text("rows=1,ranks=4", large, KernelSet::Portable);
        assert!(four.contains("gemm_sums_16") && four.contains("reduce_one_shot_4"), "{four}");
        let eight = text("rows=64,ranks=8", large, KernelSet::Auto);
        for part in ["gather_columns", "few_residual_64x32", "of 4 slices", "join_columns"] {
            assert!(eight.contains(part), "{part}: {eight}");
        }
    }

    #[test]
    fn halves_that_differ_are_explained_one_by_one() {
        let odd = text("rows=65", "intermediate=2048", KernelSet::Auto);
        assert!(
            odd.contains("the first half of the rows") && odd.contains("the second half, beside"),
            "{odd}"
        );
    }

    #[test]
    fn a_small_models_decode_step_is_explained_in_halves_and_a_large_ones_whole() {
        let small = text("rows=128", "intermediate=2048", KernelSet::Auto);
        assert!(small.contains("few_qkv_normed_64x64") && small.contains("a stream of its own"), "{small}");
        let large = text("rows=128", "hidden=5120,heads=40,intermediate=17408", KernelSet::Auto);
        assert!(large.contains("all rows") && !large.contains("half"), "{large}");
        let biased = text("rows=16", "bias=1", KernelSet::Auto);
        assert!(biased.contains("few_qkv_64x16") && !biased.contains("normed"), "{biased}");
        assert!(text("rows=1", "layers=28", KernelSet::Portable).contains("gemm_qkv_16"));
    }

    #[test]
    fn a_step_that_is_one_kernel_is_explained_as_such() {
        let one = text("rows=128,context=560", "layers=28", KernelSet::Auto);
        assert!(one.contains("divided_layers") && one.contains("512 and 512 turns a layer"), "{one}");
        assert!(!one.contains("attention_decode") && one.contains("batch_gate_up_64x64"), "{one}");
        let few = text("rows=32", "layers=28", KernelSet::Auto);
        assert!(!few.contains("divided_layers") && few.contains("attention_decode_128"), "{few}");
    }

    #[test]
    fn prompts_are_explained_beside_decode_rows_and_long_contexts_are_split() {
        let mixed = text("rows=8,tokens=512,behind=16384", "layers=28", KernelSet::Auto);
        assert!(mixed.contains("attention_decode_128") && mixed.contains("attention_prefill_128"), "{mixed}");
        assert!(mixed.contains("pieces of split ones") && !mixed.contains(" 0 pieces"), "{mixed}");
        assert!(text("tokens=16384", "layers=28", KernelSet::Auto).contains("many_qkv_"));
    }

    #[test]
    fn what_is_in_fp8_is_explained_by_its_own_kernels() {
        let decode = text("rows=8", "kv_fp8=1,weights_fp8=1", KernelSet::Auto);
        let kernels = [
            "fp8_weights_scale",
            "fp8_qkv_fp8_normed_128x16",
            "attention_decode_fp8_128",
            "fp8_residual_128x16",
        ];
        assert!(kernels.iter().all(|kernel| decode.contains(kernel)), "{decode}");
        let prefill = text("tokens=4096", "kv_fp8=1,weights_fp8=1", KernelSet::Auto);
        let kernels = ["fp8_weights_widen", "fp8_encode_128", "fp8_widen_128", "attention_prefill_fp8_128"];
        assert!(kernels.iter().all(|kernel| prefill.contains(kernel)), "{prefill}");
        let rounded = text("rows=8", "weights_fp8=1,inputs_fp8=1", KernelSet::Auto);
        let kernels = ["fp8_inputs", "few_qkv_128x16", "few_residual_64x16", "few_gate_up_128x16"];
        assert!(kernels.iter().all(|kernel| rounded.contains(kernel)), "{rounded}");
        let rounded = text("tokens=4096", "kv_fp8=1,weights_fp8=1,inputs_fp8=1", KernelSet::Auto);
        let kernels = ["fp8_inputs", "many_qkv_", "fp8_encode_128", "many_residual_", "many_gate_up_"];
        assert!(kernels.iter().all(|kernel| rounded.contains(kernel)), "{rounded}");
        let one = text("rows=128,context=560", "layers=28,kv_fp8=1", KernelSet::Auto);
        assert!(one.contains("divided_layers_fp8") && one.contains("pair_qkv_fp8_normed_128x32"), "{one}");
        let pages = text("rows=128", "intermediate=2560,kv_fp8=1", KernelSet::Auto);
        assert!(
            pages.contains("few_qkv_fp8_normed_64x64") && pages.contains("a stream of its own"),
            "{pages}"
        );
        assert!(!pages.contains("fp8_encode"), "{pages}");
    }

    #[test]
    fn steps_of_the_largest_model_are_explained_or_refused_by_name() {
        let model: ModelShape = LARGEST.parse().unwrap();
        for kernels in [KernelSet::Hopper, KernelSet::Portable] {
            assert!(text("rows=1,tokens=16", LARGEST, kernels).contains("attention_prefill_128"));
            let step: ExplainedStep = "rows=4096,context=524288,tokens=524288,behind=524288".parse().unwrap();
            let refused = step.text(&model, kernels).unwrap_err().to_string();
            assert!(refused.contains("32 bits"), "{refused}");
        }
    }

    #[test]
    fn what_is_no_step_is_refused_by_name() {
        for wrong in
            ["", "rows", "rows=x", "rows=0", "context=5", "heads=2", "rows=5000", "rows=1,context=600000"]
        {
            assert!(wrong.parse::<ExplainedStep>().is_err(), "{wrong}");
        }
    }
}
