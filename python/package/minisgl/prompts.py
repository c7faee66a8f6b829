"""What requests go on from, as people give it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Protocol, Union

from minisgl import _minisgl


class Array(Protocol):
    """An array in the host's memory: numpy's, torch's, jax's, …"""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


#: A text, token ids (a list or an array of integers), or a dict with one of them as `prompt` or `prompt_token_ids`.
Prompt = Union[str, Sequence[int], Array, "dict[str, Any]"]
#: A message of a conversation.
Message = dict[str, Any]


def is_one(prompts: Any) -> bool:
    """Is it one prompt, not several?"""
    if isinstance(prompts, (str, bytes, bytearray, dict, _minisgl.Chat)):
        return True
    if getattr(prompts, "ndim", None) == 1:
        # numpy's arrays of texts or of objects have several; other libraries have none of those.
        return getattr(prompts.dtype, "kind", "i") not in "OSTU"
    return isinstance(prompts, (list, tuple)) and len(prompts) > 0 and isinstance(prompts[0], Integral)


def each(prompts: Any) -> Iterable[Any]:
    """One prompt or several, as several."""
    if is_one(prompts):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts are texts, lists of token ids or dicts, one or several, not a {type(prompts).__name__}")
    return prompts


def listed(prompts: Any) -> list[Any]:
    """Likewise, as a list."""
    prompts = each(prompts)
    return prompts if isinstance(prompts, list) else list(prompts)


def text_of(prompt: Any) -> str | None:
    """The prompt's text, where it was given as one."""
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt")
    return prompt if isinstance(prompt, str) else None
