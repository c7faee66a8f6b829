"""What comes of requests, shaped as vLLM's outputs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Logprob:
    """A token's log-probability: natural logarithm, before temperature and filters."""

    logprob: float
    #: 1 for the most probable token; None where it is beyond those that were asked for.
    rank: int | None = None
    #: The token's text; U+FFFD stands for bytes that are no whole character.
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One output of a request."""

    #: Its place among the request's outputs.
    index: int
    #: Special tokens left out; empty for a checkpoint without a tokenizer.
    text: str
    #: An end-of-sequence token included.
    token_ids: list[int]
    #: The sum of its tokens' log-probabilities, where they were asked for.
    cumulative_logprob: float | None = None
    #: Of each token: by token id, the drawn token's and the most probable ones'.
    logprobs: list[dict[int, Logprob]] | None = None
    #: "stop" (an end-of-sequence token, or a stop text), "length" (`max_tokens`, or all that a sequence holds), "abort",
    #: "error" (see `RequestOutput.error`); None while it goes on.
    finish_reason: str | None = None
    #: The stop text or the stop token's id that ended it; None behind an end-of-sequence token.
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Has it ended?"""
        return self.finish_reason is not None


@dataclass(slots=True)
class ScoreOutput:
    """How probable a given completion is."""

    #: The completion's.
    token_ids: list[int]
    #: Of each of its tokens: natural logarithms, before temperature and filters.
    token_logprobs: list[float]
    #: Their sum.
    cumulative_logprob: float
    #: Of each of its tokens the most probable ones' by id, its own among them, where asked for.
    logprobs: list[dict[int, Logprob]] | None
    prompt_token_ids: Sequence[int]
    #: How many of the prompt's tokens the prefix cache held.
    num_cached_tokens: int
    #: Its place among the prompts.
    index: int
    #: Why there is no score, where errors are kept.
    error: str | None = None


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt's embedding."""

    #: Of length 1, unless the checkpoint's files leave that out.
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many values it has."""
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What came of a prompt that was to be embedded."""

    #: A number that no other request of its LLM has.
    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: Sequence[int]
    #: How many of the prompt's tokens the prefix cache held.
    num_cached_tokens: int
    #: Its place among the prompts.
    index: int
    finished: bool = True
    #: Why there is no embedding, where errors are kept.
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """What came of a request."""

    #: A number that no other request of its LLM has.
    request_id: str
    #: The prompt, where it was given as a text.
    prompt: str | None
    #: The prompt's token ids.
    prompt_token_ids: Sequence[int] | None
    #: Of each of its tokens, where asked for: as `CompletionOutput.logprobs`, and None for the first.
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    #: One for each of the samples that `SamplingParams.n` asks for, in their order.
    outputs: list[CompletionOutput]
    #: False for a part of an output, as a stream gives it.
    finished: bool
    #: How many of the prompt's tokens the prefix cache held.
    num_cached_tokens: int | None = None
    #: The request's place among the prompts of its call.
    index: int = 0
    #: Why it could not run or go on, where errors are kept.
    error: str | None = None
    #: What you should know though it ran: that `max_tokens` was more than a sequence holds.
    warning: str | None = None
    metrics: Any = field(default=None, repr=False)
    lora_request: Any = field(default=None, repr=False)

    def __getitem__(self, name: str) -> Any:
        """`output["text"]` and `output["token_ids"]` of the first output, as mini-sglang gives them."""
        if name not in ("text", "token_ids"):
            raise KeyError(name)
        return getattr(self.outputs[0], name)
