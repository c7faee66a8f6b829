"""What `generate`, `chat` and `stream` promise."""

import asyncio
import copy
import gc
import itertools
import json
import os
import pickle
import re
import signal
import threading
import time
import weakref

import numpy as np
import pytest
from conftest import BACKEND, FIXTURES, open_llm

import minisgl.core
from minisgl import LLM, EngineError, Interrupted, Logprob, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
QUIET = {"use_tqdm": False}


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def in_time(attempt):
    """Does what an engine must not be quicker than, until it was not: on a busy machine the test may be the one that waits."""
    assert any(attempt() for _ in range(10))


def test_greedy_tokens_are_those_of_transformers(llm):
    expected = json.loads((FIXTURES / "tiny-tied" / "expected.json").read_text())["examples"]
    outputs = llm.generate([example["prompt"] for example in expected], GREEDY, **QUIET)
    compared = 0
    for example, output in zip(expected, outputs):
        for token, greedy, margin in zip(output.outputs[0].token_ids, example["greedy"], example["top2_margin"]):
            if margin < (1e-3 if BACKEND == "cpu" else 0.3):  # What rounding to bf16 may turn.
                break
            assert token == greedy
            compared += 1
    assert compared > 20


def test_a_prompt_may_be_a_text_ids_an_array_or_a_dict(llm):
    text = "Once upon a time"
    ids = llm.encode(text)
    strided = np.zeros(2 * len(ids), dtype=np.int32)
    strided[::2] = ids
    frozen = np.array(ids, dtype=np.int64)
    frozen.flags.writeable = False
    forms = [
        text,
        ids,
        tuple(ids),
        np.array(ids, dtype=np.uint16),
        strided[::2],
        np.array(ids[::-1])[::-1],
        frozen,
        {"prompt": text},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": frozen, "prompt": "what the ids are of"},
    ]
    outputs = llm.generate(forms, GREEDY, **QUIET)
    assert all(output.prompt_token_ids == ids for output in outputs)
    assert len({tuple(ids) for ids in tokens(outputs)}) == 1
    assert outputs[0].prompt == text and outputs[1].prompt is None
    for one in (text, ids, list(np.array(ids)), frozen, {"prompt": text}):
        assert tokens(llm.generate(one, GREEDY, **QUIET)) == tokens(outputs[:1])
    table = np.array([ids, ids])
    assert tokens(llm.generate(table, GREEDY, **QUIET)) == tokens(outputs[:2])
    assert tokens(llm.generate(prompt_token_ids=[ids], sampling_params=GREEDY, **QUIET)) == tokens(outputs[:1])


class Tensor:
    """What is known of another library's tensor: DLPack, and a type that is none of numpy's."""

    dtype = object()

    def __init__(self, array):
        self.array, self.ndim = array, array.ndim

    def __iter__(self):
        return map(Tensor, self.array)

    def __dlpack__(self, **_):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("kind", ["int64", "int32", "uint8"])
def test_other_libraries_tensors_are_token_ids(llm, kind):
    ids = np.array([[5, 6, 7], [8, 9, 10]], dtype=kind)
    one, two = llm.generate(ids, GREEDY, **QUIET)
    assert llm.generate(Tensor(ids[0]), GREEDY, **QUIET)[0].outputs == one.outputs
    for several in (Tensor(ids), [Tensor(ids[0]), {"prompt_token_ids": Tensor(ids[1])}], Tensor(np.asfortranarray(ids))):
        assert tokens(llm.generate(several, GREEDY, **QUIET)) == tokens([one, two])
    assert llm.decode(Tensor(ids[0])) == llm.decode([5, 6, 7])
    for wrong, complaint in [(np.array([0.5]), "integers"), (np.array([-1]), "-1 is no token id")]:
        with pytest.raises(RequestError, match=complaint):
            llm.generate(Tensor(wrong), GREEDY, **QUIET)


def test_an_array_of_texts_has_a_prompt_in_each(llm):
    assert [output.prompt for output in llm.generate(np.array(["Once", "a"]), GREEDY, **QUIET)] == ["Once", "a"]


