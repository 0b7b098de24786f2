import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest


@pytest.fixture
def process(nano, tmp_path):
    """Start `switchlm serve` in a process; return it, its address and its first line."""
    processes = []

    def start(*arguments, path=os.environ["PATH"]):
        command = [sys.executable, "-m", "switchlm", "serve", "--model", nano, "--port", "0"]
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(
                [*command, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PATH": path,
                },  # the tests share the cores
            )
        processes.append(process)
        line = process.stdout.readline()
        return process, re.search(r"http://\S+\d", line).group(), line

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_without_a_compiler_a_note_says_what_that_costs(process, tmp_path):
    process(path="")
    said = (tmp_path / "errors").read_text()
    assert "about half as fast as it could be: there is no C compiler (gcc, cc, clang)" in said
    assert "docs/guides/kernels.md" in said


def listening(pid):
    """The (address, port) of every TCP socket that a process listens on, from /proc."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    inodes = {os.readlink(link).removeprefix("socket:[").rstrip("]") for link in links}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.append((address, int(port, 16)))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_under_load_finishes_accepted_requests(process, tmp_path):
    key = tmp_path / "key"
    key.write_text("a key of the test\n")
    running, address, line = process("--api-key-file", key, "--slots", 4, "--name", "small")
    assert line.startswith("Serving small at http://127.0.0.1:")
    assert "dropless" in line
    assert running.stdout.readline().startswith(f"  curl {address}/v1/fill -H 'Authorization")
    port = int(address.rpartition(":")[2])
    assert listening(running.pid) == [("0100007F", port)]  # 127.0.0.1 and nothing else

    responses = []

    def send():
        headers = {"Authorization": "Bearer a key of the test"}
        body = {"prompt": "hello", "max_tokens": 200, "temperature": 1, "seed": 1}
        with httpx.Client(timeout=60) as client:
            responses.append(client.post(f"{address}/v1/completions", json=body, headers=headers))

    threads = [threading.Thread(target=send) for _ in range(12)]
    for thread in threads:
        thread.start()
    while True:
        headers = {"Authorization": "Bearer a key of the test"}
        text = httpx.get(f"{address}/metrics", headers=headers).text
        waiting, active = re.findall(r"^switchlm_(?:waiting|active)_requests (\d+)", text, re.M)
        if int(waiting) + int(active) >= 12 or responses:
            break
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert [response.status_code for response in responses] == [200] * 12
    assert len({response.json()["choices"][0]["text"] for response in responses}) == 1
    assert running.wait(30) == 143
    said = (tmp_path / "errors").read_text()
    assert "all accepted requests are done" in said
    assert "Traceback" not in said
    assert "leaked" not in said, "all frozen objects are unfrozen"
    assert "a key of the test" not in said
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


def test_a_port_in_use_is_one_paragraph(refuse, nano):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "Choose another --port" in refuse("serve", "--model", nano, "--port", port)


def test_a_host_that_is_none_is_one_paragraph(refuse, nano):
    assert "no address" in refuse("serve", "--model", nano, "--host", "256.0.0.1.invalid.")


@pytest.mark.parametrize("content", [None, b"", b"short\n", "schlüssel größer".encode(), b"\xff"])
def test_a_key_file_without_a_key_is_one_paragraph(refuse, nano, tmp_path, content):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    said = refuse("serve", "--model", nano, "--port", 0, "--api-key-file", path)
    assert str(path).rpartition("/")[2] in said
    assert "key" in said


def test_slots_without_memory_are_one_paragraph(refuse, nano):
    said = refuse("serve", "--model", nano, "--port", 0, "--slots", 4096, "--max-new-tokens", 2**20)
    assert "fewer --slots" in said


def test_a_missing_extra_is_named(refuse, nano, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "switchlm.serving.server", raising=False)
    assert "switchlm[serve]" in refuse("serve", "--model", nano, "--port", 0)


def test_help_needs_no_extra(run, monkeypatch):
    for name in ("uvicorn", "fastapi", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run("serve", "--help")
    assert result.exit_code == 0
    assert "--api-key-file" in result.output
    assert "127.0.0.1" in result.output


def test_when_the_engine_ends_the_process_fails(run, nano, monkeypatch):
    """So that whatever supervises it starts it again."""
    from switchlm.serving.engine import Engine

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(Engine, "_step", None)
    answers = []

    def ask():
        address = f"http://127.0.0.1:{port}/v1/completions"
        while not answers:
            try:
                answers.append(httpx.post(address, json={"prompt": "a"}, timeout=60).status_code)
            except httpx.ConnectError:
                time.sleep(0.05)

    client = threading.Thread(target=ask)
    client.start()
    result = run("serve", "--model", nano, "--port", port)
    client.join()
    assert answers == [500]
    assert result.exit_code == 1
    assert "Error: The engine ended with TypeError" in result.output
    assert "Traceback" in result.output
