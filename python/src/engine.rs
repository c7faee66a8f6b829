//! An engine as Python holds it.

use std::mem::forget;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use minisgl::progress::Stderr;
use minisgl::{
    BackendChoice, Error, GenerationConfig, KernelSet, Llm, LlmBuilder, ModelSource, Options, Prompt,
    Quantize, SamplingParams, Text, Weights, parse_kv_dtype, parse_order, parse_policy, parse_speculation,
};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyIterator};

use crate::array;
use crate::error::{RequestError, raised};
use crate::interrupt::interruptible;
use crate::owner::Owner;
use crate::prompt;
use crate::reader::Source;
use crate::run::Run;

/// A model on a device.
#[pyclass(module = "minisgl._minisgl", frozen)]
pub struct Engine {
    state: Arc<Mutex<State>>,
    /// Tokens and texts, whatever the engine is at.
    text: Arc<Text>,
    /// Builds it anew.
    builder: LlmBuilder,
    sampling: Option<GenerationConfig>,
    /// Of a request.
    samples_max: u32,
    owner: Owner,
}

enum State {
    Awake(Box<Llm>),
    /// Its memory is given back for the time being. It wakes up with these weights, or with those in the model's files.
    Asleep(Option<Weights>),
    Closed,
}

impl State {
    fn llm(&mut self) -> PyResult<&mut Llm> {
        match self {
            State::Awake(llm) => Ok(llm),
            State::Asleep(_) => Err(PyRuntimeError::new_err("this LLM sleeps; call wake_up() first")),
            State::Closed => Err(PyRuntimeError::new_err("this LLM is closed; build another one")),
        }
    }
}

#[pymethods]
impl Engine {
    /// Opens a model. `options` are fields of the library's `Options`, by their names.
    #[new]
    #[pyo3(signature = (model, *, revision, options, quiet))]
    fn new(
        py: Python<'_>,
        model: &str,
        revision: Option<&str>,
        options: &Bound<'_, PyDict>,
        quiet: bool,
    ) -> PyResult<Self> {
        let options = read_options(options)?;
        let (model, revision) = (model.to_owned(), revision.map(str::to_owned));
        let open = move || {
            let stderr = (!quiet).then(Stderr::open);
            options.check()?;
            let source = ModelSource::find(&model, revision.as_deref(), stderr.as_ref())?;
            let sampling = source.generation_config()?;
            let builder = source.builder().options(options);
            let llm = builder.clone().build()?;
            if let Some(stderr) = stderr {
                stderr.say(llm.info().to_string());
                stderr.finish();
            }
            Ok((llm, builder, sampling))
        };
        let (llm, builder, sampling) =
            interruptible(py, open)?.map_err(|error: minisgl::Error| raised(&error))?;
        let (text, samples_max) = (llm.handle().text().clone(), llm.info().limits.queued);
        let state = Arc::new(Mutex::new(State::Awake(Box::new(llm))));
        Ok(Engine { state, text, builder, sampling, samples_max, owner: Owner::this() })
    }

    /// Begins to run requests out of an iterator, pulled as there is room for them: a prompt, its sampling and its number
    /// each. One without a seed of its own gets `seed` plus its number.
    #[pyo3(signature = (requests, *, seed, tokens))]
    fn start(&self, requests: Bound<'_, PyIterator>, seed: u64, tokens: bool) -> PyResult<Run> {
        let handle = self.when_free(requests.py(), |state| Ok(state.llm()?.handle()))?;
        let source = Source { requests: requests.unbind(), seed, samples_max: self.samples_max };
        Ok(Run::new(&handle, self.owner, source, tokens))
    }

    /// The token ids of a prompt.
    fn encode(&self, py: Python<'_>, given: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        self.owner.check()?;
        let prompt = prompt::prompt(given)?;
        py.detach(|| self.text.encode(prompt)).map_err(|error| RequestError::new_err(error.to_string()))
    }

    /// The text of tokens, special ones left out; `None` without a tokenizer.
    fn decode(&self, py: Python<'_>, given: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
        self.owner.check()?;
        let Prompt::Tokens(ids) = prompt::prompt(given)? else {
            return Err(PyTypeError::new_err("token ids are wanted"));
        };
        Ok(py.detach(|| self.text.decode(&ids)))
    }

