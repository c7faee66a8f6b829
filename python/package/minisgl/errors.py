"""What ends a call early, and whether a request that can't run does."""

from __future__ import annotations

from typing import Any

from minisgl import _minisgl
from minisgl.outputs import EmbeddingRequestOutput, RequestOutput, ScoreOutput


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came while `generate` ran. `outputs` has what had ended, in the places of the prompts; None elsewhere."""

    def __init__(self, outputs: list[RequestOutput | None]) -> None:
        self.outputs = outputs
        ended = sum(output is not None for output in outputs)
        super().__init__(f"interrupted: {ended} of {len(outputs)} requests had ended, and are in the exception's `outputs`")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.outputs,)


def is_raised(errors: str) -> bool:
    """Does a request that can't run end the call?"""
    if errors not in ("raise", "keep"):
        raise ValueError(f'errors={errors!r} is neither "raise" nor "keep"')
    return errors == "raise"


def refused(output: RequestOutput | ScoreOutput | EmbeddingRequestOutput) -> _minisgl.RequestError:
    """What tells of a request that could not run."""
    error = _minisgl.RequestError(f"prompt {output.index}: {output.error}")
    error.index = output.index
    error.outputs = []
    return error
