//! NCCL's ends of all ranks, where devices don't reach each other's memory.

use std::sync::{Arc, PoisonError, RwLock};

use cudarc::driver::sys::CUstream;

use crate::context::Context;
use crate::error::CudaError;
use crate::memory::Address;
use crate::nccl::Comm;

/// What carries words from rank to rank in kernels' stead, `[ranks]`.
#[derive(Debug)]
pub(super) struct Carriers(RwLock<Vec<Comm>>);

impl Carriers {
    pub(super) fn new(contexts: &[Arc<Context>]) -> Result<Carriers, CudaError> {
        Ok(Carriers(RwLock::new(Comm::group(contexts)?)))
    }

    pub(super) fn abort(&self) {
        self.0.read().unwrap_or_else(PoisonError::into_inner).iter().for_each(Comm::abort);
    }

    /// New ones, once those before are aborted and no recorded step has them.
    pub(super) fn renew(&self, contexts: &[Arc<Context>]) -> Result<(), CudaError> {
        let mut ends = self.0.write().unwrap_or_else(PoisonError::into_inner);
        ends.clear();
        *ends = Comm::group(contexts)?;
        Ok(())
    }

    /// Enqueues that `to` gets so many bytes of every rank, in their order, those at `from` of rank `index`.
    pub(super) fn carry(
        &self,
        index: u32,
        stream: CUstream,
        [from, to]: [Address; 2],
        bytes: usize,
    ) -> Result<(), CudaError> {
        let ends = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let end = ends.get(index as usize).ok_or(CudaError::RanksEnded)?;
        end.all_gather(stream, from, to, bytes)
    }
}
