// Expert assignment at the end of a run: heat maps of a layer, and a table of experts.
const PARTS = 10000, PANEL_ROWS = 64, MANY_EXPERTS = 48;  // more take the full width of the page

function percent(share) {
  return share >= 0.0995 ? `${Math.round(100 * share)}%` : `${(100 * share).toFixed(1)}%`;
}

// A map of rows by columns of ratios to an even share, with names for both. Cells are reached by
// the mouse or, once the map has the focus, by the arrow keys; `describe(row, column)` is the text of a cell.
function ratioMap(label, rows, columns, ratio, describe, longest = 0) {
  const room = columns.length > MANY_EXPERTS ? 900 : 430;
  const cellWidth = Math.max(5, Math.min(26, Math.floor(room / columns.length)));
  const cellHeight = 13, top = 18, width = cellWidth * columns.length, height = cellHeight * rows.length;
  const left = Math.min(190, 12 + 5.8 * Math.max(longest, ...rows.map(name => name.length)));
  const svg = element("svg", {viewBox: `0 0 ${left + width + 4} ${top + height + 4}`, class: "map", tabindex: 0,
    role: "application", "aria-label": `${label}; arrow keys read its cells`, style: `max-width:${(left + width + 4) * 1.15}px`});
  const every = Math.ceil(22 / cellWidth);
  columns.forEach((name, column) => { if (column % every === 0) svg.append(element("text",
    {x: left + (column + .5) * cellWidth, y: top - 6, "text-anchor": "middle"}, name)); });
  const cells = element("image", {x: left, y: top, width, height, preserveAspectRatio: "none", class: "cells"});
  paint(() => {
    const canvas = element("canvas", {width: columns.length, height: rows.length});
    const context = canvas.getContext("2d"), image = context.createImageData(columns.length, rows.length);
    rows.forEach((_, row) => columns.forEach((_, column) =>
      image.data.set([...shade(ratio(row, column)), 255], 4 * (row * columns.length + column))));
    context.putImageData(image, 0, 0);
    cells.setAttribute("href", canvas.toDataURL());
  });
  svg.append(cells);
  rows.forEach((name, row) => svg.append(element("text",
    {x: left - 6, y: top + (row + .5) * cellHeight + 3.5, "text-anchor": "end", class: "row"}, shorten(name, 28))));
  const cursor = element("rect", {width: cellWidth, height: cellHeight, class: "cursor", visibility: "hidden"});
  svg.append(cursor);
  const hoverText = element("p", {class: "hover-text", "aria-live": "polite"}, " ");
  let at = [0, 0];
  const show = (row, column) => {
    at = [Math.max(0, Math.min(rows.length - 1, row)), Math.max(0, Math.min(columns.length - 1, column))];
    cursor.setAttribute("x", left + at[1] * cellWidth);
    cursor.setAttribute("y", top + at[0] * cellHeight);
    cursor.setAttribute("visibility", "visible");
    hoverText.textContent = describe(...at);
  };
  const hide = () => { cursor.setAttribute("visibility", "hidden"); hoverText.textContent = " "; };
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect(), scale = (left + width + 4) / box.width;
    const column = Math.floor(((event.clientX - box.left) * scale - left) / cellWidth);
    const row = Math.floor(((event.clientY - box.top) * scale - top) / cellHeight);
    if (column >= 0 && column < columns.length && row >= 0 && row < rows.length) show(row, column);
    else hide();
  });
  svg.addEventListener("mouseleave", hide);
  svg.addEventListener("focus", () => show(...at));
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    show(at[0] + move[0], at[1] + move[1]);
  });
  return element("div", {}, svg, hoverText);
}

function shorten(text, most) {
  return text.length > most ? text.slice(0, most - 1) + "…" : text;
}

// The legend of colours: multiples of an expert's share.
function legend() {
  const bar = element("canvas", {width: 97, height: 1, class: "scale", "aria-hidden": "true"});
  paint(() => {
    const context = bar.getContext("2d"), image = context.createImageData(97, 1);
    for (let x = 0; x < 97; x++) image.data.set([...shade(2 ** (x / 24 - 2)), 255], 4 * x);
    context.putImageData(image, 0, 0);
  });
  return element("p", {class: "legend"}, "a quarter of an expert's usual share, or less", bar,
    "four times, or more");
}

function width(layer) {
  return layer.experts.length > MANY_EXPERTS ? {class: "across"} : {};
}

