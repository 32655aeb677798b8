// One response at a time, as the server streams it (docs/serving.md, "Denoising steps"). Nothing is kept anywhere: the
// key and the texts are in this page only. Addresses are relative, so a server may stand behind a path.

let model = null; // what /v1/models says of the model
let running = null; // the AbortController of the request that is being answered
let places = new Map(); // by position of the response: its chip, and what each step said of it
let counts = [], most = 1; // tokens that each step has revealed, and the largest of these numbers
let usage = null, text = "", began = 0, spent = 0; // the usage at the end, the text so far, times in ms

async function call(path, body) {
  const headers = {}, key = $("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal: running?.signal, cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`the server does not answer (${error.message})`);
  }
  if (response.ok) return response;
  const said = await response.text();
  let message = said.slice(0, 300) || response.statusText, code = null;
  try {
    ({ message, code } = JSON.parse(said).error);
  } catch { /* not the server's own answer: a proxy's, say */ }
  if (response.status === 401 && code !== "no_keys") askForKey();
  throw new Error(`${message} (HTTP ${response.status})`);
}

function askForKey() {
  $("key-field").hidden = false;
  $("key").focus();
}

function tell(id, message) {
  $(id).hidden = !message;
  $(id).textContent = message ?? "";
}

async function meet() { // reads what the server serves
  try {
    model = (await (await call("v1/models")).json()).data[0];
  } catch (error) {
    model = null;
    const first = !$("key-field").hidden && !$("key").value;
    tell("error", first ? null : error.message);
    tell("note", first ? "This server asks for a key." : null);
    $("decode").disabled = true;
    return;
  }
  const about = model.opdlm;
  tell("error", null);
  $("facts").replaceChildren();
  for (const [name, value] of [["model", model.id], ["strategy", about.strategy.replace(/_/g, " ")], ["block size", about.block_size]]) {
    if (value === null) continue;
    const pair = make("div");
    pair.append(make("dt", "", name), make("dd", "", String(value)));
    $("facts").append(pair);
  }
  $("kind").value = about.chat ? "chat" : "completion";
  $("kind").disabled = !about.chat;
  $("threshold").value = about.threshold;
  $("threshold").disabled = about.strategy !== "low_confidence_dynamic";
  showThreshold();
  $("temperature").value = about.temperature;
  $("temperature").disabled = about.strategy === "verified";
  $("limit").value = about.max_tokens;
  $("prompt").placeholder = about.chat ? "a message" : "a text to continue";
  tell("note", about.strategy === "verified"
    ? "Lossless decoding: a step accepts drafts that the teacher would have written, and adds one token of its own. "
      + "Its tokens have no confidence; underlined: the drafts for the next step."
    : null);
  $("scale").hidden = about.strategy === "verified";
  $("decode").disabled = false;
}

function asked() {
  const chat = $("kind").value === "chat", prompt = $("prompt").value;
  const body = { model: model.id, stream: true, steps: true, stream_options: { include_usage: true } };
  if ($("limit").value) body.max_tokens = Number($("limit").value);
  if (!$("threshold").disabled) body.threshold = Number($("threshold").value);
  if (!$("temperature").disabled && $("temperature").value) body.temperature = Number($("temperature").value);
  if (chat) body.messages = [{ role: "user", content: prompt }];
  else body.prompt = prompt;
  return [chat ? "v1/chat/completions" : "v1/completions", body];
}

