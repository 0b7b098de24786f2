// The report from top to bottom.
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("report");

function section(title, note, nodes) {
  nodes = nodes.filter(Boolean);
  if (!nodes.length) return;
  if (title) main.append(element("h2", {}, title));
  if (note) main.append(element("p", {class: "note"}, note));
  main.append(element("div", {class: "grid"}, ...nodes));
}

main.append(element("h1", {}, data.title), element("p", {class: "headline"}, data.headline));
if (data.table.length) {
  const columns = Object.keys(data.table[0]);
  const table = element("table", {}, element("thead", {}, element("tr", {},
    ...columns.map(c => element("th", {scope: "col"}, c)))));
  table.append(element("tbody", {}, ...data.table.map(row => element("tr", {},
    ...columns.map(c => element("td", {}, row[c] ?? ""))))));
  main.append(table);
}

const color = index => `var(--run-${index % 3})`;
const curves = (kind, x, y) => data.runs.map((run, i) => ({
  name: run.name, color: color(i), points: run[kind].map(line => [line[x], line[y]])}));
const level = data.target_loss == null ? null : {value: data.target_loss, label: "dense twin's last"};
const markAt = (key, text) => data.crossing && level
  ? {x: data.crossing[key], y: data.target_loss, label: text} : null;
const unmeasured = "no held-out loss was measured, since the run ended before its first evaluation or holds out no text";
const unlogged = "the run ended before its first logged step";
section("Loss", "Held-out negative log likelihood, in nats per target token; lower is better.", [
  chart("Held-out loss by step", "", curves("evaluation", "step", "evaluation_loss"),
        {x: "step", log: true, empty: unmeasured, level, mark: markAt("step", data.crossing && `step ${format(data.crossing.step)}`)}),
  chart("Held-out loss by time", "", curves("evaluation", "seconds", "evaluation_loss"),
        {x: "seconds of training", log: true, empty: unmeasured, level, mark: markAt("seconds", data.crossing && `${format(data.crossing.seconds)} s`)}),
  chart("Training loss", "", curves("training", "step", "loss"), {x: "step", log: true, empty: unlogged}),
  chart("Throughput", "tokens per second", curves("training", "seconds", "tokens_per_second"),
        {x: "seconds of training", fromZero: true, empty: unlogged}),
]);
if (data.sources.length > 1) {
  main.append(element("h2", {}, "By source"),
    element("p", {class: "note"}, "The two runs on the held-out text of every source of the mixture."),
    gainBySource(data.sources, data.runs.map(run => run.name)), element("p", {}));
  section("", null, [speedUps(data.sources)]);
}
layersSection(data.runs);
for (const run of data.runs) if (run.routing) routingSection(run);
for (const run of data.runs) {
  const lines = run.training.filter(line => line.load && line.load.length);
  if (!lines.length) continue;
  const names = run.layers.length ? run.layers : lines[0].load.map((_, i) => `layer ${i}`);
  section(`Load of every expert over time: ${run.name}`,
    "One row per expert, time from left to right. Grey or white is an even load, blue is idle, orange is overloaded (four times the mean).",
    names.map((name, layer) => heatmap(name, lines, layer)));
  const perLayer = key => names.map((name, i) => ({
    name: names.length <= 8 ? name : "", color: hue(i, names.length), opacity: .9,
    points: lines.filter(l => l[key]).map(l => [l.step, l[key][i]])}));
  section(`Gates and drops: ${run.name}`, null, [
    chart("Gate", "mean router probability of the chosen expert, one line per layer", perLayer("gate"), {x: "step", fromZero: true}),
    chart("Dropped", "share of tokens past capacity, one line per layer", perLayer("dropped_by_layer"), {x: "step", fromZero: true}),
  ]);
}
if (data.example) {
  main.append(element("h2", {}, "An example"));
  for (const [label, text] of Object.entries(data.example)) main.append(
    element("p", {class: "note"}, label), element("pre", {}, text));
}
if (data.configuration) main.append(element("h2", {}, "Configuration"),
  element("details", {}, element("summary", {}, "as resolved"),
    element("pre", {}, JSON.stringify(data.configuration, null, 2))));
