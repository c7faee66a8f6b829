"""Arguments of vLLM's and mini-sglang's: taken with their meaning, or refused by name."""

import pickle

import numpy as np
import pytest
from conftest import BACKEND, gpus, open_llm

import minisgl.core
from minisgl import LLM, SamplingParams
from minisgl.arguments import to_options


@pytest.mark.parametrize(
    "given, options",
    [
        ({"max_model_len": 99, "max_num_seqs": 3}, {"max_seq_len": 99, "max_running": 3}),
        ({"max_seq_len_override": 99, "max_running_req": 3}, {"max_seq_len": 99, "max_running": 3}),
        ({"max_extend_tokens": 64, "cuda_graph_max_bs": 8}, {"max_prefill_tokens": 64, "max_graph_batch": 8}),
        ({"gpu_memory_utilization": 0.5}, {"memory_utilization": 0.5}),
        ({"enforce_eager": True}, {"max_graph_batch": 0}),
        ({"enforce_eager": False, "block_size": None}, {}),
        ({"cache_type": "naive"}, {"prefix_cache": False}),
        ({"device": "cuda:1"}, {"backend": "cuda", "device": 1}),
        ({"device": 1}, {"device": 1}),
        ({"device": [0, 2], "tensor_parallel_size": 2}, {"device": [0, 2], "tensor_parallel": 2}),
        ({"device": "auto", "backend": "cpu"}, {"backend": "cpu"}),
        ({"data_parallel_size": 2}, {"data_parallel": 2}),
        ({"tensor_parallel_size": 2}, {"tensor_parallel": 2}),
        ({"pipeline_parallel_size": 1, "dtype": "auto", "trust_remote_code": True, "swap_space": 4}, {}),
        ({"tokenizer": "M", "quantization": None, "kv_cache_dtype": None}, {}),
        ({"quantization": "fp8"}, {"quantize": "fp8"}),
        ({"max_num_seqs": np.int64(3), "memory_ratio": np.float32(0.5)}, {"max_running": 3, "memory_ratio": 0.5}),
        ({"overlap": np.bool_(False)}, {"overlap": False}),
        ({"kv_cache_dtype": "auto"}, {"kv_dtype": "auto"}),
        ({"kv_cache_dtype": "bfloat16"}, {"kv_dtype": "bf16"}),
        ({"kv_cache_dtype": "fp8_e4m3"}, {"kv_dtype": "fp8"}),
    ],
)
def test_arguments_become_options(given, options):
    assert to_options("M", given) == options


@pytest.mark.parametrize(
    "given, error, complaint",
    [
        ({"max_model_len": -1}, ValueError, "max_model_len is -1"),
        ({"max_num_batched_tokens": 2**40}, ValueError, "max_num_batched_tokens is 1099511627776"),
        ({"max_num_seqs": "8"}, ValueError, "max_num_seqs is '8'"),
        ({"pipeline_parallel_size": 2}, ValueError, "pipeline_parallel_size=2 is not served by minisgl"),
        ({"quantization": "awq"}, ValueError, "quantization_config"),
        ({"kv_cache_dtype": "fp8_e5m2"}, ValueError, "fp8_e5m2.*bfloat16, fp8"),
        ({"dtype": "float16"}, ValueError, "dtype"),
        ({"tokenizer": "other"}, ValueError, "the checkpoint's own"),
        ({"enable_lora": True}, ValueError, "adapter"),
        ({"cache_type": "hiradix"}, ValueError, "radix"),
        ({"device": "tpu"}, ValueError, "cuda:1"),
        ({"device": [0, -1]}, ValueError, "device is -1"),
        ({"max_model_len": 5, "max_seq_len_override": 6}, ValueError, "contradicts"),
        ({"max_modle_len": 5}, TypeError, "did you mean max_model_len"),
        ({"colour": "red"}, TypeError, "no argument colour"),
        ({"gpu_memory_utilization": "most"}, TypeError, "gpu_memory_utilization is 'most'.*number"),
        ({"enable_prefix_caching": "no"}, TypeError, "enable_prefix_caching is 'no'.*True or False"),
        ({"enforce_eager": "no"}, TypeError, "enforce_eager is 'no'.*True or False"),
        ({"order": 5}, TypeError, "order is 5.*word"),
        ({"kv_cache_dtype": ["fp8"]}, ValueError, "kv_cache_dtype="),
    ],
)
def test_what_is_not_served_is_refused_by_name(given, error, complaint):
    with pytest.raises(error, match=complaint):
        to_options("M", given)


