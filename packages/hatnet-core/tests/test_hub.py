import base64
import http.server
import json
import re
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SMALL
from hatnet_core import HATNet, load_checkpoint
from hatnet_core.hub import HubHATNet
from hatnet_testing import check, raises

pytestmark = pytest.mark.long


@pytest.fixture
def model():
    model = HubHATNet(**SMALL, num_classes=5, drop_path_rate=0.1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def logits(model, image):
    with torch.no_grad():
        return model(image)


def test_a_saved_folder_gives_the_same_model_back_in_evaluation_mode(model, tmp_path):
    model.set_grid(pool_sizes=(16, 8, 4))
    model.reset_classifier(3)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = HubHATNet.from_pretrained(tmp_path)
    assert not again.training
    assert again.config == model.config
    image = torch.randn(1, 3, 64, 80)
    assert torch.equal(logits(again, image), logits(model.eval(), image))


def test_the_folder_is_readable_without_the_hub_library(model, tmp_path):
    model.save_pretrained(tmp_path)
    plain = HATNet(**json.loads((tmp_path / "config.json").read_text()))
    assert load_checkpoint(plain, tmp_path / "model.safetensors") == []
    assert torch.equal(plain.head.weight, model.head.weight)


def test_a_folder_works_in_a_process_that_may_not_reach_the_hub(model, tmp_path):
    model.save_pretrained(tmp_path)
    program = "import sys; from hatnet_core.hub import HubHATNet; print(HubHATNet.from_pretrained(sys.argv[1]).config)"
    environment = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{model.config}\n"


def test_arguments_override_the_saved_configuration(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert HubHATNet.from_pretrained(tmp_path, pool_sizes=(16, 8, 4)).config["pool_sizes"] == (16, 8, 4)


def test_the_model_card_describes_the_model(model, tmp_path):
    model.save_pretrained(tmp_path, model_card_kwargs={"repo_id": "someone/digits", "description": "Reads digits."})
    card = (tmp_path / "README.md").read_text()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert any(f"{millions:.1f} million" in line and "5 classes" in line for line in card.splitlines())
    assert 'HubHATNet.from_pretrained("someone/digits")' in card
    assert "Reads digits." in card
    for line in ("library_name: hatnet-core", "pipeline_tag: image-classification", "- hat-net"):
        assert line in card.split("---")[1]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_config_or_weights_is_refused_by_name(name, model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with raises(FileNotFoundError, tmp_path, name):
        HubHATNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[1]", "list"),
        (b'{"embed_dims": [8, 16, 16, 24]}', "depths"),
        (b'{"embed_dims": [8, 16, 16, 24], "depths": [1, 2, 1, 1], "grid_size": 7}', "grid_size"),
    ],
)
def test_a_configuration_that_describes_no_hatnet_is_refused(content, named, model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with raises(ValueError, tmp_path / "config.json", named):
        HubHATNet.from_pretrained(tmp_path)


def test_an_integer_is_taken_where_a_float_is_expected(model, tmp_path):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "drop_rate": 0, "drop_path_rate": 0}))
    again = HubHATNet.from_pretrained(tmp_path)
    assert (again.config.drop_rate, type(again.config.drop_rate)) == (0.0, float)


def test_a_folder_that_is_not_there_is_refused_before_the_hub_is_asked(tmp_path):
    with raises(FileNotFoundError, tmp_path / "nowhere"):
        HubHATNet.from_pretrained(tmp_path / "nowhere")


OFFLINE = """
import sys
from hatnet_core.hub import HubHATNet
HubHATNet.from_pretrained("someone/digits")
"""


def test_a_hub_that_cannot_be_reached_ends_in_one_short_error(tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert re.match(r"\w*Error: ", last)
    check(last, "config.json", "someone/digits")
    assert result.stderr.count("Traceback") == 1


def test_loading_draws_no_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    again = HubHATNet.from_pretrained(tmp_path, map_location="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
    assert HubHATNet.from_pretrained(tmp_path, map_location="cpu").stem.conv1.weight.requires_grad


def test_a_failed_save_leaves_the_model_that_was_there(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("edited")
    other = HubHATNet(**SMALL, num_classes=5)
    other.prune_intermediate_layers((0,))
    with raises(ValueError, "pruned"):
        other.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(HubHATNet.from_pretrained(tmp_path).head.weight, model.head.weight)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "edited"


def test_weights_that_are_not_finite_or_not_of_this_model_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["head.bias"][2] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with raises(ValueError, tmp_path / "model.safetensors", "finite", torch.float32, "head.bias"):
        HubHATNet.from_pretrained(tmp_path)
    del weights["head.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with raises(ValueError, tmp_path / "model.safetensors", "missing", "head.bias"):
        HubHATNet.from_pretrained(tmp_path)


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The calls of the hub's interface that an upload of small files makes; keeps the committed files."""

    def do_GET(self):
        self.answer({"id": "someone/digits", "siblings": [], "sha": "0" * 40})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.server.url}/someone/digits", "id": "someone/digits"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/someone/digits/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"errors": [], "warnings": []})

    def answer(self, content):
        payload = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        """Quiet."""


PUSH = """
import sys
from hatnet_core.hub import HubHATNet
print(HubHATNet.from_pretrained(sys.argv[1]).push_to_hub("someone/digits", token="hf_of_nobody"))
"""


def test_push_to_hub_commits_weights_configuration_and_card(model, tmp_path):
    model.save_pretrained(tmp_path / "local")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.files, server.url = {}, f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        subprocess.run(
            [sys.executable, "-c", PUSH, tmp_path / "local"],
            env={"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
            check=True,
            timeout=120,
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    (tmp_path / "pushed").mkdir()
    for name, content in server.files.items():
        (tmp_path / "pushed" / name).write_bytes(content)
    assert {"README.md", "config.json", "model.safetensors"} <= server.files.keys()
    assert b'from_pretrained("someone/digits")' in server.files["README.md"]
    again = HubHATNet.from_pretrained(tmp_path / "pushed")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
