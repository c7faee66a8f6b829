//! The kernels on the device: every module of the set loaded once, at start, each by a thread of its own.
//!
//! Machine code, which the Hopper set has, loads in milliseconds. PTX is compiled by the driver at the first start ever
//! and kept in its cache (`~/.nv/ComputeCache`): then the threads matter.
//!
//! Invariant: kernels are looked up when an operation's family is set up, never in a step, and each is resident before
//! its first launch, because none may be loaded while a graph is captured.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUfunction_attribute_enum as Attribute, CUjit_option_enum as Option_};
use minisgl_kernels::{HOPPER, Module, PORTABLE};

use crate::context::Context;
use crate::error::{CudaError, Named, cause, is_out_of_memory};
use crate::launch::{Kernel, PARAMS_MAX};
use crate::turns;

/// What is under way while modules are loaded.
const LOADING: &str = "loading the kernels";

/// Bytes for what the driver's compiler says about PTX that it refuses.
const LOG_BYTES: usize = 8 << 10;

/// The loaded modules of the kernel set in use.
#[derive(Debug)]
pub struct Modules {
    loaded: Vec<Loaded>,
    /// Are they the Hopper set?
    hopper: bool,
}

#[derive(Clone, Copy, Debug)]
struct Loaded {
    name: &'static str,
    /// Was it PTX that the driver compiled, not machine code?
    from_ptx: bool,
    handle: sys::CUmodule,
}

// SAFETY: the driver takes module handles from any thread.
unsafe impl Send for Loaded {}

impl Modules {
    /// Loads the set that the context's device runs.
    pub(crate) fn load(context: &Arc<Context>) -> Result<Modules, CudaError> {
        let hopper = context.properties.hopper;
        let set = if hopper { HOPPER } else { PORTABLE };
        let _turn = turns::synchronize();
        let loaded = std::thread::scope(|scope| {
            let threads: Vec<_> =
                set.iter().map(|module| scope.spawn(move || Loaded::load(context, module))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect::<Result<Vec<_>, _>>()
        })?;
        Ok(Modules { loaded, hopper })
    }

    /// Names of the modules that the driver compiled from PTX, now or at an earlier start.
    pub fn from_ptx(&self) -> impl Iterator<Item = &'static str> {
        self.loaded.iter().filter(|module| module.from_ptx).map(|module| module.name)
    }

    /// The kernel `kernel` of `module`, which may be launched with up to `shared` bytes of dynamic shared memory, or more if it was looked up
    /// with more before: several lists may have it.
    pub fn kernel(
        &self,
        module: &'static str,
        kernel: &'static str,
        shared: u32,
    ) -> Result<Kernel, CudaError> {
        let missing = CudaError::NoKernel { module, kernel };
        let Some(module) = self.loaded.iter().find(|loaded| loaded.name == module) else {
            return Err(missing);
        };
        let name = CString::new(kernel).map_err(|_| missing.clone())?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded, the name ends in NUL.
        let status = unsafe { sys::cuModuleGetFunction(&mut function, module.handle, name.as_ptr()) };
        status.result().map_err(|_| missing)?;
        let _turn = turns::synchronize();
        // SAFETY: the function was just found.
        unsafe { sys::cuFuncLoad(function) }.result().named("loading a kernel")?;
        allow_shared(function, shared).map_err(|error| CudaError::Launch {
            kernel,
            step: 0,
            cause: cause(error),
        })?;
        Ok(Kernel {
            function,
            name: kernel,
            param_bytes: param_bytes(kernel, function)?,
            hopper: self.hopper,
        })
    }
}

/// Lets launches of a function have so many bytes of dynamic shared memory, or what they may have by now where that is more.
fn allow_shared(function: sys::CUfunction, bytes: u32) -> Result<(), DriverError> {
    let (which, mut allowed) = (Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 0);
    // SAFETY: the function is loaded; an integer is written.
    unsafe { sys::cuFuncGetAttribute(&mut allowed, which, function) }.result()?;
    if bytes as i32 > allowed {
        // SAFETY: the function is loaded.
        unsafe { sys::cuFuncSetAttribute(function, which, bytes as i32) }.result()?;
    }
    Ok(())
}

