//! CUDA kernels of minisgl: their sources, what is built from them, and the constants that host and device share.
//!
//! ```text
//!   cuda, but for cuda/hopper   ── build.sh ──> ptx/portable/*.ptx ──> PORTABLE   any GPU from Ampere on
//!   cuda, but for cuda/portable ── build.sh ──> ptx/hopper/*.ptx   ──> HOPPER     compute capability 9.0
//!                                                   └──> cubin/*.cubin ──┘
//! ```
//!
//! A module is a family of kernels: one source file. The Hopper set comes as machine code too, which a driver loads in
//! milliseconds; PTX it compiles first, for seconds at the first start.
//!
//! Invariant: `ptx/`, `cubin/` and `registers.txt`, a table of what each kernel takes, are byte for byte what `build.sh` makes of
//! `cuda/`; `build.sh --check` says whether they are.

#![no_std]
#![forbid(unsafe_code)]

pub mod attention;

/// A family of kernels, compiled.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Name of the source file, without its extension.
    pub name: &'static str,
    /// The PTX text.
    pub ptx: &'static str,
    /// Machine code of compute capability 9.0, an ELF image aligned to 8 bytes.
    pub cubin: Option<&'static [u8]>,
}

/// Gives embedded bytes the alignment of an ELF image.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

macro_rules! modules {
    (portable: $($name:literal),* $(,)?) => {
        &[$(Module {
            name: $name,
            ptx: include_str!(concat!("../ptx/portable/", $name, ".ptx")),
            cubin: None,
        }),*]
    };
    (hopper: $($name:literal),* $(,)?) => {
        &[$(Module {
            name: $name,
            ptx: include_str!(concat!("../ptx/hopper/", $name, ".ptx")),
            cubin: {
                const CUBIN: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!("../cubin/", $name, ".cubin")));
                Some(&CUBIN.0)
            },
        }),*]
    };
}

/// Modules for compute capability 8.0 and later, in alphabetic order.
pub static PORTABLE: &[Module] = modules![portable:
    "attention", "embed", "exchange", "experts", "experts_products", "experts_router", "gemm", "perf", "sampling",
    "weights",
];

/// Modules for compute capability 9.0, in alphabetic order. Their kernels are written for dependent launch.
pub static HOPPER: &[Module] = modules![hopper:
    "attention", "attention_fp8", "embed", "exchange", "experts", "experts_products", "experts_products_fp8",
    "experts_router", "fp8_inputs", "fp8_pages", "fp8_weights", "gemm_few_gate_up", "gemm_few_head",
    "gemm_few_qkv", "gemm_few_qkv_fp8", "gemm_few_residual", "gemm_few_sums", "gemm_fp8_gate_up",
    "gemm_fp8_qkv", "gemm_fp8_qkv_fp8", "gemm_fp8_residual", "gemm_fp8_sums", "gemm_many", "gemm_rounded_few",
    "gemm_rounded_many", "layers", "layers_fp8", "perf", "sampling", "weights",
];
