
// The table, and the browser of trajectories. What the page shows is a function of `state`, which the address of the page keeps behind its #.
const data = JSON.parse(byId("data").textContent);
const OUTCOMES = {correct: "correct", partly: "partly right", wrong: "wrong", none: "no answer", lost: "search lost"};
const ROW = 68;
const state = {find: "", set: "", outcome: "", searches: "", sort: "order", only: new Set(), colour: "mask", beside: true, right: null, rightNumber: 0};
let texts = [], starts = [], cuts, logprobs, advantages, advantageScale = 0;
let items = [], twins = new Map(), shown = [], current = null;

// What each button keeps. `counts` of a button is how many it would show with all else that is chosen.
const QUICK = [
  {name: "wrong", says: "No exact match, though the search engine was there.", fits: (item) => ["partly", "wrong", "none"].includes(item.outcome)},
  {name: "no search", says: "The policy never searched.", fits: (item) => item.searches === 0},
  {name: "invalid", says: "With a turn that was neither a search nor an answer.", fits: (item) => item.turns.some(([action]) => action === "invalid")},
  {name: "truncated", says: "A budget was spent before there was an answer.", fits: (item) => item.truncated},
  {name: "search lost", says: "The search engine was lost; such an episode counts for nothing.", fits: (item) => item.outcome === "lost"},
  {name: "changed", says: "Right in one set and not in another.", fits: (item) => item.changed},
  {name: "longest", says: "The tenth of each set with the most tokens, longest first.", fits: (item) => item.longest},
];

// -- reading -----------------------------------------------------------------------------------------------------------------------------------

