"""How far a call has come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Progress:
    """A bar like vLLM's: requests, and tokens a second in and out."""

    def __init__(self, wanted: bool | Callable[..., Any], requests: int) -> None:
        self._bar: Any = None
        if wanted:
            make: Callable[..., Any]
            if callable(wanted):
                make = wanted
            else:
                from tqdm.auto import tqdm

                make = tqdm
            speed = "est. speed input: 0.00 toks/s, output: 0.00 toks/s"
            self._bar = make(total=requests, desc="Processed prompts", dynamic_ncols=True, postfix=speed)
        self._tokens = [0, 0]

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, tokens_in: int, tokens_out: int) -> None:
        """Counts a request that has ended."""
        if self._bar is None:
            return
        self._tokens[0] += tokens_in
        self._tokens[1] += tokens_out
        seconds = self._bar.format_dict["elapsed"] or 1e-9
        speeds = [count / seconds for count in self._tokens]
        self._bar.postfix = f"est. speed input: {speeds[0]:.2f} toks/s, output: {speeds[1]:.2f} toks/s"
        self._bar.update()
