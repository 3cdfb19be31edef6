"""Shared by the tests of hatnet-core: the parity fixtures and a small model."""

import http.server
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hatnet_core import HATNet

DATA = Path(__file__).parent / "data"
SMALL = {"embed_dims": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "head_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_model():
    """A model of the paper's structure that runs in milliseconds; 5 classes, random non-trivial weights."""
    model = HATNet(**SMALL, num_classes=5)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(params=["a", "b"])
def parity(request):
    """A released computation: (HATNet arguments, released-name weights, [(input, logits, stage statistics)])."""
    with safe_open(DATA / f"parity_{request.param}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    arguments = {
        "embed_dims": config["dims"],
        "depths": config["depths"],
        "head_dim": config["head_dim"],
        "kernel_sizes": config["kernel_sizes"],
        "mlp_ratios": config["expansions"],
        "grid_sizes": config["grid_sizes"][:3],
        "pool_sizes": config["ds_ratios"][:3],
        "num_classes": config["num_classes"],
    }
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    cases = [
        (
            tensors[f"case{i}.input_int8"].float() / 32,
            tensors[f"case{i}.logits"],
            {stage: tensors[f"case{i}.stage{stage}_mean_std"] for stage in (2, 3, 4)},
        )
        for i in range(2)
    ]
    return arguments, weights, cases


@pytest.fixture(scope="session")
def released_shapes():
    """Names and shapes of the released checkpoints: {"tiny": {name: shape}, ...}."""
    return json.loads((DATA / "released_state_dicts.json").read_text())


@pytest.fixture(scope="session")
def released_files(released_shapes, tmp_path_factory):
    """Random checkpoints with the names and shapes of the released files, by model name."""
    folder = tmp_path_factory.mktemp("released")
    paths = {}
    for variant, shapes in released_shapes.items():
        paths[f"hatnet_{variant}"] = folder / f"HAT-Net_{variant.title()}.pth"
        torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, paths[f"hatnet_{variant}"])
    return paths


class WeightsServer(http.server.ThreadingHTTPServer):
    """Serves ``files`` ({path: bytes}) on loopback; announces ``lengths`` and answers ``statuses`` where given."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), WeightsHandler)
        self.files, self.lengths, self.statuses, self.requests = files, {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class WeightsHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(self.server.statuses.get(self.path, 404))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.lengths.get(self.path, len(content))))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def weights_server(released_files):
    """A server on loopback that has the released file of Tiny."""
    server = WeightsServer({"/HAT-Net_Tiny.pth": released_files["hatnet_tiny"].read_bytes()})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
