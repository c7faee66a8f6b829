"""Drives a service as a user of the `openai` package does, with both of its clients: drive.py KEYED_URL TOOLS_URL TOLD_URL

At KEYED_URL a small model answers, which asks for the key "secret"; at TOOLS_URL a simulated one calls a tool whatever it
is asked; at TOLD_URL a small model calls the tools that it is told to. Whatever comes back must be of the package's own
types, strictly, with no field unknown to them.
"""

import asyncio
import inspect
import sys
from array import array
from pathlib import Path
from typing import Annotated, Literal

import openai
import pydantic
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "openai"))
from strict import all_fields_are_known, check_token  # noqa: E402

keyed_url, tools_url, told_url = (url + "/v1" for url in sys.argv[1:])
MODEL = "model"


class Weather(pydantic.BaseModel):
    city: Literal["Bonn", "Köln"]
    days: Annotated[int, pydantic.Field(ge=1, le=9)]


class Clock(pydantic.BaseModel):
    summer: bool


class Both:
    """Asks by both clients, which must get the same."""

    def __init__(self, url, key):
        self.sync = openai.OpenAI(api_key=key, base_url=url, max_retries=0)
        self.asynchronous = openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0)

    def chat(self, **asked):
        return self._ask(lambda client: client.chat.completions, ChatCompletion, ChatCompletionChunk, asked)

    def text(self, **asked):
        return self._ask(lambda client: client.completions, Completion, Completion, asked)

    def embeddings(self, **asked):
        """By either client, as numbers and as the package's own way asks for them, which is base64."""

        async def ask(**given):
            async with openai.AsyncOpenAI(
                api_key=self.asynchronous.api_key, base_url=self.asynchronous.base_url, max_retries=0
            ) as client:
                return await client.embeddings.create(model=MODEL, **given)

        numbers = {**asked, "encoding_format": "float"}
        answers = [self.sync.embeddings.create(model=MODEL, **given) for given in (asked, numbers)]
        answers += [asyncio.run(ask(**given)) for given in (asked, numbers)]
        # Numbers are written so that they are the same 32 bits.
        vectors = [[array("f", item.embedding) for item in answer.data] for answer in answers]
        assert all(vector == vectors[0] for vector in vectors), vectors
        for answer in answers:
            assert type(answer) is CreateEmbeddingResponse, type(answer)
            all_fields_are_known(CreateEmbeddingResponse.model_validate(answer.to_dict(), strict=True), "embeddings")
            for at, item in enumerate(answer.data):
                assert item.index == at and len(item.embedding) == asked.get("dimensions", 128), item
                assert abs(sum(value * value for value in item.embedding) - 1) < 1e-5, item
        return answers[0]

    def _ask(self, endpoint, kind, chunk_kind, asked):
        answers = [endpoint(self.sync).create(model=MODEL, **asked)]
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        streams = [list(endpoint(self.sync).create(model=MODEL, **asked, **streamed))]

        async def ask():
            async with openai.AsyncOpenAI(
                api_key=self.asynchronous.api_key, base_url=self.asynchronous.base_url, max_retries=0
            ) as client:
                answers.append(await endpoint(client).create(model=MODEL, **asked))
                stream = await endpoint(client).create(model=MODEL, **asked, **streamed)
                streams.append([chunk async for chunk in stream])

        asyncio.run(ask())
        for answer in answers:
            strictly(answer, kind)
        for stream in streams:
            for chunk in stream:
                strictly(chunk, chunk_kind, unended=chunk_kind is Completion)
        texts = [said(answer) for answer in answers] + [said_in(stream) for stream in streams]
        assert all(text == texts[0] for text in texts), texts
        assert streams[0][-1].usage.completion_tokens == answers[0].usage.completion_tokens
        return answers[0]


def strictly(value, kind, unended=False):
    assert type(value) is kind, type(value)
    fields = value.to_dict()
    for choice in fields["choices"] if unended else []:
        # Null until the end, as the API gives it, though the package's types do not say so.
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    strict = kind.model_validate(fields, strict=True)
    all_fields_are_known(strict, kind.__name__)


def said(answer):
    """What each choice says, calls and why it ended."""
    choices = {}
    for choice in answer.choices:
        message = getattr(choice, "message", None)
        calls = [call.function.to_dict() for call in (message and message.tool_calls) or []]
        text = (message.content or "") if message else choice.text
        choices[choice.index] = (text, calls, choice.finish_reason, logprobs(choice))
    return choices


