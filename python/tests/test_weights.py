"""What `update_weights` promises, and what reinforcement learning needs beside it."""

import ctypes
import json
import shutil
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import FIXTURES, open_llm

from minisgl import SamplingParams

DRAWN = SamplingParams(temperature=0.9, seed=3, max_tokens=16, ignore_eos=True, logprobs=1)
PROMPTS = [[1, 2, 3], list(range(40, 90)), list(range(40, 80)) + [7]]
QUIET = {"use_tqdm": False}
NORM = "model.norm.weight"


def read(file):
    """The tensors of a safetensors file, which are bfloat16."""
    data = Path(file).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, tensor in header.items():
        assert tensor["dtype"] == "BF16"
        begin, end = (8 + size + offset for offset in tensor["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], ml_dtypes.bfloat16).reshape(tensor["shape"])
    return tensors


def write(file, tensors):
    header, parts, at = {}, [], 0
    for name, tensor in tensors.items():
        parts.append(tensor.tobytes())
        kind = {"bfloat16": "BF16", "float32": "F32"}[tensor.dtype.name]
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    text = json.dumps(header).encode()
    Path(file).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def trained(tensors, seed):
    """What a step of training might make of them."""
    random = np.random.default_rng(seed)
    noisy = {}
    for name, tensor in tensors.items():
        wide = tensor.astype(np.float32)
        noisy[name] = (wide + 0.1 * np.abs(wide).mean() * random.standard_normal(tensor.shape)).astype(tensor.dtype)
    return noisy


@pytest.fixture(scope="module")
def old():
    return read(FIXTURES / "tiny-tied" / "model.safetensors")


@pytest.fixture(scope="module")
def new(old):
    return trained(old, 1)


@pytest.fixture(scope="module")
def new_checkpoint(new, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "model"
    shutil.copytree(checkpoint, folder)
    write(folder / "model.safetensors", new)
    return folder


def drawn(llm):
    """Tokens, log-probabilities and how much the prefix cache had."""
    outputs = llm.generate(PROMPTS, DRAWN, **QUIET)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs, output.num_cached_tokens) for output in outputs]


class Foreign:
    """What is known of an array of another library: DLPack alone."""

    def __init__(self, array, device=1):
        self.array, self.device = array, device

    def __dlpack__(self, **_):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.device, 0


class ForeignBfloat16:
    """A bfloat16 tensor in DLPack's form, which numpy has not."""

    class Tensor(ctypes.Structure):
        _fields_ = [
            ("data", ctypes.c_void_p),
            ("device_type", ctypes.c_int32),
            ("device_id", ctypes.c_int32),
            ("ndim", ctypes.c_int32),
            ("code", ctypes.c_uint8),
            ("bits", ctypes.c_uint8),
            ("lanes", ctypes.c_uint16),
            ("shape", ctypes.c_void_p),
            ("strides", ctypes.c_void_p),
            ("byte_offset", ctypes.c_uint64),
            ("manager_ctx", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
        ]

    def __init__(self, array):
        assert array.dtype == ml_dtypes.bfloat16 and array.flags.c_contiguous
        self.array = array
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        # The data begin 16 bytes in.
        address = array.ctypes.data - 16
        self.tensor = self.Tensor(address, 1, 0, array.ndim, 4, 16, 1, ctypes.addressof(self.shape), None, 16, None, None)

    def __dlpack__(self, **_):
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self.tensor), b"dltensor", None)

    def __dlpack_device__(self):
        return 1, 0


def reversed_twice(array):
    """The same elements, which lie the other way round."""
    return np.ascontiguousarray(array[::-1])[::-1]


def test_an_updated_model_draws_what_a_loaded_one_draws(checkpoint, old, new, new_checkpoint):
    expected = drawn(open_llm(str(new_checkpoint)))
    llm = open_llm(checkpoint)
    before = drawn(llm)
    assert before != expected
    forms = [
        new,
        list(new.items()),
        ((name, tensor.astype(np.float32)) for name, tensor in new.items()),
        {name: np.asfortranarray(tensor) for name, tensor in new.items()},
        {name: reversed_twice(tensor) for name, tensor in new.items()},
        {name: Foreign(tensor.astype(np.float32)) for name, tensor in new.items()},
        {name: Foreign(np.asfortranarray(tensor.astype(np.float32))) for name, tensor in new.items()},
        {name: ForeignBfloat16(tensor) for name, tensor in new.items()},
        new_checkpoint,
        str(new_checkpoint / "model.safetensors"),
    ]
    for form in forms:
        assert llm.update_weights(form) is None
        assert drawn(llm) == expected, "and has no prefix of the old one"
        llm.update_weights(old)
        assert drawn(llm) == before


