"""Launches: the environments of every launcher by table, the roll call with threads, and the rest with processes."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import TCPStore

from hatnet_testing import check, raises
from hatnet_train.distributed.environment import Launch, discover
from hatnet_train.distributed.heartbeat import compact_ranks
from hatnet_train.distributed.preflight import check_hostfile
from hatnet_train.distributed.rendezvous import roll_call
from launches import BIN

pytestmark = pytest.mark.long

LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "SLURM_", "OMPI_", "PMI_", "MPI_", "TORCHELASTIC_", "OMP_")
TORCH = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "node[003-005],gpu-a",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}

MEMBER = """
import json, logging, os, sys, time
from hatnet_train.distributed.environment import LAUNCHER_VARIABLES, discover
from hatnet_train.distributed.launch import join

logging.basicConfig(level="INFO", format="hatnet-train: %(message)s")
launch, start = discover(os.environ), time.monotonic()
try:
    join(launch, float(sys.argv[-1]))
except (ValueError, OSError) as error:
    print(json.dumps([launch.rank, type(error).__name__, str(error), time.monotonic() - start]), flush=True)
    sys.exit(1)
import torch
from deepspeed import comm

if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and "die-once" in sys.argv and launch.rank == 1:
    sys.exit(3)
variables = [os.environ[name] for name in LAUNCHER_VARIABLES]
mine = [launch.launcher, launch.local_world_size, torch.get_num_threads(), variables, os.getpid()]
everyone = [None] * comm.get_world_size()
comm.all_gather_object(everyone, mine)
if launch.rank == 0:
    sys.stdout.write(json.dumps(everyone) + "\\n")  # at once: a launcher writes there, too
    sys.stdout.flush()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""

ONLY_ANSWERS = """
import os
from hatnet_train.distributed.environment import discover
from hatnet_train.distributed.rendezvous import roll_call

roll_call(discover(os.environ), 60)
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """The tests themselves may run under a launcher."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)


@pytest.fixture
def member(tmp_path):
    """A script that joins within the seconds of its last argument; rank 0 prints what it hears of all."""
    path = tmp_path / "member.py"
    path.write_text(MEMBER)
    return path


@pytest.fixture
def start():
    """Start a process with some environment variables more; what still runs at the end is ended."""
    started = []

    def start(script, timeout, **variables):
        process = subprocess.Popen(
            [sys.executable, script, str(timeout)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def said(process):
    """Return what a member printed, after its end."""
    out, err = process.communicate(timeout=120)
    assert out, err
    return json.loads(out.splitlines()[-1])


def hand_started(rank, world_size, port, address="127.0.0.1"):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    return {**dict(zip(names, map(str, (rank, 0, world_size, port)), strict=True)), "MASTER_ADDR": address}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCH, Launch("environment", 3, 1, 4, 2, "node1", 1234)),
        ({**TORCH, "LOCAL_SIZE": "4"}, Launch("deepspeed", 3, 1, 4, 4, "node1", 1234)),
        (
            {**TORCH, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},
            Launch("torchrun", 3, 1, 4, 2, "node1", 1234),
        ),
        # torchrun in a step of srun, deepspeed under mpirun: the inner launcher counts
        ({**SLURM, **TORCH}, Launch("environment", 3, 1, 4, 2, "node1", 1234)),
        ({**OPENMPI, **TORCH}, Launch("environment", 3, 1, 4, 2, "node1", 1234)),
        (SLURM, Launch("slurm", 6, 0, 7, 1, "node003", 20_000 + 7 * 1000 + 2)),
        ({**SLURM, "SLURM_NODEID": "1"}, Launch("slurm", 6, 0, 7, 2, "node003", 27_002)),
        ({**SLURM, "MASTER_ADDR": "ib0.node", "MASTER_PORT": "99"}, Launch("slurm", 6, 0, 7, 1, "ib0.node", 99)),
        (OPENMPI, Launch("openmpi", 1, 1, 4, 4, "127.0.0.1", 29500)),
        (
            {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "node1"},
            Launch("openmpi", 1, 1, 4, 2, "node1", 29500),
        ),
        ({**MPICH, "MASTER_ADDR": "node1", "MASTER_PORT": "7"}, Launch("mpich", 3, 1, 4, 2, "node1", 7)),
        # mpirun and mpiexec start helpers with srun, one a host: their places are not those of the ranks
        ({**SLURM, **OPENMPI}, Launch("openmpi", 1, 1, 4, 4, "127.0.0.1", 29500)),
        ({**SLURM, **MPICH, "MPI_LOCALNRANKS": "4"}, Launch("mpich", 3, 1, 4, 4, "127.0.0.1", 29500)),
        # srun --mpi=pmi2 sets these two itself
        ({**SLURM, "PMI_RANK": "6", "PMI_SIZE": "7"}, Launch("slurm", 6, 0, 7, 1, "node003", 27_002)),
    ],
)
def test_every_launcher_tells_a_process_its_place(environ, expected):
    assert discover(environ) == expected


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({}, "none"),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "1234", "LOCAL_RANK": "0"}, "none"),
        # a batch script, and the shell of salloc, without srun
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "a[1-2]"}, "none"),
        # srun --pty bash
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "slurm"),
        ({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "1"}, "openmpi"),
    ],
)
def test_a_process_without_others_is_alone_on_a_free_loopback_port(environ, launcher):
    launch = discover(environ)
    assert launch == Launch(launcher, 0, 0, 1, 1, "127.0.0.1", launch.master_port)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", launch.master_port))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[003-010,12],gpu-a", "node003"),
        ("a[1-2]b", "a1b"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("gpu-a", "gpu-a"),
        ("rack[2,4]node[07-09].local,x", "rack2node07.local"),
    ],
)
def test_rank_0_of_a_slurm_step_is_on_its_first_node(nodes, first):
    assert discover({**SLURM, "SLURM_STEP_NODELIST": nodes}).master_addr == first