@pytest.mark.parametrize(
    "prompt, complaint",
    [
        (np.array([0.5]), "integers"),
        (b"Once", "bytes: decode it"),
        (bytearray(b"Once"), "bytearray: decode it"),
        (np.array([-1, 2]), "-1 is no token id"),
        (np.array([1 << 33]), "is no token id"),
        (np.array([[[1]]]), "one dimension"),
        ([1.5], "a prompt is a text"),
        ([-1], "a prompt is a text"),
        ({"prompt_ids": [1]}, "neither `prompt` nor"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "images"),
        (None, "a prompt is a text"),
    ],
)
def test_what_is_no_prompt_is_refused_with_what_is(llm, prompt, complaint):
    with pytest.raises(RequestError, match=complaint) as raised:
        llm.generate([[1, 2], prompt], GREEDY, **QUIET)
    assert raised.value.index == 1
    runs, refused = llm.generate([[1, 2], prompt], GREEDY, errors="keep", **QUIET)
    assert runs.error is None and len(runs.outputs[0].token_ids) == 24
    assert re.search(complaint, refused.error) and refused.outputs[0].finish_reason == "error"


def test_bytes_are_one_prompt_and_not_a_number_each(llm):
    with pytest.raises(RequestError, match="bytes: decode it"):
        llm.generate(b"Once", GREEDY, **QUIET)


def test_arguments_of_calls_that_can_not_hold_are_refused_by_name(llm):
    for wrong in (5, "greedy", {"n": 1}):
        for call in (llm.generate, llm.stream):
            with pytest.raises(TypeError, match="^sampling_params is one SamplingParams"):
                call([[1, 2]], wrong)
    for call in (llm.generate, llm.stream, llm.embed):
        with pytest.raises(TypeError, match="^prompts are texts.*not a int"):
            call(5)
    with pytest.raises(TypeError, match="prompts or prompt_token_ids"):
        llm.generate("Once", GREEDY, prompt_token_ids=[1, 2], **QUIET)
    with pytest.raises(ValueError, match="^logprobs is -1"):
        llm.score("Once", "a", logprobs=-1, **QUIET)
    with pytest.raises(ValueError, match="^dimensions is -1"):
        llm.embed("Once", dimensions=-1, **QUIET)
    with pytest.raises(TypeError, match="^dimensions is 1.5"):
        llm.embed("Once", dimensions=1.5, **QUIET)


def test_outputs_have_vllms_shape(llm):
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, ignore_eos=True)
    output = llm.generate(["Once"], params, **QUIET)[0]
    assert output.finished and output.request_id.isdecimal() and output.prompt == "Once"
    assert output.prompt_token_ids == llm.encode("Once") and output.prompt_logprobs is None
    one = output.outputs[0]
    assert (one.index, len(one.token_ids), one.finish_reason, one.stop_reason) == (0, 3, "length", None)
    assert one.finished() and one.text == llm.decode(one.token_ids)
    assert len(one.logprobs) == 3
    for token, row in zip(one.token_ids, one.logprobs):
        assert isinstance(row[token], Logprob) and row[token].rank == 1, "greedy takes the most probable"
        assert len(row) == 2 and row[token].logprob == max(other.logprob for other in row.values())
    assert one.cumulative_logprob == pytest.approx(sum(row[t].logprob for t, row in zip(one.token_ids, one.logprobs)))
    assert output["text"] == one.text and output["token_ids"] == one.token_ids
    assert pickle.loads(pickle.dumps(output)) == output


def test_each_prompt_may_have_its_own_sampling(llm):
    lengths = [1, 5, 2]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = llm.generate([[1, 2]] * 3, params, **QUIET)
    assert [len(ids) for ids in tokens(outputs)] == lengths
    for fewer in (params[:2], iter(params[:2])):
        with pytest.raises(ValueError, match="3 prompts and 2 sampling_params"):
            llm.generate([[1, 2]] * 3, fewer, **QUIET)