async function unpacked(id) {
  const text = atob(byId(id).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  byId(id).remove();
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}
async function read() {
  const [packed, ...arrays] = await Promise.all(["trajectories", "cuts", "logprobs", "advantages"].map(unpacked));
  const rest = JSON.parse(new TextDecoder().decode(packed));
  ({texts, starts, items} = rest);
  advantageScale = rest.advantage_scale;
  [cuts, logprobs, advantages] = [new Uint32Array(arrays[0]), new Float32Array(arrays[1]), new Float32Array(arrays[2])];
  items.forEach((item, place) => {
    item.place = place;
    item.key = item.id + "\n" + item.question;
    if (!twins.has(item.key)) twins.set(item.key, []);
    twins.get(item.key).push(item);
  });
  for (const same of twins.values()) {
    const right = new Set(same.filter((item) => item.outcome === "correct").map((item) => item.set));
    const wrong = new Set(same.filter((item) => !["correct", "lost"].includes(item.outcome)).map((item) => item.set));
    for (const item of same) {
      const others = item.outcome === "correct" ? wrong : right;
      item.changed = item.outcome !== "lost" && others.size > (others.has(item.set) ? 1 : 0);
    }
  }
  for (const set of data.sets) {
    const own = items.filter((item) => item.set === set).sort((a, b) => b.length - a.length || a.place - b.place);
    for (const item of own.slice(0, Math.ceil(own.length / 10))) item.longest = true;
  }
  for (const item of items) item.flags = QUICK.reduce((flags, quick, bit) => quick.fits(item) ? flags | 1 << bit : flags, 0);
}

// Calls visit(text, own, place in the trajectory's sampled tokens or -1) for each token of a text; own is null where the text has no cuts.
function visitTokens(which, firstSampled, visit) {
  const text = texts[which], end = starts[which + 1];
  if (starts[which] === end) { if (text) visit(text, null, -1); return firstSampled; }
  let at = 0, sampled = firstSampled;
  for (let i = starts[which]; i < end; i++) {
    const length = cuts[i] >>> 1, own = cuts[i] & 1;
    visit(text.slice(at, at + length), own, own ? sampled++ : -1);
    at += length;
  }
  return sampled;
}

// -- top ---------------------------------------------------------------------------------------------------------------------------------------

function drawTop() {
  byId("title").textContent = visible(data.title);
  byId("subtitle").textContent = visible(data.subtitle);
  byId("stamp").textContent = visible(JSON.stringify(data.stamp, null, 2));
  byId("stampbox").hidden = Object.keys(data.stamp).length === 0;
  const overview = byId("overview");
  if (data.table.columns.length > 5) overview.className = "overview wide";
  if (data.table.rows.length || data.notes.length) {
    const numbers = node("div", "numbers", null, overview);
    if (data.table.rows.length) drawTable(numbers);
    for (const note of data.notes) node("p", "note", note, numbers);
  }
  const first = data.curves.filter((panel) => !panel.more), more = data.curves.filter((panel) => panel.more);
  if (first.length) {
    const curves = node("div", "curves", null, overview);
    for (const panel of first) curve(panel, curves);
  }
  if (data.picture) {
    const image = node("img", "", null, overview);
    image.src = "data:image/png;base64," + data.picture;
    image.alt = "What this run measured, as a picture";
  }
  if (more.length) {
    const button = byId("morecurves");
    const name = () => { button.textContent = (byId("more").hidden ? "▸ " : "▾ ") + more.length + " more curves"; };
    byId("morebox").hidden = false;
    byId("more").hidden = true;
    name();
    button.addEventListener("click", () => {
      byId("more").hidden = !byId("more").hidden;
      if (!byId("more").childElementCount) for (const panel of more) curve(panel, byId("more"));
      button.setAttribute("aria-expanded", !byId("more").hidden);
      name();
    });
  }
}
function drawTable(parent) {
  const table = node("table", "", null, parent);
  const head = node("tr", "", null, node("thead", "", null, table));
  for (const name of data.table.columns) node("th", "", name, head);
  const body = node("tbody", "", null, table);
  for (const row of data.table.rows) {
    const line = node("tr", "", null, body);
    row.forEach((cell, i) => node("td", i ? "number" : "", cell, line));
    if (row.length > 1 && row.slice(1).every((cell) => cell === "")) line.className = "heading"; // of the rows beneath it
  }
}

// -- filters -----------------------------------------------------------------------------------------------------------------------------------

const lower = []; // of each text, once it was needed
const lowered = (which) => lower[which] ??= texts[which].toLowerCase();

// Whether an item has the words: in its question, answers or id, or in what was written and read. Each text is searched once.
function finder(words) {
  const found = new Map();
  const has = (which) => {
    if (which < 0) return false;
    if (!found.has(which)) found.set(which, lowered(which).includes(words));
    return found.get(which);
  };
  return (item) => {
    item.names ??= [item.id, item.question, item.answer ?? "", ...item.gold, ...item.turns.map((turn) => turn[1])].join("\n").toLowerCase();
    return item.names.includes(words) || item.turns.some((turn) => has(turn[2]) || has(turn[3]));
  };
}
function filter() {
  const words = state.find.toLowerCase(), has = words ? finder(words) : () => true;
  const chosen = QUICK.reduce((flags, quick, bit) => state.only.has(quick.name) ? flags | 1 << bit : flags, 0);
  const menus = ["set", "outcome", "searches"], counts = {set: {}, outcome: {}, searches: {}}, quickCounts = QUICK.map(() => 0);
  shown = [];
  for (const item of items) {
    const missed = menus.filter((menu) => state[menu] !== "" && String(item[menu]) !== state[menu]);
    if (missed.length > 1 || !has(item)) continue;
    if ((item.flags & chosen) === chosen) {
      for (const menu of menus) if (missed.every((one) => one === menu)) {
        counts[menu][item[menu]] = (counts[menu][item[menu]] ?? 0) + 1;
        counts[menu][""] = (counts[menu][""] ?? 0) + 1;
      }
      if (!missed.length) shown.push(item);
    }
    if (!missed.length) QUICK.forEach((quick, bit) => { if ((item.flags & (chosen | 1 << bit)) === (chosen | 1 << bit)) quickCounts[bit]++; });
  }
  const orders = {high: (a, b) => b.reward - a.reward, low: (a, b) => a.reward - b.reward, searches: (a, b) => b.searches - a.searches, long: (a, b) => b.length - a.length, advantage: (a, b) => b.peak - a.peak};
  const order = orders[state.only.has("longest") && state.sort === "order" ? "long" : state.sort];
  if (order) shown.sort((a, b) => order(a, b) || a.place - b.place);
  for (const menu of menus) for (const option of byId(menu).options) option.textContent = option.title + " (" + counted(counts[menu][option.value] ?? 0) + ")";
  QUICK.forEach((quick, bit) => {
    quick.count.textContent = counted(quickCounts[bit]);
    quick.button.setAttribute("aria-pressed", state.only.has(quick.name));
    quick.button.disabled = quickCounts[bit] === 0 && !state.only.has(quick.name);
  });
  byId("count").textContent = counted(shown.length) + " of " + counted(items.length);
  byId("rows").style.height = shown.length * ROW + "px";
  byId("rows").replaceChildren();
  if (shown.includes(current)) { reveal(); drawRows(); } else { byId("list").scrollTop = 0; drawRows(); open(shown[0] ?? null); }
  remember();
}

// -- list --------------------------------------------------------------------------------------------------------------------------------------

// Only the rows in sight are in the page.
function drawRows() {
  const list = byId("list"), rows = byId("rows");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4), end = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const present = new Map();
  for (const row of [...rows.children]) {
    if (row.place >= first && row.place < end) present.set(row.place, row); else row.remove();
  }
  for (let place = first; place < end; place++) if (!present.has(place)) rows.appendChild(row(place));
}
function row(place) {
  const item = shown[place], button = node("button", "item");
  button.type = "button";
  button.place = place;
  button.item = item;
  button.style.top = place * ROW + "px";
  button.setAttribute("aria-current", item === current);
  node("div", "q", item.question.slice(0, 300), button);
  const marks = node("div", "m", null, button);
  node("span", item.outcome === "correct" ? "good" : "bad", (item.outcome === "correct" ? "✓ " : "✗ ") + OUTCOMES[item.outcome], marks);
  node("span", "", item.searches + (item.searches === 1 ? " search" : " searches"), marks);
  node("span", "", "reward " + number(item.reward), marks);
  node("span", "", data.sets.length > 1 ? item.set : counted(item.length) + " tokens", marks);
  return button;
}
function reveal() {
  const list = byId("list"), top = shown.indexOf(current) * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
}

