"""Metrics of the server for Prometheus (extra `serve`)."""

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
disable_created_metrics()  # the creation time of every counter


class Statistics:
    """Counters of one engine; any thread may add to them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry, buckets=LATENCY)
        self._requests = counter(
            "switchlm_requests",
            "Requests by outcome; refused ones were not queued.",
            ["outcome"],
        )
        for outcome in OUTCOMES:
            self._requests.labels(outcome)  # present from the start, as zero
        self._responses = counter(
            "switchlm_http_responses",
            "Responses by status; 499: the client disconnected.",
            ["status"],
        )
        self._prompt_tokens = counter("switchlm_prompt_tokens", "Tokens of prompts.")
        self._new_tokens = counter("switchlm_new_tokens", "Tokens generated.")
        self._steps = counter("switchlm_steps", "Decoding steps.")
        self._rows = counter("switchlm_rows", "Rows of all decoding steps.")
        self._first_token = histogram(
            "switchlm_first_token_seconds", "From request to first token."
        )
        self._request = histogram("switchlm_request_seconds", "From request to end.")
        self._step = histogram("switchlm_step_seconds", "Decoding steps.")

    def count_response(self, status: int) -> None:
        """Count an HTTP response by its status."""
        self._responses.labels(status).inc()

    def count_first_token(self, seconds: float) -> None:
        """Count a first token; seconds: since its request was received."""
        self._first_token.observe(seconds)

    def count_step(self, rows: int, seconds: float) -> None:
        """Count a decoding step and its rows."""
        self._steps.inc()
        self._rows.inc(rows)
        self._step.observe(seconds)

    def count_request(
        self, reason: str, seconds: float | None = None, prompt: int = 0, new: int = 0
    ) -> None:
        """Count a request that ended, and its tokens."""
        self._requests.labels(reason).inc()
        self._prompt_tokens.inc(prompt)
        self._new_tokens.inc(new)
        if seconds is not None:
            self._request.observe(seconds)

    def value(self, name: str, **labels: str) -> float:
        """Return a value by its name in `text`, such as switchlm_steps_total."""
        return self._registry.get_sample_value(name, labels) or 0.0

    def seconds_for(self, waiting: int, num_slots: int) -> int:
        """Return an estimate of the seconds until the waiting requests are served, at least 1."""
        number = self.value("switchlm_request_seconds_count")
        mean = self.value("switchlm_request_seconds_sum") / number if number else 1.0
        return min(max(math.ceil(mean * waiting / num_slots), 1), 600)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all metrics as text; gauges: (help, value) by name."""
        now = CollectorRegistry()
        for name, (what, number) in gauges.items():
            Gauge(name, what, registry=now).set(number)
        return (generate_latest(self._registry) + generate_latest(now)).decode()
