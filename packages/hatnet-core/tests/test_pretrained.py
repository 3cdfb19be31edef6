import hashlib
import http.server
import io
import subprocess
import sys
import zipfile

import pytest
import timm
import torch

import hatnet_core.timm  # noqa: F401  registers the models
from hatnet_core import create_model
from hatnet_testing import check, raises

pytestmark = pytest.mark.long

NAME = "/HAT-Net_Tiny.pth"


@pytest.fixture(autouse=True)
def hub(weights_server, tmp_path, monkeypatch):
    """torch's hub folder in an empty place, the weights on the local server."""
    monkeypatch.setenv("HATNET_WEIGHTS_URL", weights_server.url + "/")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def test_pretrained_downloads_the_released_weights_once_into_the_hub_folder(hub, weights_server, released_files):
    released = torch.load(released_files["hatnet_tiny"], weights_only=True)
    for _ in range(2):
        model = create_model("hatnet_tiny", pretrained=True)
        assert torch.equal(model.head.weight, released["classifier.1.weight"])
        assert torch.equal(model.stem.conv1.weight, released["patch_embed.0.weight"])
    assert weights_server.requests.count(NAME) == 1
    assert [path.name for path in hub.iterdir()] == ["HAT-Net_Tiny.pth"]


def test_pretrained_keeps_a_fresh_head_for_other_classes_and_adapts_the_stem(released_files):
    released = torch.load(released_files["hatnet_tiny"], weights_only=True)
    model = create_model("hatnet_tiny", pretrained=True, num_classes=5, in_chans=1)
    assert model.head.weight.shape == (5, 384)
    assert torch.equal(model.stages[1].downsample.conv.weight, released["ds2.conv.weight"])
    torch.testing.assert_close(model.stem.conv1.weight, released["patch_embed.0.weight"].sum(1, keepdim=True))


def test_a_published_hash_that_agrees_is_accepted(weights_server, hub):
    digest = hashlib.sha256(weights_server.files[NAME]).hexdigest()
    weights_server.files["/SHA256SUMS"] = f"{'0' * 64}  other.pth\n{digest}  HAT-Net_Tiny.pth\n".encode()
    create_model("hatnet_tiny", pretrained=True)
    assert (hub / "HAT-Net_Tiny.pth").is_file()


@pytest.mark.parametrize("line", ["{}  ./HAT-Net_Tiny.pth\r", "{} *HAT-Net_Tiny.pth", "\ufeff{}  HAT-Net_Tiny.pth"])
@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_sums_are_read_however_they_are_written_and_never_passed_over(case, line, weights_server):
    weights_server.files["/SHA256SUMS"] = (line.format(case("a" * 64)) + "\n").encode()
    with raises(ValueError, "HAT-Net_Tiny.pth"):
        create_model("hatnet_tiny", pretrained=True)


@pytest.mark.parametrize("content", [b"<html>please log in</html>", b"\xff\xfe", b""])
def test_sums_that_do_not_name_the_file_are_refused(content, weights_server, hub):
    weights_server.files["/SHA256SUMS"] = content
    with raises(ValueError, f"{weights_server.url}/SHA256SUMS", "HAT-Net_Tiny.pth"):
        create_model("hatnet_tiny", pretrained=True)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_server_may_say_in_several_ways_that_there_are_no_sums(status, weights_server):
    weights_server.statuses["/SHA256SUMS"] = status
    create_model("hatnet_tiny", pretrained=True)


@pytest.mark.parametrize("address", ["nonsense", "file:///tmp", "  ", "https://"])
def test_an_address_that_is_none_is_refused_by_the_name_of_the_variable(address, monkeypatch):
    monkeypatch.setenv("HATNET_WEIGHTS_URL", address)
    with raises(ValueError, "HATNET_WEIGHTS_URL", "http", f"'{address}'"):
        create_model("hatnet_tiny", pretrained=True)


