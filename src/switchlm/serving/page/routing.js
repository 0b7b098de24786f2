// The figure of a stack: its tokens coloured by expert, a layer slider, and the load of the experts.
const ORDERED = 24;  // up to this number, hues by expert; above it, by rank of load
const BARS = 64;     // more experts than this: only the busiest are drawn
const BUSIEST = 32;
const GOLDEN = 137.508;
const SPECIAL = /^<extra_id_(\d+)>$/;

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

// The name of a special token, null for others; `place` 0 is the decoder's start.
function named(text, place, decoder) {
  const blank = SPECIAL.exec(text);
  if (blank) return `blank ${blank[1]}`;
  if (text === "</s>") return "end";
  if (text === "<pad>") return decoder && place === 0 ? "start" : "padding";
  return null;
}

const gateText = gate => gate >= 0.1 ? gate.toFixed(2) : gate.toPrecision(2);

// Shows a token's text, with marks for line ends and tabs.
function write(node, text) {
  for (const part of text.split(/([\n\t]|[\u0000-\u001f\u007f])/)) {
    if (part === "\n") node.append(element("span", {class: "mark"}, "⏎"), "\n");
    else if (part === "\t") node.append(element("span", {class: "mark"}, "⇥"), "\t");
    else if (/^[\u0000-\u001f\u007f]$/.test(part)) node.append(element("span", {class: "mark"}, "·"));
    else if (part) node.append(part);
  }
}

const visible = text => `“${text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥")}”`;

// The experts of a layer, busiest first.
function ranking(layer) {
  return layer.load.map((load, expert) => [load, expert]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).map(pair => pair[1]);
}

// The hue of an expert in a layer. Experts of different layers are unrelated.
function hues(layer) {
  const experts = layer.load.length;
  if (experts <= ORDERED) return expert => Math.round(25 + 360 * expert / experts) % 360;
  const rank = new Map(ranking(layer).map((expert, place) => [expert, place]));
  return expert => Math.round(25 + GOLDEN * rank.get(expert)) % 360;
}

export class StackFigure {
  constructor(stack, decoder) {
    Object.assign(this, {stack, decoder, layers: stack.layers, index: 0, focused: 0, picked: null});
    const title = decoder ? "Decoder" : "Encoder";
    this.small = element("small", {});
    this.node = element("figure", {class: "stack"}, element("figcaption", {}, title, " ", this.small));
    this.popover = element("div", {class: "popover", "aria-hidden": "true", hidden: ""});
    this.tokens = element("div", {class: "tokens", role: "listbox", "aria-orientation": "horizontal",
      "aria-label": `tokens of the ${title.toLowerCase()}; left and right: other tokens, up and down: other layers`});
    this.loads = element("div", {class: "loads", role: "toolbar", "aria-label": `load of the ${title.toLowerCase()}'s experts`});
    this.names = element("div", {class: "names", "aria-hidden": "true"});
    this.key = element("p", {class: "note key"});
    if (this.layers.length) this.node.append(this.chooser(title.toLowerCase()));
    this.node.append(this.tokens, this.popover);
    if (this.layers.length) this.node.append(this.loads, this.names, this.key);
    this.fillTokens();
    this.listen();
    this.show(0);
  }

  get layer() { return this.layers[this.index]; }

  chooser(name) {
    this.slider = element("input", {type: "range", id: `${name}-layer`, min: 0, max: this.layers.length - 1, value: 0, step: 1});
    this.layerLabel = element("output", {for: this.slider.id});
    this.slider.disabled = this.layers.length === 1;
    this.slider.addEventListener("input", () => this.show(Number(this.slider.value)));
    return element("div", {class: "layer"}, element("label", {for: this.slider.id}, "Layer"), this.slider, this.layerLabel);
  }

  layerName() {
    const many = this.layers.length, {layer, part} = this.layer;
    const where = `block ${layer + 1}` + (part && part !== "feedforward" ? `, ${part.replace(".", " ").replace("_", " and ")}` : "");
    return many === 1 ? `${where}, the only one` : `${this.index + 1} of ${many}: ${where}`;
  }

