"""HAT-Net on the Hugging Face hub: a :class:`HATNet` with ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

Needs the extra ``hatnet-core[hub]``. A saved folder holds ``model.safetensors`` (a file that
:func:`hatnet_core.load_checkpoint` reads, too), ``config.json`` (the arguments of :class:`HATNet`) and a model card.
Folders on disk need no network. ``transformers.py`` has the class for ``AutoBackbone``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download

from hatnet_core.checkpoint import load_checkpoint, save_checkpoint, variant_name
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
        values = {
            "title": variant_name(self.config) or "HAT-Net",
            "params": f"{sum(p.numel() for p in self.parameters()) / 1e6:.1f}",
            "task": f"{self.num_classes} classes" if self.num_classes else "feature extraction",
            "in_chans": self.in_chans,
            "repo_id": "folder or name on the hub",
            "description": "",
        }
        return super().generate_model_card(*args, **{**values, **kwargs})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save and upload the model, as ``PyTorchModelHubMixin.push_to_hub``; the card names the repository."""
        kwargs["model_card_kwargs"] = {"repo_id": repo_id, **(kwargs.get("model_card_kwargs") or {})}
        return super().push_to_hub(repo_id, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(self, save_directory / "model.safetensors")
        # what the model is now: set_grid and reset_classifier may have changed what it was built with
        (save_directory / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> HubHATNet:
        """The model in a folder of ``save_pretrained`` or in a repository of the hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, or the name on the hub.
            **kwargs: those of ``PyTorchModelHubMixin.from_pretrained`` (``revision``, ``cache_dir``, ``token``,
                ``local_files_only``, ``force_download``), ``map_location`` (default: cpu) and arguments of
                :class:`HATNet` that override the configuration.

        Raises:
            FileNotFoundError: if there is no ``config.json`` or no ``model.safetensors``.
            ValueError: if they cannot be read or do not fit each other.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(f"config.json in {pretrained_model_name_or_path} is not JSON: {error}") from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        **arguments: Any,
    ) -> HubHATNet:
        if "embed_dims" not in arguments:
            raise FileNotFoundError(f"no config.json with the arguments of HATNet in {model_id}")
        path: str | Path = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            path = hf_hub_download(
                model_id,
                "model.safetensors",
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        model = cls(**arguments)
        load_checkpoint(model, path)
        return model.to(map_location).eval()
