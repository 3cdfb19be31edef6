"""Images with labels from a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from hatnet_train.data.folder import Folder, Report, Skipped, refuse, some
from hatnet_train.data.split import HELD_OUT_FOLDERS

COLUMNS = {"file": ("file", "filename", "path", "image"), "label": ("label", "class"), "split": ("split",)}
"""Names of the columns; the first is that of the documentation. ``split`` can be missing."""


class Listing(Folder):
    """Images below a folder with the labels that a CSV file gives.

    Args:
        root: the folder; files outside of it are refused.
        table: the CSV file, with a header. The columns are file (relative to ``root``), label and, if wanted, split:
            train, and one of val, validation and test.
        train: the images of the split train, or the others. Without a column for it, all.
        classes: names of the classes, if they are known; else those of the file in order.
        report: called with each problem; by default the first is raised.

    Attributes:
        has_split: True if the file says which images are held out.

    Raises:
        ValueError: naming the file, and the line of a wrong value.
    """

    def __init__(
        self,
        root: Path,
        table: Path,
        *,
        train: bool,
        classes: Sequence[str] | None = None,
        report: Report = refuse,
    ) -> None:
        self.root, self.skipped = root, Skipped()
        rows = list(_rows(table, root, report))
        splits = {split for _, _, split in rows}
        self.has_split = splits != {""}
        held_out = next((name for name in HELD_OUT_FOLDERS if name in splits), "")
        if self.has_split and rows and not (held_out and "train" in splits):
            expected = f"train and one of {', '.join(HELD_OUT_FOLDERS)}"
            report(f"{table}: the column split must contain {expected}, got {', '.join(sorted(splits))}")
        self.classes = tuple(sorted({label for _, label, _ in rows}) if classes is None else classes)
        wanted = "train" if train else held_out
        chosen = [(file, label) for file, label, split in rows if not self.has_split or split == wanted]
        places = {name: place for place, name in enumerate(self.classes)}
        if unknown := sorted({label for _, label in chosen} - places.keys()):
            report(f"{table} has labels that the training data does not have: {some(unknown)}")
            chosen = [(file, label) for file, label in chosen if label in places]
        self.labels = np.array([places[label] for _, label in chosen], dtype=np.int64)
        self._names = np.array([os.fsencode(file) for file, _ in chosen], dtype=np.bytes_)

    def name(self, i: int) -> str:
        """Path of image ``i``."""
        return str(self.root / os.fsdecode(self._names[i]))


def _rows(table: Path, root: Path, report: Callable[[str], object]) -> Iterator[tuple[str, str, str]]:
    """Yield file, label and split of every row; the split is empty where there is no such column."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = _columns(table, reader.fieldnames or [])
            known: dict[str, str] = {}
            for row in reader:
                values = {name: (row.get(column) or "").strip() for name, column in columns.items()}
                problem = _problem(values, root, known, "split" in columns)
                if problem:
                    report(f"{table}: line {reader.line_num}: {problem}")
                else:
                    yield values["file"], values["label"], values.get("split", "")
            if not known:
                report(f"{table}: must contain a row for every image, got none")
    except OSError as error:
        raise ValueError(f"{table}: cannot read the file: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: must be a CSV file in UTF-8: {error}") from error


def _columns(table: Path, found: Sequence[str]) -> dict[str, str]:
    by_name = {column.strip().lower(): column for column in found}
    columns = {
        name: next((by_name[other] for other in others if other in by_name), "") for name, others in COLUMNS.items()
    }
    if missing := [name for name in ("file", "label") if not columns[name]]:
        raise ValueError(
            f"{table}: the header must have the columns file and label, got {some(list(found))}; "
            f"missing: {', '.join(missing)}"
        )
    return {name: column for name, column in columns.items() if column}


def _problem(values: dict[str, str], root: Path, known: dict[str, str], has_split: bool) -> str:
    """Describe what is wrong with a row; empty for a good one, which is added to ``known``."""
    file, label = values["file"], values["label"]
    path = PurePath(file)
    if not file or path.is_absolute() or ".." in path.parts:
        return f"file must be a path below {root}, got {file!r}"
    if not label:
        return f"label must be a non-empty string, got {label!r}"
    if has_split and values["split"] not in ("train", *HELD_OUT_FOLDERS):
        return f"split must be one of train, {', '.join(HELD_OUT_FOLDERS)}, got {values['split']!r}"
    if known.setdefault(file, label) != label:
        return f"{file} must have one label, got {known[file]} and {label}"
    if not (root / file).is_file():
        return f"no file {root / file}"
    return ""
