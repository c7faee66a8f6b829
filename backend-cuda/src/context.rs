//! The way to a device: the driver, the device's properties, its context.
//!
//! Everything that lives on the device (streams, events, pinned memory, graphs) holds an [`Arc`] of its context, so
//! that the context outlives them whatever the order in which they are dropped.
//!
//! Invariant: the driver library is asked for, and its version checked, before any other call: an entry point that
//! the library lacks would panic.

use std::str::FromStr;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};

use crate::error::{CudaError, Named};

/// CUDA 12.4, the version whose PTX the kernels are built to.
const DRIVER_VERSION_MIN: i32 = 12040;

/// Where this variable of the environment is 0, GPUs count as such that don't reach each other's memory.
const PEER_ACCESS: &str = "MINISGL_PEER_ACCESS";

/// Which kernels to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelSet {
    /// The Hopper set where the device can, else the portable set.
    #[default]
    Auto,
    /// The set for any GPU from Ampere on.
    Portable,
    /// The set for compute capability 9.0.
    Hopper,
}

impl FromStr for KernelSet {
    type Err = String;

    fn from_str(text: &str) -> Result<KernelSet, String> {
        match text {
            "auto" => Ok(KernelSet::Auto),
            "portable" => Ok(KernelSet::Portable),
            "hopper" => Ok(KernelSet::Hopper),
            _ => Err(format!("{text} is no kernel set; use auto, portable or hopper")),
        }
    }
}

/// What a device is, as far as launches care.
#[derive(Clone, Debug)]
pub struct Properties {
    /// For example `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability, before and after the point.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Bytes of dynamic shared memory that a block may ask for.
    pub shared_bytes: u32,
    /// Are the Hopper kernels used?
    pub hopper: bool,
    /// Names the card, whatever its number.
    pub uuid: [u8; 16],
}

/// A device's primary context.
#[derive(Debug)]
pub(crate) struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
    pub(crate) properties: Properties,
}

/// How many devices the driver sees; 0 where there is a driver without one.
pub fn device_count() -> Result<usize, CudaError> {
    // SAFETY: opens the library and closes it again.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    match result::init() {
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        Err(DriverError(CUresult::CUDA_ERROR_STUB_LIBRARY)) => return Err(CudaError::NoDriver),
        other => other.named("initialising the NVIDIA driver")?,
    }
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().named("reading the driver's version")?;
    if version < DRIVER_VERSION_MIN {
        return Err(CudaError::DriverTooOld { version });
    }
    Ok(result::device::get_count().named("counting the GPUs")? as usize)
}

/// Device `index`, which need not be open.
fn device(index: usize) -> Result<sys::CUdevice, CudaError> {
    let count = device_count()?;
    if count == 0 {
        return Err(CudaError::NoDevice);
    }
    if index >= count {
        return Err(CudaError::DeviceIndex { index, count });
    }
    result::device::get(index as i32).named("opening the GPU")
}

impl Context {
    /// Opens device `index` and makes its context the calling thread's.
    pub(crate) fn open(index: usize, kernels: KernelSet) -> Result<Arc<Context>, CudaError> {
        let device = device(index)?;
        let properties = Properties::read(device, kernels)?;
        // SAFETY: the device was just returned by the driver.
        let handle = unsafe { result::primary_ctx::retain(device) }.named("making a context on the GPU")?;
        let context = Context { device, handle, properties };
        context.make_current()?;
        Ok(Arc::new(context))
    }

    /// Are both of one device?
    pub(crate) fn is_of_device(&self, other: &Context) -> bool {
        self.device == other.device
    }

    /// Lets kernels of this context, the calling thread's, use memory of another's; can they?
    pub(crate) fn reach(&self, peer: &Context) -> Result<bool, CudaError> {
        if self.is_of_device(peer) {
            return Ok(true);
        }
        let mut can = 0;
        // SAFETY: the devices were returned by the driver; one integer is written.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.device, peer.device) };
        asked.result().named("asking whether GPUs reach each other's memory")?;
        if can == 0 || std::env::var_os(PEER_ACCESS).is_some_and(|value| value == "0") {
            return Ok(false);
        }
        // SAFETY: both contexts are retained.
        match unsafe { sys::cuCtxEnablePeerAccess(peer.handle, 0) } {
            CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(true),
            status => status.result().named("reaching another GPU's memory").map(|()| true),
        }
    }

    /// As people number it.
    pub(crate) fn number(&self) -> usize {
        self.device as usize
    }

    /// Makes it the context of the calling thread's driver calls.
    pub(crate) fn make_current(&self) -> Result<(), CudaError> {
        // SAFETY: the handle is retained until `self` is dropped.
        unsafe { result::ctx::set_current(self.handle) }.named("entering the GPU's context")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // An error here has nobody to go to, and the process keeps nothing that depends on it.
        // SAFETY: retained once in `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

// SAFETY: the driver takes context handles from any thread.
unsafe impl Send for Context {}
// SAFETY: the driver takes context handles from several threads at once; nothing is changed through a shared reference.
unsafe impl Sync for Context {}

impl Properties {
    /// Of device `index`, which need not be open, where these kernels are to run.
    ///
    /// # Errors
    /// There is no such device, or it can't run them.
    pub fn of(index: usize, kernels: KernelSet) -> Result<Properties, CudaError> {
        Properties::read(device(index)?, kernels)
    }

    fn read(device: sys::CUdevice, kernels: KernelSet) -> Result<Properties, CudaError> {
        let attribute = |which| {
            // SAFETY: the device was returned by the driver.
            unsafe { result::device::get_attribute(device, which) }.named("reading the GPU's properties")
        };
        let name = result::device::get_name(device).named("reading the GPU's name")?;
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(CudaError::DeviceTooOld { name, major, minor });
        }
        let hopper = match kernels {
            KernelSet::Auto => (major, minor) == (9, 0),
            KernelSet::Portable => false,
            KernelSet::Hopper if (major, minor) == (9, 0) => true,
            KernelSet::Hopper => return Err(CudaError::NotHopper { name, major, minor }),
        };
        Ok(Properties {
            name,
            capability: (major, minor),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
            hopper,
            uuid: result::device::get_uuid(device).named("reading the GPU's UUID")?.bytes.map(|b| b as u8),
        })
    }
}
