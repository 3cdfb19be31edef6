import json

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hatnet_train.monitor import Monitor


def row(epoch):
    return {"epoch": epoch, "train_loss": 2.0 / epoch, "eval_loss": 1.0 / epoch, "top1": 50.0 + epoch, "top5": 90.0}


def test_an_epoch_is_a_line_of_metrics_a_picture_and_tensorboard_scalars(tmp_path):
    monitor = Monitor(tmp_path)
    monitor.train_step(1, 2.5, 1e-4)
    monitor.epoch(row(1))
    monitor.epoch(row(2))
    monitor.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [row(1), row(2)]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 800
        assert len(set(picture.convert("RGB").resize((60, 30)).get_flattened_data())) > 10
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/top1")] == [(1, 51.0), (2, 52.0)]
    assert [(e.step, e.value) for e in events.Scalars("train/step_loss")] == [(1, 2.5)]
