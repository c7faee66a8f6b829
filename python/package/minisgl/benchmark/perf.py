"""mini-sglang's `minisgl.benchmark.perf`: the time that a function of torch's takes on the GPU. It needs torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def perf_cuda(
    f: Callable[[], Any],
    *,
    init_stream: bool = True,
    repetitions: int = 10,
    cuda_graph_repetitions: int | None = 10,
) -> float:
    """Milliseconds that a call of `f` takes on the GPU, by its events.

    Args:
        f: enqueues work of torch's.
        init_stream: on a stream of its own.
        repetitions: so often it is timed, after one time that is not.
        cuda_graph_repetitions: calls recorded as one CUDA graph, which is what is timed then, so that launches cost
            nothing; None or 0: plain calls.
    """
    import torch

    if repetitions < 1:
        raise ValueError(f"repetitions is {repetitions}; it must be at least 1")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if init_stream else torch.cuda.current_stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        f()
        work, calls = f, 1
        if cuda_graph_repetitions:
            graph, calls = torch.cuda.CUDAGraph(), cuda_graph_repetitions
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    f()
            work = graph.replay
        work()
        begin.record(stream)
        for _ in range(repetitions):
            work()
        end.record(stream)
        end.synchronize()
    return begin.elapsed_time(end) / (repetitions * calls)
