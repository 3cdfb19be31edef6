"""Share HAT-Net on the Hugging Face hub: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

Needs the extra ``hatnet-core[hub]``. A saved folder contains ``model.safetensors``, which
:func:`hatnet_core.load_checkpoint` reads as well, ``config.json`` with the arguments of :class:`HATNet`, and a model
card. Folders on disk need no network. ``from_pretrained`` also reads folders of ``hatnet-export``.
For transformers, see :mod:`hatnet_core.transformers`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from hatnet_core.checkpoint.loading import build_loaded
from hatnet_core.checkpoint.matching import variant_name
from hatnet_core.checkpoint.reading import WEIGHTS, read_checkpoint
from hatnet_core.checkpoint.saving import save_checkpoint, saved_config
from hatnet_core.config import HATNetConfig
from hatnet_core.io import json_object
from hatnet_core.model import HATNet

CARD = """---
{{ card_data }}
---

# {{ title }}

A HAT-Net of {{ params }} million parameters for {{ task }}, an implementation of "Vision Transformers with
Hierarchical Attention" (Liu et al., Machine Intelligence Research 21, 2024).

```python
# pip install "hatnet-core[hub]"
from hatnet_core.hub import HubHATNet

model = HubHATNet.from_pretrained("{{ repo_id }}")  # in evaluation mode
logits = model(images)  # B×{{ in_chans }}×H×W, normalised; any height and width from 32 up
```

{{ description }}
"""


class HubHATNet(
    HATNet,
    PyTorchModelHubMixin,
    library_name="hatnet-core",
    pipeline_tag="image-classification",
    tags=["hat-net", "hierarchical-attention", "backbone"],
    model_card_template=CARD,
):
    """A :class:`HATNet` with the methods of ``PyTorchModelHubMixin``.

    Takes the arguments of :class:`HATNet`. Weights are read from safetensors only, strictly.

    Example:
        >>> from hatnet_core.variants import model_arguments
        >>> model = HubHATNet(**model_arguments("hatnet_tiny"), num_classes=10)
        >>> model.save_pretrained("folder")  # doctest: +SKIP
        >>> model = HubHATNet.from_pretrained("folder")  # doctest: +SKIP
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(self, save_directory / WEIGHTS)
        # The mixin would save the arguments of the constructor, which set_grid or another head may have changed.
        (save_directory / "config.json").write_text(saved_config(self).to_json_string())

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Fill in the card with size and task; ``repo_id``, ``title`` and ``description`` can be given."""
        num_classes = saved_config(self).num_classes
        values = {
            "title": variant_name(self.config) or "HAT-Net",
            "params": f"{sum(p.numel() for p in self.parameters()) / 1e6:.1f}",
            "task": f"{num_classes} classes" if num_classes else "feature extraction",
            "in_chans": self.in_chans,
            "repo_id": "folder or name on the hub",
            "description": "",
        }
        return super().generate_model_card(*args, **{**values, **kwargs})

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Save the model in its present state; files of an earlier save are replaced once all new ones are written.

        Args:
            save_directory: the folder, created if needed.
            **kwargs: ``push_to_hub`` and ``repo_id`` to upload as well, ``model_card_kwargs``, and arguments of
                :meth:`push_to_hub`.

        Returns:
            The address of the commit if ``push_to_hub``, else None.

        Raises:
            ValueError: if the model cannot be saved, as for :func:`hatnet_core.save_checkpoint`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        # The mixin deletes config.json first, so that a failure would leave a folder without it.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as staging:
            super().save_pretrained(staging, model_card_kwargs=kwargs.get("model_card_kwargs"))
            for file in Path(staging).iterdir():
                if file.name != "README.md" or not (folder / file.name).exists():  # keep an edited card
                    file.replace(folder / file.name)
        return self.push_to_hub(repo_id or folder.name, **kwargs) if push else None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save and upload the model as ``PyTorchModelHubMixin.push_to_hub``; the card names the repository."""
        kwargs["model_card_kwargs"] = {"repo_id": repo_id, **(kwargs.get("model_card_kwargs") or {})}
        return super().push_to_hub(repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **arguments: Any,
    ) -> HubHATNet:
        """Load a model from a folder of ``save_pretrained`` or from the hub, in evaluation mode.

        The mixin's own method ignores unknown arguments in ``config.json`` and does not name a damaged file.

        Args:
            pretrained_model_name_or_path: the folder, or the name on the hub.
            map_location: device of the model.
            revision: branch, tag or commit on the hub.
            cache_dir: folder for downloads; by default that of huggingface_hub.
            force_download: download files that are in the cache as well.
            local_files_only: use the cache only.
            token: token for the hub; by default that of ``hf auth login``.
            **arguments: arguments of :class:`HATNet` that override ``config.json``.

        Raises:
            FileNotFoundError: if the folder, its ``config.json`` or its ``model.safetensors`` does not exist.
            OSError: if the hub cannot be reached.
            ValueError: if the files cannot be read or do not match each other.
        """
        name = str(pretrained_model_name_or_path)
        options = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
        options |= {"local_files_only": local_files_only, "token": token}
        config, weights = (_file(name, file, options) for file in ("config.json", WEIGHTS))
        values = _arguments(json_object(config.read_bytes(), config))
        checkpoint = read_checkpoint(weights)
        state = checkpoint.weights().tensors
        model = build_loaded(cls, {**values, **arguments}, config, checkpoint, state, map_location)
        return cast("HubHATNet", model).eval()


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a HATNet in a config.json, which may be one of ``hatnet-export --to huggingface``."""
    if values.get("model_type") != "hatnet":
        return values
    return {name: value for name, value in values.items() if name in HATNetConfig.__dataclass_fields__}


def _file(name: str, file: str, options: dict[str, Any]) -> Path:
    """Find a file in a local folder, or download it from a repository of the hub."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{name} must be a folder of save_pretrained: {file} is missing")
        return folder / file
    if folder.is_absolute() or name.startswith("."):
        raise FileNotFoundError(f"{name} must be a folder of save_pretrained, or a name on the hub: no such folder")
    try:
        return Path(hf_hub_download(name, file, **options))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        kind = FileNotFoundError if isinstance(error, FileNotFoundError | EntryNotFoundError) else OSError
    # Raised here, not inside "except": the tracebacks of all attempts would be attached.
    raise kind(f"could not get {file} of {name} from the hub, and there is no such folder: {reason}")
