//! The presets: what they take of a device, and how fast it could run them at best.

use std::fmt;

use minisgl_core::kv::KvFormat;
use minisgl_core::stats::ExpertsRead;
use minisgl_decoder::Checkpoint;

use crate::bench::floor::{Costs, experts_read_together, together};
use crate::diagnostics::Ceilings;
use crate::error::Error;
use crate::info::ExpertsInfo;
use crate::models::{FAMILIES, preset_names};
use crate::workload::Workload;

/// Tokens of a page, where scales are shared out among some.
const PAGE_SIZE: u32 = 16;

/// A preset's line of the list.
#[derive(Clone, Debug, PartialEq)]
pub struct ListedModel {
    /// What `--model` calls it.
    pub name: &'static str,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Bytes of keys and values of a token.
    pub kv_bytes_per_token: u64,
    /// Positions that a token sees, if every layer has a window.
    pub window: Option<u32>,
    /// Its experts, if it has any.
    pub experts: Option<ExpertsInfo>,
    /// Output tokens a second that the device allows at most, if its ceilings are known.
    pub tokens_per_s: Option<f64>,
}

/// All presets, with the floor of a workload whose requests all run together, keys and values being kept as `kv`.
///
/// # Errors
/// A preset that its own family does not read.
pub fn list_models(
    workload: &Workload,
    kv: KvFormat,
    ceilings: Option<Ceilings>,
) -> Result<Vec<ListedModel>, Error> {
    preset_names().map(|name| listed(name, workload, kv, ceilings)).collect()
}

fn listed(
    name: &'static str,
    workload: &Workload,
    kv: KvFormat,
    ceilings: Option<Ceilings>,
) -> Result<ListedModel, Error> {
    let checkpoint = Checkpoint::preset(name, FAMILIES).map_err(|cause| Error::Model(cause.into()))?;
    let (spec, tensors) = (&checkpoint.config().spec, checkpoint.tensors());
    let (dims, window) = (&spec.dims, spec.window());
    let kv_bytes_per_token = spec.page_bytes(kv, PAGE_SIZE) / u64::from(PAGE_SIZE);
    let experts = ExpertsInfo::of(&checkpoint);
    let costs = Costs::new(dims, spec.active_weights(), tensors.step_bytes(), experts, kv_bytes_per_token);
    let items = workload.draw(dims.vocab);
    let tokens: u64 = items.iter().map(|item| u64::from(item.output_tokens)).sum();
    let read = experts.map_or(ExpertsRead::default(), |experts| experts_read_together(&items, &experts));
    let floor = |ceilings| costs.work(&together(&items, window), &read).floor(&ceilings).seconds;
    Ok(ListedModel {
        name,
        weight_bytes: tensors.bytes(),
        kv_bytes_per_token,
        window,
        experts,
        tokens_per_s: ceilings.map(|ceilings| tokens as f64 / floor(ceilings)),
    })
}

impl fmt::Display for ListedModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = self.weight_bytes as f64 / f64::from(1 << 30);
        let kib = self.kv_bytes_per_token as f64 / 1024.0;
        write!(f, "{:<14} {gib:>7.2} GiB of weights {kib:>6.0} KiB of KV a token", self.name)?;
        if let Some(rate) = self.tokens_per_s {
            write!(f, " {rate:>7.0} tok/s at most")?;
        }
        if let Some(ExpertsInfo { count, per_token, .. }) = self.experts {
            write!(f, "  ({per_token} of {count} experts a token)")?;
        }
        self.window.map_or(Ok(()), |window| write!(f, "  (window of {window} tokens)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Lengths, Source};

    fn lines(ceilings: Option<Ceilings>) -> Vec<ListedModel> {
        let lengths = Lengths::BENCHMARK;
        let (input, output) = (lengths.clone(), lengths);
        let workload = Workload { source: Source::Minisgl, seed: 0, requests: 256, input, output };
        list_models(&workload, KvFormat::Bf16, ceilings).unwrap()
    }

    fn of(lines: &[ListedModel], name: &str) -> ListedModel {
        lines.iter().find(|line| line.name == name).unwrap().clone()
    }

    #[test]
    fn presets_have_the_published_number_of_weights() {
        // Parameters of the published checkpoints, a tied head counted once.
        let published = [
            ("llama-3.2-1b", 1_235_814_400_u64),
            ("llama-3.1-8b", 8_030_261_248),
            ("smollm2-135m", 134_515_008),
            ("qwen2.5-0.5b", 494_032_768),
            ("qwen2.5-7b", 7_615_616_512),
            ("mistral-7b", 7_241_732_096),
            ("smollm3-3b", 3_075_098_624),
            ("seed-oss-36b", 36_151_104_512),
            ("phi-3-mini-4k", 3_821_079_552),
            ("phi-4", 14_659_507_200),
            ("olmo-2-1b", 1_484_916_736),
            ("olmo-2-7b", 7_298_617_344),
            ("qwen3-32b", 32_762_123_264),
            ("qwen3-30b-a3b", 30_532_122_624),
        ];
        let lines = lines(None);
        for (name, parameters) in published {
            assert_eq!(of(&lines, name).weight_bytes, 2 * parameters, "{name}");
        }
    }

    #[test]
    fn keys_and_values_in_fp8_are_half_the_bytes_and_a_scale_for_each_head() {
        let lengths = Lengths::BENCHMARK;
        let (input, output) = (lengths.clone(), lengths);
        let workload = Workload { source: Source::Minisgl, seed: 0, requests: 2, input, output };
        let bytes = |kv| {
            let lines = list_models(&workload, kv, None).unwrap();
            of(&lines, "qwen3-0.6b").kv_bytes_per_token
        };
        assert_eq!(bytes(KvFormat::Bf16), 114_688);
        assert_eq!(bytes(KvFormat::Fp8), 114_688 / 2 + 2 * 28 * 8 * 2);
    }

    #[test]
    fn the_floor_is_that_of_a_run_and_a_window_bounds_what_is_read() {
        let lines = lines(Some(Ceilings { bytes_per_s: 3.11e12, flop_per_s: Some(786e12) }));
        let rate = of(&lines, "qwen3-0.6b").tokens_per_s.unwrap();
        assert!((133_966.0 / 5.05..133_966.0 / 4.95).contains(&rate), "{rate}");
        assert_eq!(of(&lines, "mistral-7b").window, Some(4096));
        assert_eq!(of(&lines, "smollm3-3b").window, None);
        let experts = of(&lines, "qwen3-30b-a3b");
        assert_eq!(
            experts.experts,
            Some(ExpertsInfo { layers: 48, count: 128, per_token: 8, bytes: 9_437_184 })
        );
        assert!(experts.to_string().contains("8 of 128 experts"), "{experts}");
        let (most, dense) = (experts.tokens_per_s.unwrap(), of(&lines, "qwen3-32b").tokens_per_s.unwrap());
        assert!(most > dense, "as many weights are read, and fewer multiplied with: {most}, {dense}");
        let text = of(&lines, "mistral-7b").to_string();
        assert!(text.contains("13.49 GiB") && text.contains("128 KiB") && text.contains("4096"), "{text}");
    }
}
