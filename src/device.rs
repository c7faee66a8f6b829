//! Which device computes: what was asked for, else a GPU where there is one.
//!
//! Naming a GPU, by `--devices` or by CUDA_VISIBLE_DEVICES, asks for one: where there is none, computing on the CPU would
//! take hours longer than anybody meant.

use std::env;

use minisgl_cuda::CudaError;

use crate::error::Error;
use crate::options::{BackendChoice, Options};

/// A decision, and why where it was left to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub on_gpu: bool,
    pub reason: Option<&'static str>,
}

/// Decides.
///
/// # Errors
/// A GPU is named that can't be had, or the driver can't be asked.
pub fn choose(options: &Options) -> Result<Choice, Error> {
    if options.simulate.is_some() {
        return Ok(Choice { on_gpu: false, reason: None });
    }
    match (options.backend, options.devices.first()) {
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
        let cpu = Options { backend: BackendChoice::Cpu, devices: vec![0], ..Options::default() };
        assert!(choose(&cpu).unwrap_err().to_string().contains("--backend cpu"));
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
