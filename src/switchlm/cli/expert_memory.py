"""The option --expert-memory: experts on the disk, and what reading them came to."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchlm.errors import ConfigError

if TYPE_CHECKING:
    from switchlm.model.transformer import SwitchTransformer

ExpertMemorySize = Annotated[
    str | None,
    typer.Option(
        "--expert-memory",
        help="Leave experts in their files and keep the last used in so much memory: 4GB, 512MiB.",
    ),
]
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("KMGT", 1)
    for ending, base in (("", 1000), ("B", 1000), ("iB", 1024))
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes that a size like 4GB, 1.5 GiB or 300M means; ConfigError teaches."""
    units = {name.lower(): size for name, size in _UNITS.items()}
    found = _SIZE.fullmatch(text)
    if found is None or found[2].lower() not in units:
        raise ConfigError(
            f"--expert-memory {text!r} is no size. Write a number and a unit: 4GB, 512MB, 1.5GiB "
            "(KB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB of 1024)."
        )
    size = int(float(found[1]) * units[found[2].lower()])
    if size < 1:
        raise ConfigError(f"--expert-memory {text!r} leaves no memory at all for experts.")
    return size


class Usage:
    """What a piece of work with a model took; nothing where its experts are not on the disk."""

    def __init__(self, model: "SwitchTransformer") -> None:
        from switchlm.compression.offload import memory_of

        self._memory = memory_of(model)
        self._seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time that passes inside."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def figures(self, num_tokens: int | None = None) -> dict[str, Any]:
        """Return resident memory, bytes read, rates; empty where all is in memory.

        num_tokens: generated, None where the work was another.
        """
        if self._memory is None:
            return {}
        counters = self._memory.counters
        resident, peak = resident_bytes()
        found: dict[str, Any] = {
            "resident_bytes": resident,
            "peak_resident_bytes": peak,
            "expert_bytes_held": counters.bytes_held,
            "bytes_read": counters.bytes_read,
            "hits": counters.hits,
            "misses": counters.misses,
            "hit_rate": counters.hit_rate,
            "guesses": counters.guesses,
            "wrong_guesses": counters.wrong_guesses,
            "seconds": self._seconds,
        }
        if num_tokens is not None:
            found["tokens_a_second"] = num_tokens / max(self._seconds, 1e-9)
        return found

    def tell(self, num_tokens: int | None = None) -> None:
        """Say the figures beside the result, in one line."""
        found = self.figures(num_tokens)
        if not found:
            return
        rate = ""
        if num_tokens is not None:
            rate = f", {found['tokens_a_second']:.1f} tokens per second"
        wanted = found["hits"] + found["misses"]
        typer.echo(
            f"Experts on disk: {found['bytes_read'] / 1e9:.2f} GB read, "
            f"{found['hit_rate']:.0%} of {wanted:,} wanted were in memory; "
            f"resident {found['resident_bytes'] / 1e9:.2f} GB "
            f"(at most {found['peak_resident_bytes'] / 1e9:.2f}){rate}.",
            err=True,
        )


def resident_bytes() -> tuple[int, int]:
    """Return the memory that this process has now, and the most it ever had."""
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak, peak
    return pages * resource.getpagesize(), peak