def test_a_prompt_may_have_several_samples(llm):
    params = SamplingParams(n=3, temperature=1, seed=4, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    prompts = ["Once upon a time", [5, 6, 7]]
    outputs = llm.generate(prompts, params, **QUIET)
    alone = llm.generate(prompts, SamplingParams(temperature=1, seed=4, max_tokens=8, ignore_eos=True), **QUIET)
    for output, one in zip(outputs, alone):
        assert [sample.index for sample in output.outputs] == [0, 1, 2]
        drawn = [tuple(sample.token_ids) for sample in output.outputs]
        assert len(set(drawn)) == 3 and list(drawn[0]) == one.outputs[0].token_ids, "the first is the one alone"
        assert all(len(sample.logprobs) == 8 and sample.finish_reason == "length" for sample in output.outputs)
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    again = llm.generate(prompts, params, **QUIET)
    assert [output.outputs for output in again] == [output.outputs for output in outputs]
    bars = []

    def bar(**options):
        from tqdm import tqdm

        bars.append(tqdm(**options, disable=False, file=open(os.devnull, "w")))
        return bars[0]

    llm.generate(prompts, params, use_tqdm=bar)
    assert bars[0].n == 2, "it counts requests"


def test_parts_of_a_stream_say_which_sample_they_are_of(llm):
    params = SamplingParams(n=2, temperature=1, seed=1, max_tokens=6, ignore_eos=True)
    whole = llm.generate(["Once", [9, 8]], params, **QUIET)
    ids = {(request, sample): [] for request in range(2) for sample in range(2)}
    texts = {key: "" for key in ids}
    ends = 0
    for part in llm.stream(["Once", [9, 8]], params):
        assert part.finished or len(part.outputs) == 1
        ends += part.finished
        for output in part.outputs:
            ids[part.index, output.index] += output.token_ids
            texts[part.index, output.index] += output.text
    assert ends == 2
    for (request, sample), drawn in ids.items():
        output = whole[request].outputs[sample]
        assert (drawn, texts[request, sample]) == (output.token_ids, output.text)


def test_samples_that_can_not_run_end_together_and_an_abort_ends_all(llm):
    params = SamplingParams(n=3, max_tokens=4)
    refused, runs = llm.generate([[10**6], [1, 2]], params, errors="keep", **QUIET)
    assert refused.error and len(refused.outputs) == 3 and len(runs.outputs) == 3
    with pytest.raises(RequestError, match="samples"):
        llm.generate([[1]], SamplingParams(n=100_000, max_tokens=1), **QUIET)
    stream = llm.stream([[1, 2]], SamplingParams(n=2, temperature=0, max_tokens=250, ignore_eos=True))
    next(stream)
    assert stream.abort(0)
    last = list(stream)[-1]
    assert last.finished and [output.finish_reason for output in last.outputs] == ["abort", "abort"]


def test_a_stop_text_ends_an_output_and_is_named(llm):
    whole = llm.generate(["Once"], GREEDY, **QUIET)[0].outputs[0].text
    stop = whole[3:5]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=["no such text", stop])
    one = llm.generate(["Once"], params, **QUIET)[0].outputs[0]
    assert (one.text, one.finish_reason, one.stop_reason) == (whole[: whole.index(stop)], "stop", stop)


def test_stop_tokens_end_an_output_and_least_lengths_and_biases_hold(llm):
    whole = llm.generate([[1, 2]], GREEDY, **QUIET)[0].outputs[0].token_ids
    last = whole[4]
    first = whole.index(last)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=[last])
    one = llm.generate([[1, 2]], params, **QUIET)[0].outputs[0]
    assert (one.token_ids, one.finish_reason, one.stop_reason) == (whole[: first + 1], "stop", last)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=[last], min_tokens=first + 2)
    longer = llm.generate([[1, 2]], params, **QUIET)[0].outputs[0].token_ids
    assert len(longer) >= first + 2 and longer[first] != last
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={"7": 100.0})
    assert llm.generate([[1, 2]], params, **QUIET)[0].outputs[0].token_ids == [7] * 6
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={7: 100.0}, frequency_penalty=2.0)
    assert llm.generate([[1, 2]], params, **QUIET)[0].outputs[0].token_ids == [7] * 6, "100 outweighs 12"
    params = SamplingParams(temperature=50, seed=1, max_tokens=40, ignore_eos=True, allowed_token_ids=[7, 9])
    assert set(llm.generate([[1, 2]], params, **QUIET)[0].outputs[0].token_ids) == {7, 9}
    for wrong in [[], [5, 10**6]]:
        with pytest.raises(RequestError, match="allowed_token_ids"):
            llm.generate([[1, 2]], SamplingParams(allowed_token_ids=wrong), **QUIET)
    with pytest.raises(RequestError, match="logit_bias"):
        llm.generate([[1, 2]], SamplingParams(logit_bias={10**6: 1.0}), **QUIET)


