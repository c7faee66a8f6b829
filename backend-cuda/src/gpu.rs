//! A GPU: its memory, its streams, the kernels that are loaded on it, and its link to other ranks. Operations take it; of
//! models it knows nothing.
//!
//! ```text
//!   host ── pinned ──> [upload stream]   upload ── event ──┐
//!   host ── pinned ──> [compute stream]  upload,      wait ┴ kernels or a graph of them ── event ──┐
//!   host <── pinned ── [copy stream]     download <───────────────────────────────────────── wait ─┘
//! ```
//!
//! Invariant: every driver call's status is looked at, and an error that a kernel caused earlier is reported as the
//! kernel's, not as the call's that happened to notice it.

mod allocations;
mod copies;

use std::sync::Arc;

use cudarc::driver::result::DriverError;
use minisgl_core::backend::DeviceInfo;
use minisgl_core::shard::Rank;

use self::allocations::Allocations;
use crate::context::{Context, KernelSet, Properties};
use crate::error::CudaError;
use crate::info::info_of;
use crate::launch::Launcher;
use crate::link::Link;
use crate::memory::Event;
use crate::module::Modules;
use crate::telemetry::Telemetry;

/// Which device to open, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The device's number, from 0.
    pub device: usize,
    /// Which kernels to run.
    pub kernels: KernelSet,
}

/// A GPU. Used from the thread that made it.
#[derive(Debug)]
pub struct Gpu {
    allocations: Allocations,
    pub(crate) modules: Modules,
    pub(crate) launcher: Launcher,
    /// To the other ranks, where there are some. Last: what lies above waits for the device before it goes.
    pub(crate) link: Option<Link>,
}

impl Gpu {
    /// Opens a device and loads the kernels for it.
    pub fn new(options: &Options) -> Result<Gpu, CudaError> {
        Gpu::on(&Context::open(options.device, options.kernels)?, None)
    }

    /// The device of one of several ranks that compute each step together. What it is given to load and to reserve is that rank's
    /// part of a model ([`minisgl_core::shard`]).
    pub fn of_rank(link: Link) -> Result<Gpu, CudaError> {
        let context = link.context().clone();
        context.make_current()?;
        Gpu::on(&context, Some(link))
    }

    fn on(context: &Arc<Context>, link: Option<Link>) -> Result<Gpu, CudaError> {
        Ok(Gpu {
            allocations: Allocations::new(context),
            modules: Modules::load(context)?,
            launcher: Launcher::new(context)?,
            link,
        })
    }

    /// Which of the ranks that compute each step together it is.
    pub fn rank(&self) -> Rank {
        self.link.as_ref().map_or(Rank::ALONE, Link::rank)
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.context().properties
    }

    /// Where to ask for the device's clocks and what holds them down; `None` where the driver's management library does
    /// not say.
    pub fn telemetry(&self) -> Option<Telemetry> {
        Telemetry::open(&self.properties().uuid)
    }

    /// The loaded kernels.
    pub fn modules(&self) -> &Modules {
        &self.modules
    }

    /// The device's streams.
    pub fn launcher(&self) -> &Launcher {
        &self.launcher
    }

    /// Streams of their own on the device, for whoever times kernels: nothing orders them beside the device's.
    pub fn another_launcher(&self) -> Result<Launcher, CudaError> {
        Launcher::new(self.context())
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        self.launcher.context()
    }

    /// Waits on the host for an event.
    fn wait_on_host(&self, operation: &'static str, event: &Event) -> Result<(), CudaError> {
        if let Some(link) = self.link.as_ref().filter(|link| link.is_carried()) {
            self.launcher.waiting(|| link.wait_for(|| event.has_passed()))?;
        }
        self.check(operation, self.launcher.waiting(|| event.synchronize()))?;
        self.check_ranks()
    }

    /// Has an exchange with other ranks been given up?
    fn check_ranks(&self) -> Result<(), CudaError> {
        self.link.as_ref().map_or(Ok(()), Link::check)
    }

    /// Makes a driver call that enqueues something.
    pub(crate) fn enqueue(
        &self,
        operation: &'static str,
        call: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<(), CudaError> {
        self.check(operation, self.launcher.in_driver(call))
    }

    fn check<T>(&self, operation: &'static str, result: Result<T, DriverError>) -> Result<T, CudaError> {
        self.launcher.check(operation, result)
    }

    /// What it is, as a backend says it.
    pub fn info(&self) -> DeviceInfo {
        info_of(self.properties())
    }

    /// Milliseconds between two events, after waiting for both.
    pub fn elapsed_ms(&self, from: &Event, to: &Event) -> Result<f32, CudaError> {
        self.wait_on_host("waiting for an event", from)?;
        self.wait_on_host("waiting for an event", to)?;
        self.launcher.ms_between(from, to)
    }

    /// Waits on the host for all that is enqueued.
    pub fn synchronize(&mut self) -> Result<(), CudaError> {
        if let Some(link) = self.link.as_ref().filter(|link| link.is_carried()) {
            link.wait_for(|| self.launcher.is_idle())?;
        }
        self.launcher.synchronize()?;
        self.check_ranks()
    }
}
