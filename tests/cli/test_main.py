import inspect
import os
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

from switchlm import __version__
from switchlm.cli import main
from switchlm.cli.main import COMMANDS, EXAMPLES, FILES, let_threads_sleep, load


def switchlm(*arguments, **options):
    line = [sys.executable, "-m", "switchlm", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, **options)


def with_body(body, *arguments):
    """Start a command line whose command `generate` has another body."""
    program = f"""
import sys
import typer
import switchlm.cli.generate
from switchlm.cli.main import main
from switchlm.errors import DataError
def generate(out: str = "x") -> None:
{textwrap.indent(textwrap.dedent(body), "    ")}
switchlm.cli.generate.generate = generate
sys.argv = ["switchlm", "generate", *{list(arguments)!r}]
main()
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_help_is_quick_and_names_every_command():
    def seconds():
        """Of processor time, which does not depend on what else runs here."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    started = seconds()
    result = switchlm("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert seconds() - started < 0.5


def test_help_imports_no_command_and_nothing_heavy():
    program = (
        "import sys\nfrom switchlm.cli.main import main\nsys.argv = ['switchlm', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "modules = [name for name in sys.modules if name.startswith('switchlm.')]\n"
        "heavy = [name for name in ('torch', 'numpy', 'tokenizers') if name in sys.modules]\n"
        "print(sorted(modules), heavy, file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr.strip() == "['switchlm.cli', 'switchlm.cli.main', 'switchlm.errors'] []"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_with_the_summary_of_the_table(command, run):
    name = command.replace("-", "_")
    function = getattr(import_module(f"switchlm.cli.{FILES.get(name, name)}"), name)
    assert inspect.getdoc(function).splitlines()[0] == COMMANDS[command]
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--help" in result.output


def test_help_of_a_command_needs_no_torch():
    program = (
        "import sys\nfrom switchlm.cli.main import load\n"
        f"for command in {list(COMMANDS)!r}:\n    load(command)\n"
        "print('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_another_system_gets_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: switchlm runs on Linux and macOS, and this is 'win32'.")


def test_version():
    result = switchlm("--version")
    assert result.returncode == 0
    assert result.stdout.strip() == f"switchlm {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "Did you mean 'generate'?"),
        (["generate", "--model", "x", "--temprature", "1"], "--temprature"),
        (["generate", "--model", "x", "text", "--seed", "many"], "--seed"),
        (["generate", "text"], "--model"),
        ([], "Usage"),
    ],
)
def test_wrong_usage_is_status_2(arguments, message):
    result = switchlm(*arguments)
    assert result.returncode == 2
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_a_user_s_mistake_is_one_paragraph_and_status_2():
    process = with_body("raise DataError('Bad\\n  text: mend it.')")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (out, err) == ("", "Error: Bad text: mend it.\n")


@pytest.mark.parametrize("arguments", [["--debug"], ["--out", "y", "--debug"]])
def test_debug_shows_the_traceback_of_a_mistake(arguments):
    process = with_body("raise DataError('Bad text.')", *arguments)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" in err
    assert err.endswith("Error: Bad text.\n")


@pytest.mark.parametrize("out", ["", "run", "missing"])
def test_any_other_failure_is_status_1_and_its_traceback_is_in_a_file(out, tmp_path, monkeypatch):
    """In the run that the command writes, or in the folder for temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    options = ["--out", str(tmp_path / out)] if out else []
    process = with_body("raise OSError(28, 'No space left on device')", *options)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("Traceback")
    last = err.splitlines()[-1]
    assert last.startswith("Error: OSError: [Errno 28] No space left on device (traceback: ")
    written = Path(last.split("traceback: ")[1].removesuffix(")"))
    assert written.parent == tmp_path / (out if out == "run" else "")
    assert written.read_text().startswith("Traceback")
    assert err.startswith(written.read_text())


def test_an_error_that_is_not_the_users_leaves_its_traceback_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = with_body("from switchlm.errors import WorkerError; raise WorkerError('Lost.')")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("Error: Lost. (traceback: ")
    (written,) = tmp_path.glob("error-*.txt")
    assert "WorkerError: Lost." in written.read_text()


def test_debug_after_two_dashes_is_text():
    process = with_body("raise DataError(out)", "--out", "y", "--", "--debug")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in err


WAIT = """
import time
print("ready", flush=True)
time.sleep(60)
"""
TRAIN = """
import time
from switchlm.cli.progress import stop_on_signal
with stop_on_signal() as should_stop:
    print("ready", flush=True)
    while not should_stop():
        time.sleep(0.01)
    print("saved", flush=True)
"""


@pytest.mark.parametrize(
    ("body", "number", "status", "output"),
    [
        (WAIT, signal.SIGINT, 130, ""),
        (WAIT, signal.SIGTERM, -signal.SIGTERM, ""),  # which a shell reports as 143
        (TRAIN, signal.SIGINT, 130, "saved\n"),
        (TRAIN, signal.SIGTERM, 143, "saved\n"),
    ],
)
def test_signals_have_their_statuses(body, number, status, output):
    process = with_body(body)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert out == output
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"KMP_BLOCKTIME": "0"}, {"KMP_BLOCKTIME": "0"}),
    ],
)
def test_waiting_threads_sleep_unless_the_user_chose(given, found):
    environment = dict(given)
    let_threads_sleep(environment)
    assert environment == found


def test_it_is_set_before_pytorch_is_imported(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    program = """
        import os, sys
        from switchlm.cli import main
        assert "torch" not in sys.modules
        main.typer.main.get_command = lambda _: lambda **_: print(os.environ["OMP_WAIT_POLICY"])
        main.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "PASSIVE\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_parses(run, command):
    program, name, *arguments = shlex.split(EXAMPLES[command])
    assert (program, name) == ("switchlm", command)
    load(command).make_context(command, arguments)
    shown = " ".join(run(command, "--help").output.split())
    assert shown.endswith(f"Example: {EXAMPLES[command]}")


def test_a_reader_that_stops_reading_is_no_error(tmp_path):
    program = f"{sys.executable} -m switchlm compress --help | true"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "20"}
    ended = subprocess.run(program, shell=True, capture_output=True, text=True, env=environment)
    assert (ended.stderr, list(tmp_path.iterdir())) == ("", [])
