"""/metrics: text in the format of Prometheus, strictly parsed, and correct counts."""

import math
import re
import threading

from switchlm.serving.statistics import LATENCY, OUTCOMES, Statistics

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(rf'({NAME})(?:\{{((?:{NAME}="[^"\\\n]*",?)*)\}})? (\S+)')


def parse(text):
    """Parse the format strictly: return {family: (kind, {(name, labels): value})}."""
    assert text.endswith("\n")
    families, family = {}, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ", 3)[2]
            assert family not in families, f"{family} comes twice"
            assert line.split(" ", 3)[3]
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family
            assert kind in ("counter", "gauge", "histogram")
            families[family] = (kind, {})
        else:
            name, labels, value = SAMPLE.fullmatch(line).groups()
            kind, samples = families[family]
            ending = name.removeprefix(family)
            assert ending in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
            assert (name, labels) not in samples
            samples[name, labels] = float(value)
    return families


def test_the_text_has_prometheus_format_and_consistent_histograms():
    statistics = Statistics()
    for reason in OUTCOMES:
        statistics.count_request(reason)
    for seconds in (0.0001, 0.3, 1e6):
        statistics.count_first_token(seconds)
    families = parse(statistics.text({"switchlm_slots": ("Slots.", 32)}))
    assert families["switchlm_slots"] == ("gauge", {("switchlm_slots", None): 32})
    _, requests = families["switchlm_requests_total"]
    assert requests == {("switchlm_requests_total", f'outcome="{one}"'): 1 for one in OUTCOMES}
    kind, samples = families["switchlm_first_token_seconds"]
    assert kind == "histogram"
    buckets = [value for (name, _), value in samples.items() if name.endswith("_bucket")]
    bounds = [float(label.split('"')[1]) for (name, label) in samples if name.endswith("_bucket")]
    assert bounds == [*LATENCY, math.inf]
    assert buckets == sorted(buckets)
    assert buckets[0] == 1
    assert buckets[-2:] == [2, 3]
    assert samples["switchlm_first_token_seconds_count", None] == 3
    assert samples["switchlm_first_token_seconds_sum", None] == 1000000.3001


def test_no_count_is_lost_among_threads():
    statistics = Statistics()

    def add():
        for _ in range(2000):
            statistics.count_request("stop", 0.1, prompt=3, new=2)
            statistics.count_step(4, 0.01)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statistics.value("switchlm_requests_total", outcome="stop") == 8000
    assert statistics.value("switchlm_request_seconds_count") == 8000
    assert statistics.value("switchlm_steps_total") == 8000
    assert statistics.value("switchlm_prompt_tokens_total") == 24000
    assert statistics.value("switchlm_new_tokens_total") == 16000
    assert statistics.value("switchlm_rows_total") == 32000


def test_the_estimated_wait_grows_with_the_queue_and_is_bounded():
    statistics = Statistics()
    assert statistics.seconds_for(1, 32) == 1
    for _ in range(10):
        statistics.count_request("length", 4.0)
    assert statistics.seconds_for(32, 32) == 4
    assert statistics.seconds_for(64, 32) == 8
    assert statistics.seconds_for(10**6, 1) == 600
