//! Host memory, asked for so that having too little is an error, not the end of the process.

use alloc::vec::Vec;

use crate::config::LimitsError;

/// So many of a value.
pub(crate) fn filled<T: Clone>(len: usize, value: T) -> Result<Vec<T>, LimitsError> {
    let mut list = reserved(len)?;
    list.resize(len, value);
    Ok(list)
}

/// What an iterator gives.
pub(crate) fn listed<T>(items: impl ExactSizeIterator<Item = T>) -> Result<Vec<T>, LimitsError> {
    let mut list = reserved(items.len())?;
    list.extend(items);
    Ok(list)
}

/// Nothing, with room for so many.
pub(crate) fn reserved<T>(capacity: usize) -> Result<Vec<T>, LimitsError> {
    let mut list = Vec::new();
    let bytes = (capacity as u64).saturating_mul(size_of::<T>() as u64);
    list.try_reserve_exact(capacity).map_err(|_| LimitsError::HostMemory { bytes })?;
    Ok(list)
}
