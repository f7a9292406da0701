
"use strict";
// What both scripts of the page use, and the curves: inline SVG, with the values of a step under the pointer.
// All text goes into the page through textContent: nothing that a corpus or a policy wrote is ever read as markup.
const byId = (id) => document.getElementById(id);

// Characters that steer, reorder or hide text, or are hidden themselves, are shown by number; line breaks and tabs stay.
const HIDDEN = /(?![\t\n])[\p{Cc}\p{Cf}\u034f\u115f\u1160\u3164\uffa0\u{e0100}-\u{e01ef}]/gu;
const visible = (text) => String(text).replace(HIDDEN, (one) => "‹" + one.codePointAt(0).toString(16).toUpperCase().padStart(2, "0") + "›");

function node(tag, className, text, parent) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined && text !== null) made.textContent = visible(text);
  if (parent) parent.appendChild(made);
  return made;
}
const number = (value) => value === null || value === undefined ? "–" : Number.isInteger(value) ? String(value) : value.toFixed(3);
const counted = (value) => value.toLocaleString("en-US");

function showTip(text, event) {
  const tip = byId("tip");
  tip.textContent = visible(text);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18) + "px";
}
const hideTip = () => { byId("tip").hidden = true; };

const SVG = byId("drawing").namespaceURI;
function drawn(tag, attributes, parent, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = visible(text);
  if (parent) parent.appendChild(made);
  return made;
}

const WIDE = 340, HIGH = 150, LEFT = 44, RIGHT = 10, TOP = 8, BOTTOM = 18, LABEL = 62;

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1).replace(".0e", "e");
  return size >= 1000 ? counted(Math.round(value)) : String(Number(value.toPrecision(3)));
}
function ticks(low, high, most) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((one) => one >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step + 0);
  return found;
}
function decades(low, high) {
  const found = [];
  for (let power = Math.ceil(Math.log10(low) - 1e-9); 10 ** power <= high * 1.0001; power++) found.push(10 ** power);
  return found.length ? found : [low, high];
}

// A scale gives the place in the picture of a value.
function scales(panel) {
  const values = panel.series.flatMap((series) => series[2]).concat(panel.marks.map((mark) => mark[1])).filter((y) => y !== null && (!panel.logarithmic || y > 0));
  const steps = panel.series.flatMap((series) => series[1]).concat(panel.marks.map((mark) => mark[0]));
  const [firstX, lastX] = steps.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
  let [low, high] = values.reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)], [Infinity, -Infinity]);
  if (low > high) [low, high] = panel.logarithmic ? [0.1, 1] : [0, 1];
  if (!panel.logarithmic) {
    if (low >= 0 && low < 0.6 * high) low = 0;
    if (low === high) { if (high > 0) low = 0; else if (low < 0) high = 0; else high = 1; }
    high += 0.06 * (high - low);
    if (low < 0) low -= 0.06 * (high - low);
  } else if (low === high) { low /= 2; high *= 2; }
  const bend = panel.logarithmic ? Math.log : (y) => y;
  return {
    x: (x) => LEFT + (WIDE - LEFT - RIGHT) * (lastX === firstX ? 0.5 : (x - firstX) / (lastX - firstX)),
    y: (y) => HIGH - BOTTOM - (HIGH - TOP - BOTTOM) * (bend(y) - bend(low)) / (bend(high) - bend(low)),
    xTicks: ticks(firstX, lastX, 6).filter(Number.isInteger),
    yTicks: panel.logarithmic ? decades(low, high) : ticks(low, high, 4),
  };
}
function path(series, scale, logarithmic) {
  let text = "", gap = true;
  series[1].forEach((x, i) => {
    const y = series[2][i];
    if (y === null || (logarithmic && y <= 0)) { gap = true; return; }
    text += (gap ? "M" : "L") + scale.x(x).toFixed(1) + " " + scale.y(y).toFixed(1);
    gap = false;
  });
  return text;
}
// The height of a mark's label: nearest to the mark of those that no curve runs through, else the one farthest from the curves.
function freest(panel, scale, left, top, early) {
  const [from, until] = early ? [left + 4, left + LABEL] : [left - LABEL, left - 4];
  const beside = [];
  for (const series of panel.series) {
    const points = series[1].map((x, i) => [scale.x(x), series[2][i]]).filter(([, y]) => y !== null && (!panel.logarithmic || y > 0)).map(([x, y]) => [x, scale.y(y)]);
    points.forEach(([x, y], i) => {
      const [nextX, nextY] = points[i + 1] ?? [x, y];
      for (const share of [0, 0.25, 0.5, 0.75]) {
        const at = x + share * (nextX - x);
        if (at >= from && at <= until) beside.push(y + share * (nextY - y));
      }
    });
  }
  const room = (y) => Math.min(HIGH, ...beside.map((other) => Math.abs(other - (y - 4))));
  const heights = [-6, 13, -17, 24].map((away) => Math.max(TOP + 8, Math.min(HIGH - BOTTOM - 3, top + away)));
  return heights.find((y) => room(y) >= 7) ?? heights.reduce((best, y) => room(y) > room(best) ? y : best);
}
const look = (place) => "stroke" + place % 8 + (place >= 8 ? " dash" + (Math.floor(place / 8) + 1) % 3 : "");