def test_steps_that_may_share_a_host_get_ports_of_their_own():
    steps = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in (70_001, 70_002) for step in range(4)]
    ports = {discover({**SLURM, **step}).master_port for step in steps}
    assert len(ports) == 8
    assert all(1024 < port < 32_768 for port in ports)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({**TORCH, "RANK": "4"}, ["RANK", "'4'", 0, 3]),
        ({**TORCH, "RANK": "-1"}, ["RANK", "'-1'", 0, 3]),
        ({**TORCH, "WORLD_SIZE": "four"}, ["WORLD_SIZE", "'four'", 1]),
        ({**TORCH, "WORLD_SIZE": "0"}, ["WORLD_SIZE", "'0'", 1]),
        ({**TORCH, "MASTER_PORT": "65536"}, ["MASTER_PORT", "'65536'", 1, 65535]),
        ({**TORCH, "MASTER_PORT": "1_000"}, ["MASTER_PORT", "'1_000'", 1, 65535]),
        ({**TORCH, "MASTER_ADDR": ""}, ["MASTER_ADDR", "''"]),
        ({**TORCH, "LOCAL_SIZE": "1"}, ["LOCAL_SIZE", "'1'", 2, 4]),
        ({"RANK": "0"}, ["LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]),
        ({**SLURM, "SLURM_PROCID": "7"}, ["SLURM_PROCID", "'7'", 0, 6]),
        ({**SLURM, "SLURM_STEP_NODELIST": "node[3-"}, ["SLURM_STEP_NODELIST", "'node[3-'"]),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, ["SLURM_STEP_NODELIST", "''"]),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(3)"}, ["SLURM_STEP_TASKS_PER_NODE", "'2(3)'"]),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ["OMPI_COMM_WORLD_LOCAL_SIZE=2", "mpirun -x MASTER_ADDR"]),
        (MPICH, ["PMI_SIZE=4", "MPI_LOCALNRANKS=2", "MASTER_ADDR"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ["MPI_LOCALNRANKS"]),
    ],
)
def test_wrong_values_are_refused_by_variable_value_and_expectation(environ, named):
    with raises(ValueError, *named):
        discover(environ)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([7, 5, 6, 3], "ranks 3, 5-7"),
        ([0, 1], "ranks 0-1"),
        (range(1024), "ranks 0-1023"),
    ],
)
def test_ranks_are_listed_short(ranks, text):
    assert compact_ranks(ranks) == text


