//! What the driver's management library says of a GPU's state: clocks, power, temperature, what holds the clocks down.
//!
//! A benchmark's figure means little without it: a card that is hot or capped is another card. The library has nothing to
//! do with the CUDA context, so whoever holds a [`Telemetry`] may ask from any thread while another computes.

use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::{Device, Nvml};

/// A GPU that can be asked for its state.
pub struct Telemetry {
    nvml: Nvml,
    uuid: String,
    /// Version of the driver, for example `580.159.04`.
    pub driver: String,
    /// The highest clock of the multiprocessors, MHz.
    pub sm_mhz_max: u32,
}

/// A GPU's state at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuState {
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: u32,
    /// Clock of the memory, MHz.
    pub memory_mhz: u32,
    /// Power drawn, W. Recent cards give the mean of the last second.
    pub power_w: f64,
    /// Temperature of the chip, degrees Celsius.
    pub temperature_c: u32,
    /// What holds the clocks down, by NVML's names; empty if nothing does.
    pub throttle_reasons: Vec<String>,
}

impl Telemetry {
    /// The GPU with this UUID; `None` where there is no management library or it does not know the GPU.
    pub fn open(uuid: &[u8; 16]) -> Option<Self> {
        let nvml = Nvml::init().ok()?;
        let uuid = uuid_text(uuid);
        let driver = nvml.sys_driver_version().ok()?;
        let sm_mhz_max = nvml.device_by_uuid(&*uuid).and_then(|gpu| gpu.max_clock_info(Clock::SM)).ok()?;
        Some(Telemetry { nvml, uuid, driver, sm_mhz_max })
    }

    /// The state now; `None` if the library gives no answer.
    pub fn read(&self) -> Option<GpuState> {
        let gpu: Device<'_> = self.nvml.device_by_uuid(&*self.uuid).ok()?;
        let reasons = gpu.current_throttle_reasons().ok()?;
        Some(GpuState {
            sm_mhz: gpu.clock_info(Clock::SM).ok()?,
            memory_mhz: gpu.clock_info(Clock::Memory).ok()?,
            power_w: f64::from(gpu.power_usage().ok()?) / 1000.0,
            temperature_c: gpu.temperature(TemperatureSensor::Gpu).ok()?,
            throttle_reasons: reasons.iter_names().map(|(name, _)| name.to_lowercase()).collect(),
        })
    }
}

/// `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex =
        |range: core::ops::Range<usize>| uuid[range].iter().map(|b| format!("{b:02x}")).collect::<String>();
    format!("GPU-{}-{}-{}-{}-{}", hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16))
}
