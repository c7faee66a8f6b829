//! A kernel of a loaded module, and what parameters it declares.

use cudarc::driver::sys;

use crate::error::CudaError;
use crate::param::Param;

/// Parameters that a kernel may have.
pub(crate) const PARAMS_MAX: usize = 28;

/// A kernel of a loaded module.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub(crate) function: sys::CUfunction,
    pub(crate) name: &'static str,
    /// Bytes of each parameter; zeros behind the last.
    pub(crate) param_bytes: [u16; PARAMS_MAX],
    /// Is it of the Hopper set, whose kernels wait for the one before by themselves?
    pub(crate) hopper: bool,
}

impl Kernel {
    /// Its name in the source.
    pub fn name(&self) -> &'static str {
        self.name
    }

    pub(super) fn check_params(&self, params: &[&dyn Param]) -> Result<(), CudaError> {
        let declared = self.param_bytes.iter().take_while(|bytes| **bytes > 0);
        if params.iter().map(|param| param.raw().1).eq(declared.clone().map(|bytes| usize::from(*bytes))) {
            return Ok(());
        }
        Err(CudaError::Parameters {
            kernel: self.name,
            given: params.iter().map(|param| param.raw().1).collect(),
            declared: declared.copied().collect(),
        })
    }
}
