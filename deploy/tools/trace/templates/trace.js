// The state is two numbers: the shown trajectory and its step (0 to n - 1, or n when all tokens are revealed). The
// page's address has them too (#trajectory=1&step=1, counted from 1). All texts are inserted as text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
let chosen = 0, cursor = 0, playing = null; // the trajectory, its step, the timer
let steps = []; // all steps of the trajectory: {block, step}
let revealed = []; // by response position: the entry of `at` with which it was revealed, and its step
let maxKl = 0; // largest KL of the trajectory

const raw = (token) => data.tokens[token] ?? "";
const shown = (token) => raw(token).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
const inText = (token) => visible(raw(token));
const nats = (kl) => (kl === null ? "–" : kl >= 1 ? kl.toFixed(2) : kl >= 0.0001 ? kl.toFixed(4) : kl.toExponential(0));
const part = (value, largest) => (largest > 0 ? Math.min(value / largest, 1) : 0);
const hasDrafts = data.settings.strategy === "verified"; // each step verifies drafts, and is a block of its own
const current = () => data.trajectories[chosen];
const blockAt = (at) => (at < steps.length ? steps[at].block : current().blocks.length);

function choose(index) {
  chosen = index;
  const trajectory = current(), length = trajectory.response_length;
  steps = trajectory.blocks.flatMap((block, b) => block.steps.map((step) => ({ block: b, step })));
  revealed = [];
  maxKl = 0;
  for (const { step } of steps)
    for (const place of step.at) {
      if (place[3]) revealed[place[0]] = { place, step: step.step };
      if (place[4] !== null) maxKl = Math.max(maxKl, place[4]);
    }
  $("trajectory").value = index;
  $("slider").max = steps.length;
  $("totals").textContent = `${length} tokens in ${trajectory.denoising_steps} denoising steps, `
    + `${trajectory.tokens_per_step.toFixed(2)} tokens per step, mean KL ${nats(trajectory.mean_kl)} nats, `
    + (trajectory.finish_reason === "eos" ? "ended with an end-of-sequence token" : "cut at the length limit");
  $("kl-most").textContent = nats(maxKl);
  $("prompt").textContent = trajectory.prompt;
  $("response").textContent = trajectory.response;
  layText(trajectory);
  layBars(trajectory);
}

function layText(trajectory) {
  const prompt = make("span", "prompt", trajectory.prompt_ids.map(inText).join(""));
  const blocks = trajectory.blocks.map((block, b) => {
    const span = make("span", "block");
    span.onclick = () => go(firstStep(b));
    return span;
  });
  $("text").replaceChildren(prompt, ...blocks);
}

function layBars(trajectory) {
  const kl = Math.max(...trajectory.blocks.map((block) => block.mean_kl ?? 0));
  const speed = Math.max(...trajectory.blocks.map((block) => block.tokens_per_step));
  const bars = trajectory.blocks.map((block, b) => {
    const bar = make("div", "bar", undefined, `block ${b + 1}: ${blockTotals(block)}`);
    for (const [side, share] of [["up", part(block.mean_kl ?? 0, kl)], ["down", part(block.tokens_per_step, speed)]]) {
      const half = make("div", side);
      half.append(make("i"));
      half.firstChild.style.setProperty("--part", share);
      bar.append(half);
    }
    bar.onclick = () => go(firstStep(b));
    return bar;
  });
  $("bars").replaceChildren(...bars);
  $("bar-kl").textContent = nats(kl);
  $("bar-speed").textContent = speed.toFixed(2);
}

const firstStep = (b) => steps.findIndex((entry) => entry.block === b);
const blockTotals = (block) =>
  `mean KL ${nats(block.mean_kl)} nats, ${block.tokens_per_step.toFixed(2)} tokens per step`;

