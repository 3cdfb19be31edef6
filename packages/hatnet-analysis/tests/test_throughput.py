"""Speed: turns, settings and rows; the rates themselves depend on the machine."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from matplotlib.text import Text

from hatnet_analysis.figures import compare_figure
from hatnet_analysis.throughput import Settings, checked_device, compare, measure_throughput, paper_top1
from hatnet_testing import raises

pytestmark = pytest.mark.long

QUICK = {"batch": 2, "size": (32, 32), "rounds": 3, "seconds": 0.01}


def test_models_take_turns_and_the_first_is_the_measure_of_the_others():
    turns = []
    first, second = measure_throughput(["hatnet_tiny", "timm/resnet18"], Settings(**QUICK), turns.append)
    order = ["hatnet_tiny", "timm/resnet18"]
    assert [turn.split()[-1] for turn in turns] == [*order, *order, *reversed(order), *order]  # the first: warming up
    assert first["ratio"] == first["ratio_lowest"] == first["ratio_highest"] == 1
    assert second["ratio_lowest"] <= second["ratio"] <= second["ratio_highest"]
    for row in (first, second):
        assert row["images_per_second_lowest"] <= row["images_per_second"] <= row["images_per_second_highest"]
        assert row["latency_ms_p50"] <= row["latency_ms_p95"] <= row["latency_ms_p99"]
        assert row["mode"] == "inference"
    assert first["params"] == 12_650_152


def test_rates_and_latencies_are_those_of_the_clock(monkeypatch):
    now = 0.0

    class Slow(torch.nn.Conv2d):
        """Takes a quarter of a second by the clock below, every fifth time a whole one."""

        calls = 0

        def forward(self, x):
            nonlocal now
            self.calls += 1
            now += 1.0 if self.calls % 5 == 0 else 0.25
            return super().forward(x)

    monkeypatch.setattr("hatnet_analysis.throughput.load_model", lambda name, size: Slow(3, 4, 1))
    monkeypatch.setattr("hatnet_analysis.throughput.time", SimpleNamespace(perf_counter=lambda: now))
    # a turn of two seconds is five steps of two images, four of them of 250 ms
    (row,) = measure_throughput(["slow"], Settings(**QUICK | {"seconds": 2.0}))
    assert row["images_per_second"] == row["images_per_second_lowest"] == row["images_per_second_highest"] == 5
    assert row["latency_ms_p50"] == 250
    assert row["latency_ms_p99"] == 1000


def test_training_takes_more_memory_than_inference():
    (inference,) = measure_throughput(["hatnet_tiny"], Settings(**QUICK))
    (training,) = measure_throughput(["hatnet_tiny"], Settings(**QUICK, train=True))
    assert training["mode"] == "training"
    assert training["peak_memory"] > inference["peak_memory"]
    assert training["peak_memory"] > 4 * training["params"]  # the gradients


@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"channels_last": True}, {"dtype": "bfloat16", "train": True}]
)
def test_other_settings_run_and_stand_in_the_row(settings):
    (row,) = measure_throughput(["hatnet_tiny"], Settings(**QUICK, **settings))
    assert all(row["mode" if name == "train" else name] in (value, "training") for name, value in settings.items())
    assert row["images_per_second"] > 0


def test_the_settings_reach_the_model(monkeypatch):
    seen = {}

    class Probe(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 5)

        def forward(self, x):
            seen["format"] = x.is_contiguous(memory_format=torch.channels_last)
            seen["training"] = self.training
            out = self.linear(x.mean((-2, -1)))
            seen["dtype"] = out.dtype
            return out

    monkeypatch.setattr("hatnet_analysis.throughput.load_model", lambda name, size: Probe())
    measure_throughput(["probe"], Settings(**QUICK, dtype="bfloat16", channels_last=True, train=True))
    assert seen == {"format": True, "training": True, "dtype": torch.bfloat16}
    measure_throughput(["probe"], Settings(**QUICK))
    assert seen == {"format": False, "training": False, "dtype": torch.float32}


def test_a_comparison_joins_speed_flops_and_the_papers_top_1():
    at_224 = Settings(**QUICK | {"size": (224, 224)})
    rows = compare(["hatnet_tiny", "timm/resnet18", "timm/convnext_atto"], at_224)
    assert [row["paper_top1"] for row in rows] == [79.8, 68.5, None]
    assert all(row["flops_complete"] >= row["flops_paper"] > 0 for row in rows)
    flops, speed = compare_figure(rows).axes
    assert len(flops.texts) == len(speed.texts) == 2  # without a figure of a paper there is no place on the plot


def test_the_plot_has_every_model_at_its_flops_and_at_its_speed_and_says_which_are_ours():
    made = [
        {"model": name, "paper_top1": top1, "flops_complete": flops, "images_per_second": speed}
        for name, top1, flops, speed in (
            ("hatnet_tiny", 79.8, 2e9, 15.0),
            ("hatnet_small", 82.6, 4.5e9, 8.0),
            ("timm/resnet50", 78.5, 4e9, 16.0),
            ("timm/swin_tiny_patch4_window7_224", 81.3, 4.4e9, 12.0),
        )
    ]
    figure = compare_figure(made)
    for axes, key, unit in zip(figure.axes, ("flops_complete", "images_per_second"), (1e9, 1), strict=True):
        drawn = {tuple(point) for line in axes.lines for point in line.get_xydata().tolist()}
        assert drawn == {(row[key] / unit, row["paper_top1"]) for row in made}
    legend = figure.axes[0].get_legend() or figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["HAT-Net", "peers"]


def test_no_name_in_the_plot_runs_out_of_the_frame_or_over_another():
    places = {  # top-1, FLOPs and images per second; some coincide along one axis
        "hatnet_tiny": (79.8, 2.15, 15.1),
        "hatnet_small": (82.6, 4.58, 8.0),
        "hatnet_medium": (84.0, 8.83, 4.5),
        "hatnet_large": (84.2, 12.14, 3.5),
        "timm/resnet50": (78.5, 4.11, 15.7),
        "timm/pvt_v2_b1": (78.7, 2.12, 20.3),
        "timm/pvt_v2_b2": (82.0, 4.05, 11.4),
        "timm/pvt_v2_b3": (83.2, 6.92, 8.0),
        "timm/swin_tiny_patch4_window7_224": (81.3, 4.51, 12.0),
        "timm/swin_small_patch4_window7_224": (83.0, 8.77, 7.1),
        "timm/twins_svt_small": (81.7, 2.94, 19.1),
        "timm/convnext_tiny": (82.1, 4.47, 15.0),
        "timm/convnext_small": (83.1, 8.71, 8.6),
    }
    figure = compare_figure(
        [
            {"model": model, "paper_top1": top1, "flops_complete": flops * 1e9, "images_per_second": speed}
            for model, (top1, flops, speed) in places.items()
        ]
    )
    figure.canvas.draw()
    for axes in figure.axes:
        frame = axes.get_window_extent()
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leaders
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
        assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
        assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]


def test_top_1_is_that_of_table_2_or_of_the_peers_own_paper():
    assert paper_top1("hatnet_large", (224, 224)) == 84.2
    assert paper_top1("timm/swin_tiny_patch4_window7_224", (224, 224)) == 81.3
    assert paper_top1("timm/convnext_tiny", (224, 224)) == 82.1


def test_a_papers_top_1_is_stated_at_the_size_of_image_it_belongs_to_alone():
    assert paper_top1("timm/vit_base_patch16_384", (384, 384)) == 77.9
    for name in ("timm/vit_base_patch16_384", "hatnet_tiny"):
        (at_32,) = compare([name], Settings(**QUICK))
        assert at_32["paper_top1"] is None
    assert paper_top1("timm/vit_base_patch16_384", (224, 224)) is None
    assert paper_top1("timm/convnext_tiny", (384, 384)) is None


@pytest.mark.parametrize("device", ["tpu9", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with raises(ValueError, "device", f"'{device}'"):
        checked_device(device)


def test_a_model_that_refuses_the_size_is_named():
    with raises(ValueError, "timm/coatnet_0_224", 2, "100×100"):
        measure_throughput(["timm/coatnet_0_224"], Settings(**{**QUICK, "size": (100, 100)}))


def test_a_model_that_is_no_classifier_is_not_trained(monkeypatch):
    monkeypatch.setattr("hatnet_analysis.throughput.load_model", lambda name, size: torch.nn.Conv2d(3, 4, 1))
    with raises(ValueError, "conv", 2, "32×32", "[batch, classes]"):
        measure_throughput(["conv"], Settings(**QUICK, train=True))


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning")  # the compiler's own
def test_a_compiled_model_is_measured_after_it_was_compiled():
    (row,) = measure_throughput(["timm/resnet18"], Settings(**QUICK, compile=True))
    assert row["compile"]
    assert row["latency_ms_p99"] < 1000  # compiling takes seconds, and belongs to the warm-up
