"""Two hosts with addresses of their own on one machine: a network namespace each, and a virtual cable between them."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from launches import BIN, lines_naming

pytestmark = pytest.mark.long

RUN = ["--recipe", "digits", "--epochs", "2", "--batch-size", "240", "--lr", "3e-4", "--seed", "5"]
FIRST, SECOND = "10.77.0.1", "10.77.0.2"
PORT = "29517"  # these hosts are nobody else's

MEMBER = """
import logging, os, sys, time
from hatnet_train.distributed.environment import discover
from hatnet_train.distributed.launch import join

logging.basicConfig(level="INFO", format="hatnet-train: %(message)s")
start = time.monotonic()
try:
    join(discover(os.environ), float(sys.argv[-1]))
except (ValueError, OSError) as error:
    sys.exit(f"{type(error).__name__} after {time.monotonic() - start:.0f} s: {error}")
print("joined")
"""


class Host:
    """A network namespace, and what was started in it."""

    def __init__(self, name, interface):
        self.name, self.interface = name, interface
        self._started = []

    def deepspeed(self, log, *arguments):
        """Start the launcher in this namespace; its output goes to the file ``log``."""
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.interface}
        with log.open("w") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, BIN / "deepspeed", *map(str, arguments)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def clear(self):
        """End what was started, the launchers with all that they launched."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for pid in ip("netns", "pids", self.name).split():  # workers of a launcher that ended without them
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def network():
    """Two hosts that reach each other, and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    both = [Host(f"hatnet{os.getpid()}{side}", f"v{os.getpid()}{side}") for side in "ab"]
    made = []
    try:
        for host in both:
            try:
                ip("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
            made.append(host)
        first, second = both
        peer = ("type", "veth", "peer", "name", second.interface, "netns", second.name)
        ip("link", "add", first.interface, "netns", first.name, *peer)
        for host, address in zip(both, (FIRST, SECOND), strict=True):
            ip("-n", host.name, "address", "add", f"{address}/30", "dev", host.interface)
            for link in ("lo", host.interface):
                ip("-n", host.name, "link", "set", link, "up")
        yield both
    finally:
        for host in made:
            ip("netns", "delete", host.name)


@pytest.fixture
def hosts(network):
    """The two hosts; what a test starts there ends with it."""
    yield network
    for host in network:
        host.clear()


@pytest.fixture
def launcher(tmp_path):
    """The launcher's arguments for the host of a number."""
    (tmp_path / "hosts").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")

    def arguments(node):
        files = ("--hostfile", tmp_path / "hosts", "--no_ssh", "--node_rank", node)
        return *files, "--master_addr", FIRST, "--master_port", PORT

    return arguments


@pytest.fixture
def member(tmp_path):
    """A script that joins within the seconds of its last argument."""
    path = tmp_path / "member.py"
    path.write_text(MEMBER)
    return path


def ended(process, log, seconds):
    """Exit status and output of a launcher, which ends within so many seconds."""
    try:
        return process.wait(seconds), log.read_text()
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {seconds} s:\n{log.read_text()}")


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_hosts_train_as_one_host_with_two_processes_does(hosts, launcher, launch, tmp_path):
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    run = ("--module", "hatnet_train", *RUN, "--out")
    launches = [host.deepspeed(logs[node], *launcher(node), *run, tmp_path / "two") for node, host in enumerate(hosts)]
    for node, (process, log) in enumerate(zip(launches, logs, strict=True)):
        status, output = ended(process, log, 300)
        assert status == 0, output
        assert f"nnodes=2, num_local_procs=1, node_rank={node}" in output
        assert "dist_world_size=2" in output
    # as many threads as on the two hosts: a sum depends on how they share it
    with launch([*RUN, "--out", tmp_path / "one"], environ={"OMP_NUM_THREADS": 1}) as started:
        assert started.wait() == [0, 0], started.text()
    for out in ("one", "two"):
        assert json.loads((tmp_path / out / "config.json").read_text())["world_size"] == 2
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name in ("train_loss", "eval_loss", "top1", "lr"):
            assert ours[name] == theirs[name]


def test_a_second_host_that_does_not_start_is_named_by_its_rank_within_the_time(hosts, launcher, member, tmp_path):
    log, start = tmp_path / "first.log", time.monotonic()
    process = hosts[0].deepspeed(log, *launcher(0), member, "20")
    status, output = ended(process, log, 120)
    assert status != 0
    assert lines_naming(output, "hatnet-train: ", "rank 1", "20 s")
    assert lines_naming(
        output, "TimeoutError", "20 s", "rank 1", f"rank 0 on {socket.gethostname()}", f"{FIRST}:{PORT}"
    )
    assert 20 <= time.monotonic() - start < 80


@pytest.mark.slow
def test_a_first_host_that_does_not_start_is_named_by_its_address_within_the_time(hosts, launcher, member, tmp_path):
    log = tmp_path / "second.log"
    process = hosts[1].deepspeed(log, *launcher(1), member, "5")
    status, output = ended(process, log, 60)
    assert status != 0
    assert lines_naming(output, "ConnectionError", f"rank 0 at {FIRST}:{PORT}", "5 s", os.strerror(errno.ECONNREFUSED))


@pytest.mark.slow
def test_a_second_host_that_is_started_as_the_first_finds_that_there_is_one(hosts, launcher, member, tmp_path):
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    launches = [host.deepspeed(log, *launcher(0), member, "60") for host, log in zip(hosts, logs, strict=True)]
    status, output = ended(launches[1], logs[1], 120)
    assert status != 0
    assert lines_naming(output, "ValueError", f"MASTER_ADDR={FIRST}", "rank 0", socket.gethostname())
    assert launches[0].poll() is None