def test_repetition_is_penalized(llm):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, repetition_penalty=1e6)
    ids = llm.generate([[1, 2]], params, **QUIET)[0].outputs[0].token_ids
    assert len(set(ids)) == 40, "no token comes up twice"


def test_the_same_script_draws_the_same_and_a_second_call_something_else(checkpoint):
    params = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7]] * 4

    def script(seed):
        llm = open_llm(checkpoint, seed=seed)
        return tokens(llm.generate(prompts, params, **QUIET)), tokens(llm.generate(prompts, params, **QUIET))

    first, second = script(3)
    assert script(3) == (first, second)
    assert script(4) != (first, second)
    assert len({tuple(ids) for ids in first + second}) == 8, "equal prompts draw apart, in one call and the next"
    seeded = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True, seed=3)
    assert len({tuple(ids) for ids in tokens(open_llm(checkpoint).generate(prompts, seeded, **QUIET))}) == 1


def test_calls_that_overlap_share_no_request_id_and_no_seed(checkpoint):
    llm = open_llm(checkpoint)
    params = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7]] * 3
    first, second = llm.stream(prompts, params, tokens=False), llm.stream(prompts, params, tokens=False)
    outputs = [next(first), next(second), *llm.generate(prompts, params, **QUIET), *first, *second]
    assert len({output.request_id for output in outputs}) == 9
    assert len({tuple(ids) for ids in tokens(outputs)}) == 9


def test_a_conversation_is_rendered_by_the_checkpoints_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    output = llm.chat(messages, GREEDY, **QUIET)[0]
    template = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    plain = llm.generate([llm.encode(template)], GREEDY, **QUIET)[0]
    assert output.prompt_token_ids == plain.prompt_token_ids
    assert tokens([output]) == tokens([plain])
    many = llm.chat([messages, [*messages, {"role": "assistant", "content": "Ho"}]], GREEDY, **QUIET)
    assert len(many) == 2 and tokens(many[:1]) == tokens([output])
    going_on = llm.chat(
        [*messages, {"role": "assistant", "content": "Ho"}],
        GREEDY,
        add_generation_prompt=False,
        continue_final_message=True,
        **QUIET,
    )
    assert llm.decode(going_on[0].prompt_token_ids).endswith("Ho")
    with pytest.raises(ValueError, match="a message has no role"):
        llm.chat([{"content": "Hi"}], GREEDY, **QUIET)
    for given in (messages[0], iter([messages])):
        with pytest.raises(TypeError, match="a list of messages"):
            llm.chat(given, GREEDY, **QUIET)


def test_a_request_that_can_not_run_raises_or_is_kept_and_the_others_go_on(llm):
    prompts = [[1, 2], [], [10**6], list(range(3, 300)), [3]]
    outputs = llm.generate(prompts, GREEDY, errors="keep", **QUIET)
    assert [output.error is not None for output in outputs] == [False, True, True, True, False]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "error", "error", "length"]
    assert "max_model_len" in outputs[3].error and "--" not in outputs[3].error, "it names what Python has"
    with pytest.raises(RequestError, match="prompt 1: ") as raised:
        llm.generate([[1, 2], []], GREEDY, **QUIET)
    assert raised.value.index == 1
    assert len(raised.value.outputs) == 2


def test_tokens_stream_and_add_up_to_the_whole(llm):
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=9, ignore_eos=True, logprobs=1)
    prompts = ["Once", "upon a time"]
    whole = llm.generate(prompts, params, **QUIET)
    texts, ids, ends = ["", ""], [[], []], []
    for part in llm.stream(prompts, params):
        one = part.outputs[0]
        texts[part.index] += one.text
        ids[part.index] += one.token_ids
        assert len(one.logprobs or ()) == len(one.token_ids)
        if part.finished:
            ends.append((part.index, one.finish_reason))
    assert ids == tokens(whole) and texts == [output.outputs[0].text for output in whole]
    assert sorted(ends) == [(0, "length"), (1, "length")]


def test_a_stream_pulls_prompts_as_there_is_room_and_closing_it_aborts(llm):
    pulled = 0

    def endless():
        nonlocal pulled
        while True:
            pulled += 1
            yield [1, 2]

    stream = llm.stream(endless(), GREEDY, tokens=False)
    assert [next(stream).outputs[0].finish_reason for _ in range(20)] == ["length"] * 20
    assert pulled < 5000, "it was not pulled to its end"
    stream.close()
    assert list(stream) == []
    assert tokens(llm.generate([[1, 2]], GREEDY, **QUIET))[0], "the engine goes on"


