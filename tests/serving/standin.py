"""The server's interface in a few lines, with the real model functions behind it."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from switchlm.errors import UserError
from switchlm.generation.fill import answer, count_blanks, put_into_blanks
from switchlm.generation.route import route
from switchlm.generation.sampling import Sampling
from switchlm.serving.page_files import REPORT_HEADERS, page_files, page_headers


def serve(model, tokenizer, *, name="nano", key=None, report=None, port=0):
    """Serve on a thread of its own until `shutdown()`; `server_port` is the port."""
    files, headers = page_files(), page_headers(report and Path(report).read_text("utf-8"))
    lock = threading.Lock()  # a model serves one thread at a time

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def give(self, status, body, kind="application/json", headers=None):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for header, value in (headers or {}).items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def refuse(self, status, message):
            error = {"message": message, "type": "invalid", "param": None, "code": None}
            self.give(status, {"error": error})

        def allowed(self):
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                self.refuse(401, "This server asks for an API key, and this is not it.")
                return False
            return True

        def do_GET(self):
            if self.path in files:
                file = files[self.path]
                self.give(200, file.content, file.media_type, headers)
            elif not self.allowed():
                pass
            elif self.path == "/v1/models":
                self.give(200, {"data": [{"id": name, "report": report is not None}]})
            elif self.path == "/report" and report:
                self.give(200, Path(report).read_bytes(), "text/html", REPORT_HEADERS)
            else:
                self.refuse(404, "There is nothing here.")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return
            try:
                with lock:
                    reply = self.routed(body) if self.path == "/v1/route" else self.said(body)
            except UserError as error:
                self.refuse(400, str(error))
                return
            if body.get("stream"):
                *events, last = reply if isinstance(reply, list) else self.pieces(body, reply)
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for event in [*map(json.dumps, [*events, last]), "[DONE]"]:
                    self.wfile.write(f"data: {event}\n\n".encode())
            else:
                self.give(200, reply)

        def routed(self, body):
            capacity = body.get("enforce_capacity", False)
            found = route(
                model, tokenizer, body["text"], body.get("output"), enforce_capacity=capacity
            )
            return {"model": name, **dataclasses.asdict(found)}

        def said(self, body):
            text = body.get("text") or body["prompt"]
            limit = body.get("max_tokens") or 32
            if "text" in body:
                count_blanks(text, tokenizer)
            sampling = Sampling(temperature=body["temperature"])
            found = answer(
                model, tokenizer, text, max_new_tokens=limit, sampling=sampling, seed=body["seed"]
            )
            return {
                "text": text,
                "filled": put_into_blanks(text, found.spans),
                "output": found.output,
                "spans": {str(number): span for number, span in found.spans.items()},
                "finished": found.finished,
            }

        def pieces(self, body, reply):
            output = reply["output"]
            if "prompt" in body:
                return [{"choices": [{"text": character}]} for character in output] or [{}]
            return [*({"output": output[:end]} for end in range(0, len(output), 4)), reply]

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
