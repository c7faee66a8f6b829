//! What a device says of itself beside computing: what it reaches at best, and the state it is in.
//!
//! A benchmark's figure means little without either. The CPU says nothing.

use minisgl_core::backend::Ops;
use minisgl_cpu::Cpu;
use minisgl_cuda::{Cuda, CudaError, HostTimes, Telemetry, perf};
use serde::Serialize;

/// What a device reaches at best.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ceilings {
    /// Bytes read a second.
    pub bytes_per_s: f64,
    /// Operations of a large matrix product a second, a multiplication and an addition counted as two; `None` where
    /// there was nothing to measure it with.
    pub flop_per_s: Option<f64>,
}

/// A GPU's state at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceState {
    /// Version of the driver.
    pub driver: String,
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: u32,
    /// The highest clock that they have.
    pub sm_mhz_max: u32,
    /// Clock of the memory, MHz.
    pub memory_mhz: u32,
    /// Power drawn, W.
    pub power_w: f64,
    /// Temperature of the chip, degrees Celsius.
    pub temperature_c: u32,
    /// What holds the clocks down; empty if nothing does.
    pub throttle_reasons: Vec<String>,
}

/// A backend that can be asked.
pub trait Gauge: Ops {
    /// Measures the ceilings, which takes a second; `None` if the device has no way to.
    fn ceilings(&mut self) -> Result<Option<Ceilings>, Self::Error>;
    /// The state now; `None` if it is not known.
    fn state(&self) -> Option<DeviceState>;
    /// What the host's time went to so far, beside work of its own; `None` where the host is the device.
    fn host_times(&self) -> Option<HostTimes>;
}

impl Gauge for Cpu {
    fn ceilings(&mut self) -> Result<Option<Ceilings>, Self::Error> {
        Ok(None)
    }

    fn state(&self) -> Option<DeviceState> {
        None
    }

    fn host_times(&self) -> Option<HostTimes> {
        None
    }
}

impl Gauge for Cuda {
    fn ceilings(&mut self) -> Result<Option<Ceilings>, CudaError> {
        let perf::Ceilings { read_bytes_s, matmul_flop_s } = perf::Ceilings::measure(self)?;
        Ok(Some(Ceilings { bytes_per_s: read_bytes_s, flop_per_s: matmul_flop_s }))
    }

    fn state(&self) -> Option<DeviceState> {
        let Telemetry { driver, sm_mhz, sm_mhz_max, memory_mhz, power_w, temperature_c, throttle_reasons } =
            self.telemetry()?;
        Some(DeviceState { driver, sm_mhz, sm_mhz_max, memory_mhz, power_w, temperature_c, throttle_reasons })
    }

    fn host_times(&self) -> Option<HostTimes> {
        Some(self.launcher().host_times())
    }
}
