"""What requests go on from, as people give it."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Union

from minisgl import _minisgl

#: A text, token ids (a list or a numpy array of integers), or a dict with one of them as `prompt` or `prompt_token_ids`.
Prompt = Union[str, Sequence[int], "dict[str, Any]"]
#: A message of a conversation.
Message = dict[str, Any]


def is_one(prompts: Any) -> bool:
    """Is it one prompt, not several?"""
    if isinstance(prompts, (str, dict, _minisgl.Chat)):
        return True
    if getattr(prompts, "ndim", None) == 1:
        return prompts.dtype.kind in "iu"
    return isinstance(prompts, (list, tuple)) and len(prompts) > 0 and isinstance(prompts[0], Integral)


def listed(prompts: Any) -> list[Any]:
    """One prompt or several, as a list."""
    if is_one(prompts):
        return [prompts]
    return prompts if isinstance(prompts, list) else list(prompts)


def text_of(prompt: Any) -> str | None:
    """The prompt's text, where it was given as one."""
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt")
    return prompt if isinstance(prompt, str) else None