def test_a_stream_that_is_dropped_goes_at_once(llm):
    stream = llm.stream(itertools.repeat([1, 2]), GREEDY)
    next(stream)
    dropped = weakref.ref(stream)
    del stream
    assert dropped() is None, "and with it what has not ended"


def test_an_iterator_that_fails_takes_nothing_with_it_that_it_gave(llm):
    def failing():
        yield [1, 2]
        yield [3, 4]
        raise KeyError("the file ends here")

    stream = llm.stream(failing(), GREEDY, tokens=False)
    assert sorted([next(stream).index, next(stream).index]) == [0, 1]
    with pytest.raises(KeyError, match="the file ends here"):
        next(stream)
    assert list(stream) == []


def test_other_threads_may_abort_and_close_what_one_reads(llm):
    stream = llm.stream(itertools.repeat([1, 2]), GREEDY, tokens=False)
    failures = []

    def meddle():
        try:
            for index in range(500):
                stream.abort(index)
            stream.close()
        except RuntimeError as error:
            failures.append(error)

    assert next(stream).finished
    thread = threading.Thread(target=meddle)
    thread.start()
    for _ in stream:
        if failures:
            break
    thread.join()
    assert failures == []
    assert not stream.abort(0)


def test_a_prompt_without_sampling_of_its_own_is_an_error_behind_those_before(llm):
    stream = llm.stream(([1, i] for i in itertools.count(1)), iter([GREEDY] * 3), tokens=False)
    with pytest.raises(ValueError, match="prompt 3 has no sampling_params"):
        ended = []
        for output in stream:
            ended.append(output.index)
    assert sorted(ended) == [0, 1, 2]
    # There may be more of them than prompts.
    assert len(list(llm.stream([[1, 2]] * 2, itertools.repeat(GREEDY), tokens=False))) == 2


def test_who_reads_a_stream_and_gives_its_prompts_is_collected(llm):
    class Driver:
        def __init__(self):
            self.stream = llm.stream(self.prompts(), GREEDY, tokens=False)

        def prompts(self):
            while self:
                yield [1, 2]

    driver = Driver()
    assert next(driver.stream).finished
    dropped = weakref.ref(driver)
    gc.collect()
    assert dropped() is driver and next(driver.stream).finished, "while it is held, it goes on"
    del driver
    gc.collect()
    assert dropped() is None


def test_reading_inside_of_the_iterator_is_refused(llm):
    def reading():
        yield [1, 2]
        yield next(stream).outputs[0].token_ids

    stream = llm.stream(reading(), GREEDY, tokens=False)
    with pytest.raises(RuntimeError, match="being read already"):
        list(stream)


def test_one_request_of_a_stream_can_be_aborted(llm):
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    def aborted():
        stream = llm.stream([[1, 2], [3, 4]], long)
        reasons = {}
        for part in stream:
            if part.index == 0 and not part.finished:
                stream.abort(0)
            if part.finished:
                reasons[part.index] = part.outputs[0].finish_reason
        assert reasons[1] == "length"
        return reasons[0] == "abort"

    in_time(aborted)


def test_streams_are_awaited_side_by_side_and_the_loop_goes_on(llm):
    # So many that it takes tens of milliseconds.
    params = SamplingParams(temperature=0, max_tokens=40 if BACKEND == "cpu" else 250, ignore_eos=True)
    expected = tokens(llm.generate([[i, i + 1] for i in range(1, 21)], params, **QUIET))

    async def one(i):
        ids = []
        async for part in llm.stream([i, i + 1], params):
            ids += part.outputs[0].token_ids
        return ids

    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        got = await asyncio.gather(*(one(i) for i in range(1, 21)))
        ticking.cancel()
        return got, ticks

    def ticked():
        got, ticks = asyncio.run(main())
        assert got == expected
        return ticks > 5

    in_time(ticked)


