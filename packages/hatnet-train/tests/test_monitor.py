import json
import re
import time

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hatnet_testing import check
from hatnet_train.data.order import GlobalOrder
from hatnet_train.monitor import Monitor, Progress
from hatnet_train.run.state import peak_memory_gb


def row(epoch):
    losses = {"train_loss": 2.0 / epoch, "eval_loss": 1.0 / epoch, "top1": 50.0 + epoch, "top5": 90.0}
    return {"epoch": epoch, **losses, "images_per_second": 812.3, "data_wait": 0.02, "memory_gb": 11.5}


def test_an_epoch_is_a_line_of_metrics_a_picture_and_tensorboard_scalars(tmp_path, capsys):
    monitor = Monitor(tmp_path, [], 0)
    monitor.train_step(1, 2.5, 1e-4)
    monitor.epoch([row(1)], 3, 5)
    monitor.epoch([row(1), {**row(2), "ema_top1": 77.0}], 3, 10)
    monitor.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        row(1),
        {**row(2), "ema_top1": 77.0},
    ]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 800
        assert len(set(picture.convert("RGB").resize((60, 30)).get_flattened_data())) > 10
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/top1")] == [(1, 51.0), (2, 52.0)]
    assert [(e.step, e.value) for e in events.Scalars("train/step_loss")] == [(1, 2.5)]
    lines = capsys.readouterr().err.splitlines()
    check(lines[0], "1/3", "2.0000", "1.0000", "51.00", 812, "2 %", "11.5 GB")
    check(lines[1], "2/3", "52.00", "77.00")
    assert re.search(r"\d s\b", lines[1])  # that are left


def test_a_run_that_goes_on_leaves_out_what_was_reported_of_steps_it_makes_again(tmp_path):
    before = Monitor(tmp_path, [], 0)
    for step in (1, 2, 3):
        before.train_step(step, 9.0, 1e-4)
    before.epoch([row(1)], 3, 2)
    before.epoch([row(1), row(2)], 3, 4)
    before.close()
    after = Monitor(tmp_path, [row(1)], 2)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [row(1)]
    after.train_step(3, 1.0, 1e-4)
    after.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/step_loss")] == [(1, 9.0), (2, 9.0), (3, 1.0)]


def test_without_a_terminal_progress_is_a_whole_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("hatnet_train.monitor.SECONDS_BETWEEN_LINES", 0.05)
    progress = Progress(2, 90, GlobalOrder(length=100, batch_size=10, seed=0), done=0)
    for _ in range(3):
        progress.step(float("nan"), 0.0)
        time.sleep(0.06)
    progress.step(1.5, 0.33)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "\r" not in "".join(lines)
    check(lines[0], "3/90", "2/10")
    assert "nan" not in lines[0]
    check(lines[-1], "1.5000", "33 %")
    assert re.search(r"\d s\b", lines[-1])  # that are left


def test_peak_memory_is_at_least_what_was_touched():
    before = peak_memory_gb()
    block = bytearray(int(before * 1e9))  # more than earlier tests of this process touched at once
    block[::4096] = bytes(len(block[::4096]))
    assert before < peak_memory_gb() < 100
    assert peak_memory_gb() > 0.3
