"""Callbacks on a real run of one process, and each of ours on a stand-in for the Trainer."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hatnet_testing import raises
from hatnet_train.callbacks import (
    Callback,
    Checkpointing,
    Heartbeat,
    Monitoring,
    NonFiniteRecovery,
    Step,
    StopOnSignal,
)
from hatnet_train.run.checkpoint import committed
from hatnet_train.run.nonfinite import NonFiniteError
from hatnet_train.signals import Preempted
from image_folders import draw_coloured_images

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Arguments of a run of 4 epochs of 2 steps."""
    root = tmp_path_factory.mktemp("coloured")
    draw_coloured_images(root, classes=3, train=8, val=2)
    return ["--recipe", "digits", "--data", root, "--epochs", "4", "--batch-size", "12", "--seed", "5"]


def probe(launch, function, arguments, ranks=1):
    with launch(arguments, ranks=ranks, module="probes", function=function) as started:
        assert started.wait() == [0] * ranks, started.text()
        return started


@pytest.fixture(scope="module")
def observed(launch, run, tmp_path_factory):
    """The hooks in the order in which a run of two processes calls them, by rank; and the run folder."""
    out = tmp_path_factory.mktemp("observed") / "run"
    probe(launch, "observe", [*run, "--epochs", "1", "--accumulation", "2", "--out", out], ranks=2)
    return [json.loads((out / f"hooks-{rank}.json").read_text()) for rank in range(2)], out


def test_hooks_are_called_on_every_rank_in_the_documented_order(observed):
    (one, two), _ = observed
    assert one == two
    without_waits = [name for name in one if name not in ("before_wait", "wants_stop")]
    step = ["after_backward", "after_backward", "after_step"]
    assert without_waits == ["on_start", "before_epoch", *step, *step, "after_epoch", "after_run", "close"]
    assert set(one) == {name for name in vars(Callback) if not name.startswith("_")} - {"on_exception"}


def test_a_users_callback_ends_a_run_early_with_final_weights(launch, run, tmp_path):
    out = tmp_path / "run"
    probe(launch, "stop_early", [*run, "--out", out])
    assert [row["epoch"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())] == [1, 2]
    final, saved = (load_file(folder / "model.safetensors") for folder in (out, committed(out / "checkpoints")[0]))
    assert all(torch.equal(final[name], saved[name]) for name in saved)


def test_a_callback_that_recovers_lets_the_run_continue(launch, run, tmp_path):
    out = tmp_path / "run"
    probe(launch, "recover", [*run, "--epochs", "2", "--out", out])
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.fixture
def trainer(tmp_path):
    """Return the attributes of a Trainer that callbacks read."""
    state = SimpleNamespace(step=0, rows=[], skipped=[], seconds=1.0, waited=0.0, lr=0.1)
    order = SimpleNamespace(steps=4, batch_size=2)
    config = SimpleNamespace(optimisation=SimpleNamespace(seed=1))
    training = SimpleNamespace(classes=["a", "b"])
    run = {"config": config, "training": training, "out": tmp_path}
    return SimpleNamespace(state=state, order=order, epochs=3, rank=0, world_size=1, **run)


class CountingSaves(Checkpointing):
    """Note the steps and whether they were the last."""

    def __init__(self, every):
        super().__init__(every)
        self.saved = []

    def save(self, trainer, *, last=False):
        self.saved.append((trainer.state.step, last))


def test_checkpoints_are_saved_every_so_many_steps_but_not_twice_at_the_end_of_an_epoch(trainer):
    saving = CountingSaves(every=2)
    for step in range(1, 9):
        trainer.state.step = step
        saving.after_step(trainer, Step(1.0))
        if step % trainer.order.steps == 0:
            saving.after_epoch(trainer, {})
    assert saving.saved == [(2, False), (4, False), (6, False), (8, False)]


def test_a_run_that_is_asked_to_stop_is_saved_once(trainer):
    saving = CountingSaves(every=1)
    trainer.state.step = 3
    saving.after_step(trainer, Step(1.0, stop=True))
    assert saving.on_exception(trainer, Preempted(3)) is False
    assert saving.on_exception(trainer, ValueError()) is False
    assert saving.saved == [(3, True)]


def test_one_received_signal_asks_to_stop(trainer):
    signals = SimpleNamespace(received=False)
    stopping = StopOnSignal(signals)
    assert not stopping.wants_stop(trainer)
    signals.received = True
    assert stopping.wants_stop(trainer)


def test_a_heartbeat_marks_every_wait(trainer):
    marks = []
    Heartbeat(SimpleNamespace(mark=lambda: marks.append(1))).before_wait(trainer)
    assert marks == [1]


def test_the_limit_of_skipped_steps_ends_the_run(trainer, monkeypatch):
    trainer.state.skipped = [1, 2]
    trainer.order = SimpleNamespace(steps=4, shares=lambda *_, **__: iter([None]))
    recovery = NonFiniteRecovery(limit=2)
    monkeypatch.setattr("hatnet_train.callbacks.dump", lambda *_: None)
    trainer.engine = trainer.training = None
    assert recovery.on_exception(trainer, ValueError()) is False
    with raises(FloatingPointError, "--max-skipped-steps", 2, "step 5"):
        recovery.on_exception(trainer, NonFiniteError(5, 1.0, [1.0]))


def test_other_ranks_than_the_first_report_nothing(trainer, tmp_path):
    trainer.rank = 1
    monitoring = Monitoring()
    monitoring.on_start(trainer)
    monitoring.before_epoch(trainer)
    monitoring.after_step(trainer, Step(1.0))
    monitoring.after_epoch(trainer, {})
    monitoring.close(trainer)
    assert not list(tmp_path.iterdir())


def test_the_first_rank_reports_losses_to_tensorboard_but_not_those_of_skipped_steps(trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitoring = Monitoring()
    monitoring.on_start(trainer)
    monitoring.before_epoch(trainer)
    for number, loss in enumerate([0.5, float("nan"), 0.25], 1):
        trainer.state.step = number
        monitoring.after_step(trainer, Step(loss))
    monitoring.close(trainer)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/step_loss")] == [(1, 0.5), (3, 0.25)]


def test_a_rank_that_does_not_write_allocates_one_tensor_at_a_time_for_a_checkpoint(launch, run, tmp_path):
    """Rank 1 of two, under ZeRO: at most a few times the largest tensor, not the model."""
    out = tmp_path / "run"
    probe(launch, "measure_save", [*run, "--epochs", "1", "--zero-stage", "1", "--out", out], ranks=2)
    writer, other = (json.loads((out / f"memory-{rank}.json").read_text()) for rank in range(2))
    assert writer["gathered"] >= 3 * writer["model"]  # weights and two moments
    assert other["gathered"] == 0
    assert other["peak"] < 4 * other["largest"] < other["model"]