def test_a_stream_that_begins_on_another_thread_is_read_in_the_loop(llm):
    async def main():
        stream = await asyncio.to_thread(llm.stream, [[1, 2], [3, 4]], GREEDY, tokens=False)
        return sorted([output async for output in stream], key=lambda output: output.index)

    assert tokens(asyncio.run(main())) == tokens(llm.generate([[1, 2], [3, 4]], GREEDY, **QUIET))


def test_who_waits_for_a_stream_is_told_when_another_task_closes_it(llm):
    async def main():
        stream = llm.stream([[1, 2]], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))

        async def read():
            return [part async for part in stream]

        reading = asyncio.create_task(read())
        await asyncio.sleep(0)  # It waits now.
        stream.close()
        return await asyncio.wait_for(reading, 60)

    # Tokens may have come by then, but not the end.
    in_time(lambda: not any(part.finished for part in asyncio.run(main())))


def test_a_callback_hears_of_each_output_as_it_ends(llm):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (60, 1)]
    heard = []
    outputs = llm.generate([[1, 2], [3, 4]], params, on_output=heard.append, **QUIET)
    assert [output.index for output in heard] == [1, 0]
    assert sorted(heard, key=lambda output: output.index) == outputs


def test_the_interpreter_is_free_while_the_engine_works(llm):
    def counted():
        count, done = 0, threading.Event()

        def counting():
            nonlocal count
            end = time.monotonic() + 30
            while not done.is_set() and time.monotonic() < end:
                count += 1
                time.sleep(0.001)

        thread = threading.Thread(target=counting)
        thread.start()
        llm.generate([[1, 2]] * 4, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True), **QUIET)
        done.set()
        thread.join()
        return count > 5

    in_time(counted)


def test_a_bar_counts_the_requests(llm):
    class Bar:
        def __init__(self, total, **_):
            self.total, self.count, self.closed = total, 0, False
            self.format_dict = {"elapsed": 1.0}
            bars.append(self)

        def update(self):
            self.count += 1

        def close(self):
            self.closed = True

    bars = []
    llm.generate([[1, 2]] * 3, GREEDY, use_tqdm=Bar)
    assert [(bar.total, bar.count, bar.closed) for bar in bars] == [(3, 3, True)]
    assert "output: 72.00 toks/s" in bars[0].postfix


def test_two_models_live_in_one_process(checkpoint, llm):
    other = open_llm(str(FIXTURES / "qwen2-bias"))
    ours, theirs = llm.stream([[1, 2]], GREEDY), other.stream([[1, 2]], GREEDY)
    a, b = [part.outputs[0].token_ids for part in ours], [part.outputs[0].token_ids for part in theirs]
    assert sum(a, []) == tokens(llm.generate([[1, 2]], GREEDY, **QUIET))[0]
    assert sum(b, []) == tokens(other.generate([[1, 2]], GREEDY, **QUIET))[0] != sum(a, [])


def test_a_closed_model_says_so(checkpoint):
    with open_llm(checkpoint) as llm:
        stream = llm.stream([[1, 2]], SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([[1, 2]], GREEDY, **QUIET)


def test_what_ended_before_a_model_is_closed_is_kept_with_its_log_probabilities(checkpoint):
    llm = open_llm(checkpoint)
    long = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
    short = SamplingParams(temperature=0, max_tokens=1, logprobs=3)
    # Closed when the first is heard of, and the others have ended too: their tokens' texts are asked for behind that.
    with pytest.raises(EngineError, match="closed") as raised:
        llm.generate([[1, 2], [3, 4], [5, 6], [7, 8]], [short, short, short, long], on_output=lambda _: llm.close(), **QUIET)
    ended = [output for output in raised.value.outputs if output is not None]
    assert len(ended) == 3 and all(len(output.outputs[0].logprobs[0]) >= 3 for output in ended)
    assert llm.decode(llm.encode("Once")) == "Once", "a tokenizer needs no engine"


def test_errors_that_come_from_elsewhere_have_no_outputs(tmp_path):
    with pytest.raises(RequestError, match="tokenizer") as refused:
        open_llm(str(FIXTURES / "qwen2-bias")).encode("Once")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineError, match="config.json") as failed:
        open_llm(str(tmp_path))
    assert refused.value.index is None and not refused.value.outputs and not failed.value.outputs


