"""Appendix B, No-token-left-behind, and what came after the paper."""

from benchmarks.paper.base import SWITCH, capacity, switch
from benchmarks.paper.table import QUALITY, Column, Row, Table, better

NO_TOKEN, DROPS = "No-token-left-behind, capacity 1.0", "Switch, capacity 1.0"
EXPERTS_CHOOSE = ("router.selection=expert_choice", "router.evaluation_capacity_factor=1.0")
Z_LOSS, BIAS, CHOICE = "router z-loss, 1e-3", "balance by bias", "experts choose, capacity 1.0"


TABLE = Table(
    name="appendix",
    title="Appendix B, and later work",
    text="The paper found no gain in sending overflowing tokens to their next best expert, and "
    "gives no figures; the z-loss is Zoph et al. 2022, choice by experts Zhou et al. 2022 (in the "
    "encoder), and balance by a bias DeepSeek-V3.",
    columns=(
        QUALITY,
        Column("dropped", lambda one, runs: one.figures.get("dropped", 0.0), ".1%"),
        Column("examples per second", lambda one, runs: one.examples_per_second, ",.0f"),
    ),
    rows=[
        Row("Switch", SWITCH),
        Row(DROPS, switch(64, *capacity(1.0))),
        Row(NO_TOKEN, switch(64, *capacity(1.0, "router.reroute_overflow=true"))),
        Row(Z_LOSS, switch(64, "router.z_weight=0.001")),
        Row(CHOICE, switch(64, *capacity(1.0, *EXPERTS_CHOOSE))),
        Row(BIAS, switch(64, "router.balance=bias")),
    ],
    claims=[
        better(DROPS, NO_TOKEN, "no gain", "No-token-left-behind does not help"),
        better(Z_LOSS, "Switch", "no loss", "the z-loss does not hurt"),
        better(CHOICE, DROPS, "-", "experts choose better than tokens do"),
        better(BIAS, "Switch", "-", "a bias balances better than the loss does"),
    ],
)