/// The sizes of a kernel's parameters, as its PTX declares them.
fn param_bytes(kernel: &'static str, function: sys::CUfunction) -> Result<[u16; PARAMS_MAX], CudaError> {
    let mut sizes = [0; PARAMS_MAX];
    for (index, bytes) in sizes.iter_mut().enumerate() {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is loaded; two integers are written.
        let status = unsafe { sys::cuFuncGetParamInfo(function, index, &mut offset, &mut size) };
        match status {
            sys::CUresult::CUDA_SUCCESS => *bytes = size as u16,
            sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(sizes),
            other => {
                return Err(CudaError::Launch { kernel, step: 0, cause: cause(DriverError(other)) });
            }
        }
    }
    Err(CudaError::Unsupported(format!("kernel `{kernel}` has {PARAMS_MAX} or more parameters")))
}

impl Loaded {
    /// A driver may refuse the machine code, one of the next major version say, and take the PTX: then starting takes
    /// longer once, and the kernels are the same.
    fn load(context: &Context, module: &Module) -> Result<Loaded, CudaError> {
        context.make_current()?;
        let from_code = module.cubin.map(|code| {
            let mut handle = std::ptr::null_mut();
            // SAFETY: the code is a whole ELF image, which says how long it is.
            let status = unsafe { sys::cuModuleLoadData(&mut handle, code.as_ptr().cast()) };
            status.result().map(|()| handle)
        });
        let (handle, from_ptx) = match from_code {
            Some(Ok(handle)) => (handle, false),
            Some(Err(error)) if is_out_of_memory(error) => return Err(CudaError::named(LOADING, error)),
            _ => (compile(module)?, true),
        };
        Ok(Loaded { name: module.name, from_ptx, handle })
    }
}

/// Has the driver compile a module's PTX.
fn compile(module: &Module) -> Result<sys::CUmodule, CudaError> {
    let ptx = CString::new(module.ptx).map_err(|_| CudaError::Module {
        module: module.name,
        cause: "the PTX holds a NUL".into(),
        log: String::new(),
    })?;
    let mut log = vec![0u8; LOG_BYTES];
    let mut options = [Option_::CU_JIT_ERROR_LOG_BUFFER, Option_::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), LOG_BYTES as *mut c_void];
    let mut handle = std::ptr::null_mut();
    // SAFETY: the PTX ends in NUL; the log is as long as said and lives beyond the call.
    let status = unsafe {
        let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
        sys::cuModuleLoadDataEx(&mut handle, ptx.as_ptr().cast(), 2, options, values)
    };
    match status.result() {
        Ok(()) => Ok(handle),
        Err(error) if is_out_of_memory(error) => Err(CudaError::named(LOADING, error)),
        Err(error) => Err(CudaError::Module {
            module: module.name,
            cause: cause(error),
            log: String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned(),
        }),
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        let _turn = turns::synchronize();
        for module in &self.loaded {
            // SAFETY: loaded once; no kernel of it is launched after the device is dropped. An error has nobody to go to.
            let _ = unsafe { sys::cuModuleUnload(module.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::KernelSet;

    /// Where an ELF header says which compute capability the code is for.
    const CAPABILITY_BYTE: usize = 0x30;

    #[test]
    #[ignore = "needs a GPU"]
    fn machine_code_that_the_driver_refuses_is_replaced_by_ptx() {
        let context = Context::open(0, KernelSet::Auto).unwrap();
        let module = *HOPPER.iter().find(|module| module.name == "perf").unwrap();
        let mut code: Vec<u64> = vec![0; module.cubin.unwrap().len().div_ceil(8)];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut code);
        bytes[..module.cubin.unwrap().len()].copy_from_slice(module.cubin.unwrap());
        assert_eq!(bytes[CAPABILITY_BYTE], 90);
        bytes[CAPABILITY_BYTE] = 75;
        let refused = Module { cubin: Some(bytemuck::cast_slice(code.leak())), ..module };
        if context.properties.hopper {
            assert!(!Loaded::load(&context, &module).unwrap().from_ptx);
            assert!(Loaded::load(&context, &refused).unwrap().from_ptx);
        } else {
            // Neither its machine code nor its PTX is for this GPU.
            assert!(Loaded::load(&context, &module).is_err());
        }
    }
}
