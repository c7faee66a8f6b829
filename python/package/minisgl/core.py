"""mini-sglang's `minisgl.core`: sampling with the defaults that its scripts count on."""

from __future__ import annotations

from typing import Any

from minisgl import sampling_params


class SamplingParams(sampling_params.SamplingParams):
    """As `minisgl.SamplingParams`, but greedy and up to 1024 tokens where nothing is said."""

    __slots__ = ()

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = -1,
        top_p: float = 1.0,
        ignore_eos: bool = False,
        max_tokens: int | None = 1024,
        **others: Any,
    ) -> None:
        super().__init__(
            temperature=temperature, top_k=top_k, top_p=top_p, ignore_eos=ignore_eos, max_tokens=max_tokens, **others
        )

    @property
    def is_greedy(self) -> bool:
        """Is the most probable token taken?"""
        return (self.temperature <= 0.0 or self.top_k == 1) and self.top_p == 1.0


__all__ = ["SamplingParams"]