// -- one trajectory, or two beside each other --------------------------------------------------------------------------------------------------

function open(item) {
  current = item;
  for (const button of byId("rows").children) button.setAttribute("aria-current", button.item === item);
  byId("question").textContent = item ? visible(item.question) : "No trajectory fits.";
  for (const id of ["tools", "heads", "cards"]) byId(id).hidden = !item;
  byId("detail").scrollTop = 0;
  byId("cards").replaceChildren();
  byId("reason").hidden = true;
  if (item) drawDetail();
  remember();
}
const ofSet = (item, set) => twins.get(item.key).filter((other) => other.set === set);

// What stands on the right: the set that was chosen, else a later one, an earlier one, or another sample of the same; null for nothing.
function partner(item) {
  if (!state.beside) return null;
  const sets = data.sets.filter((set) => ofSet(item, set).some((other) => other !== item));
  if (!sets.length) return null;
  const after = data.sets.indexOf(item.set);
  const set = sets.includes(state.right) ? state.right : sets.find((one) => data.sets.indexOf(one) > after) ?? sets.find((one) => one !== item.set) ?? sets[0];
  const others = ofSet(item, set), wanted = others[state.rightNumber];
  return wanted && wanted !== item ? wanted : others.find((other) => other !== item);
}
function drawDetail() {
  const right = partner(current), columns = right ? [current, right] : [current];
  for (const id of ["heads", "cards"]) byId(id).className = right ? "columns two" : "columns";
  byId("rightbox").hidden = !right;
  byId("beside").disabled = twins.get(current.key).length < 2;
  head("left", current);
  if (right) head("right", right);
  const why = reason(columns);
  byId("reason").hidden = !why;
  byId("reason").textContent = why;
  drawLegend();
  for (const item of columns) episode(item, byId("cards"));
}
function head(side, item) {
  const sets = byId(side), numbers = byId(side + "number"), own = ofSet(item, item.set);
  const offered = data.sets.filter((set) => ofSet(item, set).some((other) => side === "left" || other !== current));
  choices(sets, offered.map((set) => [set, set]));
  sets.value = item.set;
  choices(numbers, own.map((other, i) => [String(i), (i + 1) + " of " + own.length]).filter((_, i) => side === "left" || own[i] !== current));
  numbers.value = String(own.indexOf(item));
  numbers.hidden = own.length === 1;
}
function choices(select, pairs) {
  select.replaceChildren();
  for (const [value, label] of pairs) {
    const option = node("option", "", label, select);
    option.value = value;
    option.title = visible(label);
  }
}

