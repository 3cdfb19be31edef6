"""The comparison and measurement before a run, with real processes; the table and the digest without."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hatnet_testing import check, raises
from hatnet_train.distributed import preflight
from hatnet_train.distributed.collectives import raise_together
from hatnet_train.distributed.environment import discover
from hatnet_train.distributed.launch import join
from hatnet_train.distributed.preflight import code_digest, format_report

pytestmark = pytest.mark.long


def member(arguments):
    """A process of a launch; its log gets a line of JSON."""
    launch = discover(os.environ)
    join(launch, 60)
    version, *broken = arguments
    facts = {"data": "d1", "torch": "2.13" if launch.rank not in (1, 2) else version}
    try:
        if broken:
            raise_together("no data" if str(launch.rank) in broken[0].split(",") else None)
        result = {"report": preflight.preflight(facts, 4_000_000)}
    except ValueError as error:
        result = {"error": str(error)}
    sys.stdout.write(json.dumps({"pid": os.getpid(), **result}) + "\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture
def on_ranks(launch):
    """Run :func:`member` on some ranks; what each printed, in order."""

    def on_ranks(ranks, *arguments):
        with launch(arguments, ranks=ranks, module="test_preflight", function="member") as started:
            assert set(started.wait()) == {0}, started.text()
            logs = [started.log(rank) for rank in range(ranks)]
        return [json.loads(line) for log in logs for line in log.splitlines() if line.startswith("{")]

    return on_ranks


def test_equal_processes_get_one_report_with_a_bandwidth_that_fits_its_time(on_ranks):
    first, second = on_ranks(2, "2.13")
    report = first["report"]
    assert report == second["report"]
    assert report["world_size"] == 2
    assert list(report["hosts"].values()) == [[0, 1]]
    assert list(report["devices"].values()) == [[0, 1]]
    assert report["processes"] == [first["pid"], second["pid"]]
    assert report["facts"] == {"data": "d1", "torch": "2.13"}
    measured = report["all_reduce"]
    # Two processes: each sends and receives all bytes once.
    assert measured["bus_gigabytes_per_second"] * measured["seconds"] == pytest.approx(4_000_000 / 1e9)
    assert 0 < report["barrier_seconds"] < 10
    check(format_report(report), "2.13")


def test_ranks_that_differ_are_named_on_every_rank_with_both_values(on_ranks):
    lines = on_ranks(3, "2.12")
    assert len(lines) == 3
    (error,) = {line["error"] for line in lines}
    check(error, "torch", "2.13", "rank 0", "2.12", "ranks 1-2")


@pytest.mark.parametrize(("broken", "named"), [("0,1,2", "no data"), ("1,2", "ranks 1-2"), ("none", None)])
def test_what_stops_some_ranks_stops_all_with_one_message(broken, named, on_ranks):
    lines = on_ranks(3, "2.13", broken)
    assert len(lines) == 3
    (error,) = {line.get("error") for line in lines}
    if named is None:
        assert error is None
    else:
        check(error, named, "no data")
        assert ("rank" in error) == (broken == "1,2")


@pytest.mark.parametrize("size", [0, 2, 4_000_001])
def test_a_gradient_that_is_not_whole_float32_numbers_is_refused(size):
    with raises(ValueError, "gradient_bytes", 4, size):
        preflight.preflight({}, size)


def test_the_table_names_hosts_ranks_devices_facts_and_speed():
    report = {
        "world_size": 5,
        "hosts": {"node1": [0, 1, 2], "node2": [3, 4]},
        "devices": {"H100": [0, 1, 2, 3], "A100": [4]},
        "processes": [11, 12, 13, 14, 15],
        "facts": {"torch": "2.13"},
        "all_reduce": {"bytes": 52_000_000, "seconds": 0.0125, "bus_gigabytes_per_second": 6.656, "rounds": 5},
        "barrier_seconds": 0.00025,
    }
    expected = [
        ("5", "2"),
        ("node1", "ranks 0-2", "H100"),
        ("node2", "ranks 3-4", "A100", "H100"),
        ("torch", "2.13"),
        ("52.0 MB", "12.50 ms", "6.66 GB/s"),
        ("0.25 ms",),
    ]
    for line, named in zip(format_report(report).splitlines(), expected, strict=True):
        check(line, *named)


@pytest.mark.parametrize("change", ["content", "name", "new file", "boundary"])
def test_the_digest_changes_with_every_change_of_the_code_and_with_nothing_else(change, tmp_path, monkeypatch):
    package = tmp_path / "somewhere" / "code_to_digest"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("one")
    (package / "b.py").write_text("two")
    monkeypatch.setattr(preflight, "CODE", ("code_to_digest",))
    with monkeypatch.context() as here:
        here.syspath_prepend(package.parent)
        before = code_digest()
        (package / "__pycache__").mkdir()
        (package / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"compiled")
        assert code_digest() == before
    shutil.copytree(package, tmp_path / "elsewhere" / "code_to_digest")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert code_digest() == before
    edit(tmp_path / "elsewhere" / "code_to_digest", change)
    assert code_digest() != before


def edit(package: Path, change):
    if change == "content":
        (package / "a.py").write_text("ONE")
    elif change == "name":
        (package / "a.py").rename(package / "c.py")
    elif change == "new file":
        (package / "c.py").write_text("")
    else:  # all bytes stay, in another file
        (package / "a.py").write_text("onet")
        (package / "b.py").write_text("wo")


def test_the_digest_covers_the_installed_packages():
    assert preflight.CODE == ("hatnet_core", "hatnet_train")
    assert len(bytes.fromhex(code_digest())) == 32
