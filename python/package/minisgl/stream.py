"""Outputs as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from minisgl import _minisgl
from minisgl.errors import refused
from minisgl.outputs import RequestOutput
from minisgl.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minisgl.llm import LLM


class Stream(Iterator[RequestOutput], AsyncIterator[RequestOutput]):
    """Outputs as they come; see `LLM.stream`. Read it by `for` or by `async for`, not both, on one thread and in one task."""

    def __init__(self, llm: LLM, prompts: Iterable[Any], sampling: Iterable[SamplingParams], tokens: bool, raises: bool):
        self._llm = llm
        self._raises = raises
        self._tokens = tokens
        self._closed = False
        self._waited_for = False
        #: Prompt and number of each request that has not ended, by its index.
        self._open: dict[int, tuple[Any, int]] = {}
        self._ready: deque[RequestOutput] = deque()
        requests = _noted(prompts, sampling, llm._numbers, self._open)
        self._run = llm._engine.start(requests, seed=llm._seed, tokens=tokens)

    def __iter__(self) -> Stream:
        return self

    def __aiter__(self) -> Stream:
        return self

    def __next__(self) -> RequestOutput:
        while not self._closed and not self._ready:
            events = self._run.take()
            if events is None:
                raise StopIteration
            self._hear(events)
        if self._closed:
            raise StopIteration
        return self._give()

    async def __anext__(self) -> RequestOutput:
        while not self._closed and not self._ready:
            events = self._run.poll()
            if events is None:
                raise StopAsyncIteration
            if events:
                self._hear(events)
            else:
                await self._wait()
        if self._closed:
            raise StopAsyncIteration
        return self._give()

    async def _wait(self) -> None:
        if self._waited_for:
            raise RuntimeError("another task waits for this stream already; read it in one task")
        self._waited_for = True
        try:
            await _readable(self._run.descriptor())
        finally:
            self._waited_for = False

    def abort(self, index: int) -> bool:
        """Ends a request where it is; its output comes as others do. False if it has ended. From any thread."""
        return self._run.abort(index)

    def close(self) -> None:
        """Aborts what has not ended; nothing more comes, and who waits for it is told the end. From any thread."""
        self._closed = True
        self._run.close()

    def _hear(self, events: list[Any]) -> None:
        assembler, ready = self._llm._assembler, self._ready
        for event in events:
            if isinstance(event, _minisgl.Token):
                ready.append(assembler.part(event, *self._open[event.index]))
                continue
            output = assembler.output(event, *self._open.pop(event[0].index))
            if self._tokens:
                # Their tokens were given one by one.
                for last, done in zip(output.outputs, event):
                    last.text, last.token_ids, last.logprobs = done.last_text, [], None
            ready.append(output)

    def _give(self) -> RequestOutput:
        output = self._ready.popleft()
        if output.error is not None and self._raises:
            self.close()
            raise refused(output)
        return output


def _noted(
    prompts: Iterable[Any], sampling: Iterable[SamplingParams], numbers: Iterator[int], into: dict[int, tuple[Any, int]]
) -> Iterator[tuple[Any, SamplingParams, int]]:
    """Requests, noted by their index as they are pulled. Holds no Stream, so that one which is dropped goes at once."""
    each = iter(sampling)
    for index, prompt in enumerate(prompts):
        params = next(each, None)
        if params is None:
            raise ValueError(f"prompt {index} has no sampling_params: give one for all prompts, or one for each")
        number = next(numbers)
        into[index] = prompt, number
        yield prompt, params, number


async def _readable(descriptor: int) -> None:
    """Waits for a file descriptor without holding up the event loop."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await readable
    finally:
        loop.remove_reader(descriptor)