function classMap(layer) {
  const names = layer.classes.map(one => `${one.name}, ${percent(one.size / PARTS)}`);
  const ratio = (row, column) => layer.classes[row].share[column] / Math.max(layer.share[column], 1);
  return element("figure", width(layer),
    element("figcaption", {}, "By kind of token ", element("small", {}, "and how common it is")),
    ratioMap("experts by kind of token", names, layer.experts.map(String), ratio, (row, column) =>
      `${percent(layer.classes[row].share[column] / PARTS)} of “${layer.classes[row].name}” goes to expert ` +
      `${layer.experts[column]}, ${ratio(row, column).toFixed(2)} times its usual share`));
}

function sourceMaps(layer, sources) {
  const longest = Math.max(...sources.map(name => name.length));
  const panels = [], count = Math.ceil(sources.length / PANEL_ROWS), size = Math.ceil(sources.length / count);
  for (let from = 0; from < sources.length; from += size) {
    const names = sources.slice(from, from + size);
    const share = (row, column) => layer.by_source[from + row][column];
    const ratio = (row, column) => share(row, column) / Math.max(layer.share[column], 1);
    const part = count > 1 ? `${from + 1} to ${from + names.length} of ${sources.length}` : "";
    panels.push(element("figure", width(layer),
      element("figcaption", {}, "By source ", element("small", {}, part)),
      ratioMap(`experts by source ${part}`, names, layer.experts.map(String), ratio, (row, column) =>
        `${percent(share(row, column) / PARTS)} of ${names[row]} goes to expert ${layer.experts[column]}, ` +
        `${ratio(row, column).toFixed(2)} times its usual share`, longest)));
  }
  return panels;
}

function expertTable(layer, bySource) {
  const heads = ["expert", "share of tokens", "serves most", ...(bySource ? ["more than its share of"] : []), "most frequent tokens"];
  const rows = layer.listed.map(one => element("tr", {},
    element("td", {}, one.expert), element("td", {}, percent(one.share)),
    element("td", {}, one.classes.map(([name, share]) => `${name} ${percent(share)}`).join(", ")),
    ...(bySource ? [element("td", {}, one.sources.map(([name, times]) => `${name} ×${times.toFixed(1)}`).join(", ") || "none")] : []),
    element("td", {class: "tokens"}, ...one.tokens.map(text => element("code", {}, shown(text))))));
  const left = layer.total - layer.dead.length - layer.listed.length;
  return element("div", {class: "wide"}, element("table", {class: "words"},
    element("thead", {}, element("tr", {}, ...heads.map(head => element("th", {scope: "col"}, head)))),
    element("tbody", {}, ...rows)), ...(left > 0 ? [element("p", {class: "note"}, `and ${left} experts with a lower load`)] : []));
}

// Make spaces and line ends visible.
function shown(text) {
  return text.replace(/^ +| +$/g, spaces => "␣".repeat(spaces.length)).replace(/\n/g, "⏎").replace(/\t/g, "⇥")
             .replace(/[\u0000-\u001f\u007f]/g, "·") || "␣";
}

function summary(layer) {
  const dead = layer.dead.length
    ? `${layer.dead.length} of ${layer.total} experts are dead (${layer.dead.slice(0, 12).join(", ")}${layer.dead.length > 12 ? ", …" : ""}): ` +
      "each has less than a twentieth of an even load."
    : `No expert is dead: each of the ${layer.total} has at least a twentieth of an even load.`;
  return `${dead} Mean gate ${format(layer.gate)}; ${percent(layer.dropped)} dropped.`;
}

function routingSection(run) {
  const {sources, layers} = run.routing, several = sources.length > 1;
  main.append(element("h2", {}, `Expert assignment: ${run.name}`), element("p", {class: "note"},
    "On held-out text, at the end. Columns are experts; similar experts are neighbours" +
    (several ? ", and so are similar sources." : ".")), legend());
  const view = element("div", {});
  const select = element("select", {id: `layer-${run.name}`}, ...layers.map((layer, i) => element("option", {value: i}, layer.name)));
  const show = () => {
    const layer = layers[select.value];
    view.replaceChildren(element("p", {}, summary(layer)),
      element("div", {class: "grid"}, ...(several ? sourceMaps(layer, sources) : []), classMap(layer)),
      expertTable(layer, several));
  };
  select.addEventListener("change", show);
  main.append(element("p", {}, element("label", {for: select.id}, "Layer "), select), view);
  show();
  const places = layers.map((layer, i) => ({name: layers.length <= 8 ? layer.name : "", color: hue(i, layers.length),
    points: layer.dropped_by_place.map((share, place, all) => [100 * (place + .5) / all.length, 100 * share])}));
  const dropping = places.some(one => one.points.some(point => point[1] > 0));
  if (dropping) section("", null, [chart(`Drops by position: ${run.name}`, "percent of the tokens at that position",
    places, {x: "position in the row, percent", fromZero: true})]);
  else main.append(element("p", {class: "note"}, "No token was dropped at any position."));
}
