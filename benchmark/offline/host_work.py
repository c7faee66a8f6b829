"""What the host does for each of many short requests through LLM.generate: CPU time by thread, and memory.

    python benchmark/offline/host_work.py [REQUESTS] [MODEL]

100000 requests to the preset `tiny` on the CPU if nothing is given. The threads that compute (minisgl-cpu-N) are not the host's.
"""

import argparse
import resource
import time
from collections import Counter
from pathlib import Path

from minisgl import LLM, SamplingParams

TOKENS_IN, TOKENS_OUT = 6, 2


def cpu_seconds() -> Counter:
    """CPU time so far of this process's threads, by their names."""
    seconds: Counter = Counter()
    for task in Path("/proc/self/task").iterdir():
        seconds[(task / "comm").read_text().strip()] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return seconds


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", metavar="REQUESTS", nargs="?", type=int, default=100_000)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="tiny")
    arguments = parser.parse_args()
    requests = arguments.requests
    llm = LLM(arguments.model, backend="cpu", max_model_len=64, max_num_seqs=256)
    params = SamplingParams(temperature=0, max_tokens=TOKENS_OUT, ignore_eos=True)
    prompts = [[(i >> 8 * place) % 251 for place in range(TOKENS_IN)] for i in range(requests)]
    llm.generate(prompts[:1000], params, use_tqdm=False)  # Touches everything once.
    before, memory, start = cpu_seconds(), peak_mib(), time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, memory, spent = time.perf_counter() - start, peak_mib() - memory, cpu_seconds() - before
    assert all(len(output.outputs[0].token_ids) == TOKENS_OUT for output in outputs)
    host = {name: cpu for name, cpu in spent.items() if not name.startswith("minisgl-cpu-")}
    for name, cpu in sorted(host.items(), key=lambda item: -item[1]):
        print(f"{name:16} {cpu / requests * 1e6:6.1f} µs a request")
    print(f"host             {sum(host.values()) / requests * 1e6:6.1f} µs a request, of {seconds / requests * 1e6:.1f} µs in all")
    print(f"memory           {memory:6.1f} MiB more at its peak, {memory * 2**20 / requests:.0f} bytes a request")


if __name__ == "__main__":
    main()
