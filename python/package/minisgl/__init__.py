"""LLM inference: a checkpoint and prompts go in, tokens come out as fast as the GPU's memory can be read.

>>> from minisgl import LLM, SamplingParams
>>> llm = LLM("Qwen/Qwen3-0.6B")
>>> outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
>>> outputs[0].outputs[0].text

Names and outputs are vLLM's, so that a script of its offline API changes its import and no more.
"""

from importlib.metadata import version as _version

from minisgl._minisgl import EngineError, RequestError
from minisgl.errors import Interrupted
from minisgl.llm import LLM
from minisgl.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
    ScoreOutput,
)
from minisgl.sampling_params import SamplingParams
from minisgl.stream import Stream

__version__ = _version("minisgl")

__all__ = [
    "LLM",
    "SamplingParams",
    "RequestOutput",
    "CompletionOutput",
    "Logprob",
    "ScoreOutput",
    "EmbeddingRequestOutput",
    "EmbeddingOutput",
    "Stream",
    "EngineError",
    "RequestError",
    "Interrupted",
]
