"""What an LLM takes of a GPU's memory, and gives back. A GPU that nobody else uses: MINISGL_TEST_BACKEND=cuda."""

import os
import subprocess

import pytest
from conftest import BACKEND

from minisgl import LLM, EngineError, SamplingParams

pytestmark = pytest.mark.skipif(BACKEND != "cuda", reason="needs a GPU")

QUIET = {"use_tqdm": False}
DRAWN = SamplingParams(temperature=0.9, seed=3, max_tokens=32, ignore_eos=True, logprobs=1)
#: Of what an LLM took this may stay, MiB: what the driver keeps for a process that has used the GPU.
KEPT = 64


def memory(what):
    """MiB of the GPU, by everybody: "used" or "total"."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--query-gpu=memory.{what}", "--format=csv,noheader,nounits", "-i", gpu]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def open_llm(**arguments):
    return LLM("qwen3-0.6b", backend="cuda", max_model_len=1024, quiet=True, **arguments)


def drawn(llm):
    outputs = llm.generate([[1, 2, 3], list(range(100, 300))], DRAWN, **QUIET)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


@pytest.fixture(scope="module", autouse=True)
def context():
    """What a process's first LLM brings to the GPU stays until the process ends; before the others it is there."""
    open_llm(num_gpu_blocks_override=100).close()


def test_a_model_that_sleeps_gives_its_memory_back_and_wakes_up_as_it_was():
    before = memory("used")
    llm = open_llm(gpu_memory_utilization=0.5)
    awake, expected = memory("used"), drawn(llm)
    assert awake - before > 0.45 * memory("total")
    for level in (1, 2):
        llm.sleep(level=level)
        asleep = memory("used")
        # Another one finds the room.
        with open_llm(gpu_memory_utilization=0.6) as other:
            assert drawn(other) == expected
        llm.wake_up()
        woken = memory("used")
        print(f"before {before}, awake {awake}, asleep {asleep}, woken {woken} MiB")
        assert asleep - before <= KEPT and abs(woken - awake) <= KEPT
        assert drawn(llm) == expected
    llm.close()
    closed = memory("used")
    print(f"closed {closed} MiB")
    assert closed - before <= KEPT


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_share_of_the_gpu_holds_weights_and_pages_and_two_models_live_beside_each_other(share):
    before, total = memory("used"), memory("total")
    page_mib = 28 * 2 * 8 * 128 * 2 * 16 / 2**20
    with open_llm(gpu_memory_utilization=share) as llm:
        info, taken = llm.info(), memory("used") - before
        pages = info["num_pages"] * page_mib
        print(f"{share} of {total} MiB: {pages:.0f} MiB of pages, {taken} MiB in all")
        assert info["page_size"] == 16 and pages < taken
        # Weights of 1.2 GB are in the share; buffers and recorded steps are not.
        assert share * total - 2048 < pages < share * total - 1024
        assert taken < share * total + 4096
        expected = drawn(llm)
        with open_llm(gpu_memory_utilization=0.2) as other:
            assert drawn(other) == expected == drawn(llm)
    assert memory("used") - before <= KEPT


def test_a_share_that_does_not_hold_the_weights_says_so():
    with pytest.raises(EngineError, match="pages of 16 tokens.*raise gpu_memory_utilization"):
        open_llm(gpu_memory_utilization=0.005)
