"""A checkpoint as a folder that transformers, timm and HubHATNet load."""

import base64
import hashlib
import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SMALL
from hatnet_core import HATNet, read_metadata, save_checkpoint
from hatnet_core.cli import main
from hatnet_core.hub import HubHATNet
from hatnet_core.preprocessing import Preprocessing
from hatnet_testing import check, error_line, raises

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
PREPROCESSING = Preprocessing(tuple(CLASSES), image_size=64, crop_fraction=0.8, mean=(0.4, 0.5, 0.6))


@pytest.fixture
def run(small_model, tmp_path):
    """A run folder of a classifier."""
    described = {name: value for name, value in PREPROCESSING.to_dict().items() if name != "resize"}
    (tmp_path / "run").mkdir()
    save_checkpoint(small_model, tmp_path / "run" / "model.safetensors", {**described, "seed": 7})
    return tmp_path / "run"


@pytest.fixture
def folder(run, tmp_path):
    assert main([str(run), "--to", "huggingface", "--out", str(tmp_path / "hf")]) == 0
    return tmp_path / "hf"


@pytest.fixture
def photo(tmp_path):
    """A smooth square image: libraries that resize it differ by rounding alone."""
    noise = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((150, 150), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # of tensors at other addresses


def logits(model, photo):
    with torch.no_grad():
        return model(PREPROCESSING.open(photo)[None])


def test_auto_model_and_image_processor_load_it_with_labels_and_preprocessing(folder, small_model, photo):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    import hatnet_core.transformers  # noqa: F401  registers it

    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(CLASSES))
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(photo), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], PREPROCESSING.open(photo), rtol=0, atol=0.02)  # a level is 1 / 255 / 0.22
    with torch.no_grad():
        assert_same(model(pixels).logits, small_model(pixels))


def test_pipeline_names_the_class_that_the_model_finds(folder, small_model, photo, caplog):
    from transformers import pipeline

    import hatnet_core.transformers  # noqa: F401

    with caplog.at_level(logging.WARNING):
        best = pipeline("image-classification", str(folder))(str(photo))[0]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    expected = logits(small_model, photo).softmax(1)[0]
    assert best["label"] == CLASSES[int(expected.argmax())]
    assert best["score"] == pytest.approx(expected.max().item(), abs=0.02)


def test_timm_loads_it_with_labels_and_preprocessing(folder, small_model, photo):
    import timm

    import hatnet_core.timm  # noqa: F401

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_same(logits(model, photo), logits(small_model, photo))
    assert model.pretrained_cfg["label_names"] == CLASSES
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    torch.testing.assert_close(transform(Image.open(photo)), PREPROCESSING.open(photo), rtol=0, atol=0.04)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=2).head.out_features == 2


def test_hub_hatnet_and_load_checkpoint_read_it(folder, small_model, photo):
    model = HubHATNet.from_pretrained(folder)
    assert_same(logits(model, photo), logits(small_model, photo))
    assert model.config == small_model.config
    metadata = read_metadata(folder)
    assert (metadata["classes"], metadata["seed"]) == (CLASSES, 7)


def test_the_weights_returned_with_the_logits_are_those_of_the_layers(folder, small_model, photo):
    from hatnet_core.transformers import HATNetForImageClassification

    model = HATNetForImageClassification.from_pretrained(folder)
    image = PREPROCESSING.open(photo)[None]
    inputs = []
    blocks = [block for stage in small_model.stages for block in stage.blocks]
    for block in blocks:
        block.attn.register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        output = model(image, output_attentions=True)
        small_model(image)
        assert len(output.attentions) == len(blocks)
        for weights, block, x in zip(output.attentions, blocks, inputs, strict=True):
            torch.testing.assert_close(weights, block.attn.attention_weights(x))
        assert model(image).attentions is None
        assert not any(block.attn._forward_pre_hooks for block in model.hatnet.modules() if hasattr(block, "attn"))


def test_weights_of_window_attention_are_refused():
    from hatnet_core.transformers import HATNetConfig, HATNetForImageClassification

    model = HATNetForImageClassification(HATNetConfig(**SMALL, attention=("window",) * 3))
    with raises(ValueError, "output_attentions", "window"):
        model(torch.randn(1, 3, 64, 64), output_attentions=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.pin_memory:UserWarning")
def test_trainer_fine_tunes_it_resumes_and_saves_what_all_three_libraries_load(folder, tmp_path, photo):
    pytest.importorskip("accelerate")
    import timm
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    import hatnet_core.timm
    import hatnet_core.transformers  # noqa: F401

    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = [{"pixel_values": torch.randn(3, 32, 32) + 3 * (i % 2), "labels": i % 2} for i in range(8)]
    options = {"report_to": [], "use_cpu": True, "per_device_train_batch_size": 4, "save_steps": 2}
    arguments = TrainingArguments(str(tmp_path / "tuned"), max_steps=2, **options)
    Trainer(model, arguments, train_dataset=data).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.ndim > 1)
    arguments = TrainingArguments(str(tmp_path / "tuned"), max_steps=4, **options)
    trainer = Trainer(model, arguments, train_dataset=data)
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    trainer.save_model(tmp_path / "saved")
    expected = logits(lambda x: model.eval()(x).logits, photo)
    assert expected.shape == (1, 2)
    assert_same(logits(HubHATNet.from_pretrained(tmp_path / "saved"), photo), expected)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert_same(logits(again, photo), expected)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert_same(logits(lambda x: loaded(x).logits, photo), expected)