def said_in(stream):
    choices = {}
    for chunk in stream:
        for choice in chunk.choices:
            text, calls, reason, probabilities = choices.get(choice.index, ("", [], None, []))
            delta = getattr(choice, "delta", None)
            text += (delta.content or "") if delta else choice.text
            calls = calls + [call.function.to_dict() for call in (delta and delta.tool_calls) or []]
            found = (text, calls, choice.finish_reason or reason, probabilities + logprobs(choice))
            choices[choice.index] = found
    return choices


def logprobs(choice):
    if choice.logprobs is None:
        return []
    if getattr(choice.logprobs, "token_logprobs", None) is not None:
        return choice.logprobs.token_logprobs
    for entry in choice.logprobs.content:
        check_token(entry)
        for alternative in entry.top_logprobs:
            check_token(alternative)
    return [entry.logprob for entry in choice.logprobs.content]


def refused(kind, ask, param=None):
    try:
        ask()
    except kind as error:
        assert error.body["message"] and error.body["type"], error.body
        assert param is None or error.param == param, (error.param, param)
        return error
    raise AssertionError(f"it is not refused with {kind.__name__}")


def a_small_model():
    both = Both(keyed_url, "secret")
    user = [{"role": "user", "content": "Hi, wörld 🦀"}]
    drawn = {"temperature": 1.3, "seed": 5, "max_tokens": 20}

    names = [model.id for model in both.sync.models.list()]
    assert names == [MODEL], names
    assert type(both.sync.models.retrieve(MODEL)) is Model

    both.chat(messages=user, temperature=0, max_tokens=5)
    both.chat(messages=user, **drawn, extra_body={"ignore_eos": True, "top_k": 30, "min_p": 0.01})
    both.chat(messages=user, **drawn, n=3, top_p=0.9)
    both.chat(messages=user, **drawn, logprobs=True, top_logprobs=3, stop=["e", "\n"])
    both.chat(messages=user, seed=1, max_completion_tokens=4, user="u", metadata={"a": "b"}, store=False)
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]
    both.chat(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}], seed=2)
    both.chat(messages=user, seed=3, max_tokens=9, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    both.chat(messages=user, seed=4, presence_penalty=0, frequency_penalty=0, logit_bias={}, max_tokens=3)

    both.chat(messages=user, **drawn, presence_penalty=1.5, frequency_penalty=-0.5)
    forced = both.chat(messages=user, max_tokens=4, temperature=0, logit_bias={"70": 100}, logprobs=True)
    assert len({entry.token for entry in forced.choices[0].logprobs.content}) == 1, forced
    extra = {"repetition_penalty": 1.2, "min_tokens": 6, "bad_words": ["the"], "stop_token_ids": [70]}
    both.chat(messages=user, **drawn, extra_body=extra)
    one_token = {"allowed_token_ids": [71], "ignore_eos": True}
    one = both.chat(messages=user, max_tokens=4, logit_bias={"70": 100}, logprobs=True, extra_body=one_token)
    assert [entry.logprob for entry in one.choices[0].logprobs.content] == [0] * 4, one
    stopped = both.chat(messages=user, max_tokens=4, logit_bias={"70": 100}, extra_body={"stop_token_ids": [70]})
    assert stopped.choices[0].finish_reason == "stop" and stopped.usage.completion_tokens == 1, stopped
    assert stopped.choices[0].message.content == "", stopped
    with_stop = {"stop_token_ids": [70], "include_stop_str_in_output": True}
    stopped = both.chat(messages=user, max_tokens=4, logit_bias={"70": 100}, extra_body=with_stop)
    assert stopped.choices[0].message.content != "", stopped

    both.text(prompt="Once upon", **drawn)
    both.text(prompt=["Once", "upon", "a time"], **drawn, n=2)
    both.text(prompt=[5, 6, 7], **drawn, logprobs=0)
    both.text(prompt=[[5, 6, 7], [8]], **drawn, logprobs=3)
    both.text(prompt="Once upon", **drawn, stop="e")
    answer = both.text(prompt="Once upon", **drawn, echo=True, best_of=1)
    assert answer.choices[0].text.startswith("Once upon")
    assert both.text(prompt="Once", seed=1).usage.completion_tokens <= 16

    both.embeddings(input="Once upon")
    both.embeddings(input=["Once upon", "a time"], dimensions=32)
    both.embeddings(input=[5, 6, 7], encoding_format="float", user="u")
    assert len(both.embeddings(input=[[5, 6, 7], [8]]).data) == 2

    chat, text = both.sync.chat.completions.create, both.sync.completions.create
    bad = openai.BadRequestError
    for field, value in [
        ("presence_penalty", 2.5),
        ("logit_bias", {"5": 101}),
        ("response_format", {"type": "xml"}),
        ("n", 0),
        ("temperature", -1.0),
        ("stream_options", {"include_usage": True}),
    ]:
        refused(bad, lambda: chat(model=MODEL, messages=user, **{field: value}), field)
    refused(bad, lambda: text(model=MODEL, prompt="a", suffix="b"), "suffix")
    refused(bad, lambda: both.sync.embeddings.create(model=MODEL, input="a", dimensions=129), "dimensions")
    refused(bad, lambda: text(model=MODEL, prompt="a", extra_body={"max_token": 3}), "max_token")
    refused(bad, lambda: chat(model=MODEL, messages=[{"role": "elf", "content": "x"}]), "messages")
    long = refused(bad, lambda: text(model=MODEL, prompt=[5] * 300))
    assert long.code == "context_length_exceeded", long.code
    refused(openai.NotFoundError, lambda: chat(model="gpt-4o", messages=user), "model")
    refused(openai.NotFoundError, lambda: both.sync.models.retrieve("gpt-4o"))
    stranger = openai.OpenAI(api_key="other", base_url=keyed_url, max_retries=0)
    refused(openai.AuthenticationError, stranger.models.list)


def fields_of_the_package():
    """The service knows each field that the package can send, by its name, and so does the table in the docs."""
    client = openai.OpenAI(api_key="secret", base_url=keyed_url, max_retries=0)
    table = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    for create, given in (
        (client.chat.completions.create, {"messages": [{"role": "user", "content": "Hi"}]}),
        (client.completions.create, {"prompt": "Once"}),
        (client.embeddings.create, {"input": "Once"}),
    ):
        own = {"model", "extra_headers", "extra_query", "extra_body", "timeout"}
        fields = inspect.signature(create).parameters.keys() - own
        assert len(fields) > 3, fields
        missing = [field for field in fields if f"`{field}`" not in table]
        assert not missing, missing
        # A field that is null is as good as absent, but one that nobody knows is refused all the same.
        create(model=MODEL, **given, extra_body=dict.fromkeys(fields - given.keys()))
        unknown = lambda: create(model=MODEL, **given, extra_body={"max_token": None})  # noqa: E731, B023
        refused(openai.BadRequestError, unknown, "max_token")


def a_model_that_calls_tools():
    both = Both(tools_url, "none")
    function = {"name": "weather", "description": "…", "parameters": {"type": "object", "properties": {}}}
    asked = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 200}
    tools = [{"type": "function", "function": function}]
    for choice in ({}, {"tool_choice": "auto"}):
        answer = both.chat(**asked, tools=tools, **choice).choices[0]
        assert answer.finish_reason == "tool_calls", answer
        call = answer.message.tool_calls[0]
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Bonn"}'), call
        assert answer.message.content is None
    # What it called goes back to it with the result.
    back = answer.message.to_dict()
    result = {"role": "user", "content": "12 degrees"}
    both.chat(messages=[*asked["messages"], back, result], max_tokens=200, tools=tools)
    # The package's own way to put a stream together.
    with both.sync.chat.completions.stream(model=MODEL, **asked, tools=tools) as stream:
        for _ in stream:
            pass
        whole = stream.get_final_completion()
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"city": "Bonn"}', whole
    plain = both.chat(**asked, tools=tools, tool_choice="none").choices[0]
    assert plain.message.tool_calls is None and "<tool_call>" in plain.message.content
    other = {"type": "function", "function": {"name": "climate"}}
    ask = lambda: both.sync.chat.completions.create(model=MODEL, **asked, tools=tools, tool_choice=other)  # noqa: E731
    refused(openai.BadRequestError, ask, "tool_choice")


def a_model_that_is_told_to_call_tools():
    both = Both(told_url, "none")
    tools = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Clock)]
    asked = {"messages": [{"role": "user", "content": "?"}], "temperature": 2, "max_tokens": 150, "tools": tools}
    named = {"type": "function", "function": {"name": "Weather"}}
    for seed in range(3):
        for choice, names in (("required", {"Weather", "Clock"}), (named, {"Weather"})):
            answer = both.chat(**asked, tool_choice=choice, seed=seed, parallel_tool_calls=False).choices[0]
            assert answer.finish_reason == "tool_calls" and answer.message.content is None, answer
            [call] = answer.message.tool_calls
            assert call.function.name in names, call
            {"Weather": Weather, "Clock": Clock}[call.function.name].model_validate_json(call.function.arguments, strict=True)
    # The package's own way to arguments that are of a type.
    parsed = both.sync.chat.completions.parse(model=MODEL, **asked, tool_choice=named, seed=7)
    assert isinstance(parsed.choices[0].message.tool_calls[0].function.parsed_arguments, Weather), parsed


a_small_model()
fields_of_the_package()
a_model_that_calls_tools()
a_model_that_is_told_to_call_tools()
print("the openai package is content")