    /// The bytes that a token stands for; `None` where it stands for none.
    fn token_bytes<'py>(&self, py: Python<'py>, id: u32) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.owner.check()?;
        Ok(self.text.token_bytes(id).map(|bytes| PyBytes::new(py, &bytes)))
    }

    /// Forgets all cached prefixes.
    fn reset_prefix_cache(&self, py: Python<'_>) -> PyResult<()> {
        self.at_length(py, |state| {
            state.llm()?.clear_prefix_cache();
            Ok(())
        })
    }

    /// Puts tensors in the place of the model's own: out of pairs of a name and an array, which are copied.
    fn update_weights(&self, py: Python<'_>, pairs: &Bound<'_, PyIterator>) -> PyResult<()> {
        self.owner.check()?;
        let mut tensors = Vec::new();
        for pair in pairs {
            let (name, array) = pair?.extract::<(String, Bound<'_, PyAny>)>().map_err(|_| {
                PyTypeError::new_err("weights are pairs of a name and an array, or a dict of them")
            })?;
            tensors.push(array::tensor(name, &array)?);
        }
        self.update(py, move |llm| llm.update_weights(tensors))
    }

    /// Likewise out of a safetensors file or a folder.
    fn update_weights_from(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        self.update(py, move |llm| llm.update_weights_from(path))
    }

    /// Sampling that the checkpoint's `generation_config.json` recommends, if it does.
    fn recommended_sampling<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let Some(config) = &self.sampling else { return Ok(None) };
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = config.apply(SamplingParams::default());
        let fields = PyDict::new(py);
        fields.set_item("temperature", temperature)?;
        fields.set_item("top_k", top_k)?;
        fields.set_item("top_p", top_p)?;
        fields.set_item("min_p", min_p)?;
        Ok(Some(fields))
    }

    /// What it is made of.
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let info = self.when_free(py, |state| Ok(state.llm()?.info().clone()))?;
        let fields = PyDict::new(py);
        fields.set_item("model", &info.model)?;
        fields.set_item("commit", &info.commit)?;
        fields.set_item("backend", info.backend)?;
        fields.set_item("device", &info.device)?;
        fields.set_item("vocab_size", info.vocab)?;
        fields.set_item("eos_token_ids", &info.eos)?;
        fields.set_item("max_model_len", info.limits.sequence)?;
        fields.set_item("max_num_seqs", info.limits.running)?;
        fields.set_item("page_size", info.limits.page_size)?;
        fields.set_item("kv_cache_dtype", info.kv.to_string())?;
        fields.set_item("num_pages", info.limits.pages)?;
        fields.set_item("warnings", &info.warnings)?;
        Ok(fields)
    }

    /// What the engine did so far.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let handle = self.when_free(py, |state| Ok(state.llm()?.handle()))?;
        let stats = py.detach(|| handle.stats()).map_err(|error| raised(&error))?;
        let fields = PyDict::new(py);
        fields.set_item("decode_steps", stats.decode_steps)?;
        fields.set_item("prefill_tokens", stats.prefill_tokens)?;
        fields.set_item("cached_tokens", stats.cached_tokens)?;
        Ok(fields)
    }

    /// Ends its threads and gives the device's memory back; open runs end with an error.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.at_length(py, |state| {
            *state = State::Closed;
            Ok(())
        })
    }

    /// As `close`, until `wake_up`, which finds updated weights if they are kept.
    fn sleep(&self, py: Python<'_>, keep_updates: bool) -> PyResult<()> {
        self.at_length(py, move |state| {
            let kept = match &mut *state {
                State::Asleep(weights) => weights.take(),
                state => state.llm()?.updated_weights(),
            };
            *state = State::Asleep(kept.filter(|_| keep_updates));
            Ok(())
        })
    }

    /// Builds the engine anew after `sleep`.
    fn wake_up(&self, py: Python<'_>) -> PyResult<()> {
        let builder = self.builder.clone();
        self.at_length(py, |state| {
            if let State::Asleep(weights) = state {
                let builder = match weights {
                    Some(weights) => builder.weights(weights.clone()),
                    None => builder,
                };
                let llm = builder.build().map_err(|error| raised(&error))?;
                *state = State::Awake(Box::new(llm));
            }
            state.llm().map(drop)
        })
    }

    fn is_sleeping(&self, py: Python<'_>) -> PyResult<bool> {
        self.when_free(py, |state| Ok(matches!(state, State::Asleep(_))))
    }
}

