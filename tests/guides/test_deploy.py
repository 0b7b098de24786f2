"""docs/guides/deploy.md: its commands run, its files are valid, its sizes are computed."""

import ast
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
import transformers
from typer.testing import CliRunner

from switchlm.cli.main import app, load
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface.config import family_of
from switchlm.huggingface.quantised import Quantisation, first_entries, parts
from switchlm.model import count
from switchlm.model.presets import preset

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guides" / "deploy.md").read_text("utf-8")
COMMANDS = [line for line in GUIDE.splitlines() if line.startswith("switchlm ")]
UNIT = (ROOT / "examples" / "switchlm.service").read_text("utf-8")
CONTAINER = (ROOT / "examples" / "Containerfile").read_text("utf-8")


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_parse(line):
    _, name, *arguments = shlex.split(line)
    load(name).make_context(name, arguments)


def test_what_the_examples_run_parses():
    [line] = re.findall(r"^ExecStart=\S+/switchlm (.*)$", UNIT, re.M)
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", CONTAINER, re.M)[0])
    entry += json.loads(re.findall(r"^CMD (.*)$", CONTAINER, re.M)[0])
    for name, *arguments in (shlex.split(line), entry[1:]):
        load(name).make_context(name, arguments)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        assert (ROOT / "docs" / "guides" / target).exists(), target


def test_five_commands_take_a_checkpoint_of_the_hub_s_layout_to_a_server(tmp_path, monkeypatch):
    """On a checkpoint of random weights that transformers wrote."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_heads=2, num_experts=4,
        num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.SwitchTransformersForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path / "google" / "switch-base-8")

    Tokenizer.bytes().save(tmp_path / "google" / "switch-base-8")
    rows = [{"text": f"review {i}", "stars": str(i % 5)} for i in range(40)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    quick = ["--set", "training.steps=2", "--set", "training.evaluate_every=2"]
    quick += ["--set", "finetune.input_length=32", "--set", "finetune.target_length=8"]
    for line in COMMANDS[:4]:
        arguments = shlex.split(line)[1:]
        arguments += quick if arguments[0] == "finetune" else []
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (line, done.output)
    config = json.loads((tmp_path / "models" / "stars" / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["bits"] == 8
    (tmp_path / "key.txt").write_text("a long enough key\n")
    arguments = shlex.split(COMMANDS[4].replace("--port 8000", "--port 0"))[1:]
    with subprocess.Popen(
        [sys.executable, "-m", "switchlm", *arguments], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            line = server.stdout.readline()
            address = re.findall(r"http://127.0.0.1:\d+", line)[0]
            assert ask(f"{address}/health")
            request = {"prompt": "review 3", "max_tokens": 3, "model": "stars"}
            answer = ask(f"{address}/v1/completions", request, "a long enough key")
            assert answer["usage"]["completion_tokens"] <= 3
            server.terminate()
            server.wait(60)
        finally:
            server.kill()


def ask(address, request=None, key=""):
    """Ask a server that starts meanwhile; return the JSON of its answer."""
    body = None if request is None else json.dumps(request).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    for _ in range(100):
        try:
            return json.load(urlopen(Request(address, body, headers), timeout=30))
        except URLError as error:
            if isinstance(error, HTTPError):
                raise
            time.sleep(0.1)
    raise AssertionError(f"no answer from {address}")


def size(config, quantisation, float_bytes=4):
    """Return the bytes of all weights."""
    total = 0
    for entry in first_entries(config, family_of(config)):
        if quantisation is None:
            experts = 1 if entry.expert is None else config.num_experts
            total += math.prod(entry.shape) * experts * float_bytes
            continue
        for part in parts(entry, config.num_experts, quantisation):
            width = float_bytes if part.dtype is None else part.dtype.itemsize
            total += math.prod(part.shape) * width
    return total


def test_the_sizes_are_those_of_the_layout():
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d. |]+) \|$", GUIDE, re.M)
    rows = [(name, cells.split(" | ")) for name, cells in rows if cells.count("|") == 4]
    assert len(rows) == 7
    for name, cells in rows:
        config = preset(name)
        sizes = (
            size(config, None),
            size(config, None, 2),
            size(config, Quantisation(bits=8)),
            size(config, Quantisation(bits=4)),
        )
        expected = [f"{count.parameters(config) / 1e9:.2f}", *(f"{s / 1e9:.1f}" for s in sizes)]
        assert cells == expected, name


def test_the_python_imports_what_there_is():
    [code] = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.S | re.M)
    imported = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
    namespace = {}
    exec(compile(ast.Module(body=[*imported], type_ignores=[]), "guide", "exec"), namespace)
    assert namespace["SwitchTransformersForConditionalGeneration"].from_pretrained


def test_systemd_takes_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "switchlm.service"
    unit.write_text(UNIT.replace("/opt/switchlm/bin/switchlm", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "switchlm" in line]
    assert (done.returncode, lines) == (0, [])


def test_both_listen_where_only_this_machine_can_ask_and_are_not_root():
    assert "--host 127.0.0.1" in UNIT
    assert "DynamicUser=yes" in UNIT
    assert "-p 127.0.0.1:8000:8000" in CONTAINER
    assert re.search(r"^USER (?!0|root)", CONTAINER, re.M)
    assert "HEALTHCHECK" in CONTAINER
    for text in (UNIT, CONTAINER):
        assert "--api-key-file" in text
