"""Tiny checkpoints, and models of them: on the CPU, or where MINISGL_TEST_BACKEND says (cuda)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from minisgl import LLM

BACKEND = os.environ.get("MINISGL_TEST_BACKEND", "cpu")
FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


def gpus():
    """How many an LLM may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu])
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.count("\n")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A Qwen3 of random weights that has a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tiny-tied", "text"):
        for file in (FIXTURES / name).iterdir():
            shutil.copy(file, folder)
    return str(folder)


def open_llm(model, **arguments):
    if BACKEND != "cpu":
        # Several live at once: none takes the GPU's free memory.
        arguments.setdefault("num_gpu_blocks_override", 512)
    return LLM(model, backend=BACKEND, max_model_len=256, max_num_seqs=8, quiet=True, **arguments)


@pytest.fixture(scope="session")
def llm(checkpoint):
    return open_llm(checkpoint)
