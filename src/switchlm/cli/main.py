"""The program `switchlm`: finds the command, and turns errors into exit statuses.

0 done; 1 failed; 2 the user's mistake; 130 and 143 stopped by SIGINT and SIGTERM. The traceback of
an unexpected error is shown, and written to a file that the message names.
"""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import MutableMapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from switchlm import __version__
from switchlm.errors import SwitchLMError, UserError

# Command -> its line in `switchlm --help`. The function has the same name, with _ for -; its file,
# of the same name or as in FILES, is imported only when the command runs.
COMMANDS = {
    "pretrain": "Pre-train a Switch Transformer, or a dense model, on text.",
    "compare": "Compare a Switch Transformer with its FLOP-matched dense twin on the same text.",
    "finetune": "Fine-tune a model on tasks, and keep the best checkpoint by their metrics.",
    "distill": "Distil a large model into a small one.",
    "evaluate": "Measure the loss of models on text by source, or their scores on tasks.",
    "serve": "Serve a model over HTTP, with a page that shows the expert of each token.",
    "generate": "Fill the blanks of a text, or generate an output for it.",
    "inspect": "Show the size of a model, and which expert takes which tokens.",
    "plan": "Find the fastest layout of a model on a cluster, its memory and traffic.",
    "simulate": "Simulate the training step of one process of a large job, and measure it.",
    "verify-parallel": "Compare every layout over many processes with one process.",
    "compress": "Make a model smaller: fewer bits per weight, fewer experts.",
    "convert": "Write a model in another layout.",
    "cache": "Show the cached texts, tokenizers and kernels, and delete them.",
    "export": "Write a model for another runtime: PyTorch's programs, ONNX, or a plain T5.",
}
# Command -> the end of its --help.
EXAMPLES = {
    "pretrain": "switchlm pretrain --preset tiny --data texts --out runs/mine",
    "compare": "switchlm compare --data texts --budget 10m --out runs/race",
    "finetune": "switchlm finetune --model runs/mine --task examples.jsonl --out runs/tuned",
    "distill": "switchlm distill --teacher runs/mine --data texts --out runs/small",
    "evaluate": "switchlm evaluate --model runs/tuned --task examples.jsonl",
    "serve": "switchlm serve --model runs/mine --port 8000",
    "generate": "switchlm generate --model runs/mine --fill 'def <extra_id_0>(self):'",
    "inspect": "switchlm inspect --model runs/mine --data texts",
    "plan": "switchlm plan --preset switch-base-64 --nodes 1 --gpus-per-node 8 --gpu h100",
    "simulate": "switchlm simulate --preset switch-base-64 --ranks 8 --set mesh.expert=8",
    "verify-parallel": "switchlm verify-parallel --preset nano --nproc 4",
    "compress": "switchlm compress --model runs/mine --bits 8 --out small-model",
    "convert": "switchlm convert --model runs/mine --to huggingface --out my-model",
    "cache": "switchlm cache --keep 20GB",
    "export": "switchlm export --model runs/mine --to onnx --out my-onnx",
}
FILES = {
    **dict.fromkeys(("pretrain", "compare", "finetune", "distill"), "train"),
    **dict.fromkeys(("simulate", "verify_parallel"), "plan"),
    "export": "convert",
}

SYSTEMS = ("linux", "darwin")


class Command(TyperCommand):
    """Records the folder that it writes, for `CommandGroup.invoke`."""

    def invoke(self, ctx: Any) -> Any:
        ctx.meta["out"] = ctx.params.get("out")
        return super().invoke(ctx)


class CommandGroup(TyperGroup):
    """Lists the commands from the table and imports only the one that is invoked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, summary in COMMANDS.items():
            self.commands[name] = TyperCommand(name=name, help=summary)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept --debug after the command, too."""
        end = args.index("--") if "--" in args else len(args)
        options = [argument for argument in args[:end] if argument != "--debug"]
        debug = ["--debug"] * (len(options) < end)
        return super().parse_args(ctx, [*debug, *options, *args[end:]])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command by its name, then import it."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = load(name)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; only here are errors turned into messages and statuses."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            typer.echo(f"Error: {_one_line(error)}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("Stopped.", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of the output has ended, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code"):
                raise  # of typer itself, such as a usage error
            expected = isinstance(error, SwitchLMError)
            if not expected or ctx.params.get("debug"):
                traceback.print_exc()
            message = _one_line(error) if expected else f"{type(error).__name__}: {error}"
            where = write_traceback(ctx.meta.get("out"))
            typer.echo(f"Error: {message}{where}", err=True)
            raise typer.Exit(1) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def write_traceback(out: Path | str | None) -> str:
    """Write the traceback of the exception that is handled; return a sentence that names the file.

    out: the folder that the command writes; a run gets the file, else it is in the folder for
        temporary files.
    """
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    folders = [Path(tempfile.gettempdir())]
    if out is not None and (Path(out) / "config.yaml").is_file():
        folders.insert(0, Path(out))
    for folder in folders:
        try:
            with (folder / name).open("x", encoding="utf-8") as file:
                traceback.print_exc(file=file)
        except OSError:  # a full disk is perhaps why
            continue
        return f" (traceback: {folder / name})"
    return ""


app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"switchlm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show a mistake's traceback.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train, evaluate and use Switch Transformers: sparse T5-style language models."""


def load(command: str) -> Any:
    """Import the file of a command and return the command."""
    one = typer.Typer(add_completion=False)
    name = command.replace("-", "_")
    function = getattr(import_module(f"switchlm.cli.{FILES.get(name, name)}"), name)
    one.command(command, cls=Command, epilog=f"Example: {EXAMPLES[command]}")(function)
    return typer.main.get_command(one)


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Make OpenMP's threads sleep when they wait for long, unless the user has chosen.

    They spin otherwise, and beside another program's load a thread that waits takes the processor
    from the one that it waits for. GNU's OpenMP, PyTorch's on Linux, spins a thousand times
    first, since waking a thread takes longer. OpenMP reads this when PyTorch is imported.
    """
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        environment.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")


def main() -> None:
    """Run the command line and exit."""
    if sys.platform not in SYSTEMS:
        typer.echo(
            f"Error: switchlm runs on Linux and macOS, and this is {sys.platform!r}. On Windows, "
            "run it in the Windows Subsystem for Linux.",
            err=True,
        )
        raise SystemExit(2)
    let_threads_sleep(os.environ)
    typer.main.get_command(app)(prog_name="switchlm")
