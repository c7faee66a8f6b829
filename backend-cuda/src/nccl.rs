//! NVIDIA's NCCL, for GPUs that don't reach each other's memory: it carries what ranks send each other, through the host's memory where
//! there is no other way.
//!
//! It moves bytes and adds nothing: the order of its sums depends on their number, and ours must not. The library is opened when
//! ranks first need it, by the name that NVIDIA's packages give it; a machine without it has everything else.
//!
//! ```text
//!   rank 0   all_gather: bytes of rank 0 ──┐  ┌──> of rank 0 | of rank 1       enqueued in the rank's stream like a kernel
//!   rank 1   all_gather: bytes of rank 1 ──┴──┴──> of rank 0 | of rank 1
//! ```
//!
//! Invariant: an end that has been aborted is not used again. What its kernels waited for they wait for no longer.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::sys::{self, CUstream};
use libloading::Library;

use crate::context::Context;
use crate::error::{CudaError, Named};
use crate::memory::Address;
use crate::turns;

/// What NVIDIA's packages call it.
const NAME: &str = "libnccl.so.2";
/// What it is called where one compiles against it.
const NAME_OF_COMPILERS: &str = "libnccl.so";
/// How long an end that is aborted waits for a call that is under way. Such a call ends by the abortion itself.
const ABORT_PATIENCE: Duration = Duration::from_secs(1);
/// How long ranks' devices wait for each other when they first meet.
const CONNECT_PATIENCE: Duration = Duration::from_secs(60);

type RawComm = *mut c_void;
/// `ncclResult_t`.
type Status = c_int;
/// `ncclUint8`, `ncclFloat32`, `ncclSum`.
const UINT8: c_int = 1;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// The library's functions, whose types are those of its header since version 2.0.
struct Nccl {
    init_all: unsafe extern "C" fn(*mut RawComm, c_int, *const c_int) -> Status,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
    destroy: unsafe extern "C" fn(RawComm) -> Status,
    abort: unsafe extern "C" fn(RawComm) -> Status,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, RawComm, CUstream) -> Status,
    all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, CUstream) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    _library: Library,
}

impl Nccl {
    /// The library, opened once; the linker's reason where it can't be.
    fn open() -> Result<&'static Nccl, String> {
        static OPENED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        OPENED.get_or_init(Nccl::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Nccl, String> {
        // SAFETY: what the library does when it is loaded is to set itself up.
        let open = |name| unsafe { Library::new(name) };
        let library = open(NAME).or_else(|error| open(NAME_OF_COMPILERS).map_err(|_| error));
        let library = library.map_err(|error| error.to_string())?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the library's function of this name has this type.
                *unsafe { library.get($name) }.map_err(|error| error.to_string())?
            };
        }
        Ok(Nccl {
            init_all: function!(b"ncclCommInitAll"),
            group_start: function!(b"ncclGroupStart"),
            group_end: function!(b"ncclGroupEnd"),
            destroy: function!(b"ncclCommDestroy"),
            abort: function!(b"ncclCommAbort"),
            all_gather: function!(b"ncclAllGather"),
            all_reduce: function!(b"ncclAllReduce"),
            error_string: function!(b"ncclGetErrorString"),
            _library: library,
        })
    }

    fn check(&self, operation: &'static str, status: Status) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the library has a text that lives as long as it does for every number.
        let text = unsafe { (self.error_string)(status).as_ref().map(|text| CStr::from_ptr(text)) };
        let cause =
            text.map_or_else(|| format!("error {status}"), |text| text.to_string_lossy().into_owned());
        Err(CudaError::Nccl { operation, cause })
    }
}

/// A rank's end.
pub struct Comm {
    nccl: &'static Nccl,
    /// The library's own; null once it is aborted.
    raw: AtomicPtr<c_void>,
    /// Held in a call that uses it.
    calls: Mutex<()>,
    /// Ends when no recorded step is left that it is part of.
    aborting: Mutex<Option<JoinHandle<()>>>,
}

impl Comm {
    /// The ends of ranks in these contexts, of which no two are of one device.
    ///
    /// # Errors
    /// There is no such library; its own.
    pub(crate) fn group(contexts: &[Arc<Context>]) -> Result<Vec<Comm>, CudaError> {
        let nccl = Nccl::open().map_err(|reason| CudaError::NoNccl { reason })?;
        let devices: Vec<c_int> = contexts.iter().map(|context| context.number() as c_int).collect();
        let mut raw: Vec<RawComm> = vec![null_mut(); devices.len()];
        // SAFETY: as many ends are written as there are numbers to read.
        let status = unsafe { (nccl.init_all)(raw.as_mut_ptr(), devices.len() as c_int, devices.as_ptr()) };
        let comm = |raw| Comm {
            nccl,
            raw: AtomicPtr::new(raw),
            calls: Mutex::default(),
            aborting: Mutex::default(),
        };
        nccl.check("connecting ranks", status)?;
        let comms: Vec<Comm> = raw.into_iter().map(comm).collect();
        Self::connect(nccl, contexts, &comms)?;
        Ok(comms)
    }

