"""What an LLM is built with: vLLM's arguments, mini-sglang's, and ours, as the engine's options.

    vLLM         max_model_len=4096          ──┐
    mini-sglang  max_seq_len_override=4096   ──┴──>  max_seq_len=4096

An argument that asks for what we don't have is refused by its name; one that asks for nothing is taken.
"""

from __future__ import annotations

import difflib
from numbers import Integral, Real
from typing import Any

#: Arguments that are options of the engine, and the options' names.
OPTIONS = {
    "max_model_len": "max_seq_len",
    "max_num_seqs": "max_running",
    "max_num_batched_tokens": "max_prefill_tokens",
    "block_size": "page_size",
    "num_gpu_blocks_override": "num_pages",
    "gpu_memory_utilization": "memory_utilization",
    "enable_prefix_caching": "prefix_cache",
    "memory_ratio": "memory_ratio",
    "max_graph_batch": "max_graph_batch",
    "backend": "backend",
    "device": "device",
    "data_parallel_size": "data_parallel",
    "tensor_parallel_size": "tensor_parallel",
    "allow_imbalance": "allow_imbalance",
    "kernels": "kernels",
    "overlap": "overlap",
    "order": "order",
    "policy": "policy",
    "speculate": "speculate",
    "plain_inputs": "plain_inputs",
}

#: Those that are whole numbers.
WHOLE = frozenset(
    {
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
        "num_gpu_blocks_override",
        "max_graph_batch",
        "device",
        "data_parallel_size",
        "tensor_parallel_size",
    }
)

#: Those that are shares of something, and those that are True or False. The others are words.
SHARES = frozenset({"gpu_memory_utilization", "memory_ratio"})
TRUTHS = frozenset({"enable_prefix_caching", "enforce_eager", "allow_imbalance", "overlap", "plain_inputs"})

#: mini-sglang's names, and vLLM's other ones.
ALIASES = {
    "max_running_req": "max_num_seqs",
    "max_seq_len_override": "max_model_len",
    "max_extend_tokens": "max_num_batched_tokens",
    "cuda_graph_max_bs": "max_graph_batch",
    "page_size": "block_size",
    "num_page_override": "num_gpu_blocks_override",
    "async_scheduling": "overlap",
}

#: Arguments that change no output and cost nothing to be taken, whatever they hold.
IGNORED = frozenset(
    {
        "trust_remote_code",  # No code of a checkpoint's is ever run.
        "disable_log_stats",
        "disable_log_requests",
        "disable_custom_all_reduce",
        "disable_async_output_proc",
        "max_seq_len_to_capture",
        "compilation_config",
        "swap_space",
        "tokenizer_mode",
        "enable_chunked_prefill",
        "use_pynccl",
        "distributed_timeout",
        "distributed_executor_backend",
        "offline_mode",
        "max_logprobs",
    }
)

#: Arguments that are not served, the values at which they ask for nothing, and what to do instead.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "pipeline_parallel_size": ((1,), "a model runs on one GPU"),
    "enable_expert_parallel": ((False,), "a model runs on one GPU"),
    "dtype": (
        (None, "auto", "bfloat16", "torch.bfloat16"),
        'activations are bfloat16 on a GPU and float32 with backend="cpu"',
    ),
    "load_format": ((None, "auto", "safetensors"), "for dummy weights, name a preset, like model=\"qwen3-0.6b\""),
    "use_dummy_weight": ((False,), "for dummy weights, name a preset, like model=\"qwen3-0.6b\""),
    "skip_tokenizer_init": ((False,), "give prompts as token ids; a tokenizer that is there costs little"),
    "tokenizer_revision": ((None,), "the tokenizer is that of `revision`"),
    "download_dir": ((None,), "set HF_HOME"),
    "hf_token": ((None, True), "set HF_TOKEN"),
    "hf_overrides": ((None, {}), "edit the checkpoint's config.json"),
    "cpu_offload_gb": ((0,), "weights stay on the device"),
    "task": ((None, "auto", "generate"), "models generate"),
    "runner": ((None, "auto", "generate"), "models generate"),
    "enable_lora": ((False,), "merge the adapter into the checkpoint"),
    "enable_prompt_adapter": ((False,), "merge the adapter into the checkpoint"),
    "speculative_config": ((None,), 'speculate="ngram" drafts from the texts themselves'),
    "scheduling_policy": ((None, "fcfs"), "see `order`"),
    "logits_processors": ((None, []), "see SamplingParams"),
    "limit_mm_per_prompt": ((None, {}), "prompts are texts"),
    "chat_template": ((None,), "put chat_template.jinja into the checkpoint's folder"),
    "allowed_local_media_path": ((None, ""), "prompts are texts"),
    "mm_processor_kwargs": ((None,), "prompts are texts"),
    "attention_backend": ((None, "auto"), "see `kernels`"),
    "moe_backend": ((None, "auto"), "see `kernels`"),
    "cuda_graph_bs": ((None,), "see `max_graph_batch`"),
    "ep_size": ((1,), "a model runs on one GPU"),
    "enable_sleep_mode": ((False, True), ""),
}


