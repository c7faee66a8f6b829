//! Launching kernels: what is launched, in which shape, with which parameters.
//!
//! ```text
//!   launcher.launch(&kernel, Grid::new(tokens, 128).dependent(), [&buffer, &hidden, &eps])?;
//! ```
//!
//! A launch allocates nothing: the driver reads the parameters through an array on the stack. The parameters' sizes
//! are compared with those that the kernel declares, so a forgotten or widened one is an error that names the kernel,
//! not a wild pointer on the device. That a kernel stays within the buffers that it is given is its family's to see to, so
//! launching is the crate's own; for others it is `unsafe`.
//!
//! Between `fork` and `join` there are two lanes: what `beside` launches runs beside what follows on the compute stream.
//!
//! A kernel's failure shows at a later call. The launcher remembers the last kernels, and with `MINISGL_CUDA_SYNC=1`
//! waits after each, so that the error names the one that failed.

mod attribute;
mod grid;
mod kernel;
mod trace;

use std::cell::{Cell, RefCell};
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use minisgl_core::backend::Queue;

use crate::context::Context;
use crate::error::{CudaError, cause, is_device_lost, is_kernel_failure, is_out_of_memory};
use crate::memory::{Event, Graph};
use crate::param::Param;
use crate::turns::{self, Recording};
use trace::Trace;

pub use grid::Grid;
pub use kernel::Kernel;
pub(crate) use kernel::PARAMS_MAX;

/// What the host's time went to, since the device was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostTimes {
    /// Waiting for copies and steps to end.
    pub waited: Duration,
    /// In driver calls that enqueue copies, events, kernels and recorded steps, or read the time between two events.
    pub driver: Duration,
}

/// The device's streams and what was launched on them.
#[derive(Debug)]
pub struct Launcher {
    context: Arc<Context>,
    compute: sys::CUstream,
    copy: sys::CUstream,
    upload: sys::CUstream,
    /// The second lane, and the points where it leaves the compute stream and comes back.
    beside: sys::CUstream,
    forked: Event,
    joined: Event,
    /// Where kernels are launched: the compute stream or the one beside it.
    lane: Cell<sys::CUstream>,
    /// Wait after each launch?
    synchronous: bool,
    /// While what is launched is recorded.
    recording: RefCell<Option<Recording>>,
    trace: Trace,
    host_times: Cell<HostTimes>,
}

