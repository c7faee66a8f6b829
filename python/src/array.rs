//! Token ids out of numpy's arrays, read where they lie.
//!
//! Arrays tell where their elements are by `__array_interface__` (version 3): address, shape, strides and element type.
//! numpy and all that is made like it has it, read-only arrays included, and no header of numpy's is needed for it.

use std::ptr;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The ids in a one-dimensional array of integers; `None` for what is no array.
pub fn token_ids(given: &Bound<'_, PyAny>) -> PyResult<Option<Vec<u32>>> {
    let Some(interface) = given.getattr_opt("__array_interface__")? else { return Ok(None) };
    let interface = interface.cast_into::<PyDict>()?;
    let field = |name: &str| -> PyResult<Bound<'_, PyAny>> {
        interface
            .get_item(name)?
            .ok_or_else(|| PyTypeError::new_err(format!("an array does not tell its {name}")))
    };
    let shape: Vec<usize> = field("shape")?.extract()?;
    let &[len] = shape.as_slice() else {
        let reason =
            format!("token ids are an array of one dimension, not {}: give one array a prompt", shape.len());
        return Err(PyValueError::new_err(reason));
    };
    let kind: String = field("typestr")?.extract()?;
    let Some(element) = Integer::of(&kind) else {
        return Err(PyTypeError::new_err(format!(
            "token ids are integers; an array has elements of type {kind}"
        )));
    };
    let (address, _): (usize, bool) = field("data")?.extract()?;
    let strides: Option<Vec<isize>> = match interface.get_item("strides")? {
        Some(strides) => strides.extract()?,
        None => None,
    };
    let stride = strides.and_then(|strides| strides.first().copied()).unwrap_or(element.bytes as isize);
    let id = |i: usize| {
        // SAFETY: the array tells that its element i lies there, and `given` keeps it alive meanwhile; nobody else runs
        // Python code, which could resize it, while this thread has the interpreter's lock. Reads need no alignment.
        let value = unsafe { element.read((address as isize + i as isize * stride) as *const u8) };
        u32::try_from(value).map_err(|_| {
            PyValueError::new_err(format!("{value} is no token id; ids are 0 or above, below 2^32"))
        })
    };
    (0..len).map(id).collect::<PyResult<_>>().map(Some)
}

/// An integer type of this machine's byte order.
#[derive(Clone, Copy)]
struct Integer {
    signed: bool,
    bytes: usize,
}

impl Integer {
    /// As an array writes it: `<i8`, `|u1`, …
    fn of(kind: &str) -> Option<Integer> {
        let kind = kind.strip_prefix(['<', '|', '='])?;
        let signed = match kind.get(..1)? {
            "i" => true,
            "u" => false,
            _ => return None,
        };
        let bytes = kind.get(1..)?.parse().ok()?;
        matches!(bytes, 1 | 2 | 4 | 8).then_some(Integer { signed, bytes })
    }

    /// The integer that lies at `from`.
    ///
    /// # Safety
    /// As many bytes must lie there as it has.
    unsafe fn read(self, from: *const u8) -> i128 {
        let mut bytes = [0; 8];
        // SAFETY: the caller's promise; `bytes` has 8.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), self.bytes) };
        let value = u64::from_le_bytes(bytes);
        let unused = 64 - 8 * self.bytes as u32;
        match self.signed {
            true => i128::from((value << unused) as i64 >> unused),
            false => i128::from(value),
        }
    }
}