def test_a_model_is_pickled_as_what_it_was_built_with(checkpoint):
    llm = open_llm(checkpoint, seed=9)
    copied = pickle.loads(pickle.dumps(llm))
    assert copied.arguments == llm.arguments and copied.arguments["seed"] == 9
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    assert tokens(copied.generate([[1]], params, **QUIET)) == tokens(llm.generate([[1]], params, **QUIET))
    assert isinstance(LLM(**llm.arguments), LLM)


def test_tokens_that_are_given_get_the_bits_of_those_that_were_drawn(llm):
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=12, ignore_eos=True, logprobs=2)
    prompts = ["Once upon a time", [5, 6, 7]]
    drawn = llm.generate(prompts, params, **QUIET)
    scores = llm.score(prompts, tokens(drawn), logprobs=2, **QUIET)
    for output, score in zip(drawn, scores):
        one = output.outputs[0]
        assert score.token_ids == one.token_ids and score.prompt_token_ids == output.prompt_token_ids
        assert score.token_logprobs == [row[token].logprob for token, row in zip(one.token_ids, one.logprobs)]
        assert score.logprobs == one.logprobs and score.cumulative_logprob == one.cumulative_logprob
    pair = [{"prompt": "Once"}], [{"prompt": " upon"}]
    assert llm.score(*pair, **QUIET)[0].token_logprobs == llm.score(["Once"], [" upon"], **QUIET)[0].token_logprobs
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        llm.score(prompts, ["a"], **QUIET)
    with pytest.raises(RequestError):
        llm.score([[1]], [[10**6]], **QUIET)


def test_a_prompts_own_log_probabilities_come_with_it(llm):
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, ignore_eos=True)
    output = llm.generate([[5, 6, 7, 8]], params, **QUIET)[0]
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == 4
    score = llm.score([[5]], [[6, 7, 8]], **QUIET)[0]
    found = [row[token].logprob for token, row in zip([6, 7, 8], output.prompt_logprobs[1:])]
    assert found == score.token_logprobs


def test_prompts_are_embedded_as_they_are_alone_and_the_beginning_of_an_embedding_is_one(llm):
    prompts = ["Once upon a time", {"prompt_token_ids": [5, 6, 7]}, np.array([5, 6, 7], dtype=np.int64)]
    outputs = llm.embed(prompts, **QUIET)
    assert [output.index for output in outputs] == [0, 1, 2] and all(output.finished for output in outputs)
    first, *same = [output.outputs.embedding for output in outputs]
    assert same[0] == same[1] != first and len(first) == outputs[0].outputs.hidden_size == 128
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
    assert outputs[0].prompt_token_ids == llm.encode("Once upon a time")
    [alone] = llm.embed("Once upon a time", **QUIET)
    assert alone.outputs.embedding == first
    [cut] = llm.embed("Once upon a time", dimensions=3, **QUIET)
    length = sum(value * value for value in first[:3]) ** 0.5
    assert cut.outputs.embedding == pytest.approx([value / length for value in first[:3]], rel=1e-5)
    with pytest.raises(RequestError, match="dimensions is 129"):
        llm.embed(prompts, dimensions=129, **QUIET)
    refused, kept = llm.embed([[10**6], [5]], errors="keep", **QUIET)
    assert refused.error and refused.outputs.embedding == [] and kept.error is None


def test_a_model_sleeps_and_wakes_up_as_it_was(checkpoint):
    llm = open_llm(checkpoint)
    params = SamplingParams(temperature=1, seed=2, max_tokens=12, ignore_eos=True)
    before = tokens(llm.generate([[1, 2]], params, **QUIET))
    llm.sleep()
    assert llm.is_sleeping()
    with pytest.raises(RuntimeError, match="wake_up"):
        llm.generate([[1, 2]], params, **QUIET)
    llm.sleep(level=2)
    with pytest.raises(ValueError, match="tags has 'weight'"):
        llm.wake_up(tags=["weight"])
    llm.wake_up(tags=["weights"])
    llm.wake_up(tags="kv_cache")
    assert not llm.is_sleeping()
    assert tokens(llm.generate([[1, 2]], params, **QUIET)) == before
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.wake_up()


