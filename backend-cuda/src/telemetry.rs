//! What the driver's management library says of a GPU's state: clocks, power, temperature, what holds the clocks down.
//!
//! A benchmark's figure means little without it: a card that is hot or capped is another card.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};

/// A GPU's state at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Telemetry {
    /// Version of the driver, for example `580.159.04`.
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
    /// What holds the clocks down, by NVML's names; empty if nothing does.
    pub throttle_reasons: Vec<String>,
}

impl Telemetry {
    /// Asks for the state of the GPU with this UUID; `None` where there is no management library or it gives no answer.
    pub fn read(uuid: &[u8; 16]) -> Option<Telemetry> {
        let nvml = Nvml::init().ok()?;
        let device = nvml.device_by_uuid(uuid_text(uuid)).ok()?;
        let reasons = device.current_throttle_reasons().ok()?;
        Some(Telemetry {
            driver: nvml.sys_driver_version().ok()?,
            sm_mhz: device.clock_info(Clock::SM).ok()?,
            sm_mhz_max: device.max_clock_info(Clock::SM).ok()?,
            memory_mhz: device.clock_info(Clock::Memory).ok()?,
            power_w: f64::from(device.power_usage().ok()?) / 1000.0,
            temperature_c: device.temperature(TemperatureSensor::Gpu).ok()?,
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