function curve(panel, parent) {
  const figure = node("figure", "curve", null, parent);
  node("figcaption", "", panel.title, figure);
  const names = node("div", "names", null, figure);
  panel.series.forEach((series, place) => {
    const name = node("span", "", null, names);
    node("i", look(place), null, name);
    const last = series[2][series[2].length - 1];
    name.append(visible(series[0]));
    node("b", "", short(last), name);
  });
  if (panel.marks.length) {
    const name = node("span", "", null, names);
    node("i", "dot", null, name);
    name.append(visible(panel.marks_name));
  }
  const scale = scales(panel);
  const svg = drawn("svg", {viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", tabindex: "0"}, figure);
  svg.setAttribute("aria-label", panel.title + ": " + panel.series.map((series) => series[0] + " from " + short(series[2][0]) + " to " + short(series[2][series[2].length - 1])).join("; "));
  for (const y of scale.yTicks) {
    drawn("line", {class: "grid", x1: LEFT, x2: WIDE - RIGHT, y1: scale.y(y), y2: scale.y(y)}, svg);
    drawn("text", {x: LEFT - 5, y: scale.y(y) + 3, "text-anchor": "end"}, svg, short(y));
  }
  for (const x of scale.xTicks) drawn("text", {x: scale.x(x), y: HIGH - 5, "text-anchor": "middle"}, svg, counted(x));
  for (const [step, ended, began] of panel.switches) {
    const at = scale.x(step + 0.5);
    drawn("line", {class: "guide", x1: at, x2: at, y1: TOP, y2: HIGH - BOTTOM}, svg);
    drawn("text", {x: at - 3, y: TOP + 8, "text-anchor": "end"}, svg, ended);
    drawn("text", {x: at + 3, y: TOP + 8}, svg, began);
  }
  panel.series.forEach((series, place) => {
    drawn("path", {class: "line " + look(place), d: path(series, scale, panel.logarithmic)}, svg);
    if (series[1].length === 1 && series[2][0] !== null) drawn("circle", {class: look(place), r: 2.5, cx: scale.x(series[1][0]), cy: scale.y(series[2][0])}, svg);
  });
  for (const [x, y, label] of panel.marks) {
    const [left, top] = [scale.x(x), scale.y(y)];
    drawn("path", {class: "mark", d: `M${left} ${top - 5}l5 5l-5 5l-5 -5z`}, svg);
    const early = left < WIDE / 2;
    drawn("text", {class: "marklabel", x: early ? left + 8 : left - 8, y: freest(panel, scale, left, top, early), "text-anchor": early ? "start" : "end"}, svg,
      (["before", "after"].includes(label) ? label + " " : "") + short(y));
  }
  if (panel.note) node("div", "soft", panel.note, figure).style.fontSize = "12px";
  follow(svg, panel, scale);
  return figure;
}

// The values at the step nearest to the pointer, or at that to which the arrow keys went.
function follow(svg, panel, scale) {
  const steps = [...new Set(panel.series.flatMap((series) => series[1]).concat(panel.marks.map((mark) => mark[0])))].sort((a, b) => a - b);
  const values = panel.series.map((series) => new Map(series[1].map((x, i) => [x, series[2][i]])));
  const guide = drawn("line", {class: "guide", y1: TOP, y2: HIGH - BOTTOM, visibility: "hidden"}, svg);
  const dots = panel.series.map((series, place) => drawn("circle", {class: look(place), fill: "currentColor", r: 2.5, visibility: "hidden"}, svg));
  let at = -1;
  function tell(place, event) {
    at = place;
    const step = steps[place], lines = ["step " + counted(step)];
    guide.setAttribute("x1", scale.x(step));
    guide.setAttribute("x2", scale.x(step));
    guide.setAttribute("visibility", "visible");
    panel.series.forEach((series, i) => {
      const value = values[i].get(step);
      const shown = value !== undefined && value !== null && (!panel.logarithmic || value > 0);
      dots[i].setAttribute("visibility", shown ? "visible" : "hidden");
      if (shown) { dots[i].setAttribute("cx", scale.x(step)); dots[i].setAttribute("cy", scale.y(value)); }
      if (value !== undefined) lines.push(series[0] + ": " + (value === null ? "–" : String(value)));
    });
    for (const [x, y, label] of panel.marks) if (x === step) lines.push(panel.marks_name + ", " + label + ": " + number(y));
    showTip(lines.join("\n"), event);
  }
  function leave() {
    guide.setAttribute("visibility", "hidden");
    for (const dot of dots) dot.setAttribute("visibility", "hidden");
    hideTip();
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * WIDE / box.width;
    let nearest = 0;
    steps.forEach((step, i) => { if (Math.abs(scale.x(step) - x) < Math.abs(scale.x(steps[nearest]) - x)) nearest = i; });
    tell(nearest, event);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    const place = Math.max(0, Math.min(steps.length - 1, at + move)), box = svg.getBoundingClientRect();
    tell(place, {clientX: box.left + scale.x(steps[place]) * box.width / WIDE, clientY: box.top + box.height / 2});
  });
}
