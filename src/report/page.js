"use strict";
// Draws the report that lies in this page: tiles, charts of one run, tables. Charts are as wide as their place and are
// drawn anew when that changes.

const report = JSON.parse(document.getElementById("report").textContent);

// --- text

const number = (value, digits = 0) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

// With about three digits that count.
function short(value) {
  const size = Math.abs(value);
  if (size >= 1e5) return number(value / 1e3, 0) + "k";
  return number(value, size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
}

const percent = (share, digits = 0) => number(100 * share, digits) + "%";

function duration(seconds) {
  if (seconds < 120) return short(seconds) + " s";
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)} h` : `${m}:${two(s)} min`;
}

const milliseconds = (ms) => (ms >= 1000 ? duration(ms / 1e3) : short(ms) + " ms");

// --- elements

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function table(caption, rows, head) {
  const cell = (kind) => (value) => {
    const [text, isNumber] = typeof value === "object" ? [value.number, true] : [value, false];
    return element(kind, isNumber ? { class: "number" } : {}, text);
  };
  const made = element("table", {}, element("caption", {}, caption));
  if (head) made.append(element("tr", {}, ...head.map(cell("th"))));
  for (const [first, ...rest] of rows) {
    made.append(element("tr", {}, element("th", { scope: "row" }, first), ...rest.map(cell("td"))));
  }
  if (head) made.className = "columns";
  return element("div", { class: "table wide" }, made);
}

// --- charts

const HEIGHT = 190;
const MARGIN = { left: 46, right: 12, top: 14, bottom: 22 };

// Round values from 0 (or `from`) to at least `to`, about `count` of them.
function ticks(to, count, from = 0) {
  const rough = (to - from || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= rough * 0.999);
  const values = [];
  for (let value = Math.ceil(from / step) * step; value < to + step * 0.999; value += step) {
    values.push(Number(value.toPrecision(12)));
  }
  return values;
}

function timeTicks(seconds, count) {
  const steps = [60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400];
  const step = seconds < 120 ? null : (steps.find((step) => seconds / step <= count) ?? 86400 * Math.ceil(seconds / count / 86400));
  const values = step ? Array.from({ length: Math.floor(seconds / step) + 1 }, (_, i) => i * step) : ticks(seconds, count);
  return values.filter((value) => value <= seconds);
}

// A figure that draws itself by `draw(svg, width)` whenever its width changes.
function figure(title, keys, draw) {
  const output = element("output");
  const legend = keys.map(([name, colour]) => element("span", { class: "key", style: `--colour:${colour}` }, element("span", {}, name)));
  const svg = shape("svg", { role: "img", "aria-label": title, height: HEIGHT });
  const made = element("figure", {}, element("figcaption", {}, element("b", {}, title), ...legend, output), svg);
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.round(svg.clientWidth);
    if (width === last || width === 0) return;
    last = width;
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.replaceChildren();
    draw(svg, width, output);
  }).observe(made);
  return made;
}

function frame(svg, width, yTicks, yText, xTicks, xText, x, y) {
  for (const value of yTicks) {
    svg.append(
      shape("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
      shape("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, yText(value)),
    );
  }
  for (const value of xTicks) {
    const anchor = x(value) > width - 40 ? "end" : x(value) < MARGIN.left + 12 ? "start" : "middle";
    svg.append(shape("text", { x: x(value), y: HEIGHT - 6, "text-anchor": anchor }, xText(value)));
  }
}

// Values over time: [{ name, colour, values, text }]. `stack` puts each on the one before; `bounds` fixes the top.
function overTime(title, bucket_s, seconds, series, { top, bottom = 0, stack = false, axis = short, marks = [] } = {}) {
  const count = series[0].values.length;
  const sums = series.map((one, i) =>
    one.values.map((value, j) => value ?? (stack ? 0 : null)).map((value, j) =>
      stack && i > 0 ? value + series.slice(0, i).reduce((sum, below) => sum + (below.values[j] ?? 0), 0) : value),
  );
  const highest = Math.max(...sums.flat().filter((value) => value !== null), ...marks.map((mark) => mark.value), bottom);
  const middle = (i) => Math.min((i + 0.5) * bucket_s, seconds);
  return figure(title, series.length > 1 ? series.map((one) => [one.name, one.colour]) : [], (svg, width, output) => {
    const yTicks = top === undefined ? ticks(highest, 4, bottom) : ticks(top, 4, bottom).filter((value) => value <= top);
    const ceiling = top ?? Math.max(yTicks[yTicks.length - 1], bottom + 1e-9);
    const x = (time) => MARGIN.left + (time / seconds) * (width - MARGIN.left - MARGIN.right);
    const y = (value) => {
      const share = (Math.min(Math.max(value, bottom), ceiling) - bottom) / (ceiling - bottom || 1);
      return HEIGHT - MARGIN.bottom - share * (HEIGHT - MARGIN.top - MARGIN.bottom);
    };
    frame(svg, width, yTicks, axis, timeTicks(seconds, width / 90), duration, x, y);
    for (let i = series.length - 1; i >= 0; i--) drawSeries(svg, series[i], sums[i], i > 0 && stack ? sums[i - 1] : null, { x, y, middle, bottom, fill: stack || series.length === 1 });
    for (const mark of marks) {
      svg.append(
        shape("line", { class: "mark", "stroke-dasharray": "5 4", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(mark.value), y2: y(mark.value) }),
        shape("text", { class: "mark-text", x: width - MARGIN.right, y: y(mark.value) - 4, "text-anchor": "end" }, mark.name),
      );
    }
    readOut(svg, width, output, (position) => {
      const time = ((position - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * seconds;
      const i = Math.min(Math.max(Math.floor(time / bucket_s), 0), count - 1);
      const said = series.filter((one) => one.values[i] !== null).map((one) => (one.text ?? short)(one.values[i]) + (series.length > 1 ? ` ${one.name}` : ""));
      return [x(middle(i)), `${duration(i * bucket_s)}: ${said.join(", ") || "nothing ran"}`];
    });
  });
}

// Lines with a gap where nothing is known; a lone value is a dot.
function drawSeries(svg, { colour }, tops, floors, { x, y, middle, bottom, fill }) {
  const pieces = [];
  tops.forEach((value, i) => {
    if (value === null) return;
    if (i === 0 || tops[i - 1] === null) pieces.push([]);
    pieces[pieces.length - 1].push(i);
  });
  for (const piece of pieces) {
    const up = piece.map((i) => `${x(middle(i)).toFixed(1)},${y(tops[i]).toFixed(1)}`);
    if (fill) {
      const down = piece.map((i) => `${x(middle(i)).toFixed(1)},${y(floors ? floors[i] : bottom).toFixed(1)}`).reverse();
      svg.append(shape("polygon", { points: [...up, ...down].join(" "), style: `fill:${colour}`, "fill-opacity": floors || fill === "solid" ? 0.55 : 0.22 }));
    }
    if (up.length > 1) svg.append(shape("polyline", { points: up.join(" "), style: `stroke:${colour}`, fill: "none", "stroke-width": 1.5 }));
    else svg.append(shape("circle", { cx: up[0].split(",")[0], cy: up[0].split(",")[1], r: 2.5, style: `fill:${colour}` }));
  }
}

// A line that follows the pointer, and what it stands on in words: `at(position)` gives where to draw it and the words.
function readOut(svg, width, output, at) {
  const cursor = shape("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
  svg.append(cursor);
  svg.onpointermove = (event) => {
    const position = ((event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth) * width;
    const [x, words] = at(position);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    output.textContent = words;
  };
  svg.onpointerleave = () => {
    cursor.setAttribute("visibility", "hidden");
    output.textContent = "";
  };
}

// How latencies are distributed, on a logarithmic scale, with their percentiles.
function distribution(title, latencies) {
  const { edges, counts } = latencies.distribution;
  if (!counts.length) return element("figure", {}, element("figcaption", {}, element("b", {}, title)), element("p", { class: "faint" }, "none"));
  return figure(title, [], (svg, width, output) => {
    const [first, last] = [edges[0] || 1e-3, Math.max(edges[edges.length - 1], edges[0] || 1e-3)];
    // Latencies that are nearly alike stand in the middle of a span whose labels differ.
    const room = Math.sqrt(Math.max(1.2 / (last / first), 1));
    const [least, most] = [first / room, last * room];
    const total = counts.reduce((sum, count) => sum + count, 0);
    const yTicks = ticks(Math.max(...counts) / total, 4);
    const x = (ms) => MARGIN.left + (Math.log(Math.max(ms, least) / least) / Math.log(most / least)) * (width - MARGIN.left - MARGIN.right);
    const y = (share) => HEIGHT - MARGIN.bottom - (share / yTicks[yTicks.length - 1]) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    frame(svg, width, yTicks, (share) => percent(share, Math.abs((100 * yTicks[1]) % 1) > 0.01 ? 1 : 0), logTicks(least, most, width / 90), milliseconds, x, y);
    counts.forEach((count, i) => {
      if (!count) return;
      const [left, right] = [x(edges[i]), x(edges[i + 1])];
      const top = Math.min(y(count / total), HEIGHT - MARGIN.bottom - 1);
      svg.append(shape("rect", { x: left, y: top, width: Math.max(right - left - 1, 1), height: HEIGHT - MARGIN.bottom - top, style: "fill:var(--first)" }));
    });
    // A label that would lie on the one before it is left out; its line stays.
    let free = 0;
    for (const [name, value] of [["p50", latencies.p50], ["p90", latencies.p90], ["p99", latencies.p99]]) {
      const at = x(value);
      svg.append(shape("line", { class: "mark", x1: at, x2: at, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
      const left = Math.min(at, width - 30);
      if (left >= free) svg.append(shape("text", { class: "mark-text", x: left + 3, y: MARGIN.top + 8 }, name));
      free = Math.max(free, left + 28);
    }
    readOut(svg, width, output, (position) => {
      const i = Math.max(edges.slice(0, -1).findLastIndex((edge) => x(edge) <= position), 0);
      const middle = (x(edges[i]) + x(edges[i + 1])) / 2;
      return [middle, `${milliseconds(edges[i])} to ${milliseconds(edges[i + 1])}: ${number(counts[i])}, ${percent(counts[i] / total, 1)}`];
    });
  });
}

// Values of 1, 2 and 5 times powers of ten; where the span has too few of them, even steps.
function logTicks(least, most, count) {
  const values = [];
  for (let power = 10 ** Math.floor(Math.log10(least)); power <= most; power *= 10) {
    for (const factor of [1, 2, 5]) values.push(Number((factor * power).toPrecision(6)));
  }
  let inside = values.filter((value) => value >= least && value <= most);
  if (inside.length < 3) inside = ticks(most, Math.min(count, 5), least).filter((value) => value >= least && value <= most);
  return inside.filter((_, i) => i % Math.ceil(inside.length / count) === 0);
}

// --- the page

const [FIRST, SECOND, THIRD] = ["var(--first)", "var(--second)", "var(--third)"];

function tile(name, value, note = "") {
  return element("div", { class: "tile" }, element("span", {}, name), element("b", {}, value), element("small", {}, note));
}

const sum = (counts) => Object.values(counts).reduce((all, count) => all + count, 0);

function tiles(run) {
  const failed = sum(run.failures);
  const requests = sum(run.ended);
  const made = [
    tile("output", `${number(run.tokens_per_s)} tok/s`, `${number(run.total_tokens)} tokens`),
    tile("time", duration(run.seconds), `${number(requests)} requests ended`),
    tile("time to first token", milliseconds(run.first_token_ms.p50), `p90 ${milliseconds(run.first_token_ms.p90)}, p99 ${milliseconds(run.first_token_ms.p99)}`),
    tile("between tokens", milliseconds(run.between_tokens_ms.p50), `p90 ${milliseconds(run.between_tokens_ms.p90)}, p99 ${milliseconds(run.between_tokens_ms.p99)}`),
    tile("failed", number(failed), failed ? "by kind: see below" : "none"),
  ];
  if (run.floor) made.push(tile("of what the device allows", percent(run.floor.share, 1), `the floor is ${duration(run.floor.floor.seconds)}`));
  const device = run.device_state;
  if (device) {
    const held = device.throttle.filter((one) => one.reason !== "gpu_idle").map((one) => `${one.reason} ${percent(one.share)}`);
    made.push(tile("SM clock", `${number(device.sm_mhz.mean)} MHz`, held.length ? `held down: ${held.join(", ")}` : `of ${number(device.sm_mhz_max)}; nothing held it down`));
  }
  return element("div", { class: "tiles" }, ...made);
}

function charts(run) {
  const { timeline, seconds } = run;
  const pages = report.engine.num_pages;
  const share = (values) => values.map((value) => (value === null ? null : value / pages));
  const whole = { top: 1, axis: (value) => percent(value) };
  const made = [
    overTime("Output tokens a second", timeline.bucket_s, seconds, [{ colour: FIRST, values: timeline.output_tokens_per_s, text: (rate) => `${number(rate)} tok/s` }]),
    overTime("Prefill tokens a second", timeline.bucket_s, seconds, [{ colour: FIRST, values: timeline.prefill_tokens_per_s, text: (rate) => `${number(rate)} tok/s` }]),
    overTime("What the device's time went to", timeline.bucket_s, seconds, [
      { name: "decode", colour: FIRST, values: timeline.decode_share, text: (value) => percent(value, 1) },
      { name: "prefill", colour: SECOND, values: timeline.prefill_share, text: (value) => percent(value, 1) },
    ], { ...whole, stack: true }),
    overTime("Batch", timeline.bucket_s, seconds, [
      { name: "rows of a decode step", colour: FIRST, values: timeline.decode_rows },
      { name: "requests running", colour: SECOND, values: timeline.running },
    ]),
    overTime("Requests waiting", timeline.bucket_s, seconds, [{ colour: THIRD, values: timeline.waiting, text: (value) => `${short(value)} waiting` }]),
    overTime("KV pages in use", timeline.bucket_s, seconds, [{ colour: THIRD, values: share(timeline.pages_used), text: (value) => `${percent(value, 1)} of ${number(pages)}` }], whole),
  ];
  return made;
}

function deviceCharts(run) {
  const device = run.device_state;
  if (!device) return [element("p", { class: "faint" }, "The device's clocks, power and temperature are not known.")];
  const { timeline } = device;
  const held = device.throttle.length ? device.throttle.map((one) => [one.reason, { number: percent(one.share, 1) }]) : [["nothing", { number: "" }]];
  const measured = (name, unit, value) => [name, ...["mean", "min", "max"].map((key) => ({ number: `${number(value[key], unit === "W" ? 1 : 0)} ${unit}` }))];
  return [
    overTime("SM clock, MHz", timeline.bucket_s, run.seconds, [{ colour: FIRST, values: timeline.sm_mhz, text: (mhz) => `${number(mhz)} MHz` }], { marks: [{ name: "highest", value: device.sm_mhz_max }] }),
    overTime("Clocks held down, share of samples", timeline.bucket_s, run.seconds, [{ colour: SECOND, values: timeline.throttled, text: (share) => percent(share) }], { top: 1, axis: (value) => percent(value) }),
    overTime("Power, W", timeline.bucket_s, run.seconds, [{ colour: SECOND, values: timeline.power_w, text: (power) => `${number(power)} W` }]),
    overTime("Temperature, °C", timeline.bucket_s, run.seconds, [{ colour: THIRD, values: timeline.temperature_c, text: (degrees) => `${number(degrees)} °C` }]),
    table(`Over ${number(device.samples)} samples, one each ${device.period_ms} ms; driver ${device.driver}`, [
      measured("SM clock", "MHz", device.sm_mhz),
      measured("memory clock", "MHz", device.memory_mhz),
      measured("power", "W", device.power_w),
      measured("temperature", "°C", device.temperature_c),
    ], ["", { number: "mean" }, { number: "least" }, { number: "greatest" }]),
    table("What held the clocks down, share of samples", held),
  ];
}

function ends(run) {
  const counted = (counts) => Object.entries(counts).sort((a, b) => b[1] - a[1]).map(([name, count]) => [name, { number: number(count) }]);
  const failures = counted(run.failures);
  return [
    table("Requests ended, by why", counted(run.ended)),
    table("Failures, by kind", failures.length ? failures : [["none", { number: "0" }]]),
  ];
}

// All plain values below a key, as rows of a table.
function settings() {
  const isPlain = (value) => value !== null && typeof value !== "object";
  const words = (key) => key.replaceAll("_", " ");
  const text = (key, value) => {
    if (typeof value !== "number") return String(value);
    if (key.startsWith("memory_")) return `${number(value / 2 ** 30, 2)} GiB`;
    return Number.isInteger(value) ? String(value) : short(value);
  };
  const rows = (object) => Object.entries(object).filter(([, value]) => isPlain(value)).map(([key, value]) => [words(key), { number: text(key, value) }]);
  return ["workload", "job", "sampling", "engine"].filter((key) => report[key]).map((key) => table(words(key), rows(report[key])));
}

function runsTable() {
  const rows = report.runs.map((run, i) => [
    `run ${i + 1}`, { number: number(run.tokens_per_s) }, { number: duration(run.seconds) }, { number: milliseconds(run.first_token_ms.p50) },
    { number: milliseconds(run.between_tokens_ms.p50) }, { number: run.device_state ? `${number(run.device_state.sm_mhz.mean)} MHz` : "not known" }, run.output_hash ?? "",
  ]);
  return table("Runs", rows, ["", { number: "tok/s" }, { number: "time" }, { number: "TTFT p50" }, { number: "ITL p50" }, { number: "SM clock" }, "output hash"]);
}

function show(chosen) {
  const run = report.runs[chosen];
  const place = document.getElementById("run");
  place.replaceChildren(
    tiles(run),
    element("h2", {}, "The run"), element("div", { class: "charts" }, ...charts(run)),
    element("h2", {}, "Latencies"), element("div", { class: "charts" }, distribution("Time to first token", run.first_token_ms), distribution("Between tokens", run.between_tokens_ms)),
    element("h2", {}, "The device"), element("div", { class: "charts" }, ...deviceCharts(run)),
    element("h2", {}, "How requests ended"), element("div", { class: "tables" }, ...ends(run)),
  );
  document.querySelectorAll("nav button").forEach((button, i) => button.setAttribute("aria-pressed", String(i === chosen)));
}

function page() {
  const when = new Date(report.unix_time * 1e3).toISOString().slice(0, 16).replace("T", " ") + " UTC";
  const body = document.body;
  body.append(
    element("h1", {}, `${report.program}: ${report.model} on ${report.device}`),
    element("p", { class: "faint" }, `${when}, minisgl ${report.version}, ${report.backend} backend`),
  );
  if (report.same_output === false) body.append(element("p", { class: "warning" }, "The runs' outputs differ: see their hashes."));
  const buttons = report.runs.map((_, i) => {
    const button = element("button", { type: "button" }, `run ${i + 1}`);
    button.onclick = () => show(i);
    return button;
  });
  if (buttons.length > 1) body.append(element("nav", { "aria-label": "runs" }, ...buttons));
  body.append(element("main", { id: "run" }));
  if (report.runs.length) show(report.runs.length - 1);
  if (buttons.length > 1) body.append(element("h2", {}, "All runs"), runsTable());
  body.append(
    element("h2", {}, "Settings"), element("div", { class: "tables" }, ...settings()),
    element("h2", {}, "Command"), element("p", {}, element("code", {}, report.command.join(" "))),
  );
}

page();
