"""What the server counts, in Prometheus' text format (version 0.0.4)."""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OUTCOMES = ("stop", "length", "deadline", "cancelled", "error", "refused")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How many values lie at or below each bound, their number and sum."""

    def __init__(self, bounds: tuple[float, ...] = LATENCY) -> None:
        self.bounds = bounds
        self.counts = [0] * len(bounds)
        self.number, self.total = 0, 0.0

    def add(self, value: float) -> None:
        self.number += 1
        self.total += value
        for place, bound in enumerate(self.bounds):
            self.counts[place] += value <= bound

    def lines(self, name: str) -> Iterator[str]:
        for bound, count in zip((*self.bounds, math.inf), (*self.counts, self.number), strict=True):
            label = "+Inf" if bound == math.inf else f"{bound:g}"
            yield f'{name}_bucket{{le="{label}"}} {count}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {self.number}"


class Statistics:
    """Counters of one engine; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = dict.fromkeys(OUTCOMES, 0)
        self.answers: Counter[int] = Counter()
        self.prompt_tokens = self.new_tokens = self.steps = self.rows = 0
        self.first_token, self.whole, self.step = Histogram(), Histogram(), Histogram()

    def answered(self, status: int) -> None:
        """Count an answer of HTTP, by its status."""
        with self._lock:
            self.answers[status] += 1

    def began(self, seconds: float) -> None:
        """Count a first token, so long after its request came."""
        with self._lock:
            self.first_token.add(seconds)

    def stepped(self, rows: int, seconds: float) -> None:
        """Count a decoding step of so many rows."""
        with self._lock:
            self.steps += 1
            self.rows += rows
            self.step.add(seconds)

    def finished(
        self, reason: str, seconds: float | None = None, prompt: int = 0, new: int = 0
    ) -> None:
        """Count the end of a request, and its tokens."""
        with self._lock:
            self.requests[reason] += 1
            self.prompt_tokens += prompt
            self.new_tokens += new
            if seconds is not None:
                self.whole.add(seconds)

    def seconds_for(self, waiting: int, num_slots: int) -> int:
        """Return about how long it takes until so many have been served, whole seconds from 1."""
        mean = self.whole.total / self.whole.number if self.whole.number else 1.0
        return min(max(math.ceil(mean * waiting / num_slots), 1), 600)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all figures, and the gauges given as name to (help, value)."""
        with self._lock:
            return "\n".join(self._lines(gauges)) + "\n"

    def _lines(self, gauges: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        def head(name: str, kind: str, what: str) -> Iterator[str]:
            yield f"# HELP {name} {what}"
            yield f"# TYPE {name} {kind}"

        name = "switchlm_requests_total"
        yield from head(name, "counter", "Requests by how they ended; refused ones never began.")
        yield from (f'{name}{{outcome="{key}"}} {value}' for key, value in self.requests.items())
        name = "switchlm_http_responses_total"
        yield from head(name, "counter", "Answers by status; 499: the client was gone before.")
        yield from (f'{name}{{status="{key}"}} {self.answers[key]}' for key in sorted(self.answers))
        for name, what, value in (
            ("switchlm_prompt_tokens_total", "Tokens of prompts.", self.prompt_tokens),
            ("switchlm_new_tokens_total", "Tokens generated.", self.new_tokens),
            ("switchlm_steps_total", "Decoding steps.", self.steps),
            ("switchlm_rows_total", "Rows of all decoding steps.", self.rows),
        ):
            yield from head(name, "counter", what)
            yield f"{name} {value}"
        for name, what, histogram in (
            ("switchlm_first_token_seconds", "From request to first token.", self.first_token),
            ("switchlm_request_seconds", "From request to end.", self.whole),
            ("switchlm_step_seconds", "Decoding steps.", self.step),
        ):
            yield from head(name, "histogram", what)
            yield from histogram.lines(name)
        for name, (what, number) in gauges.items():
            yield from head(name, "gauge", what)
            yield f"{name} {number:g}"