def test_the_card_quotes_the_accuracy_measured_on_the_images(run, small_model, tmp_path, photo, capsys):
    found = CLASSES[int(logits(small_model, photo).argmax())]
    for i, name in enumerate([found, found, found, "ant" if found != "ant" else "bee"]):
        (tmp_path / "photos/val" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, tmp_path / "photos/val" / name / f"{i}.png")
    arguments = [run, "--to", "huggingface", "--data", tmp_path / "photos", "--out", tmp_path / "measured"]
    assert main(list(map(str, arguments))) == 0
    card = (tmp_path / "measured/README.md").read_text()
    assert "75.00 %" in card
    assert "value: 0.75" in card.split("---")[1]
    assert "75.00 %" in capsys.readouterr().out
    assert read_metadata(tmp_path / "measured")["metrics"] == {"top1": 75.0, "images": 4}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"classes": ["a"]}, ["classes", 5, 1]),
        ({"classes": "abcde"}, ["classes", "'abcde'"]),
        ({"mean": [0.5]}, ["std", 1]),
        ({"std": [0.1, 0.0, 0.1]}, ["std", 0.0]),
        ({"crop_fraction": 1.5}, ["crop_fraction", 1.5]),
        ({"interpolation": "nearest"}, ["interpolation", "'nearest'"]),
    ],
)
def test_preprocessing_out_of_range_is_one_line_and_no_folder(change, named, small_model, tmp_path, capsys):
    save_checkpoint(small_model, tmp_path / "m.safetensors", change)
    arguments = [tmp_path / "m.safetensors", "--to", "huggingface", "--out", tmp_path / "hf"]
    assert main(list(map(str, arguments))) == 1
    error_line(capsys.readouterr().err, "hatnet-export", "m.safetensors", *named)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("arguments", [{"in_chans": 1, "num_classes": 5}, {"num_classes": 0}])
def test_a_model_that_is_no_classifier_of_rgb_images_is_refused(arguments, tmp_path, capsys):
    save_checkpoint(HATNet(**SMALL, **arguments), tmp_path / "m.safetensors")
    arguments = [tmp_path / "m.safetensors", "--to", "huggingface", "--out", tmp_path / "hf"]
    assert main(list(map(str, arguments))) == 1
    error_line(capsys.readouterr().err, "hatnet-export", "num_classes", "in_chans")
    assert not (tmp_path / "hf").exists()


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The calls of the hub's interface for uploads and downloads of small files."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        files = self.server.files
        if "/resolve/" in self.path:
            content = files.get(self.path.rpartition("/")[2])
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
            return
        siblings = [{"rfilename": name} for name in files]
        self.answer(json.dumps({"id": "someone/insects", "siblings": siblings, "sha": "0" * 40}).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"{self.server.url}/someone/insects"
        content = {"errors": [], "warnings": []}
        if self.path.endswith("/repos/create"):
            content = {"url": address, "id": "someone/insects"}
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            content = {"files": [{**f, "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            content = {"commitUrl": f"{address}/commit/1", "commitOid": "1" * 40}
        self.answer(json.dumps(content).encode())

    def answer(self, payload, **headers):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", "0" * 40)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def hub(tmp_path):
    """A hub on loopback with one repository, and the environment of a process that uses it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.files, server.url = {}, f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()
    server.server_close()
    thread.join()


PUSH = """
import sys
from huggingface_hub import HfApi
HfApi(token="hf_of_nobody").upload_folder(repo_id="someone/insects", folder_path=sys.argv[1])
"""
PUSH_MODEL = """
import sys
from hatnet_core.transformers import HATNetForImageClassification
HATNetForImageClassification.from_pretrained(sys.argv[1]).push_to_hub("someone/insects", token="hf_of_nobody")
"""
LOAD = """
import sys, timm, hatnet_core.timm, hatnet_core.transformers
from hatnet_core.hub import HubHATNet
from transformers import pipeline
print(pipeline("image-classification", "someone/insects")(sys.argv[1])[0]["label"])
print(timm.create_model("hf-hub:someone/insects", pretrained=True).pretrained_cfg["label_names"])
print(HubHATNet.from_pretrained("someone/insects").num_classes)
"""


def in_process(code, argument, environment):
    command = [sys.executable, "-c", code, str(argument)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pushed_folder_is_loaded_from_the_hub_by_all_three_libraries(folder, hub, small_model, photo):
    server, environment = hub
    in_process(PUSH, folder, environment)
    assert server.files.keys() == {path.name for path in folder.iterdir()}
    best, labels, count = in_process(LOAD, photo, environment).splitlines()
    assert best == CLASSES[int(logits(small_model, photo).argmax())]
    assert (labels, count) == (str(CLASSES), "5")


def test_push_to_hub_of_the_loaded_model_uploads_weights_and_configuration(folder, hub):
    server, environment = hub
    in_process(PUSH_MODEL, folder, environment)
    assert {"config.json", "model.safetensors"} <= server.files.keys()
    check(server.files["config.json"].decode().replace("\n", " "), *CLASSES)