def test_arrays_are_copied(checkpoint, new, new_checkpoint):
    given = {name: tensor.copy() for name, tensor in new.items()}
    llm = open_llm(checkpoint)
    llm.update_weights(given)
    for tensor in given.values():
        tensor[:] = 0
    assert drawn(llm) == drawn(open_llm(str(new_checkpoint)))


def test_some_tensors_are_enough(checkpoint, old, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    part = trained({NORM: old[NORM]}, 2)
    write(folder / "model.safetensors", {**old, **part})
    llm = open_llm(checkpoint)
    llm.update_weights(part)
    assert drawn(llm) == drawn(open_llm(str(folder)))


@pytest.mark.parametrize(
    "weights, error, complaint",
    [
        ({"norm.weight": np.zeros(128, np.float32)}, ValueError, "`norm.weight`.*model.norm.weight"),
        ({NORM: np.zeros(64, np.float32)}, ValueError, f"{NORM}.*shape"),
        ({NORM: np.zeros((1, 128), np.float32)}, ValueError, f"{NORM}.*shape"),
        ({NORM: np.zeros(128)}, TypeError, f"{NORM}.*<f8"),
        ({NORM: np.zeros(128, np.int32)}, TypeError, f"{NORM}.*<i4"),
        ({NORM: np.zeros(128, ">f4")}, TypeError, f"{NORM}.*>f4"),
        ({NORM: Foreign(np.zeros(128))}, TypeError, f"{NORM}.*64 bits"),
        ({NORM: Foreign(np.zeros(128, np.float32), device=2)}, ValueError, f"{NORM}.*cpu"),
        ({NORM: [0.0] * 128}, TypeError, f"{NORM}.*list"),
        ([(NORM, np.zeros(128, np.float32))] * 2, ValueError, "twice"),
        ([NORM], TypeError, "pairs"),
        (5, TypeError, "weights are a dict.*not a int"),
        ("nowhere.safetensors", ValueError, "nowhere.safetensors"),
        (FIXTURES / "tiny-untied", ValueError, "another model"),
    ],
)
def test_what_can_not_hold_is_refused_and_nothing_changes(llm, new, weights, error, complaint):
    before = drawn(llm)
    if isinstance(weights, dict):
        weights = {**new, **weights}
    with pytest.raises(error, match=complaint):
        llm.update_weights(weights)
    llm.reset_prefix_cache()
    assert [tokens for tokens, _, _ in drawn(llm)] == [tokens for tokens, _, _ in before]


def test_updates_survive_a_sleep_unless_they_are_to_be_forgotten(checkpoint, old, new):
    llm = open_llm(checkpoint)
    before = drawn(llm)
    llm.update_weights(new)
    after = drawn(llm)
    llm.sleep()
    with pytest.raises(RuntimeError, match="wake_up"):
        llm.update_weights(old)
    llm.sleep()
    llm.wake_up()
    assert drawn(llm) == after != before
    llm.sleep()
    llm.sleep(level=2)
    llm.wake_up()
    assert drawn(llm) == before
    llm.update_weights(new)
    assert drawn(llm) == after


def test_who_generates_meanwhile_gets_the_old_model_or_the_new_one(checkpoint, new, new_checkpoint):
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    prompts = [[i, 5] for i in range(1, 25)]

    def tokens(llm):
        return [output.outputs[0].token_ids for output in llm.generate(prompts, long, **QUIET)]

    llm, begun = open_llm(checkpoint), threading.Event()
    before, after = tokens(llm), tokens(open_llm(str(new_checkpoint)))
    thread = threading.Thread(target=lambda: (begun.wait(), llm.update_weights(new)))
    thread.start()
    outputs = llm.generate(prompts, long, on_output=lambda _: begun.set(), **QUIET)
    thread.join()
    got = [output.outputs[0].token_ids for output in outputs]
    assert all(one in both for one, both in zip(got, zip(before, after)))
    assert got[0] == before[0] and tokens(llm) == after
    assert tokens(llm) == after


def test_a_rollout_is_scored_with_the_bits_that_it_was_drawn_with_step_after_step(checkpoint, old):
    llm = open_llm(checkpoint)
    params = SamplingParams(temperature=1, max_tokens=24, ignore_eos=True, logprobs=0)
    seen, weights = set(), old
    for step in range(3):
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params, **QUIET)]
        scores = llm.score(PROMPTS, [one.token_ids for one in outputs], **QUIET)
        for one, score in zip(outputs, scores):
            assert score.token_logprobs == [row[token].logprob for token, row in zip(one.token_ids, one.logprobs)]
        # The same tokens are of another probability for the next policy.
        weights = trained(weights, 10 + step)
        llm.update_weights(weights)
        again = llm.score(PROMPTS, [one.token_ids for one in outputs], **QUIET)
        assert all(new.token_logprobs != score.token_logprobs for new, score in zip(again, scores))
        seen.add(tuple(outputs[0].token_ids))
    assert len(seen) == 3
