// Elements, numbers, line charts, bars, and the load of experts over time.
const WIDTH = 560, HEIGHT = 250, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 38;

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g", "rect", "image", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
                   : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function format(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(3) + "k";
  return String(+value.toPrecision(4));
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough);
  const marks = [];
  for (let mark = Math.ceil(low / step) * step; mark <= high + step * 1e-9; mark += step) marks.push(mark);
  return marks;
}

// Marks of a logarithmic axis: 1, 2 and 5 times the powers of ten, powers alone if those are many.
function logTicks(low, high) {
  const marks = [], digits = high / low < 1e3 ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const digit of digits) marks.push(digit * 10 ** power);
  return marks.filter(mark => mark >= low && mark <= high);
}

// A line chart. series: [{name, color, points: [[x, y], ...]}]; the name is shown in the legend, and
// `hoverText` instead of it under the mouse. level: a dashed line with a label. top: end of an axis from 0.
// log: the axis of x is logarithmic where points span more than a decade, so that the steep start and the
// flat end of a loss are both legible. empty: why there may be no points.
function chart(title, small, series, {x, level = null, mark = null, fromZero = false, top = null,
                                      narrow = false, log = false, empty = "nothing was measured"} = {}) {
  const wide = narrow ? 384 : WIDTH, high = narrow ? 190 : HEIGHT, left = narrow ? 38 : LEFT;
  series = series.map(s => ({...s, points: s.points.filter(p => p[0] != null && p[1] != null)}))
                 .filter(s => s.points.length);
  const caption = element("figcaption", {}, title, " ", element("small", {}, small));
  if (!series.length) return element("figure", {}, caption, element("p", {class: "note"}, `No points: ${empty}.`));
  const xs = series.flatMap(s => s.points.map(p => p[0]));
  const ys = series.flatMap(s => s.points.map(p => p[1]));
  if (level) ys.push(level.value);
  if (fromZero) ys.push(0, top || 0);
  const highX = xs.reduce((a, b) => Math.max(a, b));
  log = log && xs.every(v => v > 0) && highX > 10 * xs.reduce((a, b) => Math.min(a, b));
  const lowX = xs.reduce((a, b) => Math.min(a, b), log ? Infinity : 0);
  let highY = ys.reduce((a, b) => Math.max(a, b)), lowY = ys.reduce((a, b) => Math.min(a, b));
  if (highY === lowY) { highY += Math.abs(highY) * 0.1 || 1; }
  const pad = (highY - lowY) * 0.05;
  highY += pad; if (!fromZero) lowY -= pad;
  const along = log ? Math.log : v => v, back = log ? Math.exp : v => v;
  const px = v => left + (along(v) - along(lowX)) / (along(highX) - along(lowX) || 1) * (wide - left - RIGHT);
  const py = v => high - BOTTOM - (v - lowY) / (highY - lowY) * (high - TOP - BOTTOM);
  const svg = element("svg", {viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": title});
  for (const t of ticks(lowY, highY, narrow ? 4 : 5)) svg.append(
    element("line", {x1: left, x2: wide - RIGHT, y1: py(t), y2: py(t), stroke: "var(--line)"}),
    element("text", {x: left - 6, y: py(t) + 4, "text-anchor": "end"}, format(t)));
  for (const t of log ? logTicks(lowX, highX) : ticks(lowX, highX, narrow ? 5 : 7)) svg.append(
    element("text", {x: px(t), y: high - 20, "text-anchor": px(t) > wide - 30 ? "end" : "middle"}, format(t)));
  svg.append(element("text", {x: wide - RIGHT, y: high - 4, "text-anchor": "end"}, log ? `${x}, logarithmic` : x));
  if (level) svg.append(
    element("line", {x1: left, x2: wide - RIGHT, y1: py(level.value), y2: py(level.value),
                     stroke: "var(--faint)", "stroke-dasharray": "5 4"}),
    element("text", {x: left + 5, y: py(level.value) - 5}, level.label));
  for (const s of series) svg.append(s.points.length === 1
    ? element("circle", {cx: px(s.points[0][0]), cy: py(s.points[0][1]), r: 3, fill: s.color})
    : element("path", {
      d: s.points.map((p, i) => (i ? "L" : "M") + px(p[0]).toFixed(1) + " " + py(p[1]).toFixed(1)).join(""),
      fill: "none", stroke: s.color, "stroke-width": 1.8, "stroke-opacity": s.opacity || 1,
      "stroke-dasharray": s.dashes || "none", "stroke-linejoin": "round"}));
  if (mark) svg.append(
    element("line", {x1: px(mark.x), x2: px(mark.x), y1: py(mark.y), y2: high - BOTTOM,
                     stroke: "var(--good)", "stroke-dasharray": "3 3"}),
    element("circle", {cx: px(mark.x), cy: py(mark.y), r: 4.5, fill: "var(--good)"}),
    element("text", px(mark.x) > wide - 90
      ? {x: px(mark.x) - 6, y: high - BOTTOM - 6, "text-anchor": "end"}
      : {x: px(mark.x) + 6, y: high - BOTTOM - 6}, mark.label));
  const hover = element("text", {x: wide - RIGHT, y: TOP + 8, "text-anchor": "end"});
  svg.append(hover);
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width * wide - left) / (wide - left - RIGHT);
    const at = back(along(lowX) + place * (along(highX) - along(lowX)));
    const height = (event.clientY - box.top) / box.height * high;
    let found = series.map(s => {
      const near = s.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      return {text: `${s.hoverText || s.name} ${format(near[1])}`, away: Math.abs(py(near[1]) - height)};
    });
    // Show all of a few series, else the one nearest to the mouse.
    if (narrow || found.length > 6) found = [found.reduce((a, b) => b.away < a.away ? b : a)];
    hover.textContent = found.map(one => one.text).join("   ") + `   at ${format(at)}`;
  });
  svg.addEventListener("mouseleave", () => { hover.textContent = ""; });
  for (const s of series) if (s.name) caption.append(named(s.name, s.color));
  return element("figure", {}, caption, svg);
}