def to_options(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """The engine's options that arguments ask for; those left at None are left to the engine.

    Raises:
        TypeError: an argument that nobody has.
        ValueError: one that asks for what is not served, or the same thing twice.
    """
    options: dict[str, Any] = {}
    for name, value in given.items():
        for option, setting in _one(model, name, value):
            if setting is None:
                continue
            if options.get(option, setting) != setting:
                raise ValueError(f"{name}={value!r} contradicts another argument: both set {option}")
            options[option] = setting
    return options


def _one(model: str, name: str, value: Any) -> list[tuple[str, Any]]:
    """The options that an argument sets."""
    if name in ALIASES:
        name = ALIASES[name]
    if name == "device" and isinstance(value, str):
        return _device(value)
    if name == "quantization":
        return _quantization(value)
    if name == "kv_cache_dtype":
        return _kv_dtype(value)
    if value is not None and (name in OPTIONS or name == "enforce_eager"):
        _check(name, value)
    if name in OPTIONS:
        return [(OPTIONS[name], value)]
    if name == "enforce_eager":
        return [("max_graph_batch", 0 if value else None)]
    if name == "cache_type":
        if value not in ("radix", "naive"):
            raise ValueError(f"cache_type={value!r} is neither radix (equal prefixes are kept) nor naive")
        return [("prefix_cache", value == "radix")]
    if name == "tokenizer":
        if value not in (None, model):
            raise ValueError(f"tokenizer={value!r}: the tokenizer is the checkpoint's own; leave it out")
        return []
    if name in IGNORED:
        return []
    if name in NEUTRAL:
        neutral, instead = NEUTRAL[name]
        if value not in neutral and str(value) not in neutral:
            raise ValueError(f"{name}={value!r} is not served by minisgl: {instead}")
        return []
    known = [*OPTIONS, *ALIASES, *NEUTRAL, *IGNORED, "quantization", "kv_cache_dtype", "seed", "revision", "generation_config"]
    near = difflib.get_close_matches(name, known, n=1)
    raise TypeError(f"LLM has no argument {name}" + (f"; did you mean {near[0]}?" if near else ""))


def _check(name: str, value: Any) -> None:
    """Refuses what is of another type than the option."""
    if name in WHOLE:
        several = name == "device" and isinstance(value, (list, tuple))
        for one in value if several else [value]:
            if not _is_whole(one, 32):
                raise ValueError(f"{name} is {one!r}; it must be a whole number from 0 up, below 2^32: leave it out for the engine's choice")
    elif name in SHARES:
        if not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}; it must be a number")
    elif name in TRUTHS:
        if type(value).__name__ not in ("bool", "bool_"):  # numpy's, too.
            raise TypeError(f"{name} is {value!r}; it must be True or False")
    elif not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; it must be a word")


def _is_whole(value: Any, bits: int) -> bool:
    return isinstance(value, Integral) and 0 <= int(value) < 2**bits


def to_seed(given: Any) -> int:
    """The seed that requests' own are counted from."""
    if given is not None and not _is_whole(given, 64):
        raise ValueError(f"seed is {given!r}; it must be a whole number from 0 up, below 2^64")
    return int(given or 0)


def _quantization(value: Any) -> list[tuple[str, Any]]:
    """Weights made "fp8" when they are loaded; `None` leaves them as the checkpoint has them."""
    if value not in (None, "fp8"):
        raise ValueError(
            f'quantization={value!r} is not served by minisgl: "fp8" makes weights fp8 when they are loaded; otherwise the '
            "checkpoint's own quantization_config says how they are stored"
        )
    return [("quantize", value)]


#: vLLM's names of what keys and values are kept as, and the engine's.
KV_DTYPES = {"auto": "auto", "bfloat16": "bf16", "fp8": "fp8", "fp8_e4m3": "fp8"}


def _kv_dtype(value: Any) -> list[tuple[str, Any]]:
    """`None` leaves it to the engine, as "auto" does."""
    if value is not None and (not isinstance(value, str) or value not in KV_DTYPES):
        raise ValueError(f"kv_cache_dtype={value!r} is not served by minisgl; give one of {', '.join(KV_DTYPES)}")
    return [("kv_dtype", None if value is None else KV_DTYPES[value])]


def _device(value: str) -> list[tuple[str, Any]]:
    """vLLM's way to name a device: auto, cpu, cuda, cuda:1."""
    kind, _, number = value.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise ValueError(f"device={value!r} is no device; give a GPU's number, or auto, cpu, cuda or cuda:1")
    return [("backend", None if kind == "auto" else kind), ("device", int(number) if number else None)]
