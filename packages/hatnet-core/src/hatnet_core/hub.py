"""HAT-Net on the Hugging Face hub: a :class:`HATNet` with ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

Needs the extra ``hatnet-core[hub]``. A saved folder holds ``model.safetensors`` (a file that
:func:`hatnet_core.load_checkpoint` reads, too), ``config.json`` (the arguments of :class:`HATNet`) and a model card.
Folders on disk need no network. ``transformers.py`` has the class for ``AutoBackbone``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from hatnet_core.checkpoint import (
    WEIGHTS,
    build_loaded,
    read_metadata,
    read_state,
    save_checkpoint,
    saved_config,
    variant_name,
)
from hatnet_core.config import HATNetConfig
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
    """A :class:`HATNet` that comes from and goes to the Hugging Face hub or a folder of its form.

    Takes the arguments of :class:`HATNet`. Weights are read from safetensors alone, strictly.

    Example:
        >>> from hatnet_core.variants import model_arguments
        >>> model = HubHATNet(**model_arguments("hatnet_tiny"), num_classes=10)
        >>> model.save_pretrained("folder")  # doctest: +SKIP
        >>> model = HubHATNet.from_pretrained("folder")  # doctest: +SKIP
    """

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card with this model's size and task; ``repo_id``, ``title`` and ``description`` may be given."""
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
        """Save the model as it is now; a folder that holds one keeps it until the new files are complete.

        Args:
            save_directory: the folder; made if it is not there.
            **kwargs: ``push_to_hub`` and ``repo_id`` to upload as well, ``model_card_kwargs``, and what
                :meth:`push_to_hub` takes.

        Returns:
            The address of the commit if ``push_to_hub``, else None.

        Raises:
            ValueError: if stages of the model were pruned.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as staging:
            super().save_pretrained(staging, model_card_kwargs=kwargs.get("model_card_kwargs"))
            for file in Path(staging).iterdir():
                if file.name != "README.md" or not (folder / file.name).exists():  # a card may have been edited
                    file.replace(folder / file.name)
        return self.push_to_hub(repo_id or folder.name, **kwargs) if push else None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save and upload the model, as ``PyTorchModelHubMixin.push_to_hub``; the card names the repository."""
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
        """The model in a folder of ``save_pretrained`` or in a repository of the hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, or the name on the hub.
            map_location: device to put the model on.
            revision: as for ``huggingface_hub.hf_hub_download``, and so ``cache_dir``, ``force_download``,
                ``local_files_only`` and ``token``.
            cache_dir: likewise.
            force_download: likewise.
            local_files_only: likewise.
            token: likewise.
            **arguments: arguments of :class:`HATNet` that override the configuration.

        Raises:
            FileNotFoundError: if there is no such folder, no ``config.json`` or no ``model.safetensors`` in it.
            ValueError: if they cannot be read or do not fit each other.
        """
        name = str(pretrained_model_name_or_path)
        options = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
        options |= {"local_files_only": local_files_only, "token": token}
        config, weights = (_file(name, file, options) for file in ("config.json", WEIGHTS))
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
            raise ValueError(f"{config} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{config} must hold the arguments of HATNet, got {type(values).__name__}")
        state, _ = read_state(weights)
        model = build_loaded(cls, {**values, **arguments}, config, state, weights, map_location)
        return cast("HubHATNet", model).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(self, save_directory / WEIGHTS)
        # as now: set_grid, reset_classifier or another head may have changed the arguments it was built with
        config = read_metadata(save_directory / WEIGHTS)["config"]
        (save_directory / "config.json").write_text(HATNetConfig(**config).to_json_string())


def _file(name: str, file: str, options: dict[str, Any]) -> Path:
    """A file of a local folder, or of a repository of the hub."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith("."):
            raise FileNotFoundError(f"no folder {name}: expected one of save_pretrained, or a name on the hub")
        try:
            return Path(hf_hub_download(name, file, **options))
        except OSError as error:  # of the hub, of the network: without the traceback of each attempt
            reason = str(error).strip().partition("\n")[0]
            kind = FileNotFoundError if isinstance(error, FileNotFoundError | EntryNotFoundError) else OSError
        raise kind(f"could not get {file} of {name} from the hub, and there is no such folder: {reason}")
    if not (folder / file).is_file():
        raise FileNotFoundError(f"no {file} in {name}: expected a folder of save_pretrained")
    return folder / file