def test_cached_prefixes_are_counted_and_can_be_forgotten(checkpoint):
    llm = open_llm(checkpoint)
    prompt = [list(range(3, 103))]
    cached = lambda: llm.generate(prompt, GREEDY, **QUIET)[0].num_cached_tokens  # noqa: E731
    assert cached() == 0
    assert cached() >= 64
    assert llm.reset_prefix_cache()
    assert cached() == 0


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal's program has it: a shell's background jobs are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_keeps_what_has_ended(checkpoint, interruptible):
    llm = open_llm(checkpoint)
    long = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
    params = [SamplingParams(temperature=0, max_tokens=1), *[long] * 2000]
    # A moment after the first has ended, when all wait for the engine.
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted) as raised:
        llm.generate([[1, 2]] * len(params), params, on_output=lambda output: output.index or timer.start(), **QUIET)
    outputs = raised.value.outputs
    assert len(outputs) == len(params) and outputs[-1] is None
    assert outputs[0].finished and "requests had ended" in str(raised.value)
    assert isinstance(raised.value, KeyboardInterrupt)
    assert len(tokens(llm.generate([[1, 2]], GREEDY, **QUIET))[0]) == 24, "it can be used again"


@pytest.fixture
def interrupted(interruptible, tmp_path):
    """Calls what reads a file that does not come to its end, and Ctrl-C once it reads; `interrupted.end()` ends the file, empty."""
    fifo = tmp_path / "endless.safetensors"
    os.mkfifo(fifo)
    writer = []

    def interrupt():
        while not writer:
            try:
                writer.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # Nobody reads it yet.
                time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    def end():
        os.close(writer.pop())

    def interrupted(call):
        give_up = threading.Timer(60, end)
        give_up.start()
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt).start()
            call(fifo)
        give_up.cancel()
        assert writer, "it waited for the file's end"

    interrupted.end = end
    return interrupted


def test_an_interrupt_does_not_wait_for_a_model_that_is_opened(interrupted, tmp_path):
    def open_it(fifo):
        os.link(fifo, tmp_path / "config.json")
        open_llm(str(tmp_path))

    interrupted(open_it)
    interrupted.end()


def test_an_interrupt_does_not_wait_for_an_update_and_neither_do_calls_behind_it(interrupted, checkpoint):
    llm = open_llm(checkpoint)
    before = tokens(llm.generate([[1, 2]], GREEDY, **QUIET))
    interrupted(llm.update_weights)
    interrupted(lambda _: llm.generate([[1, 2]], GREEDY, **QUIET))
    assert llm.decode(llm.encode("Once")) == "Once"
    # It goes on behind that, and here comes to nothing.
    interrupted.end()
    assert tokens(llm.generate([[1, 2]], GREEDY, **QUIET)) == before


def test_every_call_of_a_forked_process_is_refused(llm):
    calls = [
        lambda: llm.stream([[1]]),
        lambda: llm.update_weights({}),
        llm.info,
        llm.stats,
        llm.reset_prefix_cache,
        lambda: llm.encode("Once"),
        lambda: llm.decode([1]),
        llm.is_sleeping,
        llm.sleep,
        llm.wake_up,
        llm.close,
    ]
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # A call that waits for ever ends it.
        refused = 0
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused += "spawn" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(calls)


def test_a_forked_process_is_refused_and_ends(checkpoint):
    llm = open_llm(checkpoint)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            dropped = weakref.ref(llm)
            try:
                llm.generate([[1, 2]], GREEDY, **QUIET)
            except RuntimeError as error:
                os.write(write, str(error).encode())
            # What belongs to the parent is dropped here, and nothing waits for threads that are not there.
            del llm
            gc.collect()
            os.write(write, b" DROPPED" if dropped() is None else b" KEPT")
        finally:
            os._exit(0)
    os.close(write)
    said = b""
    while part := os.read(read, 4096):
        said += part
    assert os.waitpid(child, 0)[1] == 0
    assert b"spawn" in said and said.endswith(b" DROPPED")


@pytest.mark.parametrize("kind", [SamplingParams, minisgl.core.SamplingParams])
def test_sampling_is_copied_compared_and_shown(kind):
    params = kind(temperature=0.5, max_tokens=7, stop=["a"], seed=4)
    for copied in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), params.clone()):
        assert type(copied) is kind and copied == params
        assert (copied.temperature, copied.max_tokens, copied.stop, copied.seed) == (0.5, 7, ["a"], 4)
    assert params != kind(temperature=0.5, max_tokens=8, stop=["a"], seed=4)
    assert "temperature=0.5" in repr(params) and "max_tokens=7" in repr(params)
