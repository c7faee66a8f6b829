"""Tiny checkpoints, and models of them on the CPU."""

import shutil
from pathlib import Path

import pytest

from minisgl import LLM

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A Qwen3 of random weights that has a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tiny-tied", "text"):
        for file in (FIXTURES / name).iterdir():
            shutil.copy(file, folder)
    return str(folder)


def open_llm(model, **arguments):
    return LLM(model, backend="cpu", max_model_len=256, max_num_seqs=8, quiet=True, **arguments)


@pytest.fixture(scope="session")
def llm(checkpoint):
    return open_llm(checkpoint)
