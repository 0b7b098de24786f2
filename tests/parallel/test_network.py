"""Two hosts whose network is cut: two network namespaces with one cable between them."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from tests.parallel.jobs import Job, torchrun, toy

pytestmark = pytest.mark.slow


def inside(pid: int) -> tuple[str, ...]:
    return ("nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials")


@contextmanager
def holder(*command: str) -> Iterator[int]:
    """Keep namespaces alive for the length of the block; they vanish with this process."""
    process = subprocess.Popen([*command, "sleep", "300"], stderr=subprocess.PIPE)
    try:
        time.sleep(0.5)
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.skip(f"no network namespaces here: {process.stderr.read().decode().strip()}")
        yield process.pid
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def ip(pid: int, *arguments: str) -> None:
    done = subprocess.run([*inside(pid), "ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no cables between network namespaces here: {done.stderr.strip()}")


@pytest.fixture
def hosts():
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} here")
    with (
        holder("unshare", "-r", "-n") as left,
        holder(*inside(left), "unshare", "-n") as right,
    ):
        ip(
            left,
            "link",
            "add",
            "left",
            "type",
            "veth",
            "peer",
            "name",
            "right",
            "netns",
            f"{right}",
        )
        for number, pid, device in [(1, left, "left"), (2, right, "right")]:
            ip(pid, "address", "add", f"10.77.0.{number}/24", "dev", device)
            ip(pid, "link", "set", device, "up")
            ip(pid, "link", "set", "lo", "up")
        yield left, right


def test_a_cut_cable_ends_both_hosts_within_the_timeout(tmp_path, hosts):
    with ExitStack() as opened:
        jobs = [
            opened.enter_context(
                Job(
                    tmp_path / device,
                    torchrun(
                        *toy(tmp_path, steps=1000, timeout=5),
                        processes=2,
                        nodes=2,
                        node=node,
                        rendezvous="static",
                        address="10.77.0.1",
                        port=29500,
                        prefix=inside(pid),
                    ),
                    GLOO_SOCKET_IFNAME=device,
                )
            )
            for node, (pid, device) in enumerate(zip(hosts, ["left", "right"], strict=True))
        ]
        jobs[0].wait_for(r"saved 10\b")
        assert len(jobs[0].workers()) == len(jobs[1].workers()) == 2
        ip(hosts[0], "link", "set", "left", "down")
        start = time.monotonic()
        while jobs[0].workers() or jobs[1].workers():
            assert time.monotonic() - start < 5 + 10, jobs[0].text + jobs[1].text
            time.sleep(0.1)
        assert [job.finish(60) for job in jobs] == [1, 1]
    near, far = (
        [line for line in job.text.splitlines() if "LostRankError" in line] for job in jobs
    )
    assert near
    assert far
    for line in near:
        assert re.search(r"rank 2 \(.*rank 3 \(", line), "those beyond the cut are named"
        assert not re.search(r"rank [01] \(", line), "and nobody else"
    for line in far:
        assert "the store of the job does not answer" in line
        assert "cut off" in line
