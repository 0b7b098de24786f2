// Metrics of layers at every evaluation: attention of heads, and routing.
function nearCharts({step, stacks}) {
  return stacks.map(({name, layers}) => {
    const series = layers.flatMap((layer, at) => layer.near.map((curve, head) => {
      const alone = layers.length === 1;  // then colours are of heads, otherwise of layers
      const named = alone ? layer.near.length <= 8 : layers.length <= 8 && head === 0;
      return {name: named ? (alone ? `head ${head}` : layer.name) : "", hoverText: `${layer.name}, head ${head}:`,
        color: alone ? tone(head, layer.near.length) : tone(at, layers.length),
        opacity: alone ? 1 : .65, points: step.map((s, i) => [s, curve[i]])};
    }));
    return chart(`Near attention, ${name}`, "weight on tokens at most 3 away, one line per head", series,
      {x: "step", fromZero: true, top: 1, narrow: true});
  });
}

function switchCharts({step, switches}) {
  const lines = (key, more = {}) => switches.map((layer, i) => ({
    name: switches.length <= 8 ? layer.name : "", hoverText: `${layer.name}:`, color: tone(i, switches.length),
    opacity: .9, points: step.map((s, j) => [s, layer[key][j]]), ...more}));
  const experts = switches[0].experts, even = experts && {value: Math.log(experts),
    label: `ln ${experts} = ${Math.log(experts).toFixed(2)}: uniform`};
  const options = {x: "step", fromZero: true, narrow: true};
  const load = lines("load_entropy", {dashes: "2 3"}).map(line => ({...line, name: "", hoverText: `load, ${line.hoverText}`}));
  return [
    chart("Mean gate", "router probability of the chosen expert", lines("gate"), options),
    chart("Kept expert", "tokens with the expert of one evaluation ago", lines("kept_expert"), {...options, top: 1}),
    chart("Entropy of the router", "nats, mean of the tokens' own; dotted: of the load", [...lines("router_entropy"), ...load],
      {...options, level: even}),
    chart("Dead experts", experts ? `of ${experts}, chosen by no token` : "chosen by no token", lines("dead_experts"), options),
  ];
}

function layersSection(runs) {
  runs = runs.filter(run => run.inside);
  if (!runs.length) return;
  main.append(element("h2", {}, "Metrics of layers"), element("p", {class: "note"},
    "Measured at every evaluation on the first held-out batch. " + (runs.some(run => run.inside.switches.length)
      ? "A decided router has a low entropy per token and a high gate, while the entropy of the load stays near its " +
        "maximum; experts specialise once tokens keep them. " : "") +
    (runs.some(run => Math.max(run.inside.switches.length, ...run.inside.stacks.map(stack => stack.layers.length)) > TONES.length)
      ? "Many layers are coloured from blue, the first, to orange, the last." : "")));
  for (const run of runs) {
    const charts = [...nearCharts(run.inside), ...(run.inside.switches.length ? switchCharts(run.inside) : [])];
    if (runs.length > 1) main.append(element("h3", {}, run.name));
    main.append(element("div", {class: "grid narrow"}, ...charts.filter(Boolean)));
  }
}
