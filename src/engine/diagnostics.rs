//! What a device says of itself beside computing: what it reaches at best, and where its state is asked for.
//!
//! A benchmark's figure means little without either. The CPU says nothing.

use minisgl_core::backend::Ops;
use minisgl_core::stats::ExpertsRead;
use minisgl_cpu::Cpu;
use minisgl_cuda::{Cuda, CudaError, GpuState, HostTimes};
use serde::Serialize;

use crate::telemetry::{DeviceState, Probe};

/// What a device reaches at best.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ceilings {
    /// Bytes read a second.
    pub bytes_per_s: f64,
    /// Operations of a large matrix product a second, a multiplication and an addition counted as two; `None` where
    /// there was nothing to measure it with.
    pub flop_per_s: Option<f64>,
}

impl Ceilings {
    /// Of two devices together.
    pub fn joined(self, other: Ceilings) -> Ceilings {
        let flop_per_s = self.flop_per_s.zip(other.flop_per_s).map(|(one, two)| one + two);
        Ceilings { bytes_per_s: self.bytes_per_s + other.bytes_per_s, flop_per_s }
    }
}

/// A backend that can be asked.
pub trait Diagnostics: Ops {
    /// Measures the ceilings, which takes a second; `None` if the device has no way to.
    fn ceilings(&mut self) -> Result<Option<Ceilings>, Self::Error>;
    /// Where its state can be asked for, from any thread; `None` if it is not known.
    fn probe(&self) -> Option<Probe>;
    /// What the host's time went to so far, beside work of its own; `None` where the host is the device.
    fn host_times(&self) -> Option<HostTimes>;
    /// What decode steps read of layers with experts so far, after waiting for what is enqueued.
    fn experts_read(&mut self) -> Result<ExpertsRead, Self::Error>;
}

impl Diagnostics for Cpu {
    fn ceilings(&mut self) -> Result<Option<Ceilings>, Self::Error> {
        Ok(None)
    }

    fn probe(&self) -> Option<Probe> {
        None
    }

    fn host_times(&self) -> Option<HostTimes> {
        None
    }

    fn experts_read(&mut self) -> Result<ExpertsRead, Self::Error> {
        Cpu::experts_read(self)
    }
}

impl Diagnostics for Cuda {
    fn ceilings(&mut self) -> Result<Option<Ceilings>, CudaError> {
        let minisgl_perf::Ceilings { read_bytes_s, matmul_flop_s } = minisgl_perf::Ceilings::measure(self)?;
        Ok(Some(Ceilings { bytes_per_s: read_bytes_s, flop_per_s: matmul_flop_s }))
    }

    fn probe(&self) -> Option<Probe> {
        let telemetry = self.telemetry()?;
        let (driver, sm_mhz_max) = (telemetry.driver.clone(), telemetry.sm_mhz_max);
        let read = move || {
            let GpuState { sm_mhz, memory_mhz, power_w, temperature_c, throttle_reasons } =
                telemetry.read()?;
            Some(DeviceState { sm_mhz, memory_mhz, power_w, temperature_c, throttle_reasons })
        };
        Some(Probe { driver, sm_mhz_max, read: Box::new(read) })
    }

    fn host_times(&self) -> Option<HostTimes> {
        Some(self.launcher().host_times())
    }

    fn experts_read(&mut self) -> Result<ExpertsRead, CudaError> {
        Cuda::experts_read(self)
    }
}
