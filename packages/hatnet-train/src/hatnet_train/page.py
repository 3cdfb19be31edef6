"""One self-contained HTML page about a trained model: of a run at its end, or of ``hatnet-eval``.

Curves, accuracy per class, confusions, mistakes as pictures, the configuration and the next commands. ``page.html`` in
this folder is the Jinja template.
"""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from hatnet_core.checkpoint import WEIGHTS
from hatnet_core.io import atomic_write
from hatnet_train.__about__ import __version__
from hatnet_train.classifier import Classifier
from hatnet_train.config import FIELDS, TrainConfig
from hatnet_train.curves import MANY_CLASSES, best_epoch, curves_svg
from hatnet_train.data import Source
from hatnet_train.data.images import to_pillow
from hatnet_train.results import Results

PAGE = "results.html"
"""Page in a run folder."""

PICTURES = 12
"""Mistakes, and as many hits, that are shown."""

THUMBNAIL = 192
"""Longest side of a picture on the page in pixels."""

MATRIX_CLASSES = 25
"""Most classes whose confusion matrix is a table of numbers; one of more classes is drawn."""

DRAWN_CLASSES = 2000
"""Most classes whose confusion matrix is drawn, a pixel for each pair."""

CONFUSIONS = 12
"""Pairs of classes in the list of the most frequent confusions."""

COLOURS = {True: (47, 134, 201), False: (217, 115, 13)}
"""Of hits, on the diagonal of the matrix, and of mistakes; both are legible on a light and on a dark page."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Content of a page.

    Attributes:
        title: heading.
        about: one sentence.
        figures: the most important results by name, as they are shown.
        held_out: the images.
        results: their predictions.
        settings: configuration by group and name.
        commands: command lines, as words, by their purpose.
        rows: metrics of the epochs; empty for an evaluation.
    """

    title: str
    about: str
    figures: Mapping[str, str]
    held_out: Source
    results: Results
    settings: Mapping[str, Mapping[str, Any]]
    commands: Mapping[str, Sequence[str]]
    rows: Sequence[Mapping[str, Any]] = field(default=())


def run_page(
    out: Path,
    config: TrainConfig,
    training_images: int,
    held_out: Source,
    results: Results,
    rows: Sequence[Mapping[str, Any]],
) -> Page:
    """Describe a run by the weights of its last epoch.

    Args:
        out: the run folder.
        config: the run.
        training_images: how many.
        held_out: the images of the evaluation.
        results: their predictions by the last weights.
        rows: metrics of the epochs.
    """
    last, best = rows[-1], best_epoch(rows)
    figures = headline(last, results)
    if "ema_top1" in last:
        figures["top-1, average of the weights"] = f"{last['ema_top1']:.2f} %"
    figures["best epoch"] = f"{best['epoch']} of {len(rows)}: {best['top1']:.2f} %"
    settings: dict[str, dict[str, Any]] = {}
    for name, value in config.to_dict().items():
        settings.setdefault(FIELDS[name].group, {})[name] = value
    return Page(
        title=f"Results of {out}",
        about=f"{config.model.variant} at {config.images.image_size} pixels after {len(rows)} epochs on "
        f"{training_images:,} images of {config.images.data}. All results are those of the weights of the last "
        f"epoch, {WEIGHTS}, on {len(results.images):,} held-out images of {len(results.classes):,} classes.",
        figures=figures,
        held_out=held_out,
        results=results,
        settings=settings,
        commands={
            **_commands(str(out)),
            "Train on other images from these weights": [
                *("hatnet-train", "--recipe", "imagenet", "--variant", config.model.variant, "--init", str(out)),
                *("--data", "DATA", "--out", "NEXT"),
            ],
        },
        rows=rows,
    )


def evaluation_page(
    row: Mapping[str, Any], classifier: Classifier, held_out: Source, results: Results, variant: str | None = None
) -> Page:
    """Describe a checkpoint by its predictions for a data set.

    Args:
        row: of :func:`hatnet_train.evaluate.evaluation_run`.
        classifier: the checkpoint.
        held_out: the images.
        results: their predictions.
        variant: the model, if the checkpoint does not record it.
    """
    figures = headline({**row, "eval_loss": row["loss"]}, results)
    figures["speed"] = f"{row['images_per_second']:,.0f} images/s"
    among = f"choosing among {row['classes']:,} classes"
    unread = f"; {row['bad_images']:,} images could not be read" if row["bad_images"] else ""
    preprocessing = {"crop_fraction": classifier.crop_fraction, "mean": classifier.mean, "std": classifier.std}
    return Page(
        title=f"{row['checkpoint']} on {row['data']}",
        about=f"{len(results.images):,} images at {row['size']} pixels, {among}{unread}.",
        figures=figures,
        held_out=held_out,
        results=results,
        settings={"evaluation": row, "images": preprocessing, "model": classifier.model.config},
        commands=_commands(row["checkpoint"], variant),
    )


def _commands(checkpoint: str, variant: str | None = None) -> dict[str, list[str]]:
    """Command lines for what a user may want next; words in capitals are for the user to replace."""
    weights = ["--checkpoint", checkpoint, *(["--variant", variant] if variant else [])]
    return {
        "Classify images": ["hatnet-predict", "IMAGE", *weights],
        "Measure other images, with such a page": [
            *("hatnet-eval", *weights, "--data", "DATA", "--page", "page.html", "--per-class", "classes.csv")
        ],
        "Show what a point of an image attends to": [
            *("hatnet-analysis", "attention", "IMAGE", *weights, "--point", "100", "100", "--out", "attention.png")
        ],
        "Export the model": ["hatnet-export", *weights, "--out", "model.onnx"],
    }


