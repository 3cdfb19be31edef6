"""Field of a configuration: its type and range, the check of a value, and the error about one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

LARGEST = 1e300
"""Upper bound of numbers that have none of their own: finite, and not shown."""


class FieldError(ValueError):
    """A field of a configuration has a value that it cannot have.

    Attributes:
        field: its name.
        problem: what was expected and what the value is.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field} {self.problem}"


@dataclass(frozen=True)
class Field:
    """Declaration of one field of :class:`TrainConfig`."""

    group: str
    type: Any
    """With its range, as ``msgspec`` checks it."""
    required: bool
    default: Any
    marks: frozenset[str] = frozenset()

    @property
    def may_change(self) -> bool:
        """True if a resumed run may choose another value."""
        return "may_change" in self.marks

    @property
    def may_grow(self) -> bool:
        """True if a resumed run may choose a larger value."""
        return "may_grow" in self.marks

    def checked(self, name: str, value: Any) -> Any:
        """Return ``value`` in the type of the field, such as a list as a tuple; FieldError if it is out of range."""
        try:
            return msgspec.convert(value, self.type)
        except msgspec.ValidationError as error:
            raise FieldError(name, f"must be {_described(self.type)}, got {value!r}") from error


def _described(kind: Any) -> str:
    """Say what a type and its range allow, such as "an integer from 1"."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers, each {_described(get_args(kind)[0])}"
    if get_origin(kind) is not Annotated:
        names = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
        return names.get(kind) or _described(get_args(kind)[0])  # of a type or None
    text = _described(get_args(kind)[0])
    for meta in kind.__metadata__:
        text = "a non-empty string" if meta.min_length else text
        bounds = {"from": meta.ge, "above": meta.gt, "to": meta.le if meta.le != LARGEST else None, "below": meta.lt}
        text += "".join(f" {word} {bound}" for word, bound in bounds.items() if bound is not None)
    return text