async function* events(response) { // the events of a stream, to its [DONE]
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off: the server or the way to it has ended");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const content = part.replace(/^data: /, "");
      if (content === "[DONE]") return;
      const event = JSON.parse(content);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function decode() {
  if (running || !model) return;
  clear();
  running = new AbortController();
  setRunning(true);
  const [path, body] = asked();
  let ended = null;
  try {
    for await (const event of events(await call(path, body))) {
      usage = event.usage ?? usage;
      spent = performance.now() - began;
      for (const choice of event.choices) {
        if (choice.step) take(choice.step);
        text += choice.delta?.content ?? choice.text ?? "";
        ended = choice.finish_reason ?? ended;
      }
      $("final").textContent = text;
      showFigures();
    }
    finish(ended === "length" ? "ended at the limit of tokens" : "ended");
  } catch (error) {
    finish(error.name === "AbortError" ? "stopped" : "failed");
    if (error.name !== "AbortError") tell("error", error.message);
  } finally {
    running = null;
    setRunning(false);
  }
}

function clear() {
  places = new Map();
  counts = [];
  most = 1;
  usage = null;
  text = "";
  began = performance.now();
  spent = 0;
  tell("error", null);
  $("asked").textContent = $("kind").value === "completion" ? visible($("prompt").value) : "";
  for (const id of ["blocks", "bars", "final"]) $(id).replaceChildren();
  for (const id of ["tokens", "steps", "per-step", "per-second", "most"]) $(id).textContent = "–";
  showCursor(0);
}

function setRunning(on) {
  $("decode").disabled = on || !model;
  $("stop").disabled = !on;
  $("slider").disabled = on || !counts.length;
  if (on) $("state").textContent = "waits for a slot or its first step";
}

function take(step) {
  const fresh = step.tokens.filter((token) => !places.has(token.position));
  if (fresh.length) {
    const lossless = model.opdlm.strategy === "verified", last = $("blocks").lastElementChild;
    last?.classList.remove("current");
    const block = lossless && last ? last : make("span", lossless ? "" : "block current"); // its windows overlap
    for (const token of fresh) {
      const chip = make("i");
      places.set(token.position, { chip, said: [] });
      block.append(chip);
    }
    if (block !== last) $("blocks").append(block);
  }
  for (const token of step.tokens) places.get(token.position).said.push({ ...token, number: step.number });
  const count = step.tokens.filter((token) => token.revealed).length;
  counts.push(count);
  most = Math.max(most, count);
  const bar = make("i", "", undefined, `step ${step.number}: ${count} tokens`);
  bar.style.setProperty("--count", count);
  $("bars").append(bar);
  $("bars").style.setProperty("--most", most);
  $("bars").scrollLeft = $("bars").scrollWidth;
  $("most").textContent = most;
  $("state").textContent = "is being decoded";
  // Only what this step or the one before it has changed is drawn.
  const changed = new Set(step.tokens.map((token) => token.position));
  for (const chip of document.querySelectorAll("#blocks .now")) changed.add(chip.position);
  showCursor(counts.length, changed);
  $("text").scrollTop = $("text").scrollHeight;
}

function draw(position, cursor) {
  const { chip, said } = places.get(position);
  const known = said.filter((each) => each.number <= cursor).at(-1);
  chip.position = position;
  chip.style.removeProperty("--sure");
  if (!known) {
    chip.className = "chip future";
    chip.textContent = "·";
    chip.title = "";
    return;
  }
  const confidence = known.confidence === null ? "" : `, confidence ${percent(known.confidence)}`;
  if (!known.revealed) {
    const draft = known.confidence === null || $("guesses").checked;
    chip.className = draft ? "chip draft" : "chip masked";
    chip.textContent = draft ? visible(known.text) : "░";
    chip.title = `candidate ${visible(known.text)}${confidence}`;
    return;
  }
  const afterEnd = usage && position >= usage.completion_tokens ? " after-end" : "";
  const kind = known.confidence === null ? "revealed" : "sure";
  chip.className = `chip ${kind}${afterEnd}${known.number === cursor ? " now" : ""}`;
  chip.textContent = visible(known.text);
  chip.title = `step ${known.number}${confidence}`;
  if (known.confidence !== null) chip.style.setProperty("--sure", known.confidence);
}

function showCursor(cursor, changed) { // what is known after this many steps
  $("slider").max = counts.length;
  $("slider").value = cursor;
  $("where").textContent = counts.length ? `step ${cursor} of ${counts.length}` : "";
  for (const position of changed ?? places.keys()) draw(position, cursor);
  if (!changed) Array.from($("bars").children).forEach((bar, i) => bar.classList.toggle("later", i >= cursor));
}

function showFigures() {
  const tokens = usage?.completion_tokens ?? counts.reduce((sum, count) => sum + count, 0);
  const steps = usage?.denoising_steps ?? counts.length;
  if (!tokens) return;
  $("tokens").textContent = tokens;
  $("steps").textContent = steps || "–";
  $("per-step").textContent = steps ? (tokens / steps).toFixed(2) : "–";
  $("per-second").textContent = spent ? Math.round((1000 * tokens) / spent) : "–";
}

function finish(how) {
  $("state").textContent = `${how} after ${(spent / 1000).toFixed(2)} s`;
  $("blocks").lastElementChild?.classList.remove("current");
  showCursor(counts.length);
  if (text && !counts.length) tell("note", "This server tells no denoising steps: the text comes as it is made.");
}

const showThreshold = () => { $("threshold-shown").textContent = Number($("threshold").value).toFixed(2); };
$("threshold").oninput = showThreshold;
$("slider").oninput = (event) => showCursor(Number(event.target.value));
$("guesses").onchange = () => showCursor(Number($("slider").value));
$("stop").onclick = () => running?.abort();
$("use-key").onclick = meet;
$("key").onkeydown = (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // the form would ask for a response
  meet();
};
$("prompt").onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) decode(); };
$("ask").onsubmit = (event) => {
  event.preventDefault();
  decode();
};
meet();
