"""The best epoch, its weights as a file, and early stopping, on metrics by hand; real runs are in test_finetune.py."""

from types import SimpleNamespace

import pytest

from hatnet_train.best import BestWeights, EarlyStopping, best_epoch
from hatnet_train.run.state import AVERAGE, BEST


def rows(*top1, losses=None, average=()):
    found = []
    for i, value in enumerate(top1):
        found.append({"epoch": i + 1, "top1": value, "eval_loss": (losses or [1.0] * len(top1))[i]})
        if average:
            found[-1] |= {"ema_top1": average[i], "ema_eval_loss": 1.0}
    return found


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (rows(50, 70, 60), (2, 70)),
        (rows(50, 70, 70), (2, 70)),
        (rows(50, 70, 70, losses=[1.0, 0.5, 0.4]), (3, 70)),
        (rows(50, 70, 60, average=[10, 20, 75]), (3, 75)),
    ],
)
def test_the_best_epoch_has_the_highest_accuracy_then_the_lowest_loss_then_comes_first(metrics, expected):
    assert best_epoch(metrics)[:2] == expected


def stand_in(metrics, *, epochs=10, **attributes):
    stopped = []
    state = SimpleNamespace(rows=metrics, step=4 * len(metrics))
    given = {"state": state, "epochs": epochs, "rank": 0, "stop": lambda: stopped.append(len(metrics))}
    return SimpleNamespace(**given, **attributes), stopped


def test_a_run_stops_after_so_many_epochs_without_a_better_one():
    metrics, ends = rows(50, 70, 60, 65, 69), []
    for n in range(1, 6):
        trainer, stopped = stand_in(metrics[:n])
        EarlyStopping(3).after_epoch(trainer, metrics[n - 1])
        ends.append(bool(stopped))
    assert ends == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("patience", "epochs", "stops"), [(3, 10, True), (4, 10, False), (0, 10, False), (3, 5, False)]
)
def test_a_resumed_run_that_had_stopped_ends_at_once(patience, epochs, stops):
    trainer, stopped = stand_in(rows(50, 70, 60, 65, 69), epochs=epochs)
    EarlyStopping(patience).on_start(trainer)
    assert bool(stopped) is stops


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-0000000008-evaluated"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / AVERAGE).write_bytes(b"average")
    return folder


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (rows(50, 70), b"weights"),
        (rows(50, 40, average=[10, 60]), b"average"),
        (rows(70, 50), None),
    ],
)
def test_the_weights_of_the_best_epoch_are_those_of_its_checkpoint(metrics, expected, checkpoint, tmp_path):
    trainer, _ = stand_in(metrics, out=tmp_path / "run", origin=None)
    BestWeights().after_epoch(trainer, metrics[-1])
    best = tmp_path / "run" / BEST
    assert (best.read_bytes() if best.exists() else None) == expected


def test_a_copy_that_a_killed_process_did_not_make_is_made_on_resume(checkpoint, tmp_path):
    trainer, _ = stand_in(rows(50, 70), out=tmp_path / "run", origin=checkpoint)
    BestWeights().on_start(trainer)
    assert (tmp_path / "run" / BEST).read_bytes() == b"weights"


def test_a_restart_from_a_later_checkpoint_does_not_take_weights_of_the_one_before(checkpoint, tmp_path):
    trainer, _ = stand_in(rows(50, 70, 90), out=tmp_path / "run", origin=checkpoint)
    BestWeights().on_start(trainer)
    assert not (tmp_path / "run" / BEST).exists()


def test_a_run_that_resumes_elsewhere_takes_the_best_weights_along(checkpoint, tmp_path):
    (tmp_path / "run" / BEST).write_bytes(b"earlier")
    (tmp_path / "other").mkdir()
    trainer, _ = stand_in(rows(70, 50), out=tmp_path / "other", origin=checkpoint)
    BestWeights().on_start(trainer)
    assert (tmp_path / "other" / BEST).read_bytes() == b"earlier"


def test_a_copy_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    trainer, _ = stand_in(rows(50, 70), out=tmp_path / "run", origin=None)
    BestWeights().after_epoch(trainer, {})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
