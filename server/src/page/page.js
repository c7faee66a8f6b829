// Sends a prompt and shows its answer as it streams; draws the metrics of the last minutes.
//
//   form ── POST, stream ──> events ──> #answer, #thought, #fault
//   every second: GET /metrics ──> samples ──> one small chart each
//
// #prompt=…&run in the address fills in a prompt, and sends it.
"use strict";

const $ = (id) => document.getElementById(id);
const fault = (message) => {
  $("fault").hidden = !message;
  $("fault").textContent = message || "";
};
addEventListener("error", (event) => fault(event.message));
addEventListener("unhandledrejection", (event) => fault(String(event.reason)));

const headers = (more) => {
  const key = $("key").value;
  return key ? { ...more, authorization: `Bearer ${key}` } : { ...more };
};

// A key is asked for once it turns out to be needed.
const checked = async (response) => {
  if (response.ok) return response;
  if (response.status === 401) $("key-field").hidden = false;
  const text = await response.text();
  let message = text;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // It is shown as it is.
  }
  throw new Error(message || `status ${response.status}`);
};

// --- A prompt and its answer

const request = () => {
  const prompt = $("prompt").value;
  const shared = {
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    max_tokens: Number($("tokens").value),
  };
  switch ($("kind").value) {
    case "chat":
      return ["v1/chat/completions", { ...shared, messages: [{ role: "user", content: prompt }] }];
    case "text":
      return ["v1/completions", { ...shared, prompt }];
    default:
      return ["v1/completions", { ...shared, prompt: prompt.match(/\d+/g)?.map(Number) ?? [], return_token_ids: true }];
  }
};

// The events of a stream, parsed.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

let running = null;

const show = (choice) => {
  const { delta } = choice;
  if (delta?.reasoning_content) {
    $("thought").hidden = false;
    $("thought").textContent += delta.reasoning_content;
  }
  // The end of a text may come without a token: then there is no id to show.
  const ids = $("kind").value === "ids" ? (choice.token_ids ?? []).map((id) => `${id} `).join("") : undefined;
  $("answer").textContent += ids ?? (delta ? delta.content : choice.text) ?? "";
};

const send = async () => {
  fault("");
  $("answer").textContent = "";
  $("thought").textContent = "";
  $("thought").hidden = true;
  const [path, body] = request();
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const started = performance.now();
  let first = null;
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      body: JSON.stringify(body),
      signal: running.signal,
    });
    for await (const event of events((await checked(response)).body)) {
      if (event.error) throw new Error(event.error.message);
      first ??= performance.now() - started;
      event.choices.forEach(show);
      if (event.usage) {
        const { completion_tokens: tokens } = event.usage;
        const seconds = (performance.now() - started - first) / 1000;
        const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} a second` : "";
        $("said-of").textContent = `${tokens} tokens, the first after ${first.toFixed(0)} ms${rate}`;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") fault(error.message);
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
};

$("try").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => running?.abort());

// --- Metrics

const KEPT = 180; // Samples of a chart, one a second.

// Each chart: what it is called, its number from this sample and the one before, and how that is written.
const rate = (name) => (now, before) => before && Math.max(0, now.sum(name) - before.sum(name)) / (now.at - before.at);
const mean = (name) => (now, before) => {
  const count = before && now.sum(`${name}_count`) - before.sum(`${name}_count`);
  return count > 0 ? (1000 * (now.sum(`${name}_sum`) - before.sum(`${name}_sum`))) / count : null;
};
const CHARTS = [
  ["Running", (now) => now.sum("vllm:num_requests_running"), (v) => v.toFixed(0)],
  ["Waiting", (now) => now.sum("vllm:num_requests_waiting"), (v) => v.toFixed(0)],
  ["Tokens a second", rate("vllm:generation_tokens_total"), (v) => v.toFixed(0)],
  ["Prompt tokens a second", rate("vllm:prompt_tokens_total"), (v) => v.toFixed(0)],
  ["KV cache in use", (now) => 100 * now.sum("vllm:kv_cache_usage_perc"), (v) => `${v.toFixed(1)} %`],
  ["To the first token", mean("vllm:time_to_first_token_seconds"), (v) => `${v.toFixed(1)} ms`],
  ["Between tokens", mean("vllm:inter_token_latency_seconds"), (v) => `${v.toFixed(2)} ms`],
  ["Device time of a step", mean("minisgl:step_seconds"), (v) => `${v.toFixed(2)} ms`],
].map(([title, value, written]) => {
  const figure = document.createElement("figure");
  figure.innerHTML = `<figcaption></figcaption><strong>–</strong>
    <svg viewBox="0 0 ${KEPT - 1} 100" preserveAspectRatio="none" aria-hidden="true"><polyline/></svg>`;
  figure.querySelector("figcaption").textContent = title;
  $("charts").append(figure);
  return { figure, value, written, points: [] };
});

const parse = (text) => {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = /^([^#{ ]+)(?:\{.*\})? (\S+)/.exec(line);
    if (found) sums.set(found[1], (sums.get(found[1]) ?? 0) + Number(found[2]));
  }
  return { at: performance.now() / 1000, sum: (name) => sums.get(name) ?? 0 };
};

const draw = (chart, value) => {
  const { figure, written, points } = chart;
  points.push(value ?? null);
  if (points.length > KEPT) points.shift();
  if (value != null) figure.querySelector("strong").textContent = written(value);
  const top = Math.max(...points.map((point) => point ?? 0)) || 1;
  const from = KEPT - points.length;
  // What was not measured stays where it was.
  let last = 0;
  const line = points.map((point, i) => `${from + i},${(98 - (96 * (last = point ?? last)) / top).toFixed(1)}`);
  figure.querySelector("polyline").setAttribute("points", line.join(" "));
};

let before = null;
const sample = async () => {
  try {
    const response = await checked(await fetch("metrics", { headers: headers() }));
    const now = parse(await response.text());
    CHARTS.forEach((chart) => draw(chart, chart.value(now, before)));
    before = now;
    if ($("model").textContent === "…") await name();
  } catch (error) {
    if (!running) fault(error.message);
  }
  setTimeout(sample, 1000);
};

const name = async () => {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return;
  const [model] = (await response.json()).data;
  $("model").textContent = `${model.id}, up to ${model.max_model_len} tokens`;
};

// --- What the address asks for

const asked = new URLSearchParams(location.hash.slice(1));
for (const id of ["prompt", "kind", "temperature", "tokens"]) {
  if (asked.has(id)) $(id).value = asked.get(id);
}
sample();
if (asked.has("run")) send();
