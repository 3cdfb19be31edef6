"""Write a folder that transformers, timm and ``HubHATNet`` load, with class names, preprocessing and a model card.

Needs the extras ``hatnet-core[hub,transformers]``. One ``config.json`` serves all three: it has the arguments of
:class:`hatnet_core.HATNet`, the keys of transformers, and those of timm.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hatnet_core.checkpoint.matching import variant_name
from hatnet_core.checkpoint.reading import WEIGHTS
from hatnet_core.checkpoint.saving import save_checkpoint, saved_config
from hatnet_core.model import HATNet
from hatnet_core.preprocessing import Preprocessing
from hatnet_core.transformers import HATNetConfig, HATNetForImageClassification
from hatnet_core.variants import VARIANTS

CARD = """---
{{ card_data }}
---

# {{ title }}

A HAT-Net of {{ params }} million parameters for {{ classes | length }} classes, an implementation of
"Vision Transformers with Hierarchical Attention" (Liu et al., Machine Intelligence Research 21, 2024).

{{ accuracy }}

```python
# pip install "hatnet-core[hub,transformers,timm]"
name = "path of this folder, or its name on the hub"

import hatnet_core.transformers
from transformers import pipeline
pipeline("image-classification", name)("image.jpg")

import timm, hatnet_core.timm
timm.create_model(f"local-dir:{name}", pretrained=True)  # or hf-hub:

from hatnet_core.hub import HubHATNet
HubHATNet.from_pretrained(name)
```

Images are resized to {{ resize }} pixels on the short side ({{ interpolation }}), cropped to
{{ image_size }}×{{ image_size }}, divided by 255 and normalised with mean {{ mean }} and standard deviation
{{ std }}. The model takes any height and width from 32 pixels up.

Classes: {{ classes | join(", ") }}.
"""

PROCESSOR = "BitImageProcessor"
"""Image processor of transformers that resizes the short side and crops the centre."""

TAGS = ["hat-net", "hierarchical-attention", "image-classification", "timm", "transformers"]


def save_folder(
    model: HATNet, folder: str | Path, preprocessing: Preprocessing, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the folder; files of an earlier export are replaced once all new ones are written.

    Args:
        model: the classifier.
        folder: the folder, created if needed.
        preprocessing: class names and preprocessing.
        metadata: kept in ``model.safetensors``. Its ``metrics`` are quoted in the card: ``top1`` in percent, and
            ``images``, the number of held-out images it was measured on.

    Raises:
        ValueError: if the model has no classifier, its images are not RGB, or it cannot be saved.
    """
    config = saved_config(model)
    if not config.num_classes or config.in_chans != 3:
        raise ValueError(
            f"model must have classes and in_chans=3 for Hugging Face, got num_classes={config.num_classes} and "
            f"in_chans={config.in_chans}"
        )
    record = {**(metadata or {}), **preprocessing.to_dict()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as staging:
        part = Path(staging)
        save_checkpoint(model, part / WEIGHTS, record)
        described = _config(config, preprocessing)
        described.architectures = [HATNetForImageClassification.__name__]
        described.save_pretrained(part)
        (part / "preprocessor_config.json").write_text(json.dumps(_processor(preprocessing), indent=2) + "\n")
        _card(model, preprocessing, record.get("metrics")).save(part / "README.md")
        for file in part.iterdir():
            file.replace(folder / file.name)


def _config(config: Mapping[str, Any], preprocessing: Preprocessing) -> HATNetConfig:
    """Return a configuration with the keys of all three libraries."""
    arguments = {name: value for name, value in config.items() if name not in ("num_classes", "global_pool")}
    variant = variant_name(config)
    return HATNetConfig(
        **arguments,
        id2label=dict(enumerate(preprocessing.classes)),
        label2id={name: i for i, name in enumerate(preprocessing.classes)},
        # AutoImageProcessor looks here instead of in preprocessor_config.json if a folder has the keys of timm
        image_processor_type=PROCESSOR,
        architecture=variant if variant in VARIANTS else "hatnet_tiny",  # model_args make it this model
        model_args=arguments,
        pretrained_cfg={
            "input_size": (3, preprocessing.image_size, preprocessing.image_size),
            "crop_pct": preprocessing.crop_fraction,
            "crop_mode": "center",
            "interpolation": preprocessing.interpolation,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "fixed_input_size": False,
            "first_conv": "stem.conv1",
            "classifier": "head",
        },
    )


def _processor(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the settings of transformers' image processor for these steps."""
    return {
        "image_processor_type": PROCESSOR,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocessing.interpolation],  # Pillow's numbers
        "do_center_crop": True,
        "crop_size": {"height": preprocessing.image_size, "width": preprocessing.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _card(model: HATNet, preprocessing: Preprocessing, metrics: Mapping[str, Any] | None) -> ModelCard:
    title = variant_name(model.config) or "HAT-Net"
    data = ModelCardData(library_name="hatnet-core", pipeline_tag="image-classification", tags=TAGS, model_name=title)
    accuracy = "Its accuracy was not measured at export."
    if metrics:
        top1, images = float(metrics["top1"]), int(metrics["images"])
        accuracy = f"Top-1 accuracy: **{top1:.2f} %** of {images} held-out images."
        data.eval_results = [
            EvalResult(
                task_type="image-classification",
                dataset_type="imagefolder",
                dataset_name=f"{images} held-out images",
                metric_type="accuracy",
                metric_value=round(top1 / 100, 6),
            )
        ]
    with tempfile.NamedTemporaryFile("w", suffix=".md", encoding="utf-8") as template:
        template.write(CARD)
        template.flush()
        return ModelCard.from_template(
            data,
            template_path=template.name,
            title=title,
            params=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
            accuracy=accuracy,
            **preprocessing.to_dict(),
        )
