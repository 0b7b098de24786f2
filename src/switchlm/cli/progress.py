"""Progress displays of training runs and of other long work, and tables.

A run shows steps, losses, speed and the remaining time. SIGINT and SIGTERM finish the step and
save; the command then exits with the documented status.
"""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from switchlm.files import to_json

Event = dict[str, Any]
SPARK = "▁▂▃▄▅▆▇█"
PLAIN_INTERVAL = 10.0  # seconds between lines without a terminal


def follow(
    start: Callable[..., Iterable[Event]],
    *,
    steps: int | None,
    seconds: float | None,
    as_json: bool,
    lines: bool = True,
) -> tuple[Console, Event]:
    """Run a recipe under the live display, until its end or a signal.

    Returns the console, and the last value of every key of the events. Only the main process of a
    job shows anything.

    start: the recipe, with all arguments but `should_stop` and `report`.
    steps, seconds: at which it will end; None if not known.
    as_json: whether the display goes to standard error.
    lines: with as_json, print every line of metrics too.
    """
    from switchlm.parallel.launch import launched

    launch = launched()
    is_main = launch is None or launch.rank == 0
    console = Console(stderr=as_json, quiet=not is_main)
    progress = Progress(console, steps=steps, seconds=seconds)
    last: Event = {}
    with stop_on_signal() as should_stop:
        for event in progress.show(start(should_stop=should_stop, report=progress.show_phase)):
            last |= event
            if lines and as_json and is_main and "step" in event:
                typer.echo(to_json(event))
    return console, last


class Progress:
    """Shows the events of a recipe.

    steps, seconds: at which the runs will end; None if not known.
    """

    def __init__(self, console: Console, *, steps: int | None, seconds: float | None) -> None:
        self.console = console
        self.steps = steps
        self.seconds = seconds
        self.started = time.monotonic()
        self.phase = "starting"
        self.runs: dict[str, Event] = {}
        self.curves: dict[str, list[float]] = {}
        self.printed = 0.0

    def show(self, events: Iterable[Event]) -> Iterator[Event]:
        """Show and yield every event."""
        if not self.console.is_terminal:
            for event in events:
                self._update(event)
                self._print_line(event)
                yield event
            return
        with Live(console=self.console, get_renderable=self._draw, refresh_per_second=4):
            for event in events:
                self._update(event)
                yield event

    def show_phase(self, line: str) -> None:
        """Show a phase that has no steps to count."""
        self.phase = line
        if not self.console.is_terminal:
            self.console.print(line, markup=False, highlight=False)

    def _update(self, event: Event) -> None:
        if "phase" in event:
            self.phase = event["phase"]
        elif "step" in event:
            name = event.get("run", "run")
            self.runs.setdefault(name, {}).update(event)
            if event.get("evaluation_loss") is not None:
                self.curves.setdefault(name, []).append(event["evaluation_loss"])

    def _draw(self) -> Group:
        table = plain_table(["model"], ["step", "loss", "held-out", "tokens/s", "training"])
        table.add_column("held-out loss so far")
        for name, state in self.runs.items():
            table.add_row(
                name,
                f"{state['step']:,}",
                _number(state.get("loss")),
                _number(state.get("evaluation_loss")),
                f"{state.get('tokens_per_second', 0):,.0f}",
                f"{state.get('seconds', 0):.0f} s",
                _sparkline(self.curves.get(name, [])),
            )
        return Group(Text(self._status(), style="bold"), table)

    def _status(self) -> str:
        elapsed = time.monotonic() - self.started
        left = self._left(elapsed)
        remaining = "" if left is None else f", about {_clock(left)} left"
        return f"{self.phase}: {_clock(elapsed)} elapsed{remaining}"

    def _left(self, elapsed: float) -> float | None:
        estimates = [] if self.seconds is None else [max(self.seconds - elapsed, 0.0)]
        done = min((state["step"] for state in self.runs.values()), default=0)
        if self.steps is not None and done:
            estimates.append(elapsed / done * (self.steps - done))
        return min(estimates, default=None)

    def _print_line(self, event: Event) -> None:
        now = time.monotonic()
        if "phase" in event:
            self.console.print(f"{self.phase} ...")
        elif now - self.printed > PLAIN_INTERVAL and "step" in event:
            self.printed = now
            states = "; ".join(
                f"{name} step {state['step']:,} loss {_number(state.get('loss'))} "
                f"held-out {_number(state.get('evaluation_loss'))}"
                + (f" score {state['score']:.2f}%" if "score" in state else "")
                for name, state in self.runs.items()
            )
            self.console.print(f"{self._status()}; {states}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _sparkline(values: list[float], width: int = 24) -> str:
    """Return the last values as bars between their minimum and maximum."""
    values = values[-width:]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARK[round((value - low) * scale)] for value in values)


def plain_table(words: Sequence[str], numbers: Sequence[str], title: str | None = None) -> Table:
    """Return an empty table without borders: columns of text, then columns of numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
    for column in words:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; yields a function that takes the number done."""
    console = Console(stderr=True)
    hidden = total == 1 or not console.is_terminal
    with Bar(console=console, transient=True, disable=hidden) as bar:
        number = bar.add_task(what, total=total)
        yield lambda done: bar.update(number, completed=done)


STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether to stop; after a signal, exit with 130 or 143.

    A second SIGINT stops at once.
    """
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, on_signal) for number in STATUS}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise SystemExit(STATUS[signal.Signals(received[0])])
