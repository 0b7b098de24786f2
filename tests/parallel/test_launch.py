"""The environment of torchrun and srun, complete, incomplete and invalid; and the rendezvous."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from tests.parallel.jobs import free_port

from switchlm.errors import LaunchError
from switchlm.parallel import launch
from switchlm.parallel.launch import Launch, launched, open_store, ranks, rendezvous

ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = ADDRESS | {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = ADDRESS | {
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_PROCID": "8",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
}


def test_a_plain_process_has_no_launch():
    assert launched({}) is None
    assert launched({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1", "LOCAL_RANK": "0"}) is None


def test_the_environment_of_torchrun():
    assert launched(TORCHRUN) == Launch(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        address="node0:29500",
        node=1,
        restarts=2,
    )


def test_torchrun_hosts_the_store_before_its_processes_start():
    found = launched(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert found is not None
    assert found.store_is_up


def test_processes_of_a_torchrun_that_was_killed_do_not_wait_for_it(monkeypatch):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "AGENT_SECONDS", 1)
    found = launched(TORCHRUN | address | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert found is not None
    with (
        pytest.raises(LaunchError, match=r"in 1 s\. Look whether torchrun, or rank 0, still runs"),
        launch.process_group(found, 600),
    ):
        raise AssertionError("there is no store")


def test_the_environment_of_srun():
    assert launched(SRUN) == Launch(
        rank=8,
        world_size=9,
        local_rank=0,
        local_world_size=1,
        address="node0:29500",
        node=2,
        restarts=0,
    )


def test_torchrun_within_srun_is_what_counts():
    """One task per node starts torchrun, whose processes inherit the variables of the task."""
    found = launched(SRUN | TORCHRUN)
    assert found is not None
    assert (found.rank, found.world_size, found.local_world_size) == (5, 8, 4)


@pytest.mark.parametrize(("environment", "restarts"), [(TORCHRUN, 5), (SRUN, 3)])
def test_a_requeued_job_of_slurm_is_a_restarted_one(environment, restarts):
    found = launched(environment | {"SLURM_RESTART_COUNT": "3"})
    assert found is not None
    assert found.restarts == restarts


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_missing_variable_of_torchrun_is_refused(name):
    half = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(LaunchError, match=f"but {name} is missing.*by torchrun or srun.*unset"):
        launched(half)


@pytest.mark.parametrize("value", ["-1", "two", "", "1.5", "²", "9" * 30])
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"])
def test_nonsense_from_torchrun_is_refused(name, value):
    with pytest.raises(LaunchError, match=f"but {name} is '"):
        launched(TORCHRUN | {name: value})


@pytest.mark.parametrize(
    "name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS"]
)
def test_nonsense_from_srun_is_refused(name):
    with pytest.raises(LaunchError, match=f"but {name} is 'many'"):
        launched(SRUN | {name: "many"})


@pytest.mark.parametrize("tasks", ["", "4", "x2", "4(x2)"])
def test_a_node_beyond_slurms_list_is_refused(tasks):
    with pytest.raises(LaunchError, match=r"SLURM_STEP_TASKS_PER_NODE is .*but this is node 2"):
        launched(SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks})


@pytest.mark.parametrize(("rank", "local"), [("8", "0"), ("0", "4")])
def test_a_rank_beyond_the_number_of_processes_is_refused(rank, local):
    with pytest.raises(LaunchError, match="count from 0 to"):
        launched(TORCHRUN | {"RANK": rank, "LOCAL_RANK": local})


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_without_an_address_the_message_says_how_to_give_one(name):
    with pytest.raises(LaunchError, match=f"{name} is missing.*torchrun sets both"):
        launched(TORCHRUN | {name: ""})
    with pytest.raises(LaunchError, match=f"{name} is missing.*export MASTER_ADDR=.*scontrol"):
        launched(SRUN | {name: ""})


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_does_not_exist_is_refused(port):
    with pytest.raises(LaunchError, match=f"MASTER_PORT must be from 1 to 65535, got {port}"):
        launched(TORCHRUN | {"MASTER_PORT": port})


def test_a_store_that_is_not_there_is_named(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(LaunchError, match=f"Rank 1 of 2 did not reach .* 127.0.0.1:{port} in 1 s"):
        open_store(f"127.0.0.1:{port}", 1, 2, 1)


def clients(number):
    """Return as many connections to one store as torchrun's agent keeps over restarts."""
    seconds = timedelta(seconds=30)
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=seconds, wait_for_workers=False)
    return host, [
        dist.TCPStore("127.0.0.1", host.port, timeout=seconds, wait_for_workers=False)
        for _ in range(number)
    ]


def meet_all(stores, restarts):
    """Run each rank's rendezvous in a thread; return `restarted` of each."""
    found = {}

    def run(rank):
        own, restarted = rendezvous(stores[rank], rank, len(stores), restarts[rank], 20)
        own.set(f"seen/{rank}", "yes")
        own.wait([f"seen/{other}" for other in range(len(stores))], timedelta(seconds=10))
        found[rank] = restarted

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found.get(rank) for rank in range(len(stores))]


def test_all_agree_which_start_it_is_whatever_their_agents_counted():
    _host, stores = clients(3)
    assert meet_all(stores, [0, 0, 0]) == [False] * 3
    assert meet_all(stores, [0, 1, 0]) == [True] * 3
    assert meet_all(stores, [0, 0, 0]) == [True] * 3


def test_one_agents_count_is_enough_on_a_new_store():
    _host, stores = clients(3)
    assert meet_all(stores, [0, 0, 1]) == [True] * 3


def test_a_request_of_a_dead_process_has_no_effect():
    _host, stores = clients(2)
    stores[1].set("request/1", "a process that died before rank 0 came")
    assert meet_all(stores, [0, 0]) == [False] * 2


def test_ranks_that_do_not_start_are_named():
    _host, stores = clients(1)
    with pytest.raises(LaunchError, match=r"Ranks 1, 2 of 3 did not start within 0\.3 s"):
        rendezvous(stores[0], 0, 3, 0, 0.3)


def test_other_ranks_refer_to_the_message_of_rank_0():
    _host, stores = clients(1)
    with pytest.raises(LaunchError, match=r"Rank 1 waited 1 s for all 3 .*if it has none, rank 0"):
        rendezvous(stores[0], 1, 3, 0, 1)


def test_of_many_ranks_only_the_first_are_listed():
    assert ranks([3]) == "rank 3"
    assert ranks(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, ..."
