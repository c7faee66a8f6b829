//! Arrays, read where they lie: token ids, and tensors.
//!
//! ```text
//!   __array_interface__   numpy, and all that is made like it    address, shape, strides, type by name
//!   __dlpack__            torch, jax, …                          a capsule with the same, which this module only looks into
//! ```
//!
//! numpy's read-only arrays have the first too, and no header of numpy's is needed for it.

use std::ffi::c_void;
use std::ptr;
use std::slice;
use std::sync::Arc;

use minisgl::{Dtype, NamedTensor};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

/// An array as it lies in memory.
struct Array<'py> {
    layout: Layout,
    /// `None`: of a type that nothing here is made of.
    element: Option<Element>,
    /// The elements' type as the array tells it.
    told: String,
    /// Keeps the memory.
    _owner: Bound<'py, PyAny>,
}

/// Where an array's elements are.
struct Layout {
    shape: Vec<usize>,
    /// Bytes from an element to the next, in each dimension; `None`: row by row without gaps.
    strides: Option<Vec<isize>>,
    address: *const u8,
}

enum Element {
    Id(Integer),
    Weight(Dtype),
}

impl<'py> Array<'py> {
    /// `None` for what is no array; `what` it is called in errors.
    fn of(what: &str, given: &Bound<'py, PyAny>) -> PyResult<Option<Self>> {
        if let Some(interface) = given.getattr_opt("__array_interface__")? {
            return Array::of_interface(given, &interface.cast_into::<PyDict>()?).map(Some);
        }
        given.hasattr("__dlpack__")?.then(|| Array::of_dlpack(what, given)).transpose()
    }

    /// By version 3 of the protocol, which writes types as `<f4`, `|u1`, …
    fn of_interface(given: &Bound<'py, PyAny>, interface: &Bound<'py, PyDict>) -> PyResult<Self> {
        let field = |name: &str| -> PyResult<Bound<'_, PyAny>> {
            interface
                .get_item(name)?
                .ok_or_else(|| PyTypeError::new_err(format!("an array does not tell its {name}")))
        };
        let (address, _): (usize, bool) = field("data")?.extract()?;
        let strides = match interface.get_item("strides")? {
            Some(strides) => strides.extract()?,
            None => None,
        };
        let told: String = field("typestr")?.extract()?;
        // Types that numpy does not know tell their names alone.
        let name = given.getattr_opt("dtype")?.and_then(|dtype| dtype.getattr("name").ok());
        let name: Option<String> = name.and_then(|name| name.extract().ok());
        let element = match (told.as_str(), name.as_deref()) {
            ("<f2", _) => Some(Element::Weight(Dtype::F16)),
            ("<f4", _) => Some(Element::Weight(Dtype::F32)),
            (_, Some("bfloat16")) => Some(Element::Weight(Dtype::BF16)),
            (_, Some("float8_e4m3fn")) => Some(Element::Weight(Dtype::F8_E4M3)),
            (kind, _) => Integer::of(kind).map(Element::Id),
        };
        let layout = Layout { shape: field("shape")?.extract()?, strides, address: address as *const u8 };
        Ok(Array { layout, element, told, _owner: given.clone() })
    }

    fn of_dlpack(what: &str, given: &Bound<'py, PyAny>) -> PyResult<Self> {
        // kDLCPU, kDLCUDAHost.
        const HOST: [i64; 2] = [1, 3];
        let (device, _): (i64, i64) = given.call_method0("__dlpack_device__")?.extract()?;
        if !HOST.contains(&device) {
            let reason = format!("{what}: not in the host's memory; give a copy there (tensor.cpu())");
            return Err(PyValueError::new_err(reason));
        }
        let capsule = given.call_method0("__dlpack__")?.cast_into::<PyCapsule>()?;
        // Its maker frees it with the capsule, since nobody takes it over.
        let managed = capsule.pointer_checked(Some(c"dltensor"))?.cast::<DlTensor>();
        // SAFETY: a capsule of this name holds a DLManagedTensor, which begins with a DLTensor, and lives to this function's end.
        let tensor = unsafe { managed.as_ref() };
        let (code, bits, lanes) = (tensor.code, tensor.bits, tensor.lanes);
        let element = match (code, bits, lanes) {
            // kDLInt, kDLUInt.
            (0 | 1, 8 | 16 | 32 | 64, 1) => {
                Some(Element::Id(Integer { signed: code == 0, bytes: usize::from(bits / 8) }))
            }
            // kDLFloat, kDLBfloat, kDLFloat8_e4m3fn.
            (2, 16, 1) => Some(Element::Weight(Dtype::F16)),
            (2, 32, 1) => Some(Element::Weight(Dtype::F32)),
            (4, 16, 1) => Some(Element::Weight(Dtype::BF16)),
            (10, 8, 1) => Some(Element::Weight(Dtype::F8_E4M3)),
            _ => None,
        };
        let sizes = |from: *const i64| -> Option<&[i64]> {
            let len = usize::try_from(tensor.ndim).unwrap_or(0);
            // SAFETY: the capsule says that as many sizes lie there, if any do.
            (!from.is_null() && len > 0).then(|| unsafe { slice::from_raw_parts(from, len) })
        };
        let size = (bits / 8) as isize;
        let strides = |strides: &[i64]| strides.iter().map(|stride| *stride as isize * size).collect();
        let layout = Layout {
            shape: sizes(tensor.shape).unwrap_or_default().iter().map(|size| *size as usize).collect(),
            strides: sizes(tensor.strides).map(strides),
            address: tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize),
        };
        let told = format!("{code} of DLPack, {bits} bits x {lanes}");
        Ok(Array { layout, element, told, _owner: capsule.into_any() })
    }
}