  fillTokens() {
    this.spans = this.stack.tokens.map((text, place) => {
      const span = element("span", {class: "token", role: "option", tabindex: place ? -1 : 0, "aria-selected": "false"});
      const name = named(text, place, this.decoder);
      if (name) { span.classList.add("special"); span.textContent = name; }
      else if (text === "") span.classList.add("part");
      else write(span, text);
      this.tokens.append(span);
      return span;
    });
  }

  listen() {
    this.tokens.addEventListener("pointerover", event => this.showPopover(this.spans.indexOf(event.target.closest(".token"))));
    this.tokens.addEventListener("pointerleave", () => this.hidePopover());
    this.tokens.addEventListener("focusin", event => { this.move(this.spans.indexOf(event.target)); this.showPopover(this.focused); });
    this.tokens.addEventListener("focusout", () => this.hidePopover());
    this.tokens.addEventListener("scroll", () => this.hidePopover());
    this.tokens.addEventListener("click", event => {
      const place = this.spans.indexOf(event.target.closest(".token"));
      if (place >= 0) { this.move(place); this.spans[place].focus(); this.showPopover(place); }
    });
    this.tokens.addEventListener("keydown", event => {
      const steps = {ArrowLeft: this.focused - 1, ArrowRight: this.focused + 1, Home: 0, End: this.spans.length - 1};
      const layers = {ArrowUp: this.index + 1, ArrowDown: this.index - 1};
      if (event.key in steps) {
        this.spans[Math.max(0, Math.min(this.spans.length - 1, steps[event.key]))].focus();
      } else if (event.key in layers && this.layers.length) {
        this.show(Math.max(0, Math.min(this.layers.length - 1, layers[event.key])));
        this.showPopover(this.focused);
      } else if (event.key === "Escape") this.hidePopover();
      else return;
      event.preventDefault();
    });
    this.loads.addEventListener("keydown", event => {
      const bars = [...this.loads.querySelectorAll("button")], here = bars.indexOf(event.target);
      const places = {ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: bars.length - 1};
      if (!(event.key in places)) return;
      event.preventDefault();
      const bar = bars[Math.max(0, Math.min(bars.length - 1, places[event.key]))];
      bars.forEach(one => { one.tabIndex = one === bar ? 0 : -1; });
      bar.focus();
    });
  }

  move(place) {
    this.spans[this.focused].tabIndex = -1;
    this.focused = place;
    this.spans[place].tabIndex = 0;
  }

  show(index) {
    this.index = index;
    this.picked = null;
    if (!this.layer) {
      this.small.textContent = `${count(this.spans.length, "token")}; no layer here has experts`;
      return;
    }
    this.slider.value = index;
    this.layerLabel.textContent = this.layerName();
    this.slider.setAttribute("aria-valuetext", this.layerName());
    this.hue = hues(this.layer);
    this.tokens.classList.add("routed");
    this.most = Math.max(...this.layer.gate, 1e-9);
    this.spans.forEach((span, place) => {
      const expert = this.layer.expert[place], none = expert < 0;
      span.classList.toggle("dropped", !this.layer.kept[place]);
      span.style.setProperty("--hue", none ? 0 : this.hue(expert));
      span.style.setProperty("--strength", (this.layer.gate[place] / this.most).toFixed(3));
      span.dataset.expert = expert;
      span.setAttribute("aria-label", this.describe(place));
    });
    this.drawLoads();
    this.highlight();
  }

  describe(place) {
    const {expert, gate, kept} = this.layer, text = this.stack.tokens[place];
    const name = named(text, place, this.decoder) ?? (text === "" ? "continuation byte" : visible(text));
    if (expert[place] < 0) return `${name}: not chosen by any expert`;
    return `${name}: expert ${expert[place]}, gate ${gateText(gate[place])}${kept[place] ? "" : ", dropped"}`;
  }

