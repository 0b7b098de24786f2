// The form: stream the filled text, then show the expert assignment.
import {get, post, stream, useKey} from "./api.js";
import * as blanks from "./blanks.js";
import {StackFigure} from "./routing.js";

const $ = id => document.getElementById(id);
const EXAMPLE = `class Stack:
    def __init__(self):
        self.items = <extra_id_0>

    def <extra_id_1>(self, item):
        self.items.append(<extra_id_2>)
        return self
`;
let running = null;  // aborts the request in progress
let shown = null;    // the text and output whose routing is shown
let retry = null;    // to call once there is a key

function setStatus(message) { $("status").textContent = message; }

function showError(error, again) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    retry = again;
    $("key-form").hidden = false;
    $("key").focus();
  }
  $("error").textContent = error.message;
  $("error").hidden = false;
}

function hideError() { $("error").hidden = true; }

function options() {
  const number = id => $(id).value === "" ? undefined : Number($(id).value);
  return {temperature: number("temperature"), top_p: number("top-p"), seed: number("seed"), max_tokens: number("max-tokens")};
}

// Sends the text and shows the output while it is generated. Returns the output.
async function fill(text, signal) {
  let output = "";
  if (blanks.numbers(text).length) {
    blanks.show($("result"), text, new Map(), false);
    for await (const event of stream("v1/fill", {text, ...options()}, signal)) {
      output = event.output ?? output;
      const spans = event.spans ? new Map(Object.entries(event.spans)) : blanks.spansOf(output);
      blanks.show($("result"), text, spans, !event.spans);
      if (event.spans && !event.finished) setStatus("The output ended at the limit of tokens; Sampling sets it.");
    }
  } else {
    const body = {prompt: text, ...options()};
    $("result").replaceChildren();
    for await (const event of stream("v1/completions", body, signal)) {
      output += event.choices?.[0]?.text ?? "";
      $("result").textContent = output;
    }
  }
  return output;
}

async function submit() {
  const text = $("text").value;
  if (running) return;
  hideError();
  if (!text.trim()) {
    showError(new Error("Type a text first, with blanks where the model is to insert text."));
    $("text").focus();
    return;
  }
  running = new AbortController();
  $("submit").disabled = true;
  $("stop").hidden = false;
  $("result-title").textContent = blanks.numbers(text).length ? "Filled" : "Answer";
  const started = performance.now();
  setStatus("Filling …");
  try {
    const output = await fill(text, running.signal);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    if ($("status").textContent === "Filling …") setStatus(`Done in ${seconds} s.`);
    shown = {text, output};
    await showRouting(running.signal);
  } catch (error) {
    setStatus(error.name === "AbortError" ? "Stopped." : "");
    showError(error, submit);
  } finally {
    running = null;
    $("submit").disabled = false;
    $("stop").hidden = true;
  }
}

async function showRouting(signal) {
  const body = {...shown, ...($("capacity").checked ? {enforce_capacity: true} : {})};
  const routed = await post("v1/route", body, signal);
  const dense = !routed.num_experts;
  const figures = [new StackFigure(routed.encoder, false), new StackFigure(routed.decoder, true)];
  $("routing-note").textContent = dense
    ? "This model is dense: it has no Switch layers."
    : "The colour is the token's expert in this layer, its strength the gate. Point at a token or use the arrow keys; " +
      "a bar shows the tokens of its expert only. The decoder's tokens are its inputs, not its predictions.";
  $("capacity-row").hidden = dense;
  $("stacks").replaceChildren(...figures.map(figure => figure.node));
  $("routing").hidden = false;
}

function insertBlank() {
  const field = $("text");
  field.focus();
  field.setRangeText(blanks.next(field.value), field.selectionStart, field.selectionEnd, "end");
  updateNextBlank();
}

function updateNextBlank() { $("next-blank").textContent = blanks.next($("text").value); }

async function showReport() {
  const report = location.hash === "#report";
  $("text-view").hidden = report;
  $("report-view").hidden = !report;
  for (const link of $("views").children) {
    if ((link.hash === "#report") === report) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!report || $("report").srcdoc) return;
  try {
    // Set as text, since the request of a frame would lack the key; the frame is sandboxed.
    $("report").srcdoc = await (await get("report")).text();
  } catch (error) {
    showError(error, showReport);
  }
}

async function loadModels() {
  try {
    const models = (await (await get("v1/models")).json()).data;
    $("model").textContent = models.map(model => model.id).join(", ");
    document.title = `${$("model").textContent} · switchlm`;
    $("views").hidden = !models.some(model => model.report);
  } catch (error) {
    showError(error, loadModels);
  }
}

$("form").addEventListener("submit", event => { event.preventDefault(); submit(); });
$("form").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("blank").addEventListener("click", insertBlank);
$("text").addEventListener("input", updateNextBlank);
$("capacity").addEventListener("change", () => showRouting().then(hideError, error => showError(error, showRouting)));
$("key-form").addEventListener("submit", async event => {
  event.preventDefault();
  useKey($("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  hideError();
  const again = retry;
  retry = null;
  await again?.();
  if (again !== loadModels && $("key-form").hidden) await loadModels();
  if ($("key-form").hidden) $("text").focus();
});
addEventListener("hashchange", showReport);
$("text").value = EXAMPLE;
updateNextBlank();
loadModels().then(showReport);