function go(to) {
  cursor = Math.min(Math.max(to, 0), steps.length);
  const trajectory = current(), at = blockAt(cursor), now = steps[cursor]?.step;
  $("slider").value = cursor;
  $("where").textContent = now
    ? `step ${cursor + 1} of ${steps.length}, block ${at + 1} of ${trajectory.blocks.length}`
    : `done: ${steps.length} steps, ${trajectory.blocks.length} blocks`;
  paintText(trajectory, at, now);
  paintCards(trajectory, Math.min(at, trajectory.blocks.length - 1), now);
  history.replaceState(null, "", `#trajectory=${chosen + 1}&step=${cursor + 1}`);
}

function paintText(trajectory, at, now) {
  const spans = $("text").children;
  trajectory.blocks.forEach((block, b) => {
    const span = spans[b + 1], state = b === at ? `step ${now.step}` : b < at ? "done" : "future";
    if (span.dataset.state !== state) { // redraws only what changed: a response can have thousands of tokens
      span.dataset.state = state;
      span.classList.toggle("current", b === at);
      span.replaceChildren(...Array.from({ length: block.count }, (_, i) => chip(trajectory, block.first + i, state, now)));
    }
  });
  Array.from($("bars").children).forEach((bar, b) => bar.classList.toggle("current", b === at));
  const span = spans[Math.min(at, trajectory.blocks.length - 1) + 1], box = $("text");
  if (span.offsetTop < box.scrollTop + box.offsetTop || span.offsetTop + span.offsetHeight > box.scrollTop + box.offsetTop + box.clientHeight)
    box.scrollTop = span.offsetTop - box.offsetTop - box.clientHeight / 2;
}

function chip(trajectory, position, state, now) {
  if (state === "future") return make("i", "chip future", "·");
  const { place, step } = revealed[position];
  if (state !== "done" && step > now.step) return make("i", "chip masked", "░");
  const afterEnd = position >= trajectory.response_length ? " after-end" : "";
  const recent = state !== "done" && step === now.step ? " now" : "";
  return sure("chip sure" + afterEnd + recent, inText(place[1]), place[2], `step ${step}, confidence ${percent(place[2])}`);
}

function paintCards(trajectory, b, now) {
  const block = trajectory.blocks[b], prompt = trajectory.prompt_ids;
  const end = prompt.length + block.steps[0].at.at(-1)[0] + 1; // behind the block's own lie drafts that were thrown away
  const kl = now ? now.at.filter((place) => place[4] !== null).map((place) => place[4]) : [];
  const mean = kl.length ? `; this step ${nats(kl.reduce((a, c) => a + c) / kl.length)} nats` : "";
  $("block").replaceChildren(`Block ${b + 1}`, make("small", "", `positions ${block.start} to ${prompt.length + block.first + block.count - 1}, ${blockTotals(block)}${mean}`));
  const cards = [];
  for (let position = block.start; position < end; position++)
    cards.push(position < prompt.length ? promptCard(position, prompt[position]) : card(trajectory, position, now));
  $("cards").replaceChildren(...cards);
}

function promptCard(position, token) {
  const element = make("div", "card earlier");
  element.append(head(position, "prompt"), make("span", "token masked", shown(token)));
  return element;
}

function head(position, state) {
  const element = make("div", "head");
  element.append(make("span", "", `position ${position}`), make("span", "", state));
  return element;
}

function card(trajectory, position, now) {
  const response = position - trajectory.prompt_ids.length;
  const live = now && now.at.find((place) => place[0] === response);
  const { place: final, step } = revealed[response];
  const [, candidate, confidence, isRevealed, kl, tops, wrong] = live ?? final;
  const state = hasDrafts ? fate(live ?? final) : !live ? `revealed by step ${step}` : isRevealed ? "revealed now" : "masked";
  const element = make("div", "card" + (live ? (isRevealed ? " now" : "") : " earlier"));
  const token = make("span", live && !isRevealed ? "token masked" : "token sure", live && !isRevealed && !hasDrafts ? "░" : shown(candidate));
  token.style.setProperty("--sure", confidence);
  const about = wrong != null ? `draft ${shown(wrong)} was wrong, teacher's ` : live && !isRevealed ? `candidate ${shown(candidate)}, ` : "";
  const said = `${about}confidence ${percent(confidence)}`;
  element.append(head(position, state), token, make("span", "said", said));

  const meter = make("div", "meter"), track = make("div", "track");
  track.append(make("i"));
  track.firstChild.style.setProperty("--part", Math.sqrt(part(kl ?? 0, maxKl)));
  meter.append(make("span", "", "KL"), track, make("span", "number", kl === null ? (hasDrafts ? "no draft" : "after the end") : `${nats(kl)} nats`));
  const pair = make("div", "tops");
  pair.append(topTable("student", tops, wrong ?? candidate), topTable("teacher", trajectory.teacher[response] ?? [], candidate));
  element.append(meter, pair);
  return element;
}