// Every colouring tells sampled tokens from those of the environment; the latter two say more of the sampled ones.
const COLOURS = {
  mask: {name: "mask", has: () => true},
  logprob: {name: "log-prob", has: (item) => item.logprobs >= 0, lacks: "log-probabilities: the agent gives none, or its tokenizer cannot be had"},
  advantage: {name: "advantage", has: (item) => item.advantages >= 0, lacks: "advantages: only rollouts of training have them"},
};
function reason(columns) {
  const colour = COLOURS[state.colour], without = columns.filter((item) => !colour.has(item));
  const lines = without.length ? [(columns.length > without.length ? without[0].set : "This") + " has no " + colour.lacks + "."] : [];
  const silent = state.colour === "advantage" ? columns.filter((item) => item.peak === 0) : [];
  if (silent.length) {
    const [item] = silent, own = ofSet(item, item.set);
    const whose = columns.length === silent.length ? "" : " of " + item.set + ", " + (own.indexOf(item) + 1) + " of " + own.length + ",";
    const alike = silent.every((one) => sameReward(ofSet(one, one.set)));
    lines.push("All advantages" + whose + " are 0" + (alike ? ": the samples of this question had the same reward." : "."));
  }
  return visible(lines.join(" "));
}
function sameReward(samples) {
  const whole = samples.filter((one) => one.outcome !== "lost");
  return whole.length > 1 && whole.every((one) => one.reward === whole[0].reward);
}
const heat = (logprob) => "rgba(var(--heat), " + Math.min(0.75, -logprob / 4).toFixed(3) + ")";
const weight = (advantage) => {
  if (!advantage) return "";
  const share = Math.min(1, Math.abs(advantage) / (advantageScale || 1));
  return "rgba(var(" + (advantage > 0 ? "--plus" : "--minus") + "), " + (0.1 + 0.6 * share).toFixed(3) + ")";
};
const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(3);

function drawLegend() {
  const legend = byId("legend");
  legend.replaceChildren();
  const box = (background, className) => { node("i", className, null, legend).style.background = background; };
  if (state.colour === "mask") {
    box("rgba(var(--own), .3)");
    legend.append(" sampled by the policy, trained on ");
    box("rgba(var(--other), .2)");
    legend.append(" environment, masked");
  } else if (state.colour === "logprob") {
    legend.append("p = 1 ");
    for (const logprob of [0, -0.7, -1.5, -3]) box(heat(logprob));
    legend.append(" p < .05");
  } else {
    legend.append(signed(-advantageScale).replace("-", "−") + " ");
    for (const share of [-1, -0.5, 0, 0.5, 1]) box(weight(share * advantageScale));
    legend.append(" " + signed(advantageScale) + ", below zero underlined");
  }
}
function dress(span, own, item, sampled, place) {
  if (state.colour === "mask") {
    span.style.background = own ? "rgba(var(--own), " + (place % 2 ? .17 : .3) + ")" : "rgba(var(--other), " + (place % 2 ? .1 : .2) + ")";
    return;
  }
  if (!own) { span.className = "masked"; return; }
  if (sampled < 0) return;
  if (state.colour === "logprob" && item.logprobs >= 0) span.style.background = heat(logprobs[item.logprobs + sampled]);
  if (state.colour === "advantage" && item.advantages >= 0) {
    const advantage = advantages[item.advantages + sampled];
    span.style.background = weight(advantage);
    if (advantage < 0) span.className = "below";
  }
}

