"""Table 11 (appendix C): how a router explores in training."""

from benchmarks.paper.base import switch
from benchmarks.paper.plans import Pretraining
from benchmarks.paper.table import Row, Table, better


def explored(kind: str, rate: float = 0.0) -> Pretraining:
    """Return 64 experts, so explored."""
    return switch(64, f"router.exploration={kind}", f"router.exploration_rate={rate}")


TABLE = Table(
    name="table11",
    title="Table 11: exploration",
    text="The rate of jitter is the paper's, 0.01; that of dropout, which it does not name, 0.1.",
    rows=[
        Row("argmax", explored("argmax", 0.01), ("-1.471",)),
        Row("sample", explored("sample"), ("-1.570",)),
        Row("input dropout", explored("input_dropout", 0.1), ("-1.480",)),
        Row("jitter", explored("jitter", 0.01), ("-1.468",)),
    ],
    claims=[
        better("jitter", "argmax", "+0.003"),
        better("argmax", "input dropout", "+0.009"),
        better("argmax", "sample", "+0.099"),
    ],
)