/// The ids in a one-dimensional array of integers; `None` for what is no array.
pub fn token_ids(given: &Bound<'_, PyAny>) -> PyResult<Option<Vec<u32>>> {
    let Some(array) = Array::of("token ids", given)? else { return Ok(None) };
    let Layout { shape, strides, address } = &array.layout;
    let &[len] = shape.as_slice() else {
        let reason =
            format!("token ids are an array of one dimension, not {}: give one array a prompt", shape.len());
        return Err(PyValueError::new_err(reason));
    };
    let Some(Element::Id(element)) = array.element else {
        return Err(PyTypeError::new_err(format!(
            "token ids are integers; an array has elements of type {}",
            array.told
        )));
    };
    let stride =
        strides.as_ref().and_then(|strides| strides.first().copied()).unwrap_or(element.bytes as isize);
    let id = |i: usize| {
        // SAFETY: the array tells that its element i lies there, and keeps it meanwhile; nobody else runs Python code, which
        // could resize it, while this thread has the interpreter's lock. Reads need no alignment.
        let value = unsafe { element.read(address.wrapping_offset(i as isize * stride)) };
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

/// A copy of an array as a tensor of this name.
pub fn tensor(name: String, given: &Bound<'_, PyAny>) -> PyResult<NamedTensor> {
    let Some(array) = Array::of(&format!("tensor `{name}`"), given)? else {
        return Err(PyTypeError::new_err(format!(
            "tensor `{name}` is a {}; give a numpy array, or what has __dlpack__ (torch, jax)",
            given.get_type()
        )));
    };
    let Some(Element::Weight(dtype)) = array.element else {
        return Err(PyTypeError::new_err(format!(
            "tensor `{name}` has elements of type {}; weights are float32, float16, bfloat16 or float8_e4m3fn (the latter two \
             in numpy by ml_dtypes)",
            array.told
        )));
    };
    // SAFETY: the array tells so of itself and keeps its memory meanwhile, and this thread has the interpreter's lock.
    Ok(unsafe { copied(name, dtype, &array.layout) })
}

/// `DLTensor` of dlpack.h, ABI 0 and 1.
#[repr(C)]
struct DlTensor {
    data: *const c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    /// `[ndim]`.
    shape: *const i64,
    /// `[ndim]`, in elements; null: row by row without gaps.
    strides: *const i64,
    byte_offset: u64,
}

/// # Safety
/// The elements must lie where the layout says, and nobody may write to them.
unsafe fn copied(name: String, dtype: Dtype, layout: &Layout) -> NamedTensor {
    let size = dtype.bitsize() / 8;
    let mut bytes = Vec::with_capacity(layout.shape.iter().product::<usize>() * size);
    let strides: Vec<isize> = match &layout.strides {
        Some(strides) => strides.clone(),
        None => compact(&layout.shape, size),
    };
    // SAFETY: the caller's promise.
    unsafe { gather(layout.address, &layout.shape, &strides, size, &mut bytes) };
    NamedTensor { name, dtype, shape: layout.shape.clone(), bytes: Arc::new(bytes) }
}

/// The strides of elements that lie row by row without gaps.
fn compact(shape: &[usize], size: usize) -> Vec<isize> {
    (0..shape.len()).map(|i| (shape[i + 1..].iter().product::<usize>() * size) as isize).collect()
}

/// Appends the elements from `at` on, of so many bytes each.
///
/// # Safety
/// They must lie where shape and strides say.
unsafe fn gather(at: *const u8, shape: &[usize], strides: &[isize], size: usize, out: &mut Vec<u8>) {
    let bytes = shape.iter().product::<usize>() * size;
    match (shape, strides) {
        _ if bytes == 0 => {}
        _ if strides == compact(shape, size) => {
            // SAFETY: the caller's promise; so many bytes lie there without gaps.
            out.extend_from_slice(unsafe { slice::from_raw_parts(at, bytes) });
        }
        ([count, shape @ ..], [stride, strides @ ..]) => {
            for i in 0..*count as isize {
                // SAFETY: the caller's promise, for each of the parts.
                unsafe { gather(at.wrapping_offset(i * stride), shape, strides, size, out) };
            }
        }
        _ => {} // Without dimensions it has no gaps.
    }
}
