"""Reads a Batch file of requests and its results as a user of the `openai` package would: check.py REQUESTS RESULTS

A server on the loopback interface hands the results out, as the API does: the file as a whole, and each answer to the
request it belongs to. What the package makes of them must be of its own types, with every field known to them and none
converted.
"""

import base64
import json
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from strict import all_fields_are_known, check_token

requests_path, results_path = sys.argv[1:]
requests = {}
for line in open(requests_path, encoding="utf-8"):
    request = json.loads(line)
    requests[request["custom_id"]] = request


class Api(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, open(results_path, "rb").read())

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        response = results[self.headers["x-custom-id"]]["response"]
        self.answer(response["status_code"], json.dumps(response["body"]).encode())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def prompts_of(asked):
    """How many prompts a body has in a field."""
    is_one = asked is None or isinstance(asked, str) or isinstance(asked[0], int)
    return 1 if is_one else len(asked)


def check_answer(request, answer, body):
    kind = ChatCompletion if request["url"] == "/v1/chat/completions" else Completion
    assert type(answer) is kind, type(answer)
    strict = kind.model_validate(body, strict=True)
    all_fields_are_known(strict, kind.__name__)
    assert answer.to_dict() == strict.to_dict() == body, "something is lost or converted on the way"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    outputs = request["body"].get("n", 1) * prompts_of(request["body"].get("prompt"))
    assert [choice.index for choice in answer.choices] == list(range(outputs))
    for choice in answer.choices:
        check_logprobs(request, kind, choice)
    if kind is Completion and answer.choices[0].logprobs:
        lengths = sum(len(choice.logprobs.tokens) for choice in answer.choices)
        assert lengths == answer.usage.completion_tokens, lengths


def check_logprobs(request, kind, choice):
    if kind is ChatCompletion and choice.logprobs:
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == request["body"].get("top_logprobs", 0)
            check_token(entry)
            for alternative in entry.top_logprobs:
                check_token(alternative)
    if kind is Completion and choice.logprobs:
        lengths = {len(part) for part in (choice.logprobs.tokens, choice.logprobs.token_logprobs)}
        assert len(lengths) == 1, lengths


def check_embedding(request, answer, body):
    assert type(answer) is CreateEmbeddingResponse, type(answer)
    assert len(body["data"]) == prompts_of(request["body"]["input"]), body
    if request["body"].get("encoding_format") == "base64":
        for item in body["data"]:
            bytes = base64.b64decode(item["embedding"], validate=True)
            item["embedding"] = list(struct.unpack(f"<{len(bytes) // 4}f", bytes))
    strict = CreateEmbeddingResponse.model_validate(body, strict=True)
    all_fields_are_known(strict, "CreateEmbeddingResponse")
    assert answer.to_dict() == strict.to_dict() == body, "something is lost or converted on the way"
    for at, item in enumerate(answer.data):
        values = item.embedding
        assert item.index == at and len(values) == request["body"].get("dimensions", 128), item
        assert abs(sum(value * value for value in values) - 1) < 1e-5, values
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0


def check_refusal(request, error, body):
    assert isinstance(error, openai.BadRequestError), error
    assert error.status_code == 400 and error.type == "invalid_request_error"
    assert error.body == body["error"] and error.param == body["error"]["param"]


server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=server.serve_forever, daemon=True).start()
base_url = f"http://127.0.0.1:{server.server_port}/v1"
client = openai.OpenAI(api_key="none", base_url=base_url, max_retries=0)

results = {}
for line in client.files.content("file-results").text.splitlines():
    result = json.loads(line)
    assert list(result) == ["id", "custom_id", "response", "error"], list(result)
    assert result["custom_id"] not in results and result["id"].startswith("batch_req_")
    assert result["error"] is None and result["response"]["request_id"]
    results[result["custom_id"]] = result
assert results.keys() == requests.keys(), results.keys() ^ requests.keys()

answers = refusals = 0
for custom_id, request in requests.items():
    create, prompt, check = {
        "/v1/chat/completions": (client.chat.completions.create, "messages", check_answer),
        "/v1/completions": (client.completions.create, "prompt", check_answer),
        "/v1/embeddings": (client.embeddings.create, "input", check_embedding),
    }[request["url"]]
    body = results[custom_id]["response"]["body"]
    headers = {"x-custom-id": custom_id}
    # A request that leaves its model out has the one that answered.
    own = {"model": "any", **request["body"]}
    known = {name: own.pop(name) for name in ("model", prompt) if name in own}
    known.setdefault(prompt, [])
    try:
        check(request, create(**known, extra_body=own, extra_headers=headers), body)
        answers += 1
    except openai.APIStatusError as error:
        check_refusal(request, error, body)
        refusals += 1
print(f"{answers} answers and {refusals} refusals are the package's own types")
