"""Download and load the weights that the paper's authors released.

The files are published without a licence. They are downloaded only on request, into torch's hub folder
(``torch.hub.get_dir()``/checkpoints), and never redistributed. ``HATNET_WEIGHTS_URL`` gives another address, such as a
mirror in a network without internet. If that address has a file ``SHA256SUMS``, as ``sha256sum *.pth`` prints it, the
download is compared with it; the authors published none.
"""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
from torch import nn

from hatnet_core.checkpoint import load_checkpoint
from hatnet_core.io import atomic_write
from hatnet_core.model import HATNet, unwrap
from hatnet_core.variants import model_arguments

RELEASED_URL = "https://github.com/yun-liu/HAT-Net/releases/download/v2.0"
"""Address of the authors' files; the environment variable ``HATNET_WEIGHTS_URL`` overrides it."""

RELEASED_FILES = {
    "hatnet_tiny": "HAT-Net_Tiny.pth",
    "hatnet_small": "HAT-Net_Small.pth",
    "hatnet_medium": "HAT-Net_Medium.pth",
    "hatnet_large": "HAT-Net_Large.pth",
}
"""Released file of each model of Table 1, trained on ImageNet-1k at 224×224."""

RELEASED_CLASSES = 1000
"""Outputs of the classifier in the released files."""

SUMS_TIMEOUT_S = 30


def load_pretrained(model: nn.Module, name: str) -> None:
    """Load the released weights of ``name`` into ``model``; a head of other than 1000 classes is kept.

    Args:
        model: the model; for other than 3 input channels, :func:`hatnet_core.load_checkpoint` adapts the weights.
        name: one of the four models of Table 1.

    Raises:
        ValueError: if nothing was released for ``name``, the download is damaged, or the weights do not match.
        OSError: if the file cannot be downloaded.
    """
    hatnet = unwrap(model)
    load_checkpoint(hatnet, released_file(name), drop_head=hatnet.num_classes != RELEASED_CLASSES)


def released_url(name: str) -> str:
    """Address of the released weights of ``name``.

    Raises:
        ValueError: if nothing was released for ``name``, or ``HATNET_WEIGHTS_URL`` is not an http address.
    """
    if name not in RELEASED_FILES:
        raise ValueError(f"no weights were released for {name!r}; released: {', '.join(RELEASED_FILES)}")
    base = os.environ.get("HATNET_WEIGHTS_URL") or RELEASED_URL
    if not re.match(r"https?://[^/\s]", base):
        raise ValueError(f"HATNET_WEIGHTS_URL must be an http or https address, got {base!r}")
    return f"{base.rstrip('/')}/{RELEASED_FILES[name]}"


def released_file(name: str, folder: str | Path | None = None) -> Path:
    """Path of the released weights of ``name``, downloaded at the first call.

    A file appears in the folder only after it has been downloaded and checked. An interrupted download, or one in
    progress in another process, is never taken for it.

    Args:
        name: one of the four models of Table 1.
        folder: folder of the file; by default torch's hub folder.

    Raises:
        ValueError: if nothing was released for ``name``, or the download is incomplete or damaged.
        OSError: if the file cannot be downloaded.
    """
    url = released_url(name)
    folder = Path(torch.hub.get_dir()) / "checkpoints" if folder is None else Path(folder)
    path = folder / RELEASED_FILES[name]
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        _download(url, part, folder)
        try:
            load_checkpoint(HATNet(**model_arguments(name)), part)
            _check_sums_of_archive(part)
        except ValueError as error:
            raise ValueError(f"the download of {url} is incomplete or damaged: {error}") from None
    return path


def _download(url: str, path: Path, folder: Path) -> None:
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_published_sha256(url))
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"could not download {url}: {error}; without a network, set HATNET_WEIGHTS_URL to a mirror "
            f"or put the file into {folder}"
        ) from None  # urllib's tracebacks fill pages
    except RuntimeError as error:  # torch.hub reports another hash like this
        raise ValueError(f"the download of {url} is not the published file: {error}") from None


def _check_sums_of_archive(path: Path) -> None:
    """Raise ValueError if a tensor differs from its checksum in the file, which torch.load does not compare."""
    if zipfile.is_zipfile(path):  # torch before 1.6 wrote another format
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"checksum of {broken} differs")


def _published_sha256(url: str) -> str | None:
    """Look up the hash of ``url`` in the file ``SHA256SUMS`` next to it; None if there is no such file.

    Raises:
        ValueError: if the file does not list it.
    """
    base, _, name = url.rpartition("/")
    try:
        with urllib.request.urlopen(f"{base}/SHA256SUMS", timeout=SUMS_TIMEOUT_S) as response:  # noqa: S310  checked by released_url
            lines = response.read().decode(errors="replace").splitlines()
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):  # answers of servers and object stores for a missing file
            return None
        raise
    for line in lines:
        digest, _, file = line.strip().lower().partition(" ")
        if file.strip().lstrip("*").removeprefix("./") == name.lower() and re.fullmatch("[0-9a-f]{64}", digest):
            return digest
    raise ValueError(f"{base}/SHA256SUMS has no line with the SHA-256 of {name}")