  drawLoads() {
    const {load, kept} = this.layer, experts = load.length, total = load.reduce((a, b) => a + b, 0);
    const drawn = experts <= BARS ? load.map((_, expert) => expert) : ranking(this.layer).slice(0, BUSIEST).filter(expert => load[expert]);
    const most = Math.max(...load, 1), mean = total / experts, used = load.filter(Boolean).length;
    const dropped = kept.filter(one => !one).length;
    this.small.textContent = `${count(this.spans.length, "token")}, ${used} of ${count(experts, "expert")} used` + (dropped ? `, ${dropped} dropped` : "");
    const bars = drawn.map((expert, place) => {
      const bar = element("button", {type: "button", tabindex: place ? -1 : 0, "aria-pressed": "false",
        "aria-label": `expert ${expert}: ${count(load[expert], "token")}; show them`, "data-expert": expert, title: `expert ${expert}: ${count(load[expert], "token")}`},
        element("span", {class: "count"}, load[expert] || ""), element("span", {class: "bar"}));
      bar.style.setProperty("--hue", this.hue(expert));
      bar.style.setProperty("--share", (load[expert] / most).toFixed(4));
      bar.addEventListener("click", () => { this.picked = this.picked === expert ? null : expert; this.highlight(); });
      return bar;
    });
    const even = element("div", {class: "even", "aria-hidden": "true"});
    even.style.setProperty("--share", (mean / most).toFixed(4));
    this.loads.replaceChildren(...bars, even);
    this.loads.classList.toggle("dense", drawn.length > 40);
    const every = drawn.length > 40 ? 8 : drawn.length > ORDERED ? 4 : 1;
    this.names.replaceChildren(...drawn.map((expert, place) => element("span", {}, experts > BARS ? (drawn.length <= 16 || place % 4 === 0 ? expert : "") : place % every ? "" : expert)));
    const rest = experts > BARS && used > drawn.length ? `; the busiest ${drawn.length} are drawn` : "";
    this.key.replaceChildren(element("span", {}, `Load of each expert, by its number${rest}; dashed: uniform load`),
      element("span", {}, "gate 0", element("span", {class: "ramp", "aria-hidden": "true"}), gateText(this.most)));
    if (dropped) this.key.append(element("span", {}, element("span", {class: "hatch", "aria-hidden": "true"}), "dropped: no capacity slot left"));
  }

  highlight() {
    this.tokens.classList.toggle("picking", this.picked !== null);
    for (const bar of this.loads.querySelectorAll("button"))
      bar.setAttribute("aria-pressed", String(Number(bar.dataset.expert) === this.picked));
    for (const span of this.spans) span.classList.toggle("picked", Number(span.dataset.expert) === this.picked);
  }

  // The popover beside a token: its expert in this and in the other layers.
  showPopover(place) {
    this.hidePopover();
    if (place < 0 || !this.layer) return;
    const span = this.spans[place], {expert, gate, kept} = this.layer, text = this.stack.tokens[place];
    span.classList.add("active");
    span.setAttribute("aria-selected", "true");
    const swatch = element("span", {class: "swatch"});
    swatch.style.setProperty("--hue", span.style.getPropertyValue("--hue"));
    const assignment = expert[place] < 0 ? "not chosen by any expert" : `expert ${expert[place]}, gate ${gateText(gate[place])}`;
    this.popover.replaceChildren(
      element("code", {}, named(text, place, this.decoder) ?? (text === "" ? "continuation byte" : visible(text))),
      element("div", {class: "assignment"}, swatch, element("b", {}, assignment), kept[place] ? "" : "dropped"));
    if (this.layers.length > 1) {
      const path = element("div", {class: "path"}, "in every layer: ");
      this.layers.forEach((layer, i) => path.append(i ? " → " : "", element(i === this.index ? "b" : "span", {}, layer.expert[place] < 0 ? "none" : layer.expert[place])));
      this.popover.append(path);
    }
    this.popover.hidden = false;
    const box = span.getClientRects()[0], own = this.node.getBoundingClientRect();
    const left = Math.max(0, Math.min(box.left - own.left, own.width - this.popover.offsetWidth));
    const below = box.bottom + this.popover.offsetHeight + 12 < innerHeight;
    this.popover.style.left = `${left}px`;
    this.popover.style.top = `${below ? box.bottom - own.top + 6 : box.top - own.top - this.popover.offsetHeight - 6}px`;
  }

  hidePopover() {
    this.popover.hidden = true;
    for (const span of this.tokens.querySelectorAll(".active")) {
      span.classList.remove("active");
      span.setAttribute("aria-selected", "false");
    }
  }
}
