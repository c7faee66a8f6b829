"""`python -m minisgl`, `python -m minisgl.bench`, and the scripts of examples/ and benchmark/, as a user starts them."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from conftest import BACKEND, FIXTURES

from minisgl.benchmark.perf import perf_cuda
from minisgl.program import translate

ROOT = FIXTURES.parents[1]


def run(*words, **options):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=FIXTURES, **options)


@pytest.mark.parametrize(
    "given, ours",
    [
        ("--model-path M --tp-size 2 --port 5", "--model M --tensor-parallel 2 --port 5"),
        ("--model=M --max-running-requests=8 --graph 4", "--model M --max-running 8 --max-graph-batch 4"),
        ("--model M --max-seq-len-override 9 --max-prefill-length 8", "--model M --max-seq-len 9 --max-prefill-tokens 8"),
        ("--model M --cache-type naive --num-tokenizer 2 --disable-pynccl", "--model M --no-prefix-cache"),
        ("--model Qwen/Qwen3-0.6B --dummy-weight --attn auto", "--model qwen3-0.6b"),
        ("--model M --memory-ratio 0.5 --num-pages 7 --page-size 16", "--model M --memory-ratio 0.5 --num-pages 7 --page-size 16"),
    ],
)
def test_mini_sglangs_flags_are_ours(given, ours):
    assert translate(given.split()) == (ours.split(), False)


def test_a_flag_that_asks_for_what_is_not_served_is_refused_by_name():
    for given in ("--ep-size 2", "--dtype float16", "--attn fa", "--model-source modelscope", "--cache-type lru"):
        with pytest.raises(ValueError, match=given):
            translate(["--model", "M", *given.split()])
    refused = run("-m", "minisgl", "--model", "M", "--ep-size", "2")
    assert refused.returncode == 1 and "one GPU" in refused.stderr
    unknown = run("-m", "minisgl", "--model", "M", "--no-such-flag")
    assert unknown.returncode == 1 and "--no-such-flag" in unknown.stderr
    assert "--max-running" in run("-m", "minisgl", "--help").stdout


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_it_serves_until_a_signal_ends_it(checkpoint, name):
    words = ["-m", "minisgl", "--model-path", checkpoint, "--backend", "cpu", "--port", "0", "--max-seq-len-override", "256"]
    served = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True, cwd=FIXTURES)
    try:
        address = None
        while address is None:
            line = served.stderr.readline()
            assert line, "it ended before it was ready"
            address = re.search(r"ready at (http://[\d.]+:\d+)", line)
        body = {"prompt": "Once", "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"{address[1]}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert len(json.load(answer)["choices"][0]["token_ids"]) == 4
        served.send_signal(getattr(signal, name))
        assert served.wait(60) == 0
        assert "all requests have ended" in served.stderr.read()
    finally:
        served.kill()
        served.wait()
        served.stderr.close()


def test_a_shell_answers_what_is_said(checkpoint):
    words = ["-m", "minisgl", "--model", checkpoint, "--shell", "--backend", "cpu", "--max-seq-len", "256", "--max-tokens", "8"]
    said = run(*words, "--temperature", "0", input="Hi\n/quit\n")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


def test_the_benchmark_prints_mini_sglangs_line():
    words = ["--model", "tiny", "--backend", "cpu", "--n", "4", "--input-len", "8", "--output-len", "4..9"]
    measured = run("-m", "minisgl.bench", *words)
    assert measured.returncode == 0, measured.stderr
    assert re.search(r"^Total: \d+tok, Time: [\d.]+s, Throughput: [\d.]+tok/s$", measured.stdout, re.MULTILINE)
    assert "minisgl" in measured.stdout, "it draws mini-sglang's requests"


@pytest.mark.skipif(BACKEND != "cuda", reason="needs a GPU: it takes minutes without")
def test_mini_sglangs_script_measures_the_same_tokens_with_overlap_and_without():
    script = ROOT / "benchmark" / "offline" / "bench.py"
    for overlap in ("0", "1"):
        measured = run(script, "qwen3-0.6b", env={**os.environ, "MINISGL_DISABLE_OVERLAP_SCHEDULING": overlap})
        assert measured.returncode == 0, measured.stderr
        print(measured.stdout)
        assert re.fullmatch(r"Total: 133966tok, Time: [\d.]+s, Throughput: [\d.]+tok/s\n", measured.stdout)


@pytest.mark.skipif(BACKEND != "cuda", reason="needs a GPU")
def test_a_function_of_torchs_takes_its_time_recorded_or_not_on_either_stream():
    torch = pytest.importorskip("torch")
    cycles = 2_000_000
    once = perf_cuda(lambda: torch.cuda._sleep(cycles))
    assert 0.5 < once < 4, "milliseconds at any GPU's clock"
    for options in ({}, {"init_stream": False, "cuda_graph_repetitions": None}, {"cuda_graph_repetitions": 3, "repetitions": 2}):
        assert perf_cuda(lambda: torch.cuda._sleep(2 * cycles), **options) == pytest.approx(2 * once, rel=0.2)
    with pytest.raises(ValueError, match="repetitions is 0"):
        perf_cuda(lambda: None, repetitions=0)


def test_the_first_example_runs(checkpoint):
    said = run(ROOT / "examples" / "offline.py", checkpoint, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("Prompt:") == 4 and "Processed prompts: 100%" in said.stderr