impl Launcher {
    /// Streams of its own on the context's device.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Launcher, CudaError> {
        let stream = || {
            result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(|error| CudaError::Driver { operation: "making a stream", cause: cause(error) })
        };
        let compute = stream()?;
        Ok(Launcher {
            context: context.clone(),
            compute,
            copy: stream()?,
            upload: stream()?,
            beside: stream()?,
            forked: Event::untimed(context)?,
            joined: Event::untimed(context)?,
            lane: Cell::new(compute),
            synchronous: std::env::var_os("MINISGL_CUDA_SYNC").is_some_and(|value| value == "1"),
            recording: RefCell::default(),
            trace: Trace::default(),
            host_times: Cell::default(),
        })
    }

    /// What the host's time went to so far.
    pub fn host_times(&self) -> HostTimes {
        self.host_times.get()
    }

    /// Waits, and counts the time.
    pub(crate) fn waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let done = wait();
        let times = self.host_times.get();
        self.host_times.set(HostTimes { waited: times.waited + started.elapsed(), ..times });
        done
    }

    /// Makes a driver call, and counts its time.
    pub(crate) fn in_driver<T>(&self, call: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let done = call();
        let times = self.host_times.get();
        self.host_times.set(HostTimes { driver: times.driver + started.elapsed(), ..times });
        done
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// A queue's stream, for calls of the driver's and of its libraries.
    pub fn stream(&self, queue: Queue) -> sys::CUstream {
        match queue {
            Queue::Compute => self.compute,
            Queue::Copy => self.copy,
            Queue::Upload => self.upload,
        }
    }

    /// From here to [`Launcher::end_capture`] what is launched on the compute stream is recorded, not run.
    pub fn begin_capture(&self) -> Result<(), CudaError> {
        let recording = turns::record();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        let begun = unsafe { result::stream::begin_capture(self.compute, mode) };
        self.check("beginning to record a step", begun)?;
        self.recording.replace(Some(recording));
        Ok(())
    }

    /// Ends the recording and instantiates it.
    pub fn end_capture(&self) -> Result<Graph, CudaError> {
        let _recording = self.recording.take();
        // SAFETY: the stream is alive.
        let recorded = unsafe { result::stream::end_capture(self.compute) };
        let recorded = self.check("recording a step", recorded)?;
        // SAFETY: the graph was just captured, and is destroyed once.
        let (instantiated, destroyed) = unsafe {
            let flags = sys::CUgraphInstantiate_flags(0);
            (result::graph::instantiate(recorded, flags), result::graph::destroy(recorded))
        };
        let graph = Graph::new(&self.context, self.check("instantiating a recorded step", instantiated)?);
        self.check("freeing a recording", destroyed)?;
        // SAFETY: graph and stream are alive.
        let uploaded = unsafe { result::graph::upload(graph.handle, self.compute) };
        self.check("uploading a recorded step", uploaded)?;
        Ok(graph)
    }

    /// Enqueues recorded work.
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        // SAFETY: graph and stream are alive.
        let launched = self.in_driver(|| unsafe { result::graph::launch(graph.handle, self.compute) });
        self.check("replaying a recorded step", launched)?;
        self.launched("(a recorded step)")
    }

    /// Begins the second lane, behind what was launched so far.
    pub(crate) fn fork(&self) -> Result<(), CudaError> {
        let forked =
            self.in_driver(|| self.forked.record(self.compute).and_then(|()| self.forked.hold(self.beside)));
        self.check("beginning a second lane", forked)
    }

    /// Ends the second lane: what is launched from now on waits for it.
    pub(crate) fn join(&self) -> Result<(), CudaError> {
        let joined =
            self.in_driver(|| self.joined.record(self.beside).and_then(|()| self.joined.hold(self.compute)));
        self.check("ending a second lane", joined)
    }

    /// Launches in the second lane.
    pub(crate) fn beside(
        &self,
        launch: impl FnOnce(&Launcher) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        self.lane.set(self.beside);
        let launched = launch(self);
        self.lane.set(self.compute);
        launched
    }

    fn streams(&self) -> [sys::CUstream; 4] {
        [self.upload, self.compute, self.copy, self.beside]
    }

    /// Waits on the host for all streams.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _turn = turns::synchronize();
        for stream in self.streams() {
            // SAFETY: the stream is alive.
            let waited = unsafe { result::stream::synchronize(stream) };
            self.check("waiting for the GPU", waited)?;
        }
        Ok(())
    }

    /// Has all ended that was launched, or failed?
    pub(crate) fn is_idle(&self) -> bool {
        // SAFETY: the streams are alive.
        let is_busy = |stream| unsafe { sys::cuStreamQuery(stream) } == sys::CUresult::CUDA_ERROR_NOT_READY;
        !self.streams().into_iter().any(is_busy)
    }

    /// A point in time, to be recorded.
    pub fn event(&self) -> Result<Event, CudaError> {
        Event::timed(&self.context)
    }

    /// A point in a stream, to be recorded, that tells no time.
    pub(crate) fn untimed_event(&self) -> Result<Event, CudaError> {
        Event::untimed(&self.context)
    }

    /// Enqueues a point in time on the compute stream.
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        self.check("recording an event", event.record(self.compute))
    }

    /// Milliseconds between two events that have happened.
    pub fn ms_between(&self, from: &Event, to: &Event) -> Result<f32, CudaError> {
        let mut ms = 0.0;
        // SAFETY: both events are alive; one float is written.
        let status = self.in_driver(|| unsafe { sys::cuEventElapsedTime(&mut ms, from.handle, to.handle) });
        self.check("reading an event's time", status.result())?;
        Ok(ms)
    }

    fn is_recording(&self) -> bool {
        self.recording.borrow().is_some()
    }

    /// Counts the steps that errors speak of.
    pub(crate) fn begin_step(&self) {
        if !self.is_recording() {
            self.trace.step.set(self.trace.step.get() + 1);
        }
    }

    fn launched(&self, name: &'static str) -> Result<(), CudaError> {
        self.trace.push(name);
        if self.synchronous && !self.is_recording() {
            // SAFETY: the stream lives as long as `self`.
            let waited = unsafe { result::stream::synchronize(self.lane.get()) };
            return waited.map_err(|error| self.failed(name, error));
        }
        Ok(())
    }

    /// How many clusters of the grid's shape the device takes at once.
    pub(crate) fn clusters_at_once(&self, kernel: &Kernel, grid: Grid) -> Result<u32, CudaError> {
        let mut cluster = attribute::cluster(grid.cluster);
        let config = self.config(grid, std::slice::from_mut(&mut cluster));
        let mut clusters = 0;
        // SAFETY: the function is loaded; one integer is written.
        let status = unsafe { sys::cuOccupancyMaxActiveClusters(&mut clusters, kernel.function, &config) };
        status.result().map_err(|error| self.refused(kernel.name, error))?;
        Ok(clusters as u32)
    }

    fn config(&self, grid: Grid, attributes: &mut [sys::CUlaunchAttribute]) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: grid.blocks[0],
            gridDimY: grid.blocks[1],
            gridDimZ: grid.blocks[2],
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: self.lane.get(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }

    /// Enqueues a kernel of the caller's choice, over addresses of the caller's choice.
    ///
    /// # Errors
    /// Other parameters than the kernel declares, or a launch that the driver refuses.
    ///
    /// # Safety
    /// The kernel stays within memory that is allocated, and that nothing uses meanwhile, given these parameters.
    pub unsafe fn launch_raw<const N: usize>(
        &self,
        kernel: &Kernel,
        grid: Grid,
        params: [&dyn Param; N],
    ) -> Result<(), CudaError> {
        self.launch(kernel, grid, params)
    }

    /// Enqueues a kernel in the lane at hand. An empty grid is nothing to do.
    pub(crate) fn launch<const N: usize>(
        &self,
        kernel: &Kernel,
        grid: Grid,
        params: [&dyn Param; N],
    ) -> Result<(), CudaError> {
        if grid.is_empty() {
            return Ok(());
        }
        kernel.check_params(&params)?;
        let mut pointers = params.map(|param| param.raw().0.cast_mut());
        let (mut attributes, mut count) = ([attribute::cluster(grid.cluster); 3], 0);
        let mut add = |there: bool, attribute| {
            if there {
                attributes[count] = attribute;
                count += 1;
            }
        };
        add(grid.cluster > 1, attribute::cluster(grid.cluster));
        add(grid.dependent && kernel.hopper, attribute::dependent());
        add(grid.cooperative, attribute::cooperative());
        let config = self.config(grid, &mut attributes[..count]);
        // SAFETY: function and stream are alive; `pointers` holds as many readable values, of the sizes that the
        // kernel declares, as it has parameters; the driver copies them before it returns.
        let status = self.in_driver(|| unsafe {
            sys::cuLaunchKernelEx(&config, kernel.function, pointers.as_mut_ptr(), null_mut())
        });
        status.result().map_err(|error| self.refused(kernel.name, error))?;
        self.launched(kernel.name)
    }

    /// The error of a launch that the driver refused; an earlier kernel's failure shows here too.
    fn refused(&self, kernel: &'static str, error: DriverError) -> CudaError {
        if is_kernel_failure(error) || is_device_lost(error) || is_out_of_memory(error) {
            return self.failed("launching a kernel", error);
        }
        CudaError::Launch { kernel, step: self.trace.step.get(), cause: cause(error) }
    }

    /// A call's result, with what is known about the kernels before it where it failed.
    pub fn check<T>(&self, operation: &'static str, result: Result<T, DriverError>) -> Result<T, CudaError> {
        result.map_err(|error| self.failed(operation, error))
    }

    /// The error of a failed call, with what is known about the kernels before it.
    pub(crate) fn failed(&self, operation: &'static str, error: DriverError) -> CudaError {
        let step = self.trace.step.get();
        if is_device_lost(error) {
            return CudaError::DeviceLost { step, cause: cause(error) };
        }
        if !is_kernel_failure(error) {
            return CudaError::named(operation, error);
        }
        let launched = if self.synchronous {
            format!("it was the newest of: {}", self.trace.last())
        } else {
            format!(
                "launched last, newest first: {}; to name the one that failed, run with MINISGL_CUDA_SYNC=1 and without \
                 recorded steps (--max-graph-batch 0)",
                self.trace.last()
            )
        };
        CudaError::Kernel { step, cause: cause(error), launched }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // Errors have nobody to go to here; the context is released in any case.
        let _ = self.context.make_current();
        for stream in self.streams() {
            // SAFETY: created in `new`, destroyed once.
            let _ = unsafe { result::stream::destroy(stream) };
        }
    }
}
