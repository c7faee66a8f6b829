"""Makes outputs out of what the engine gives.

    _minisgl.Completion, one for each sample  ──┐
    _minisgl.Token, one for each drawn        ──┴──>  RequestOutput, ScoreOutput, EmbeddingRequestOutput
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisgl import _minisgl
from minisgl.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
    ScoreOutput,
)
from minisgl.prompts import text_of

_FINISH_REASONS = {"eos": "stop"}


class Assembler:
    """Outputs of an engine's requests."""

    def __init__(self, engine: _minisgl.Engine) -> None:
        self._engine = engine
        self._token_texts: dict[int, str | None] = {}

    def output(self, samples: list[_minisgl.Completion], prompt: Any, number: int) -> RequestOutput:
        """A request's output out of what the engine gives for each of its samples."""
        first = samples[0]
        prompt_ids, prompt_logprobs = first.prompt_token_ids, first.prompt_logprobs
        return RequestOutput(
            request_id=str(number),
            prompt=text_of(prompt),
            prompt_token_ids=prompt_ids,
            prompt_logprobs=None
            if prompt_logprobs is None or not prompt_ids
            else [None, *self._logprobs(prompt_ids[1:], prompt_logprobs)],
            outputs=[self._sample(done) for done in samples],
            finished=True,
            num_cached_tokens=first.cached_tokens,
            index=first.index,
            error=next((done.error for done in samples if done.error is not None), None),
            warning=first.warning,
        )

    def part(self, token: _minisgl.Token, prompt: Any, number: int) -> RequestOutput:
        """A token of a request as an output of its own."""
        ids, logprobs = [token.token_id], token.logprobs
        output = CompletionOutput(
            index=token.sample,
            text=token.text,
            token_ids=ids,
            cumulative_logprob=None if logprobs is None else logprobs[0],
            logprobs=None if logprobs is None else self._logprobs(ids, [logprobs]),
        )
        return RequestOutput(
            request_id=str(number),
            prompt=text_of(prompt),
            prompt_token_ids=None,
            prompt_logprobs=None,
            outputs=[output],
            finished=False,
            index=token.index,
        )

    def score(self, samples: list[_minisgl.Completion], prompt: Any, number: int, top: int) -> ScoreOutput:
        """How probable a given completion is; `top` of the most probable tokens at each place were asked for."""
        (done,) = samples
        ids, given = done.prompt_token_ids or [], done.prompt_logprobs or []
        begin = len(ids) - len(given)
        return ScoreOutput(
            token_ids=ids[begin:],
            token_logprobs=[logprob for logprob, _ in given],
            cumulative_logprob=sum((logprob for logprob, _ in given), 0.0),
            logprobs=self._logprobs(ids[begin:], given) if top else None,
            prompt_token_ids=ids[:begin],
            num_cached_tokens=done.cached_tokens,
            index=done.index,
            error=done.error,
        )

    def embedding(self, samples: list[_minisgl.Completion], prompt: Any, number: int) -> EmbeddingRequestOutput:
        """A prompt's embedding."""
        (done,) = samples
        return EmbeddingRequestOutput(
            request_id=str(number),
            outputs=EmbeddingOutput(done.embedding or []),
            prompt_token_ids=done.prompt_token_ids or [],
            num_cached_tokens=done.cached_tokens,
            index=done.index,
            error=done.error,
        )

    def _sample(self, done: _minisgl.Completion) -> CompletionOutput:
        logprobs = done.logprobs
        token_ids = done.token_ids
        reason = done.finish_reason
        return CompletionOutput(
            index=done.sample,
            text=done.text or "",
            token_ids=token_ids,
            cumulative_logprob=None if logprobs is None else sum((logprob for logprob, _ in logprobs), 0.0),
            logprobs=None if logprobs is None else self._logprobs(token_ids, logprobs),
            finish_reason=_FINISH_REASONS.get(reason, reason),
            stop_reason=token_ids[-1] if reason == "stop" and done.stop_text is None else done.stop_text,
        )

    def _logprobs(
        self, token_ids: Sequence[int], given: list[tuple[float, list[tuple[int, float]]]]
    ) -> list[dict[int, Logprob]]:
        """Of each token, its own and the most probable ones' by id."""
        rows = []
        for token_id, (logprob, top) in zip(token_ids, given):
            row = {token_id: Logprob(logprob, None, self._token_text(token_id))}
            for rank, (other, logprob) in enumerate(top, 1):
                row[other] = Logprob(logprob, rank, self._token_text(other))
            rows.append(row)
        return rows

    def _token_text(self, token_id: int) -> str | None:
        known = self._token_texts
        if token_id not in known:
            text = self._engine.token_bytes(token_id)
            known[token_id] = None if text is None else text.decode("utf-8", "replace")
        return known[token_id]