def write_page(page: Page, path: Path) -> None:
    """Write the page; a former one is replaced as a whole.

    Raises:
        OSError: if it cannot be written.
    """
    results, names = page.results, display_names(page.results.classes)
    curves = curves_svg(page.rows, classes=len(names)) if page.rows else []
    per_class = [{**row, "name": name} for row, name in zip(results.per_class(), names, strict=True)]
    content = {
        "page": page,
        "version": __version__,
        "curves": [_url(svg.encode(), "image/svg+xml") for svg in curves],
        "best": best_epoch(page.rows) if page.rows else None,
        "per_class": [row for row in per_class if row["images"]],
        "absent": [row["name"] for row in per_class if not row["images"]],
        **_confusion(results, names),
        "pictures": {
            "Most confident mistakes": _pictures(page, names, results.confident_mistakes(PICTURES)),
            "Least confident hits": _pictures(page, names, results.unsure_hits(PICTURES)),
        },
        "commands": {purpose: shlex.join(words) for purpose, words in page.commands.items()},
    }
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True)
    with atomic_write(path) as part:
        html = environment.get_template("page.html").render(content)
        part.write_text(html, encoding="utf-8", errors="replace")


def display_names(classes: Sequence[str]) -> list[str]:
    """Return the names to show: of ImageNet's synsets such as n01440764 their first word, else the class names."""
    synsets = imagenet_synsets()
    return [f"{synsets[name].partition(',')[0]} ({name})" if name in synsets else name for name in classes]


@cache
def imagenet_synsets() -> dict[str, str]:
    """Descriptions of ImageNet-1k's classes by their synset, in the order of the labels."""
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo()
    return dict(zip(info.label_names(), info.label_descriptions(), strict=True))


def headline(metrics: Mapping[str, Any], results: Results) -> dict[str, str]:
    """Return accuracies and loss of an evaluation as they are shown; top-5 only of more than ten classes."""
    counted = [row["top1"] for row in results.per_class() if row["images"]]
    shown = {"top-1": f"{metrics['top1']:.2f} %"}
    if len(results.classes) > MANY_CLASSES:
        shown["top-5"] = f"{metrics['top5']:.2f} %"
    return {
        **shown,
        "mean of the classes": f"{sum(counted) / len(counted):.2f} %",
        "worst class": f"{min(counted):.2f} %",
        "loss": f"{metrics['eval_loss']:.4f}",
        "images": f"{len(results.images):,}",
    }


def _confusion(results: Results, names: Sequence[str]) -> dict[str, Any]:
    """Return the matrix as numbers or as a picture, and the most frequent confusions."""
    pairs = results.confusions()
    shown = sorted({place for label, prediction, _ in pairs for place in (label, prediction)})
    images = {row["class"]: row["images"] for row in results.per_class()}
    wrong = sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: -pair[2])[:CONFUSIONS]
    content: dict[str, Any] = {
        "confusions": [
            {"label": names[label], "prediction": names[prediction], "n": n, "of": images[results.classes[label]]}
            for label, prediction, n in wrong
        ]
    }
    if len(shown) > DRAWN_CLASSES:
        return content
    at = {place: i for i, place in enumerate(shown)}
    matrix = np.zeros((len(shown), len(shown)), np.int64)
    for label, prediction, n in pairs:
        matrix[at[label], at[prediction]] = n
    if len(shown) <= MATRIX_CLASSES:
        return {**content, "matrix": matrix.tolist(), "matrix_names": [names[place] for place in shown]}
    return {**content, "matrix_picture": _drawn_matrix(matrix), "matrix_classes": len(shown)}


def _drawn_matrix(matrix: np.ndarray) -> str:
    """Draw each pair of classes as a pixel, the more opaque the larger its share of the row."""
    share = matrix / matrix.sum(1, keepdims=True).clip(1)
    pixels = np.empty((*matrix.shape, 4), np.uint8)
    pixels[..., :3] = np.where(np.eye(len(matrix), dtype=bool)[..., None], COLOURS[True], COLOURS[False])
    pixels[..., 3] = (255 * np.sqrt(share)).round()  # the root shows single images of a large class
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return _url(buffer.getvalue(), "image/png")


def _pictures(page: Page, names: Sequence[str], rows: Sequence[int]) -> list[dict[str, Any]]:
    results = page.results
    return [
        {
            "url": _thumbnail(page.held_out, int(results.images[row])),
            "file": page.held_out.name(int(results.images[row])),
            "label": names[results.labels[row]],
            "prediction": names[results.predictions[row]],
            "correct": bool(results.correct[row]),
            "probability": f"{100 * results.probabilities[row]:.1f}\N{NO-BREAK SPACE}%",
        }
        for row in rows
    ]


def _thumbnail(held_out: Source, image: int) -> str:
    """Embed an image, reduced; an empty string if it cannot be read any more."""
    try:
        picture = to_pillow(held_out.image(image))
    except (ValueError, OSError):
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, subsampling=0)
    return _url(buffer.getvalue(), "image/jpeg")


def _url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
