"""What the server counts, for Prometheus: by its own client (extra `serve`)."""

import math
from collections.abc import Mapping
from functools import partial

from switchlm.errors import MissingExtraError

try:
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        disable_created_metrics,
        generate_latest,
    )
except ImportError:
    raise MissingExtraError("prometheus-client", "serve", "counting requests") from None

CONTENT_TYPE = CONTENT_TYPE_LATEST
LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OUTCOMES = ("stop", "length", "deadline", "cancelled", "error", "refused")
disable_created_metrics()  # a moment of birth beside every counter


class Statistics:
    """Counters of one engine; any thread may add to them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry, buckets=LATENCY)
        self._requests = counter(
            "switchlm_requests",
            "Requests by how they ended; refused ones never began.",
            ["outcome"],
        )
        for outcome in OUTCOMES:
            self._requests.labels(outcome)  # shown from the start, as zero
        self._answers = counter(
            "switchlm_http_responses",
            "Answers by status; 499: the client was gone before.",
            ["status"],
        )
        self._prompt_tokens = counter("switchlm_prompt_tokens", "Tokens of prompts.")
        self._new_tokens = counter("switchlm_new_tokens", "Tokens generated.")
        self._steps = counter("switchlm_steps", "Decoding steps.")
        self._rows = counter("switchlm_rows", "Rows of all decoding steps.")
        self._first_token = histogram(
            "switchlm_first_token_seconds", "From request to first token."
        )
        self._whole = histogram("switchlm_request_seconds", "From request to end.")
        self._step = histogram("switchlm_step_seconds", "Decoding steps.")

    def answered(self, status: int) -> None:
        """Count an answer of HTTP, by its status."""
        self._answers.labels(status).inc()

    def began(self, seconds: float) -> None:
        """Count a first token, so long after its request came."""
        self._first_token.observe(seconds)

    def stepped(self, rows: int, seconds: float) -> None:
        """Count a decoding step of so many rows."""
        self._steps.inc()
        self._rows.inc(rows)
        self._step.observe(seconds)

    def finished(
        self, reason: str, seconds: float | None = None, prompt: int = 0, new: int = 0
    ) -> None:
        """Count the end of a request, and its tokens."""
        self._requests.labels(reason).inc()
        self._prompt_tokens.inc(prompt)
        self._new_tokens.inc(new)
        if seconds is not None:
            self._whole.observe(seconds)

    def value(self, name: str, **labels: str) -> float:
        """Return a figure by its name in `text`, such as switchlm_steps_total."""
        return self._registry.get_sample_value(name, labels) or 0.0

    def seconds_for(self, waiting: int, num_slots: int) -> int:
        """Return about how long it takes until so many have been served, whole seconds from 1."""
        number = self.value("switchlm_request_seconds_count")
        mean = self.value("switchlm_request_seconds_sum") / number if number else 1.0
        return min(max(math.ceil(mean * waiting / num_slots), 1), 600)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all figures, and the gauges given as name to (help, value)."""
        now = CollectorRegistry()
        for name, (what, number) in gauges.items():
            Gauge(name, what, registry=now).set(number)
        return (generate_latest(self._registry) + generate_latest(now)).decode()