    /// Has all of them do something together: the first time a rank's host waits for the others', as it must not while it records.
    /// Where that fails or takes too long, the ends are aborted, so that none waits for those that did not begin.
    fn connect(nccl: &Nccl, contexts: &[Arc<Context>], comms: &[Comm]) -> Result<(), CudaError> {
        const BYTES: usize = 16;
        let _turn = turns::synchronize();
        let begin = |context| Trial::new(context, BYTES * (comms.len() + 1));
        let trials = contexts.iter().map(begin).collect::<Result<Vec<_>, _>>()?;
        let gather = |(comm, trial): (&Comm, &Trial)| {
            comm.all_gather(trial.stream, trial.memory, trial.memory.offset(BYTES), BYTES)
        };
        // SAFETY: a group is begun, and ended below.
        let begun = nccl.check("connecting ranks", unsafe { (nccl.group_start)() });
        let enqueued = begun.and_then(|()| {
            let gathered = comms.iter().zip(&trials).try_for_each(gather);
            // SAFETY: the group was begun above.
            gathered.and(nccl.check("connecting ranks", unsafe { (nccl.group_end)() }))
        });
        let connected = enqueued.and_then(|()| Trial::wait(&trials));
        connected.inspect_err(|_| comms.iter().for_each(Comm::abort))
    }

    /// Enqueues that `to` gets `bytes` bytes of every rank, in their order, those at `from` of this one. All ranks must do it.
    pub(crate) fn all_gather(
        &self,
        stream: CUstream,
        from: Address,
        to: Address,
        bytes: usize,
    ) -> Result<(), CudaError> {
        // SAFETY: the end is one that lives; callers own both ranges, and order what uses them by the stream.
        self.call("carrying words", |nccl, raw| unsafe {
            (nccl.all_gather)(pointer(from), pointer(to), bytes, UINT8, raw, stream)
        })
    }

    /// Enqueues that `to` gets so many f32 of all ranks added up in whatever order, those at `from` of this one: what benchmarks compare
    /// ours with.
    ///
    /// # Errors
    /// The library's own; the end was aborted.
    ///
    /// # Safety
    /// So many f32 lie at each place, which nothing uses meanwhile but what the stream orders.
    pub unsafe fn all_reduce(
        &self,
        stream: CUstream,
        from: Address,
        to: Address,
        count: usize,
    ) -> Result<(), CudaError> {
        // SAFETY: the end is one that lives; the rest is the caller's promise.
        self.call("adding up", |nccl, raw| unsafe {
            (nccl.all_reduce)(pointer(from), pointer(to), count, FLOAT32, SUM, raw, stream)
        })
    }

    fn call(
        &self,
        operation: &'static str,
        call: impl FnOnce(&Nccl, RawComm) -> Status,
    ) -> Result<(), CudaError> {
        let _call = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let raw = self.raw.load(Ordering::Acquire);
        if raw.is_null() {
            Err(CudaError::RanksEnded)
        } else {
            self.nccl.check(operation, call(self.nccl, raw))
        }
    }

    /// Ends what its kernels wait for, from any thread.
    pub(crate) fn abort(&self) {
        let raw = self.raw.swap(null_mut(), Ordering::AcqRel);
        if raw.is_null() {
            return;
        }
        let until = Instant::now() + ABORT_PATIENCE;
        while matches!(self.calls.try_lock(), Err(TryLockError::WouldBlock)) && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        let (nccl, end) = (self.nccl, AtomicPtr::new(raw));
        let abort = move |raw| {
            // SAFETY: the end is used by nobody else, or by a call that waits for another rank, which this ends. An error has
            // nobody to go to.
            let _ = unsafe { (nccl.abort)(raw) };
        };
        // It returns only once recorded steps are gone, which this thread may be about to see to.
        let thread =
            thread::Builder::new().name("minisgl-nccl-abort".into()).spawn(move || abort(end.into_inner()));
        match thread {
            Ok(thread) => *self.aborting.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread),
            // Kernels that wait must end, even if this waits, too.
            Err(_) => abort(raw),
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        let aborting = self.aborting.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // It doesn't panic.
        let _ = aborting.map(JoinHandle::join);
        let raw = *self.raw.get_mut();
        if !raw.is_null() {
            // SAFETY: nobody uses it any more, and no recorded step does. An error has nobody to go to.
            let _ = unsafe { (self.nccl.destroy)(raw) };
        }
    }
}

/// What a rank connects with, freed once its stream is idle.
struct Trial<'a> {
    context: &'a Arc<Context>,
    memory: Address,
    stream: CUstream,
}

impl Trial<'_> {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Trial<'_>, CudaError> {
        context.make_current()?;
        let stream = result::stream::create(StreamKind::NonBlocking).named("making a stream")?;
        let mut trial = Trial { context, memory: Address::NULL, stream };
        // SAFETY: freed once, in `drop`.
        trial.memory = Address(unsafe { result::malloc_sync(bytes) }.named("allocating GPU memory")?);
        Ok(trial)
    }

    /// Waits until all streams are idle, so long at most.
    fn wait(trials: &[Trial<'_>]) -> Result<(), CudaError> {
        let until = Instant::now() + CONNECT_PATIENCE;
        for trial in trials {
            trial.context.make_current()?;
            // SAFETY: the stream is alive.
            let state = || unsafe { sys::cuStreamQuery(trial.stream) };
            while state() == sys::CUresult::CUDA_ERROR_NOT_READY {
                if Instant::now() > until {
                    return Err(CudaError::RanksLate { seconds: CONNECT_PATIENCE.as_secs_f32() });
                }
                thread::sleep(Duration::from_millis(1));
            }
            state().result().named("connecting ranks")?;
        }
        Ok(())
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        // Errors have nobody to go to here.
        let _ = self.context.make_current();
        // SAFETY: both were made in `new`, and are used no more once the stream is idle.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
            if self.memory != Address::NULL {
                let _ = result::memory_free(self.memory.0);
            }
        }
    }
}

impl fmt::Debug for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Comm").field(&self.raw).finish()
    }
}

fn pointer(address: Address) -> *mut c_void {
    address.number() as *mut c_void
}