function fate([, , , isRevealed, kl, , wrong]) {
  if (!isRevealed) return "draft, thrown away";
  return wrong != null || kl === null ? "the teacher's own token" : "draft, right";
}

function topTable(title, tops, candidate) {
  const table = make("table");
  table.append(make("caption", "", title));
  for (let i = 0; i < tops.length; i += 2) {
    const row = make("tr", tops[i] === candidate ? "chosen" : "");
    row.style.setProperty("--part", tops[i + 1]);
    row.append(make("td", "", shown(tops[i]), `token ${tops[i]}`), make("td", "", percent(tops[i + 1])));
    table.append(row);
  }
  if (!tops.length) table.append(make("caption", "", "–"));
  return table;
}

function play(on) {
  clearInterval(playing);
  playing = on ? setInterval(() => (cursor < steps.length ? go(cursor + 1) : play(false)), 1000 / $("speed").value) : null;
  $("play").textContent = on ? "‖ Pause" : "▶ Play";
  if (on && cursor === steps.length) go(0);
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const index = Math.min(Math.max((Number(asked.get("trajectory")) || 1) - 1, 0), data.trajectories.length - 1);
  choose(index);
  go((Number(asked.get("step")) || 1) - 1);
}

const settings = Object.entries(data.settings).map(([name, value]) => [name.replace(/_/g, " "), String(value)]);
for (const [name, value] of [["run", data.run], ["student", data.student], ["teacher", data.teacher], ...settings]) {
  const pair = make("div");
  pair.append(make("dt", "", name), make("dd", "", value));
  $("facts").append(pair);
}
data.trajectories.forEach((trajectory, i) => {
  const option = make("option", "", `${i + 1}. ${trajectory.prompt.slice(0, 50)}`, trajectory.name);
  option.value = i;
  $("trajectory").append(option);
});
$("trajectory").onchange = (event) => { play(false); choose(Number(event.target.value)); go(0); };
$("slider").oninput = (event) => go(Number(event.target.value));
$("first").onclick = () => go(0);
$("back").onclick = () => go(cursor - 1);
$("next").onclick = () => go(cursor + 1);
$("last").onclick = () => go(steps.length);
$("play").onclick = () => play(playing === null);
$("speed").onchange = () => play(playing !== null);
document.onclick = (event) => { // so that the space bar does not press the clicked button again
  if (event.detail > 0 && event.target.tagName === "BUTTON") event.target.blur();
};
document.onkeydown = (event) => {
  if (event.target.tagName === "SELECT" || event.altKey || event.ctrlKey || event.metaKey) return;
  const b = blockAt(cursor), blocks = current().blocks.length;
  const to = {
    ArrowLeft: event.shiftKey ? firstStep(Math.max(b - 1, 0)) : cursor - 1,
    ArrowRight: event.shiftKey ? (b + 1 < blocks ? firstStep(b + 1) : steps.length) : cursor + 1,
    Home: 0,
    End: steps.length,
  }[event.key];
  if (to !== undefined) go(to);
  else if (event.key === " " && event.target.tagName !== "BUTTON") play(playing === null);
  else return;
  event.preventDefault();
};
window.onhashchange = readAddress;
readAddress();
