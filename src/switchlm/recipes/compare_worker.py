"""One run of a comparison in a process of its own, advanced a few steps at a time.

Two models of this size share the cores best with one process each: their products are too small to
split. The parent writes `advance STEP` or `finish` to the child's standard input; the child answers
with JSON lines on its standard output, metrics lines first and `{"done": true}` last. A child whose
parent is gone reads the end of its input and stops.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from switchlm.config import read_yaml, write_yaml
from switchlm.data.pretraining.loader import Loader, open_data
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import SwitchLMError
from switchlm.huggingface.load import save
from switchlm.recipes.config import RunConfig, from_sections, to_sections
from switchlm.recipes.pretrain import build_model, record_routing
from switchlm.training.loop import train
from switchlm.training.run_folder import RunFolder

Event = dict[str, Any]


class WorkerError(SwitchLMError):
    """The child process of a run ended before its time."""


class CompareWorker:
    """The parent's end: starts the child on a run folder and asks it for steps."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, folder: RunFolder, threads: int
    ) -> None:
        self.folder = folder
        self.metrics: list[Event] = []
        folder.create()
        write_yaml(folder.config, to_sections(config))
        tokenizer.save(folder.tokenizer)
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

    def ask(self, command: str) -> None:
        """Send a command; `answers` gives what comes back."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(command + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # `answers` says what happened

    def answers(self) -> Iterator[Event]:
        """Yield the metrics lines of the last command, as they come."""
        assert self._child.stdout is not None
        for text in self._child.stdout:
            line = json.loads(text)
            if line.get("done"):
                return
            self.metrics.append(line)
            yield line
        raise WorkerError(
            f"The process of {str(self.folder.root)!r} ended with status {self._child.wait()} "
            "before its run did; what it said stands above."
        )

    def close(self) -> None:
        """End the child: it stops at the end of its input, or now if it must."""
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


class _Run:
    """The child's end."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        config = from_sections(read_yaml(folder.config))
        self.loader: Loader = open_data(
            config.data, seed=config.training.seed, tokenizer=Tokenizer.load(folder.tokenizer)
        )
        self.model = build_model(config)
        self.stopping = False
        self.lines = train(
            self.model,
            self.loader,
            config.training,
            run=folder,
            should_stop=lambda: self.stopping,
            kernels=config.kernels,
        )

    def serve(self, commands: TextIO, answers: TextIO) -> None:
        """Obey until told to finish, or until the commands end."""
        for command in commands:
            word, *step = command.split()
            if word == "finish":
                self.stopping = True
            for line in self.lines:
                _send(answers, line)
                if word == "advance" and "loss" in line and line["step"] >= int(step[0]):
                    break
            if word == "finish":
                save(self.model, self.loader.tokenizer, self.folder.model)
                record_routing(self.model, self.loader, self.loader.tokenizer, self.folder)
            _send(answers, {"done": True})


def _send(answers: TextIO, line: Event) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


def _main(root: str, threads: str) -> None:
    # Ctrl-C reaches the whole group of processes; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(int(threads))
    _Run(RunFolder(Path(root))).serve(sys.stdin, sys.stdout)


if __name__ == "__main__":
    _main(*sys.argv[1:])
