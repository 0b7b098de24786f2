// Blanks of a text, and the spans of an output.
const BLANK = /<extra_id_(\d+)>/g;

export function numbers(text) {
  return [...text.matchAll(BLANK)].map(match => Number(match[1]));
}

export function next(text) {
  return `<extra_id_${Math.max(-1, ...numbers(text)) + 1}>`;
}

// The text after each sentinel up to the next one; of several spans of a blank, the first.
export function spansOf(output) {
  const parts = output.split(BLANK), spans = new Map();
  for (let i = 1; i < parts.length; i += 2) if (!spans.has(parts[i])) spans.set(parts[i], parts[i + 1]);
  return spans;
}

// Shows the text with its spans in a node: a mark per span, the one being generated with a caret.
export function show(node, text, spans, generating) {
  const parts = text.split(BLANK), last = [...spans.keys()].pop();
  node.replaceChildren(parts[0]);
  for (let i = 1; i < parts.length; i += 2) {
    const mark = document.createElement("mark"), span = spans.get(parts[i]);
    mark.textContent = span ?? `<extra_id_${parts[i]}>`;
    if (span === undefined) mark.className = "empty";
    if (generating && parts[i] === last) mark.classList.add("next");
    node.append(mark, parts[i + 1]);
  }
}