def test_a_hostfile_gives_hosts_and_slots_in_order(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two hosts\n127.0.0.2 slots=8\n\nlocalhost   slots=4  # the small one\n")
    assert list(check_hostfile(hosts).items()) == [("127.0.0.2", 8), ("localhost", 4)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, [os.strerror(errno.ENOENT)]),
        ("# none\n", ["NAME slots=NUMBER"]),
        ("localhost slots=1\nlocalhost 8\n", [2, "NAME slots=NUMBER", "'localhost 8'"]),
        ("localhost slots=0\n", [1, "NAME slots=NUMBER", "'localhost slots=0'"]),
        ("localhost slots=1\n#\nlocalhost slots=2\n", [3, "localhost"]),
        ("no-such-host.invalid slots=1\n", ["no-such-host.invalid"]),
        ("a..b slots=1\n", ["a..b"]),
    ],
)
def test_a_hostfile_is_refused_by_file_and_line_or_host(text, named, tmp_path):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with raises(ValueError, tmp_path / "hosts", *named):
        check_hostfile(tmp_path / "hosts")


def call_roll(ranks, world_size, timeout, launcher="environment", port=None):
    """Call the roll in a thread for each rank: what each got, and the seconds that all took."""
    port, results = port or free_port(), {}

    def answer(rank):
        try:
            results[rank] = roll_call(Launch(launcher, rank, 1, world_size, 2, "127.0.0.1", port), timeout)
        except OSError as error:
            results[rank] = error

    threads = [threading.Thread(target=answer, args=(rank,)) for rank in ranks]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results, time.monotonic() - start


def test_the_roll_of_two_hundred_ranks_is_complete_and_leaves_them_one_store():
    stores, _ = call_roll(range(200), 200, timeout=60)
    assert sorted(stores) == list(range(200))
    stores[7].set("word", "heard")
    assert stores[199].get("word") == b"heard"


def test_missing_ranks_are_named_to_all_that_are_present_when_rank_0_stops_waiting():
    errors, seconds = call_roll([0, *range(8, 40)], 64, timeout=3)
    assert len(errors) == 33
    assert {type(error) for error in errors.values()} == {TimeoutError}
    (text,) = {str(error) for error in errors.values()}
    check(text, 31, 64, "3 s", "ranks 1-7, 40-63", f"ranks 0, 8-39 on {socket.gethostname()}")
    assert 3 <= seconds < 30


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_processes_of_a_launcher_join_into_one_group(launcher, member, run_command):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    deepspeed = (BIN / "deepspeed", "--num_accelerators", "2", "--master_port", free_port())
    done = run_command(*(torchrun if launcher == "torchrun" else deepspeed), member, "60")
    assert done.returncode == 0, done.stderr
    everyone = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('[["')))
    assert [one[:2] for one in everyone] == [[launcher, 2], [launcher, 2]]
    assert [one[3][:3] for one in everyone] == [["0", "0", "2"], ["1", "1", "2"]]
    assert len({one[4] for one in everyone}) == 2


def slurm(rank):
    return {
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"},
        **{"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"},
        **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
    }


def openmpi(rank):
    sizes = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    return {**sizes, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}


@pytest.mark.parametrize("variables", [slurm, openmpi])
def test_processes_with_the_variables_of_slurm_or_mpi_join_and_share_the_cores(variables, member, start):
    # MPI has one default port for all: another launch on this machine may hold it
    port = {"MASTER_PORT": str(free_port())} if variables is openmpi else {}
    processes = [start(member, 60, **variables(rank), **port) for rank in (0, 1)]
    everyone = said(processes[0])
    assert processes[1].wait(60) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [one[:3] for one in everyone] == [[variables.__name__, 2, threads]] * 2
    assert [one[3][:3] for one in everyone] == [["0", "0", "2"], ["1", "1", "2"]]
    assert [one[4] for one in everyone] == [process.pid for process in processes]