def test_a_model_that_is_not_there_and_settings_that_can_not_hold_are_value_errors(checkpoint):
    with pytest.raises(ValueError, match="no/such/model"):
        LLM("no/such/model", backend="cpu", quiet=True)
    with pytest.raises(ValueError, match="max_model_len"):
        LLM(checkpoint, backend="cpu", max_model_len=10**8, quiet=True)
    with pytest.raises(ValueError, match="^gpu_memory_utilization is 2"):
        LLM(checkpoint, backend="cpu", gpu_memory_utilization=2.0, quiet=True)
    with pytest.raises(ValueError, match="^memory_ratio is 2"):
        LLM(checkpoint, backend="cpu", memory_ratio=2.0, quiet=True)
    with pytest.raises(ValueError, match="give num_gpu_blocks_override"):
        LLM(checkpoint, backend="cpu", max_model_len=256, num_gpu_blocks_override=1, quiet=True)
    with pytest.raises(ValueError, match="data_parallel_size 0"):
        LLM(checkpoint, backend="cpu", data_parallel_size=0, quiet=True)
    with pytest.raises(ValueError, match="backend: "):
        LLM(checkpoint, backend="tpu", quiet=True)
    with pytest.raises(TypeError, match="needs a model"):
        LLM()
    for seed in (-1, 2**64, 1.5, "a"):
        with pytest.raises(ValueError, match="^seed is "):
            LLM(checkpoint, backend="cpu", seed=seed, quiet=True)


@pytest.mark.skipif(BACKEND != "cpu" and gpus() < 2, reason="needs two GPUs")
def test_several_engines_draw_what_one_draws(checkpoint):
    prompts = [[1, 2, i] for i in range(12)]
    params = SamplingParams(temperature=1, max_tokens=8, ignore_eos=True)
    one, two = (open_llm(checkpoint, data_parallel_size=engines) for engines in (1, 2))
    outputs = [llm.generate(prompts, params, use_tqdm=False) for llm in (one, two)]
    assert outputs[0] == outputs[1]


def test_mini_sglangs_names_build_the_same_engine(checkpoint):
    from minisgl.llm import LLM as TheirLLM

    llm = TheirLLM(model_path=checkpoint, backend="cpu", max_seq_len_override=128, max_running_req=2, quiet=True)
    assert (llm.info()["max_model_len"], llm.info()["max_num_seqs"]) == (128, 2)
    output = llm.generate(["Once"], minisgl.core.SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)[0]
    assert len(output["token_ids"]) == 4 and isinstance(output["text"], str)


def test_defaults_are_those_of_whose_name_it_is():
    ours, theirs = SamplingParams(), minisgl.core.SamplingParams()
    assert (ours.temperature, ours.max_tokens) == (1.0, 16)
    assert (theirs.temperature, theirs.max_tokens, theirs.is_greedy) == (0.0, 1024, True)


