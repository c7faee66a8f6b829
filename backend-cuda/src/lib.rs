//! The CUDA backend of minisgl, over the driver API.
