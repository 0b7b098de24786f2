"""One run of a comparison in a process of its own, advanced a few steps at a time.

Two models of this size share the cores best with one process each: their matmuls are too small to
split. The parent writes `advance STEP` or `finish` to the child's standard input; the child writes
JSON lines to its standard output, metrics first and `{"done": true}` last, or `{"failed": why}`.
The child stops at the end of its input, so it also stops when the parent dies.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from switchlm.config import read_yaml
from switchlm.data.pretraining.loader import open_data
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import SwitchLMError, WorkerError
from switchlm.files import to_json
from switchlm.huggingface.load import save
from switchlm.recipes.config import from_sections
from switchlm.recipes.pretrain import build_model, record_routing
from switchlm.recipes.trained_with import metadata_of
from switchlm.training.loop import train
from switchlm.training.run_folder import RunFolder

Event = dict[str, Any]


class CompareWorker:
    """Starts the child process on a run folder, sends it commands and reads its metrics."""

    def __init__(self, folder: RunFolder, threads: int) -> None:
        """folder: with settings and tokenizer."""
        self.folder = folder
        self.metrics: list[Event] = []
        self._child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "switchlm.recipes.compare_worker",
                str(folder.root),
                str(threads),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def send(self, command: str) -> None:
        """Send a command; `read_lines` returns its output."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # `read_lines` raises the error
            self._child.stdin.write(command + "\n")
            self._child.stdin.flush()

    def read_lines(self) -> Iterator[Event]:
        """Yield the metrics lines of the last command, as they arrive."""
        assert self._child.stdout is not None
        for text in self._child.stdout:
            line = json.loads(text)
            if line.get("done"):
                return
            if "failed" in line:
                raise WorkerError(f"The run in {str(self.folder.root)!r} failed. {line['failed']}")
            self.metrics.append(line)
            yield line
        raise WorkerError(
            f"The process of {str(self.folder.root)!r} ended with status {self._child.wait()} "
            "before its run did; its error is printed above."
        )

    def close(self) -> None:
        """Close the child's input, and kill the child if it does not stop within 10 s."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    @property
    def evaluations(self) -> list[Event]:
        """The lines with a held-out loss so far."""
        return [line for line in self.metrics if "evaluation_loss" in line]


def _serve(folder: RunFolder, commands: TextIO, output: TextIO) -> None:
    """Run the commands in the child process, until `finish` or the end of its input."""
    config = from_sections(read_yaml(folder.config))
    tokenizer = Tokenizer.load(folder.tokenizer)
    loader = open_data(config.data, seed=config.training.seed, tokenizer=tokenizer)
    model = build_model(config)
    stopping = False

    def send(line: Event) -> None:
        output.write(to_json(line) + "\n")
        output.flush()

    lines = train(
        model,
        loader,
        config.training,
        run=folder,
        should_stop=lambda: stopping,
        kernels=config.kernels,
    )
    for command in commands:
        word, *step = command.split()
        stopping = word == "finish"
        try:
            for line in lines:
                send(line)
                if not stopping and "loss" in line and line["step"] >= int(step[0]):
                    break
        except SwitchLMError as error:
            send({"failed": str(error)})
            return
        if stopping:
            about = metadata_of(model, config.data)
            save(model, loader.tokenizer, folder.model, metadata=about)
            record_routing(model, loader, loader.tokenizer, folder)
        send({"done": True})


def _main(root: str, threads: str) -> None:
    # Ctrl-C reaches all processes of the group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(int(threads))
    _serve(RunFolder(Path(root)), sys.stdin, sys.stdout)


if __name__ == "__main__":
    _main(*sys.argv[1:])