// Blue is idle, the background is an even load, orange is overloaded.
const SHADES = {
  light: [[92, 132, 205], [176, 198, 232], [244, 243, 238], [240, 166, 86], [176, 58, 8]],
  dark: [[20, 42, 100], [42, 70, 128], [92, 97, 107], [196, 120, 56], [255, 178, 96]],
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const painters = [];  // redraw canvases when the theme changes
dark.addEventListener("change", () => painters.forEach(draw => draw()));
function paint(draw) {
  painters.push(draw);
  draw();
}

// A colour and its name, without a line break between them.
function named(name, color) {
  return element("span", {class: "named"}, element("span", {class: "key", style: `background:${color}`}),
                 element("small", {}, name));
}

function hue(index, count) {
  return `hsl(${Math.round(360 * index / count)} 60% 50%)`;
}

// Colour-blind safe colours for a few lines, and a range from blue to orange for many.
const TONES = ["#1d5fd1", "#d9730d", "#12805c", "#8e44ad", "#c2255c", "#0e8ba0", "#8a6d1b", "#6b7686"];
function tone(index, count) {
  if (count <= TONES.length) return TONES[index];
  return `hsl(${Math.round(225 - 200 * index / (count - 1))} 65% 46%)`;
}

function shade(ratio) {
  const place = Math.max(0, Math.min(3.999, (Math.log2(Math.max(ratio, 1 / 16)) + 2) ));
  const low = Math.floor(place), part = place - low, shades = SHADES[dark.matches ? "dark" : "light"];
  return shades[low].map((v, i) => Math.round(v + (shades[low + 1][i] - v) * part));
}

function heatmap(name, lines, layer) {
  const experts = lines[0].load[layer].length;
  const canvas = element("canvas", {width: lines.length, height: experts, role: "img",
    "aria-label": `load of every expert over time, ${name}`});
  paint(() => {
    const context = canvas.getContext("2d"), image = context.createImageData(lines.length, experts);
    lines.forEach((line, column) => line.load[layer].forEach((share, expert) =>
      image.data.set([...shade(share * experts), 255], 4 * (expert * lines.length + column))));
    context.putImageData(image, 0, 0);
  });
  const last = lines[lines.length - 1].load[layer], most = Math.max(...last) * experts;
  const idle = last.filter(share => share * experts < 0.05).length;
  const small = element("small", {}, `last: busiest ${most.toFixed(2)} times the mean, ${idle} idle`);
  const caption = element("figcaption", {}, name, " ", small);
  const rest = small.textContent;
  canvas.addEventListener("mousemove", event => {
    const box = canvas.getBoundingClientRect();
    const column = Math.min(lines.length - 1, Math.floor((event.clientX - box.left) / box.width * lines.length));
    const expert = Math.min(experts - 1, Math.floor((event.clientY - box.top) / box.height * experts));
    small.textContent = `step ${lines[column].step}, expert ${expert}: ` +
      `${(lines[column].load[layer][expert] * experts).toFixed(2)} times the mean`;
  });
  canvas.addEventListener("mouseleave", () => { small.textContent = rest; });
  return element("figure", {}, caption, canvas);
}

// Each source's loss under both models as two dots with a line, sorted by the gain.
function gainBySource(sources, names) {
  const rows = [...sources].sort((a, b) => (b.dense_loss - b.sparse_loss) - (a.dense_loss - a.sparse_loss));
  const wide = 1180, left = 46, longest = Math.max(...rows.map(row => row.name.length));
  const labels = rows.length <= 160, step = (wide - left - 8) / rows.length;
  const bottom = labels ? Math.min(150, 14 + 4.4 * longest) : 24, high = 250;
  const losses = rows.flatMap(row => [row.dense_loss, row.sparse_loss]);
  const low = Math.min(...losses), top = Math.max(...losses), pad = (top - low) * 0.06 || 0.1;
  const py = loss => 8 + (top + pad - loss) / (top - low + 2 * pad) * high;
  const px = i => left + (i + .5) * step;
  const svg = element("svg", {viewBox: `0 0 ${wide} ${high + 16 + bottom}`, role: "img",
    "aria-label": "held-out loss of every source under both models"});
  for (const t of ticks(low - pad, top + pad, 5)) svg.append(
    element("line", {x1: left, x2: wide - 8, y1: py(t), y2: py(t), stroke: "var(--line)"}),
    element("text", {x: left - 6, y: py(t) + 4, "text-anchor": "end"}, format(t)));
  rows.forEach((row, i) => {
    const x = px(i), gain = row.dense_loss - row.sparse_loss;
    const radius = Math.max(1.6, Math.min(4, step / 3));
    const group = element("g", {}, element("title", {}, `${row.name}: ${names[1]} ${row.dense_loss.toFixed(3)}, ` +
      `${names[0]} ${row.sparse_loss.toFixed(3)}, gain ${gain.toFixed(3)}`),
      element("rect", {x: x - step / 2, y: 8, width: step, height: high, fill: "transparent"}),
      element("line", {x1: x, x2: x, y1: py(row.dense_loss), y2: py(row.sparse_loss), stroke: "var(--faint)"}),
      element("circle", {cx: x, cy: py(row.dense_loss), r: radius, fill: "var(--run-1)"}),
      element("circle", {cx: x, cy: py(row.sparse_loss), r: radius, fill: "var(--run-0)"}));
    if (labels) group.append(element("text", {transform: `translate(${x + 3} ${high + 16}) rotate(-90)`,
      "text-anchor": "end", class: "small"}, row.name));
    svg.append(group);
  });
  return element("figure", {class: "scrolls"}, element("figcaption", {}, "Held-out loss of every source ",
    element("small", {}, "nats per target token, largest gain first"),
    ...names.map((name, i) => named(name, `var(--run-${i})`))), svg);
}

// Histogram over sources of the speed-up to the dense twin's last loss.
function speedUps(sources) {
  const reached = sources.filter(one => one.step_ratio).map(one => 1 / one.step_ratio);
  const never = sources.length - reached.length;
  const highest = Math.max(2, ...reached), width = [0.1, 0.25, 0.5, 1, 2, 5].find(w => (highest - 1) / w <= 24) || highest / 24;
  const bins = Array(Math.ceil((highest - 1) / width + 1e-9) + 1).fill(0);
  reached.forEach(speed => { bins[Math.max(0, Math.floor((speed - 1) / width + 1e-9))] += 1; });
  const most = Math.max(...bins, never), bar = (WIDTH - LEFT - RIGHT) / (bins.length + 1.6);
  const bx = i => LEFT + (i ? i + .6 : 0.1) * bar;
  const py = n => HEIGHT - BOTTOM - n / most * (HEIGHT - TOP - BOTTOM);
  const svg = element("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "histogram of speed-ups in steps"});
  for (const t of ticks(0, most, 5).filter(Number.isInteger)) svg.append(
    element("line", {x1: LEFT, x2: WIDTH - RIGHT, y1: py(t), y2: py(t), stroke: "var(--line)"}),
    element("text", {x: LEFT - 6, y: py(t) + 4, "text-anchor": "end"}, t));
  [never, ...bins].forEach((n, i) => svg.append(element("rect", {x: bx(i) + 1, y: py(n), width: bar - 2,
    height: HEIGHT - BOTTOM - py(n), fill: i ? "var(--run-0)" : "var(--faint)"},
    element("title", {}, i ? `${n} sources from ${format(1 + (i - 1) * width)} to ${format(1 + i * width)} times` : `${n} never`))));
  if (never) svg.append(element("text", {x: bx(0) + bar / 2, y: HEIGHT - 20, "text-anchor": "middle"}, "never"));
  const every = Math.ceil(40 / bar);
  bins.forEach((_, i) => { if (i % every === 0) svg.append(element("text",
    {x: bx(i + 1), y: HEIGHT - 20, "text-anchor": "middle"}, format(1 + i * width))); });
  svg.append(element("text", {x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end"}, "times as fast in steps"));
  return element("figure", {}, element("figcaption", {}, "Speed-up in steps, by source ",
    element("small", {}, `${sources.length} sources` + (never ? `, ${never} never reached it` : ""))), svg);
}
