"""How a request's tokens are drawn."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

from minisgl._minisgl import check_sampling

#: Fields of vLLM's that change no output of ours, whatever they hold.
_IGNORED = frozenset({"detokenize", "output_kind", "skip_clone", "spaces_between_special_tokens", "stream_interval"})

#: Fields of vLLM's that are not served, and the values at which they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "length_penalty": (None, 1),
    "early_stopping": (None, False),
    "use_beam_search": (None, False),
    "skip_special_tokens": (None, True),
    "logits_processors": (None, []),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
    "truncate_prompt_tokens": (None,),
    "extra_args": (None, {}),
    "logprob_token_ids": (None,),
    "flat_logprobs": (None, False),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
}


class SamplingParams:
    """How a request's tokens are drawn, with vLLM's names and defaults.

    A field of vLLM's that is not served may stand at the value that asks for nothing; at another it is refused by name.

    Args:
        n: outputs, each a sample of its own: the i-th draws with a seed made of the request's and i, the first with the
            request's itself. The prompt is computed once, and its KV pages are held once.
        temperature: 0, or anything below 0.00001, takes the most probable token; higher is flatter.
        top_p: draw among the most probable tokens that hold this mass, in (0, 1].
        top_k: draw among the k most probable tokens; 0 and -1: all.
        min_p: draw among tokens at least this many times as probable as the most probable one, in [0, 1].
        seed: the same seed draws the same tokens, whatever runs beside the request; None: the LLM's own seed plus the
            number of requests that it had before.
        max_tokens: output tokens at most; None: as many as a sequence holds.
        stop: a text or texts that end the output, which is cut before the first one found.
        ignore_eos: go on past end-of-sequence tokens.
        logprobs: give the log-probabilities of each token drawn and of the k most probable ones, k <= 20.
        prompt_logprobs: likewise of the prompt's tokens.
        repetition_penalty: above 1, tokens that the prompt or the output has are less probable; above 0.
        presence_penalty: taken off the logits of tokens that the output has, in [-2, 2].
        frequency_penalty: taken off for each time that the output has the token, in [-2, 2].
        min_tokens: output tokens at least; what would end it is not drawn before.
        stop_token_ids: tokens that end the output, as its last one; their text is not part of it.
        include_stop_str_in_output: let the text end with the stop text or the stop token's text.
        logit_bias: what is added to the logits of tokens, by id, in [-100, 100]; 1024 tokens at most.
        bad_words: a text or texts that the output may not have.
        allowed_token_ids: the only tokens that may be drawn, one at least; None: all. An output ends by an
            end-of-sequence token only where it is among them.
    """

    def __init__(
        self,
        *,
        n: int | None = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        max_tokens: int | None = 16,
        stop: str | Iterable[str] | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        repetition_penalty: float | None = 1.0,
        presence_penalty: float | None = 0.0,
        frequency_penalty: float | None = 0.0,
        min_tokens: int | None = 0,
        stop_token_ids: Iterable[int] | None = None,
        include_stop_str_in_output: bool | None = False,
        logit_bias: Mapping[int, float] | Mapping[str, float] | None = None,
        bad_words: str | Iterable[str] | None = None,
        allowed_token_ids: Iterable[int] | None = None,
        **others: Any,
    ) -> None:
        self.n = 1 if n is None else n
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.seed = None if seed == -1 else seed
        self.max_tokens = max_tokens
        self.stop: list[str] = _several("stop", stop)
        self.ignore_eos = ignore_eos
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.repetition_penalty = 1.0 if repetition_penalty is None else repetition_penalty
        self.presence_penalty = presence_penalty or 0.0
        self.frequency_penalty = frequency_penalty or 0.0
        self.min_tokens = min_tokens or 0
        self.stop_token_ids: list[int] = _several("stop_token_ids", stop_token_ids)
        self.include_stop_str_in_output = False if include_stop_str_in_output is None else include_stop_str_in_output
        self.logit_bias = _biases(logit_bias)
        self.bad_words: list[str] = _several("bad_words", bad_words)
        self.allowed_token_ids: list[int] | None = None
        if allowed_token_ids is not None:
            self.allowed_token_ids = _several("allowed_token_ids", allowed_token_ids)
        for name, value in others.items():
            self._refuse(name, value)
        check_sampling(self)

    __slots__ = tuple(inspect.signature(__init__).parameters)[1:-1]

    def _refuse(self, name: str, value: Any) -> None:
        """Refuses a field that is not served, unless it asks for nothing."""
        if name in _IGNORED:
            return
        if name not in _NEUTRAL:
            near = difflib.get_close_matches(name, [*FIELDS, *_NEUTRAL], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"SamplingParams has no field {name}{hint}")
        if not any(value == neutral and type(value) is not str for neutral in _NEUTRAL[name]):
            neutral = _NEUTRAL[name][-1]
            raise ValueError(f"{name}={value!r} is not served by minisgl: leave it out, or at {neutral!r}")

    def clone(self) -> SamplingParams:
        """A copy."""
        return type(self)(**{name: getattr(self, name) for name in FIELDS})

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), {name: getattr(self, name) for name in FIELDS})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SamplingParams):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in FIELDS)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in FIELDS)
        return f"SamplingParams({fields})"


#: What there is to be set.
FIELDS: tuple[str, ...] = SamplingParams.__slots__


def _several(name: str, given: Any) -> list[Any]:
    """What there is in an iterable; a text is one thing, and None nothing."""
    if given is None:
        return []
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable):
        raise TypeError(f"{name} is {given!r}, which is not a list")
    return list(given)


def _biases(given: Any) -> dict[int, float]:
    """By token; keys that come out of JSON are texts."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"logit_bias is {given!r}, which is not a dict")
    try:
        return {int(token) if isinstance(token, str) else index(token): bias for token, bias in given.items()}
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias is {given!r}; its keys are token ids") from None


def _rebuild(kind: type[SamplingParams], fields: dict[str, Any]) -> SamplingParams:
    return kind(**fields)
