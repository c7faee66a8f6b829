//! Errors as Python has them.

use minisgl::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

create_exception!(
    minisgl,
    EngineError,
    PyRuntimeError,
    "The model could not be opened, or the engine failed; out of `generate`, `outputs` has what had ended by then."
);
create_exception!(
    minisgl,
    RequestError,
    PyValueError,
    "A request can't run: out of `generate`, `index` says which, and `outputs` has what had ended by then."
);

/// What they have besides, out of whatever they come.
pub fn complete(py: Python<'_>) -> PyResult<()> {
    let (engine, request) = (py.get_type::<EngineError>(), py.get_type::<RequestError>());
    engine.setattr("outputs", PyTuple::empty(py))?;
    request.setattr("outputs", PyTuple::empty(py))?;
    request.setattr("index", py.None())
}

/// What stops an engine. A setting that can't hold is a `ValueError`, as a wrong argument is in Python.
pub fn raised(error: &Error) -> PyErr {
    let text = in_arguments(&error.to_string());
    match error {
        Error::NoModel { .. }
        | Error::Revision { .. }
        | Error::Limits(_)
        | Error::MemoryShare { .. }
        | Error::TooFewPages { .. }
        | Error::NoEngine
        | Error::TooManyEngines(_)
        | Error::Ranks(_)
        | Error::RanksSimulated(_)
        | Error::DevicesLeftOver { .. }
        | Error::DevicesDiffer { .. }
        | Error::SequenceTooLong { .. }
        | Error::HostMemory { .. }
        | Error::NoGpu { .. } => PyValueError::new_err(text),
        _ => EngineError::new_err(text),
    }
}

/// A text of the library's, which names the flags of its commands, with the arguments that are meant here.
pub fn in_arguments(text: &str) -> String {
    const ARGUMENTS: [(&str, &str); 22] = [
        ("--plain-inputs", "plain_inputs=True"),
        ("--quantize fp8", "quantization=\"fp8\""),
        ("--kv-dtype auto", "kv_cache_dtype=\"auto\""),
        ("--backend cpu", "backend=\"cpu\""),
        ("--generation-config none", "generation_config=\"none\""),
        ("--max-seq-len", "max_model_len"),
        ("--max-running", "max_num_seqs"),
        ("--max-prefill-tokens", "max_num_batched_tokens"),
        ("--max-graph-batch", "max_graph_batch"),
        ("--num-pages", "num_gpu_blocks_override"),
        ("--page-size", "block_size"),
        ("memory_utilization", "gpu_memory_utilization"),
        ("--memory-ratio is", "memory_ratio is"),
        // Advice to turn it: pages follow whichever of them was given.
        ("--memory-ratio", "gpu_memory_utilization or memory_ratio"),
        ("--backend", "backend"),
        ("--data-parallel", "data_parallel_size"),
        ("--tensor-parallel", "tensor_parallel_size"),
        ("--allow-imbalance", "allow_imbalance"),
        ("--devices", "device"),
        ("--kernels", "kernels"),
        ("--revision", "revision"),
        ("--model", "model"),
    ];
    ARGUMENTS.iter().fold(text.to_owned(), |text, (flag, argument)| text.replace(flag, argument))
}