// Draws a text token by token. Line breaks around it are drawn as signs, so that they take no lines.
function drawText(parent, item, which, ofPolicy, counter) {
  const text = texts[which], from = text.length - text.trimStart().length, until = text.trimEnd().length;
  let at = 0;
  counter.sampled = visitTokens(which, counter.sampled, (piece, own, sampled) => {
    const begin = at;
    at += piece.length;
    const outside = begin < from || at > until;
    const drawn = outside ? [...piece].map((one, i) => one === "\n" && (begin + i < from || begin + i >= until) ? "↵" : one).join("") : piece;
    const span = node("span", "", drawn, parent);
    const mine = own === null ? ofPolicy : own === 1;
    if (own === null) counter.token = NaN; // how many tokens it has is not known, nor the place of those behind it
    dress(span, mine, item, sampled, counter.token);
    span.token = {item, piece, mine, sampled, place: counter.token};
    counter.token += 1;
  });
}
function tellToken(token) {
  const {item, piece, mine, sampled, place} = token;
  const lines = [JSON.stringify(piece.length > 200 ? piece.slice(0, 200) + "…" : piece)];
  lines.push((Number.isNaN(place) ? "" : "token " + counted(place + 1) + " of " + counted(item.length) + ", ") + (mine ? "sampled by the policy" : "environment, masked"));
  if (sampled >= 0 && item.logprobs >= 0) {
    const logprob = logprobs[item.logprobs + sampled];
    lines.push("log-prob " + logprob.toFixed(3) + ", p = " + Math.exp(logprob).toFixed(3));
  }
  if (sampled >= 0 && item.advantages >= 0) lines.push("advantage " + signed(advantages[item.advantages + sampled]));
  return lines.join("\n");
}
function episode(item, parent) {
  const card = node("article", "episode", null, parent);
  const head = node("header", "", null, card);
  const answer = node("div", "", "answer: ", head);
  node("strong", item.outcome === "correct" ? "good" : "bad", item.answer === null ? "none" : item.answer || "(empty)", answer);
  node("div", "", "gold: " + item.gold.join(" / "), head);
  node("div", "soft", item.ending, head);
  node("div", "soft", counted(item.length) + " tokens", head);
  node("div", "soft", "question " + item.id, head);
  if (item.retokenized) node("div", "soft", "encoded from text, not as it was sampled", head);
  const counter = {token: 0, sampled: 0};
  const prompt = node("details", "", null, card);
  node("summary", "", "Prompt", prompt);
  const ofPrompt = starts[item.prompt + 1] - starts[item.prompt];
  prompt.addEventListener("toggle", () => {
    if (prompt.open && prompt.childElementCount === 1) drawText(node("div", "text env", null, prompt), item, item.prompt, false, {token: 0, sampled: 0});
  });
  counter.token = ofPrompt;
  item.turns.forEach(([action, content, segment, reply], i) => {
    const box = node("section", "turn", null, card);
    node("div", "says", "Turn " + (i + 1) + " · " + action + (content ? ": " + content.slice(0, 300) : ""), box);
    drawText(node("div", "text policy", null, box), item, segment, true, counter);
    if (reply >= 0) drawText(node("div", "text env", null, box), item, reply, false, counter);
  });
  const scores = node("div", "scores", null, card);
  pairs("Reward " + number(item.reward), item.terms, scores);
  pairs("Metrics", item.metrics, scores);
}
function pairs(title, values, parent) {
  const box = node("div", "", null, parent);
  node("strong", "", title, box);
  const table = node("table", "", null, box);
  for (const [name, value] of Object.entries(values)) {
    const line = node("tr", "", null, table);
    node("th", "", name, line);
    node("td", "number", number(value), line);
  }
}

// -- address -----------------------------------------------------------------------------------------------------------------------------------

let waiting = null;
function remember() {
  clearTimeout(waiting);
  waiting = setTimeout(() => { if (location.hash !== address()) history.replaceState(null, "", address() || "#"); }, 150); // browsers refuse many changes at once
}
function address() {
  const parts = new URLSearchParams();
  for (const name of ["find", "set", "outcome", "searches"]) if (state[name] !== "") parts.set(name, state[name]);
  if (state.sort !== "order") parts.set("sort", state.sort);
  if (state.only.size) parts.set("only", [...state.only].join(","));
  if (state.colour !== "mask") parts.set("colour", state.colour);
  if (!state.beside) parts.set("beside", "no");
  if (state.right !== null) parts.set("right", state.right + "." + state.rightNumber);
  if (current) parts.set("at", current.set + "." + current.number);
  return "#" + parts;
}
const split = (name) => [name.slice(0, name.lastIndexOf(".")), Number(name.slice(name.lastIndexOf(".") + 1))];
function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  for (const name of ["find", "set", "outcome", "searches"]) state[name] = parts.get(name) ?? "";
  for (const name of ["set", "outcome", "searches"]) if (![...byId(name).options].some((option) => option.value === state[name])) state[name] = "";
  state.sort = [...byId("sort").options].some((option) => option.value === parts.get("sort") && !option.disabled) ? parts.get("sort") : "order";
  state.only = new Set((parts.get("only") ?? "").split(",").filter((name) => QUICK.some((quick) => quick.name === name)));
  state.colour = Object.hasOwn(COLOURS, parts.get("colour")) && !byId("colour-" + parts.get("colour")).disabled ? parts.get("colour") : "mask";
  state.beside = parts.get("beside") !== "no";
  [state.right, state.rightNumber] = parts.has("right") ? split(parts.get("right")) : [null, 0];
  for (const name of ["find", "set", "outcome", "searches", "sort"]) byId(name).value = state[name];
  byId("colour-" + state.colour).checked = true;
  byId("beside").checked = state.beside;
  const [set, place] = split(parts.get("at") ?? "");
  return items.find((item) => item.set === set && item.number === place) ?? null;
}