impl Engine {
    /// Updates weights. Tensors that are not as they must be are wrong arguments.
    fn update(
        &self,
        py: Python<'_>,
        update: impl FnOnce(&mut Llm) -> Result<(), Error> + Send + 'static,
    ) -> PyResult<()> {
        self.at_length(py, |state| {
            update(state.llm()?).map_err(|error| match error {
                Error::Model(_) => PyValueError::new_err(error.to_string()),
                error => raised(&error),
            })
        })
    }

    /// Looks at the state, at once if nobody changes it.
    fn when_free<T: Send + 'static>(
        &self,
        py: Python<'_>,
        look: impl FnOnce(&mut State) -> PyResult<T> + Send + 'static,
    ) -> PyResult<T> {
        self.owner.check()?;
        match self.state.try_lock() {
            Ok(mut state) => look(&mut state),
            Err(TryLockError::Poisoned(state)) => look(&mut state.into_inner()),
            Err(TryLockError::WouldBlock) => self.at_length(py, look),
        }
    }

    /// Does what takes long with the state. Ctrl-C does not wait for it, and it comes to its end behind that.
    fn at_length<T: Send + 'static>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut State) -> PyResult<T> + Send + 'static,
    ) -> PyResult<T> {
        self.owner.check()?;
        let state = self.state.clone();
        interruptible(py, move || work(&mut locked(&state)))?
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Engine {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            forget(self.state.clone());
        }
    }
}

fn read_options(given: &Bound<'_, PyDict>) -> PyResult<Options> {
    let mut options = Options::default();
    for (name, value) in given {
        let name: String = name.extract()?;
        let word = || value.extract::<String>();
        let refused = |reason: String| PyValueError::new_err(format!("{name}: {reason}"));
        match name.as_str() {
            "backend" => options.backend = word()?.parse::<BackendChoice>().map_err(refused)?,
            "data_parallel" => options.data_parallel = value.extract()?,
            "tensor_parallel" => options.tensor_parallel = value.extract()?,
            "allow_imbalance" => options.allow_imbalance = value.extract()?,
            "device" => {
                let one = value.extract::<Option<usize>>();
                options.devices = one.map(|one| one.into_iter().collect()).or_else(|_| value.extract())?;
            }
            "kernels" => options.kernels = word()?.parse::<KernelSet>().map_err(refused)?,
            "max_running" => options.max_running = value.extract()?,
            "max_prefill_tokens" => options.max_prefill_tokens = value.extract()?,
            "page_size" => options.page_size = value.extract()?,
            "kv_dtype" => options.kv_dtype = parse_kv_dtype(&word()?).map_err(refused)?.0,
            "num_pages" => options.num_pages = value.extract()?,
            "memory_ratio" => options.memory_ratio = value.extract()?,
            "memory_utilization" => options.memory_utilization = value.extract()?,
            "max_seq_len" => options.max_seq_len = value.extract()?,
            "max_graph_batch" => options.max_graph_batch = value.extract()?,
            "overlap" => options.overlap &= value.extract::<bool>()?,
            "prefix_cache" => options.prefix_cache = value.extract()?,
            "order" => options.order = parse_order(&word()?).map_err(refused)?,
            "policy" => options.policy = parse_policy(&word()?).map_err(refused)?,
            "speculate" => options.speculation = parse_speculation(&word()?).map_err(refused)?,
            "quantize" => options.quantize = Some(word()?.parse::<Quantize>().map_err(refused)?),
            "plain_inputs" => options.plain_inputs = value.extract()?,
            _ => return Err(PyTypeError::new_err(format!("{name} is no option of an engine"))),
        }
    }
    Ok(options)
}
