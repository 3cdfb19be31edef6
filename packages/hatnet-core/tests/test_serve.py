"""The example of the pages that serves an exported file, started on loopback."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from hatnet_core import save_checkpoint
from hatnet_core.cli import main
from hatnet_core.preprocessing import Preprocessing

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

EXAMPLES = Path(__file__).parents[3] / "examples"
PREPROCESSING = Preprocessing(("ant", "bee", "cat", "dog", "elk"), image_size=32, mean=(0.3, 0.4, 0.5))


@pytest.fixture
def server(small_model, tmp_path):
    described = {name: value for name, value in PREPROCESSING.to_dict().items() if name != "resize"}
    save_checkpoint(small_model, tmp_path / "m.safetensors", described)
    assert main([str(tmp_path / "m.safetensors"), "--static", "--out", str(tmp_path / "m.onnx")]) == 0
    command = [sys.executable, "-m", "uvicorn", "--app-dir", EXAMPLES, "serve:app", "--port", "0"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, env=os.environ | {"MODEL": str(tmp_path / "m.onnx")}, stdout=log, stderr=log)
    try:
        while "running on " not in (said := (tmp_path / "log").read_text()):
            assert process.poll() is None, said
            time.sleep(0.1)
        yield said.partition("running on ")[2].split()[0]
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def post(url, content):
    with urllib.request.urlopen(urllib.request.Request(url, content), timeout=60) as answer:
        return json.load(answer)


def test_the_served_model_answers_with_the_classes_of_the_model_and_refuses_other_files(server, small_model, tmp_path):
    pixels = torch.randint(256, (6, 5, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).resize((50, 60), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    answer = post(f"{server}/predict?top=2", (tmp_path / "photo.png").read_bytes())
    with torch.no_grad():
        shares, classes = (
            small_model(PREPROCESSING.open(tmp_path / "photo.png")[None]).softmax(1)[0].sort(descending=True)
        )
    assert [one["label"] for one in answer] == [PREPROCESSING.classes[i] for i in classes[:2].tolist()]
    assert [one["score"] for one in answer] == pytest.approx(shares[:2].tolist(), abs=0.02)
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(f"{server}/predict", b"no image")
    assert refused.value.code == 400
    refused.value.close()