@pytest.mark.parametrize("damage", ["truncated", "wrong hash", "not a number"])
def test_timm_downloads_no_worse_than_we_do(damage, weights_server, hub, released_files, tmp_path):
    whole = weights_server.files[NAME]
    if damage == "truncated":
        weights_server.files[NAME] = whole[: len(whole) // 2]
    elif damage == "wrong hash":
        weights_server.files["/SHA256SUMS"] = f"{'0' * 64}  HAT-Net_Tiny.pth\n".encode()
    else:
        released = torch.load(released_files["hatnet_tiny"], weights_only=True)
        torch.save(released | {"classifier.1.bias": torch.full((1000,), float("nan"))}, tmp_path / "nan.pth")
        weights_server.files[NAME] = (tmp_path / "nan.pth").read_bytes()
    for build in (timm.create_model, create_model):
        with raises(ValueError, f"{weights_server.url}{NAME}"):
            build("hatnet_tiny", pretrained=True)
        assert list(hub.iterdir()) == []


def test_a_wrong_hash_is_refused_and_nothing_is_left(weights_server, hub):
    weights_server.files["/SHA256SUMS"] = f"{'0' * 64}  HAT-Net_Tiny.pth\n".encode()
    with raises(ValueError, f"{weights_server.url}{NAME}", "0" * 64):
        create_model("hatnet_tiny", pretrained=True)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("announced", ["all of it", "what comes"])
def test_a_truncated_download_is_refused_and_nothing_is_left(announced, weights_server, hub):
    whole = weights_server.files[NAME]
    weights_server.files[NAME] = whole[: len(whole) // 2]
    if announced == "all of it":
        weights_server.lengths[NAME] = len(whole)
    with raises((ValueError, OSError), f"{weights_server.url}{NAME}"):
        create_model("hatnet_tiny", pretrained=True)
    assert list(hub.iterdir()) == []


def test_a_download_after_a_failed_one_succeeds(weights_server):
    whole = weights_server.files[NAME]
    weights_server.files[NAME] = whole[:1000]
    with raises(ValueError, f"{weights_server.url}{NAME}"):
        create_model("hatnet_tiny", pretrained=True)
    weights_server.files[NAME] = whole
    create_model("hatnet_tiny", pretrained=True)


def test_a_missing_file_is_refused_by_address(weights_server, hub):
    with raises(OSError, f"{weights_server.url}/HAT-Net_Small.pth", 404):
        create_model("hatnet_small", pretrained=True)
    assert list(hub.iterdir()) == []


def test_a_server_that_is_not_there_is_refused_by_address(monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as free:
        url = f"http://127.0.0.1:{free.server_address[1]}"
    monkeypatch.setenv("HATNET_WEIGHTS_URL", url)
    with raises(OSError, f"{url}{NAME}"):
        create_model("hatnet_tiny", pretrained=True)


def test_a_page_in_place_of_the_weights_is_refused(weights_server, hub):
    weights_server.files[NAME] = b"<html>please log in</html>"
    with raises(ValueError, f"{weights_server.url}{NAME}"):
        create_model("hatnet_tiny", pretrained=True)
    assert list(hub.iterdir()) == []


def test_a_bit_that_flipped_on_the_way_is_refused(weights_server, hub):
    content = bytearray(weights_server.files[NAME])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 0x10
    weights_server.files[NAME] = bytes(content)
    with raises(ValueError, f"{weights_server.url}{NAME}"):
        create_model("hatnet_tiny", pretrained=True)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("name", ["hatnet_small_gelu", "hatnet_small_window234"])
def test_a_model_without_released_weights_is_refused_with_those_that_have_some(name):
    with raises(ValueError, name, "hatnet_tiny"):
        create_model(name, pretrained=True)


OFFLINE = """
import sys
import hatnet_core, hatnet_core.timm, timm
create = timm.create_model if sys.argv[1] == "timm" else hatnet_core.create_model
create("hatnet_tiny", pretrained=True)
"""


@pytest.mark.parametrize("library", ["timm", "hatnet_core"])
def test_offline_the_released_weights_end_in_one_short_error_with_the_way_out(library, tmp_path):
    environment = {"HATNET_WEIGHTS_URL": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", OFFLINE, library], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("OSError: ")
    check(last, f"http://127.0.0.1:9{NAME}", "HATNET_WEIGHTS_URL", tmp_path / "hub" / "checkpoints")
    assert result.stderr.count("Traceback") == 1
