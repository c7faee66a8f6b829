//! CUDA kernels of minisgl: their sources, the PTX built from them, and the constants that host and device share.
