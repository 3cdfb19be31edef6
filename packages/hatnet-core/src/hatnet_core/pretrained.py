"""The weights released by the paper's authors: their names, their addresses and the way into a model.

The files are published without a licence. They are downloaded on a user's request only, into torch's hub folder
(``torch.hub.get_dir()``/checkpoints), and never redistributed. ``HATNET_WEIGHTS_URL`` names another address to take
them from, such as a mirror inside a network without internet. If a file ``SHA256SUMS`` (as ``sha256sum *.pth``
prints it) lies beside them, the download has to agree with it; the authors published none.
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
"""Where the authors published the files; the environment variable ``HATNET_WEIGHTS_URL`` overrides it."""

RELEASED_FILES = {
    "hatnet_tiny": "HAT-Net_Tiny.pth",
    "hatnet_small": "HAT-Net_Small.pth",
    "hatnet_medium": "HAT-Net_Medium.pth",
    "hatnet_large": "HAT-Net_Large.pth",
}
"""The released file of each model of Table 1, trained on ImageNet-1k at 224×224."""

RELEASED_CLASSES = 1000
"""Outputs of the classifier in the released files."""

SUMS_TIMEOUT_S = 30


def load_pretrained(model: nn.Module, name: str) -> None:
    """Load the released weights of ``name`` into ``model``; the head stays as it is if it has not 1000 classes.

    Args:
        model: the model; adapted as :func:`hatnet_core.load_checkpoint` says if it takes other than 3 channels.
        name: one of the four models of Table 1.

    Raises:
        ValueError: if nothing was released for ``name``, the download is damaged, or the weights do not fit.
        OSError: if the file cannot be downloaded.
    """
    hatnet = unwrap(model)
    load_checkpoint(hatnet, released_file(name), drop_head=hatnet.num_classes != RELEASED_CLASSES)


def released_url(name: str) -> str:
    """The address of the released weights of ``name``.

    Raises:
        ValueError: if nothing was released for ``name``, or ``HATNET_WEIGHTS_URL`` is no http address.
    """
    if name not in RELEASED_FILES:
        raise ValueError(f"no weights were released for {name!r}; released: {', '.join(RELEASED_FILES)}")
    base = os.environ.get("HATNET_WEIGHTS_URL") or RELEASED_URL
    if not re.match(r"https?://[^/\s]", base):
        raise ValueError(f"HATNET_WEIGHTS_URL must be an http or https address, got {base!r}")
    return f"{base.rstrip('/')}/{RELEASED_FILES[name]}"


def released_file(name: str, folder: str | Path | None = None) -> Path:
    """The released weights of ``name`` on disk, downloaded if they are not there yet.

    A file enters the folder whole, after it has been read once: neither a download that broke off nor one that
    another process is still busy with can be taken for it.

    Args:
        name: one of the four models of Table 1.
        folder: where the file is kept; by default torch's hub folder.

    Raises:
        ValueError: if nothing was released for ``name``, or what was downloaded is incomplete or damaged.
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
        ) from None  # else pages of tracebacks of urllib
    except RuntimeError as error:  # torch.hub's way to report another hash
        raise ValueError(f"the download of {url} is not the published file: {error}") from None


def _check_sums_of_archive(path: Path) -> None:
    """ValueError if a tensor is not the one whose checksum the file holds; torch.load does not compare them."""
    if zipfile.is_zipfile(path):  # not what torch wrote before 1.6
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"checksum of {broken} differs")


def _published_sha256(url: str) -> str | None:
    """What the file ``SHA256SUMS`` beside ``url`` says of it; None if there is no such file.

    Raises:
        ValueError: if there is one, and it does not say.
    """
    base, _, name = url.rpartition("/")
    try:
        with urllib.request.urlopen(f"{base}/SHA256SUMS", timeout=SUMS_TIMEOUT_S) as response:  # noqa: S310  checked by released_url
            lines = response.read().decode(errors="replace").splitlines()
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):  # how servers and object stores say that there is none
            return None
        raise
    for line in lines:
        digest, _, file = line.strip().lower().partition(" ")
        if file.strip().lstrip("*").removeprefix("./") == name.lower() and re.fullmatch("[0-9a-f]{64}", digest):
            return digest
    raise ValueError(f"{base}/SHA256SUMS has no line with the SHA-256 of {name}")