@pytest.mark.parametrize(
    "fields, error, complaint",
    [
        ({"n": 0}, ValueError, "n is 0"),
        ({"n": -1}, ValueError, "n is -1"),
        ({"temperature": -1}, ValueError, "temperature is -1"),
        ({"top_p": 0}, ValueError, "top_p is 0"),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0"),
        ({"logprobs": 21}, ValueError, "logprobs is 21"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty is 0"),
        ({"presence_penalty": 2.5}, ValueError, "presence_penalty is 2.5"),
        ({"min_tokens": 17}, ValueError, "min_tokens is 17"),
        ({"logit_bias": {"five": 1.0}}, ValueError, "five"),
        ({"allowed_token_ids": [-1]}, ValueError, r"allowed_token_ids is \[-1\]"),
        ({"allowed_token_ids": "ab"}, TypeError, "allowed_token_ids is"),
        ({"seed": -2}, ValueError, "seed is -2"),
        ({"max_tokens": 2**40}, ValueError, "max_tokens is 1099511627776"),
        ({"logprobs": -1}, ValueError, "logprobs is -1"),
        ({"temperature": "hot"}, TypeError, "temperature is 'hot': .*number"),
        ({"use_beam_search": True}, ValueError, "use_beam_search=True is not served"),
        ({"skip_special_tokens": False}, ValueError, "skip_special_tokens"),
        ({"max_token": 5}, TypeError, "did you mean max_tokens"),
        ({"top_k": -2}, ValueError, "top_k is -2"),
        ({"stop": 5}, TypeError, "stop is 5.*list"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids is 5.*list"),
        ({"stop_token_ids": np.array([-1])}, ValueError, "stop_token_ids is .*-1"),
        ({"bad_words": 5}, TypeError, "bad_words is 5.*list"),
        ({"allowed_token_ids": 5}, TypeError, "allowed_token_ids is 5.*list"),
        ({"logit_bias": [(1, 2.0)]}, TypeError, "logit_bias is .*dict"),
        ({"logit_bias": {1.7: 2.0}}, ValueError, "logit_bias is .*token ids"),
        ({"include_stop_str_in_output": "no"}, TypeError, "include_stop_str_in_output is 'no'"),
    ],
)
def test_sampling_that_can_not_hold_is_refused_when_it_is_made(fields, error, complaint):
    with pytest.raises(error, match=complaint):
        SamplingParams(**fields)


def test_every_field_of_sampling_is_explained_and_can_be_copied():
    fields = minisgl.sampling_params.FIELDS
    assert fields[0] == "n" and "allowed_token_ids" in fields and "self" not in fields and "others" not in fields
    for name in fields:
        assert f"    {name}: " in SamplingParams.__doc__, name
    params = SamplingParams(seed=7, stop="x", logit_bias={5: 1.0}, allowed_token_ids=[5, 6])
    assert params.clone() == params == pickle.loads(pickle.dumps(params))
    with pytest.raises(AttributeError):
        params.max_token = 5


def test_what_there_may_be_several_of_comes_in_any_iterable_and_a_text_is_one():
    params = SamplingParams(
        n=np.int64(2),
        stop="end",
        bad_words="bad",
        stop_token_ids=np.array([5, 6]),
        allowed_token_ids=range(5, 7),
        logit_bias={"5": 1, np.int64(6): np.float32(2)},
    )
    assert (params.stop, params.bad_words, params.stop_token_ids) == (["end"], ["bad"], [5, 6])
    assert (params.allowed_token_ids, params.logit_bias) == ([5, 6], {5: 1, 6: 2})
    assert SamplingParams(stop=np.array(["a", "b"]), stop_token_ids=np.array([], int)).stop == ["a", "b"]


def test_sampling_that_asks_for_nothing_is_taken():
    params = SamplingParams(n=1, best_of=1, presence_penalty=None, repetition_penalty=1.0, bad_words=[], top_k=-1)
    assert params.top_k == -1 and params == SamplingParams(top_k=-1)


def test_without_sampling_the_checkpoints_own_counts(checkpoint, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    wishes = {"do_sample": True, "temperature": 0.5, "top_k": 7, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    params = open_llm(str(folder)).get_default_sampling_params()
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 7, 16)
    params = open_llm(str(folder), generation_config="vllm").get_default_sampling_params()
    assert params == SamplingParams()
