"""Read JSON files into typed structures, with one form of error: ``<path>: <field> must be <type>, got <value>``."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

T = TypeVar("T")

Count: TypeAlias = Annotated[int, Meta(ge=0)]
Sha256: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]

WORDS = {"int": "an integer", "float": "a number", "str": "a string", "object": "an object", "array": "a list"}
"""Types as msgspec names them, in words."""


def read_json(path: Path, kind: type[T], layout: Mapping[str, Any] | None = None) -> T:
    """Read a JSON file as a dataclass or another type; keys that the type does not have are ignored.

    Args:
        path: the file.
        kind: the type, with ranges as ``msgspec.Meta`` declares them.
        layout: keys and values that the file must have, such as its version; they are checked first.

    Raises:
        ValueError: naming the file, and the field with its value and what was expected.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file: {error.strerror or error}") from error
    return parse_json(content, kind, path, layout)


def parse_json(text: bytes, kind: type[T], path: Path, layout: Mapping[str, Any] | None = None) -> T:
    """Convert the content of a JSON file to a type, as :func:`read_json` does."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    for name, expected in (layout or {}).items():
        if (found := content.get(name) if isinstance(content, dict) else None) != expected:
            raise ValueError(f"{path}: {name} must be {expected!r}, got {reprlib.repr(found)}")
    return convert(content, kind, path)


def convert(value: Any, kind: type[T], path: Path) -> T:
    """Convert what was read from a JSON file to a type, as :func:`read_json` does."""
    try:
        return msgspec.convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{path}: {_explain(str(error), value, kind)}") from error


def in_words(text: str) -> str:
    """Say what msgspec expected: of ``Expected `int` >= 1, got `str` - at `$[2]```, "an integer >= 1"."""
    text = re.sub(r" - at `.*|, got .*|Expected ", "", text)
    return re.sub("`(.*)`", lambda types: " or ".join(WORDS.get(name, name) for name in types[1].split(" | ")), text)


def _explain(error: str, value: Any, kind: type) -> str:
    """Reword an error of msgspec, or of a ``__post_init__``, with the whole path of the field and its value."""
    text, _, path = error.partition(" - at `")
    is_key = path.startswith("key")
    name, found = "", value
    for field, index in re.findall(r"\.(\w+)|\[([\d.]+)\]", path + "[...]" * is_key):
        key = int(index) if index.isdigit() else field or _wrong_key(found, error, value, kind)
        name += f".{field}" if field else f"[{json.dumps(key)}]"
        found = found[key]
    name = name.lstrip(".")
    if missing := re.fullmatch("Object missing required field `(.*)`", text):
        return f"{name}.{missing[1]} is missing".lstrip(".")
    if not text.startswith("Expected "):
        return f"{name}: {text}" if name else text
    if is_key:
        return f"the key of {name} must be {in_words(text)}"
    return f"{name or 'the content'} must be {in_words(text)}, got {reprlib.repr(found)}"


def _wrong_key(entries: dict[str, Any], error: str, value: Any, kind: type) -> str:
    """Find the key that msgspec writes as ``[...]``: as the only one of ``entries`` it is still the same error."""
    whole = dict(entries)
    for key in whole:
        entries.clear()
        entries[key] = whole[key]
        try:
            msgspec.convert(value, kind)
        except ValueError as again:
            if str(again) == error:
                break
    entries.update(whole)
    return key
