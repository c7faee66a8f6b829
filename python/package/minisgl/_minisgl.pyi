"""The Rust half: an engine, and runs of requests on it. `minisgl.LLM` is what to use."""

from collections.abc import Iterator, Sequence
from typing import Any

class EngineError(RuntimeError):
    """The model could not be opened, or the engine failed; out of `generate`, `outputs` has what had ended by then."""

    outputs: Sequence[Any]

class RequestError(ValueError):
    """A request can't run: out of `generate`, `index` says which, and `outputs` has what had ended by then."""

    index: int | None
    outputs: Sequence[Any]

class Chat:
    """A conversation for the chat template; lists and dicts come as JSON."""

    def __new__(
        cls,
        messages: str,
        *,
        tools: str | None,
        kwargs: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> Chat: ...

class Scored:
    """In the place of sampling: a completion that is given, and scored."""

    def __new__(cls, completion: Any, logprobs: int) -> Scored: ...

class Embedded:
    """In the place of sampling: the prompt is embedded."""

    def __new__(cls, dimensions: int | None) -> Embedded: ...

class Token:
    """Another token of a request."""

    index: int
    sample: int
    token_id: int
    text: str
    logprobs: tuple[float, list[tuple[int, float]]] | None

class Completion:
    """What came of one of a request's samples."""

    index: int
    sample: int
    last_text: str
    text: str | None
    token_ids: list[int]
    finish_reason: str
    stop_text: str | None
    prompt_token_ids: list[int] | None
    cached_tokens: int
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None
    prompt_logprobs: list[tuple[float, list[tuple[int, float]]]] | None
    embedding: list[float] | None
    warning: str | None
    error: str | None

class Run:
    """Requests on their way through an engine, read on one thread; `abort` and `close` may come from any."""

    def take(self) -> list[Token | list[Completion]] | None:
        """What has happened: waits for something, for a moment at most. None when all requests have ended.

        A request's end is a list of its samples.
        """

    def take_into(self, into: list[Any]) -> list[int] | None:
        """As `take`, for ends alone, which go to their places in `into`; gives the places."""

    def poll(self) -> list[Token | list[Completion]] | None:
        """What has happened so far, without waiting: when there may be more, `descriptor` becomes readable."""

    def descriptor(self) -> int:
        """A file descriptor that is readable when `poll` may have something to give."""

    def abort(self, index: int) -> bool:
        """Ends a request where it is; its completion comes as others do. False if it has ended."""

    def close(self) -> None:
        """Ends everything: nothing more is heard of what has not ended."""

class Engine:
    """A model on a device."""

    def __new__(cls, model: str, *, revision: str | None, options: dict[str, Any], quiet: bool) -> Engine: ...
    def start(self, requests: Iterator[tuple[Any, Any, int]], *, seed: int, tokens: bool) -> Run: ...
    def encode(self, given: Any) -> list[int]: ...
    def decode(self, given: Any) -> str | None: ...
    def token_bytes(self, id: int) -> bytes | None: ...
    def reset_prefix_cache(self) -> None: ...
    def update_weights(self, pairs: Iterator[tuple[str, Any]]) -> None: ...
    def update_weights_from(self, path: str) -> None: ...
    def recommended_sampling(self) -> dict[str, Any] | None: ...
    def info(self) -> dict[str, Any]: ...
    def stats(self) -> dict[str, int]: ...
    def close(self) -> None: ...
    def sleep(self, keep_updates: bool) -> None: ...
    def wake_up(self) -> None: ...
    def is_sleeping(self) -> bool: ...

def serve(program: str, words: list[str]) -> bool:
    """A service with OpenAI's API, until a signal ends it; `words` are the flags behind the name `program`."""

def chat(program: str, words: list[str]) -> bool:
    """A conversation in the terminal."""

def offline_bench(program: str, words: list[str]) -> bool:
    """The offline benchmark."""

def check_sampling(given: Any) -> None:
    """Checks the ranges of a `minisgl.SamplingParams`."""
