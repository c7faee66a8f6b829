//! Which device computes: what was asked for, else a GPU where there is one.
//!
//! Naming a GPU, by `--devices` or by CUDA_VISIBLE_DEVICES, asks for one: where there is none, computing on the CPU would
//! take hours longer than anybody meant.

use std::env;
use std::str::FromStr;

use minisgl_cuda::CudaError;

use crate::error::Error;

/// What a GPU's backend is called.
pub(crate) const CUDA: &str = "cuda";

/// Which device computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// CUDA where there is a GPU, else the CPU.
    #[default]
    Auto,
    /// The reference backend.
    Cpu,
    /// An NVIDIA GPU; an error where there is none.
    Cuda,
}

impl FromStr for BackendChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(BackendChoice::Auto),
            "cpu" => Ok(BackendChoice::Cpu),
            CUDA => Ok(BackendChoice::Cuda),
            _ => Err(format!("{text} is no backend; use auto, cpu or cuda")),
        }
    }
}

/// A decision, and why where it was left to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub on_gpu: bool,
    pub reason: Option<&'static str>,
}

/// Decides, by what is asked for and the GPUs that are named.
///
/// # Errors
/// A GPU is named that can't be had, or the driver can't be asked.
pub fn choose(backend: BackendChoice, devices: &[usize], is_simulated: bool) -> Result<Choice, Error> {
    if is_simulated {
        return Ok(Choice { on_gpu: false, reason: None });
    }
    match (backend, devices.first()) {
        (BackendChoice::Cuda, _) => Ok(Choice { on_gpu: true, reason: None }),
        (BackendChoice::Cpu, None) => Ok(Choice { on_gpu: false, reason: None }),
        (BackendChoice::Cpu, Some(device)) => Err(Error::NoGpu {
            asked: format!("--devices {device}"),
            reason: "--backend cpu computes without one",
        }),
        (BackendChoice::Auto, device) => {
            let visible = env::var("CUDA_VISIBLE_DEVICES").ok();
            decide(device.copied(), visible.as_deref(), minisgl_cuda::device_count())
        }
    }
}

/// By what is named and by what the driver sees.
fn decide(
    device: Option<usize>,
    visible: Option<&str>,
    count: Result<usize, CudaError>,
) -> Result<Choice, Error> {
    let reason = match count {
        Ok(1..) => return Ok(Choice { on_gpu: true, reason: Some("there is a GPU") }),
        Ok(0) => "the NVIDIA driver sees no GPU",
        Err(CudaError::NoDriver) => "there is no NVIDIA driver",
        Err(error) => return Err(Error::Gpu(Box::new(error))),
    };
    // Empty, or a negative number, hides all GPUs: that asks for none.
    let names_one = |visible: &&str| !visible.is_empty() && !visible.starts_with('-');
    match (device, visible.filter(names_one)) {
        (Some(device), _) => Err(Error::NoGpu { asked: format!("--devices {device}"), reason }),
        (None, Some(visible)) => {
            Err(Error::NoGpu { asked: format!("CUDA_VISIBLE_DEVICES={visible}"), reason })
        }
        (None, None) => Ok(Choice { on_gpu: false, reason: Some(reason) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(device: Option<usize>, visible: Option<&str>, count: Result<usize, CudaError>) -> String {
        decide(device, visible, count).unwrap_err().to_string()
    }

    #[test]
    fn a_gpu_that_is_named_and_not_there_is_an_error() {
        for count in [Ok(0), Err(CudaError::NoDriver)] {
            assert!(refusal(Some(5), None, count).contains("--devices 5"));
        }
        for count in [Ok(0), Err(CudaError::NoDriver)] {
            assert!(refusal(None, Some("9"), count).contains("CUDA_VISIBLE_DEVICES=9"));
        }
        let refused = choose(BackendChoice::Cpu, &[0], false).unwrap_err().to_string();
        assert!(refused.contains("--backend cpu"), "{refused}");
    }

    #[test]
    fn without_a_name_the_cpu_computes_where_there_is_no_gpu_and_the_reason_is_kept() {
        let reason = |visible| decide(None, visible, Err(CudaError::NoDriver)).unwrap().reason.unwrap();
        for visible in [None, Some(""), Some("-1")] {
            assert_eq!(reason(visible), "there is no NVIDIA driver");
        }
        let choice = decide(None, Some("9"), Ok(2)).unwrap();
        assert!(choice.on_gpu && choice.reason == Some("there is a GPU"));
    }
}
