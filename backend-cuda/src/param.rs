//! What a kernel's parameters may be.

use std::ffi::c_void;

/// A kernel's parameter: plain data with the size and layout that the kernel declares.
pub trait Param {
    /// Where the value lies, and how many bytes it has.
    fn raw(&self) -> (*const c_void, usize);
}

/// Makes parameters of types that a kernel declares with the same layout.
macro_rules! plain_params {
    ($($type:ty),*) => {$(
        impl $crate::param::Param for $type {
            fn raw(&self) -> (*const std::ffi::c_void, usize) {
                ((self as *const Self).cast(), size_of::<Self>())
            }
        }
    )*};
}
pub(crate) use plain_params;
plain_params!(u32, i32, f32, u64);