def test_a_round_of_torchrun_after_a_restart_does_not_take_the_last_one_for_its_own(member, run_command):
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1")
    done = run_command(sys.executable, "-m", *torchrun, member, "die-once", "60")
    assert done.returncode == 0, done.stderr
    assert '[["torchrun", 2,' in done.stdout


def test_a_round_that_a_killed_rank_0_left_with_the_agent_of_torchrun_does_not_count(member, start, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}
    killed = [start(member, 100, **hand_started(rank, 3, agent.port), **torchrun) for rank in (0, 1)]
    began = time.monotonic()
    while not agent.check(["hatnet-train/round"]) and time.monotonic() - began < 60:
        time.sleep(0.1)
    for process in killed:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    left = agent.get("hatnet-train/round")
    stores, _ = call_roll([2, 1, 0], 3, timeout=60, launcher="torchrun", port=agent.port)
    assert left
    stores[2].set("word", "heard")
    assert stores[0].get("word") == b"heard"


def test_the_second_process_in_one_place_ends_at_once_and_names_the_first(member, start):
    port = free_port()
    start(member, 100, **hand_started(0, 3, port))  # and rank 2 never comes
    twins = [start(member, 100, **hand_started(1, 3, port)) for _ in range(2)]
    began = time.monotonic()
    while all(twin.poll() is None for twin in twins) and time.monotonic() - began < 60:
        time.sleep(0.1)
    second, first = sorted(twins, key=lambda twin: twin.poll() is None)
    rank, kind, text, _ = said(second)
    assert (rank, kind) == (1, "ValueError")
    check(text, "rank 1", socket.gethostname(), first.pid, second.pid)
    assert first.poll() is None


@pytest.mark.parametrize(
    ("address", "reason"), [("127.0.0.1", os.strerror(errno.ECONNREFUSED)), ("no-such-host.invalid", "Errno -")]
)
def test_a_rank_without_a_rank_0_names_its_address_and_the_seconds(address, reason, member, start):
    port = free_port()
    rank, kind, text, seconds = said(start(member, 4, **hand_started(1, 2, port, address)))
    assert (rank, kind) == (1, "ConnectionError")
    check(text, f"rank 1 on {socket.gethostname()}", "rank 0", f"{address}:{port}", "4 s", reason, "MASTER_ADDR")
    assert 4 <= seconds < 30


def test_a_port_that_is_taken_is_named_by_rank_0(member, start):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        _, kind, text, _ = said(start(member, 10, **hand_started(0, 2, port)))
    assert kind == "ConnectionError"
    check(text, "rank 0", port, socket.gethostname(), "address already in use", "MASTER_PORT")


def test_the_end_of_rank_0_ends_the_wait_of_the_others(member, start):
    port = free_port()
    first = start(member, 100, **hand_started(0, 3, port))
    second = start(member, 100, **hand_started(1, 3, port))
    # After ten seconds rank 0 reports whom it waits for.
    waiting = next(line for line in iter(first.stderr.readline, "") if line.startswith("hatnet-train: "))
    check(waiting, "rank 2", 3, "100 s")
    os.killpg(first.pid, signal.SIGKILL)
    ended = time.monotonic()
    _, kind, text, _ = said(second)
    assert kind == "ConnectionError"
    check(text, "rank 0", f"127.0.0.1:{port}")
    assert time.monotonic() - ended < 30


def test_a_rank_that_answers_the_roll_but_does_not_join_is_not_waited_for_without_an_end(member, start, tmp_path):
    (tmp_path / "only_answers.py").write_text(ONLY_ANSWERS)
    port = free_port()
    start(tmp_path / "only_answers.py", 20, **hand_started(1, 2, port))
    _, kind, text, seconds = said(start(member, 20, **hand_started(0, 2, port)))
    assert kind == "ConnectionError"
    check(text, "127.0.0.1", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    assert 20 <= seconds < 80


def test_a_timeout_that_is_none_is_refused(member, start):
    _, kind, text, _ = said(start(member, 0))
    assert kind == "ValueError"
    check(text, "timeout", "0.0")
