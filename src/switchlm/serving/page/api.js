// Requests to the server: JSON, server-sent events, errors, and the API key.
let key = "";  // in memory only

export function useKey(value) { key = value; }

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// The error of a response: its message, or its status if it has none.
async function failure(response) {
  let message = "";
  try { message = (await response.json()).error.message; } catch { /* no JSON */ }
  message ||= `The server responded with ${response.status} ${response.statusText}`.trim() + ".";
  const wait = response.headers.get("Retry-After");
  if (response.status === 429 && wait) message += ` Try again in ${wait} s.`;
  return new ServerError(message, response.status);
}

async function send(path, options) {
  const headers = {...(options.body ? {"Content-Type": "application/json"} : {}), ...(key ? {Authorization: `Bearer ${key}`} : {})};
  let response;
  try {
    response = await fetch(path, {...options, headers, cache: "no-store"});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not respond. Is it still running?", 0);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export const get = path => send(path, {});

export async function post(path, body, signal) {
  return (await send(path, {method: "POST", body: JSON.stringify(body), signal})).json();
}

// Yields every object of a stream of server-sent events, until `[DONE]`.
export async function* stream(path, body, signal) {
  const response = await send(path, {method: "POST", body: JSON.stringify({...body, stream: true}), signal});
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server was lost.", 0);
    }
    if (part.done) return;
    const lines = (rest + part.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, event.error.code ?? 500);
      yield event;
    }
  }
}
