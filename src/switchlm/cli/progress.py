"""Progress displays of training runs and of other long work, and tables.

A run shows steps, losses, speed and the remaining time. SIGINT and SIGTERM finish the step and
save; the command then exits with the documented status.
"""

import signal
import time
from collections import deque
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
RATE_POINTS = 20  # lines of metrics that the time left is estimated from


def follow(
    start: Callable[..., Iterable[Event]],
    *,
    steps: int | None,
    seconds: float | None,
    as_json: bool,
    lines: bool = True,
    of_training: bool = True,
) -> tuple[Console, Event]:
    """Run a recipe under the live display, until its end or a signal.

    Returns the console, and the last value of every key of the events. Only the main process of a
    job shows anything.

    start: the recipe, with all arguments but `should_stop` and `report`.
    steps, seconds: at which it will end; None if not known.
    of_training: whether `seconds` counts training, of resumed runs in all, or this whole command.
    as_json: whether the display goes to standard error.
    lines: with as_json, print every line of metrics too.
    """
    from switchlm.parallel.launch import launched

    launch = launched()
    is_main = launch is None or launch.rank == 0
    console = Console(stderr=as_json, quiet=not is_main)
    last: Event = {}
    with stop_on_signal() as should_stop:
        progress = Progress(
            console,
            steps=steps,
            seconds=seconds,
            of_training=of_training,
            should_stop=should_stop,
        )
        for event in progress.show(start(should_stop=should_stop, report=progress.show_phase)):
            last |= event
            if lines and as_json and is_main and "step" in event:
                typer.echo(to_json(event))
    if "ended" in last:
        console.print(last["ended"], style="bold", markup=False, highlight=False)
    return console, last


class Progress:
    """Shows the events of a recipe.

    steps, seconds, of_training: as of `follow`.
    should_stop: whether the runs were asked to stop, so that no time is left to estimate.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int | None,
        seconds: float | None,
        of_training: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.console = console
        self.steps = steps
        self.seconds = seconds
        self.of_training = of_training
        self.should_stop = should_stop
        self.started = time.monotonic()
        # When this process reached a step, of the last `RATE_POINTS` lines: time and step.
        self.points: deque[tuple[float, int]] = deque(maxlen=RATE_POINTS)
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
            done = min(state["step"] for state in self.runs.values())
            if not self.points or done > self.points[-1][1]:
                self.points.append((time.monotonic(), done))
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
        now = time.monotonic()
        status = f"{self.phase}: {_clock(now - self.started)} elapsed"
        if self.should_stop():
            return f"{status}, stopping after this step"
        left = self._left(now)
        return status if left is None else f"{status}, about {_clock(left)} left"

    def _left(self, now: float) -> float | None:
        """Estimate the seconds left, by the rate of the last steps that this process took."""
        if not self.points:
            return None
        reached, done = self.points[-1]
        waited = now - reached
        estimates = []
        if self.seconds is not None and self.of_training:
            trained = max(state.get("seconds", 0.0) for state in self.runs.values())
            estimates.append(self.seconds - trained - waited)
        elif self.seconds is not None:
            estimates.append(self.seconds - (now - self.started))
        first, from_step = self.points[0]
        if self.steps is not None and done > from_step:
            rate = (done - from_step) / (reached - first)
            estimates.append((self.steps - done) / rate - waited)
        return max(min(estimates), 0.0) if estimates else None

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