// -- start -------------------------------------------------------------------------------------------------------------------------------------

function listen() {
  for (const id of ["set", "outcome", "searches", "sort"]) byId(id).addEventListener("change", (event) => { state[id] = event.target.value; filter(); });
  byId("find").addEventListener("input", (event) => { state.find = event.target.value; filter(); });
  byId("beside").addEventListener("change", (event) => { state.beside = event.target.checked; open(current); });
  byId("left").addEventListener("change", (event) => open(ofSet(current, event.target.value)[0]));
  byId("leftnumber").addEventListener("change", (event) => open(ofSet(current, current.set)[Number(event.target.value)]));
  byId("right").addEventListener("change", (event) => { state.right = event.target.value; state.rightNumber = 0; open(current); });
  byId("rightnumber").addEventListener("change", (event) => { state.right = byId("right").value; state.rightNumber = Number(event.target.value); open(current); });
  byId("rows").addEventListener("click", (event) => { const button = event.target.closest(".item"); if (button) open(button.item); });
  byId("list").addEventListener("scroll", drawRows, {passive: true});
  addEventListener("resize", drawRows);
  addEventListener("hashchange", () => { const item = recall(); if (item) current = item; filter(); if (item && shown.includes(item)) open(item); });
  byId("detail").addEventListener("pointermove", (event) => { if (event.target.token) showTip(tellToken(event.target.token), event); else hideTip(); });
  byId("detail").addEventListener("pointerleave", hideTip);
  addEventListener("keydown", key);
}
function key(event) {
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) && event.target.type !== "radio" && event.target.type !== "checkbox";
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); byId("find").focus(); byId("find").select(); }
  const move = {j: 1, k: -1}[event.key];
  if (!move || !shown.length) return;
  const place = Math.max(0, Math.min(shown.length - 1, shown.indexOf(current) + move));
  open(shown[place]);
  reveal();
  drawRows();
  if (byId("browser").getBoundingClientRect().top > innerHeight / 2) byId("browser").scrollIntoView();
}
function drawControls() {
  choices(byId("set"), [["", "all"], ...data.sets.map((name) => [name, name])]);
  choices(byId("outcome"), [["", "all"], ...Object.entries(OUTCOMES).filter(([name]) => items.some((item) => item.outcome === name))]);
  choices(byId("searches"), [["", "any"], ...[...new Set(items.map((item) => item.searches))].sort((a, b) => a - b).map((n) => [String(n), String(n)])]);
  for (const quick of QUICK) {
    quick.button = node("button", "", quick.name, byId("quick"));
    quick.button.type = "button";
    quick.button.title = quick.says;
    quick.count = node("span", "", "", quick.button);
    quick.button.addEventListener("click", () => { if (!state.only.delete(quick.name)) state.only.add(quick.name); filter(); });
  }
  for (const [name, colour] of Object.entries(COLOURS)) {
    const label = node("label", "", null, byId("colours")), radio = node("input", "", null, label);
    Object.assign(radio, {type: "radio", name: "colour", id: "colour-" + name, value: name, disabled: !items.some(colour.has)});
    label.append(" " + colour.name);
    if (radio.disabled) label.title = "No trajectory of this page has " + colour.lacks + ".";
    radio.addEventListener("change", () => { state.colour = name; open(current); });
  }
  byId("byadvantage").disabled = !items.some(COLOURS.advantage.has);
}

// Opens on what training changed, where there is such a question.
function firstOpened() {
  const later = (item) => twins.get(item.key).some((other) => data.sets.indexOf(other.set) > data.sets.indexOf(item.set) && other.outcome === "correct");
  return items.slice(0, 500).find((item) => item.outcome !== "correct" && later(item)) ?? null;
}
async function start() {
  drawTop();
  await read();
  drawControls();
  const asked = recall();
  current = asked ?? firstOpened();
  listen();
  filter();
  if (current && shown.includes(current)) open(current);
  if (asked) byId("browser").scrollIntoView();
}
start().catch((error) => {
  byId("problem").hidden = false;
  byId("problem").textContent = "This page cannot show its trajectories: " + visible(error.message) + (self.DecompressionStream ? "" : ". It needs a browser of 2023 or later.");
}).finally(() => { performance.mark("shown"); document.documentElement.dataset.ready = "yes"; });
