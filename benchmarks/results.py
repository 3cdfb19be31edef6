"""Results of a measurement: interleaved rounds, ratios, tables and JSON.

Speed is only ever judged as a ratio of two contenders of one run. Every round runs all contenders, one after the
other, and each round begins with another one; a ratio is formed within a round, so that what slows the machine for a
while slows both sides of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from tqdm import tqdm


@dataclass(frozen=True)
class Table:
    """Values of all contenders, one a round.

    Attributes:
        title: what the table shows.
        unit: of the values.
        rounds: the values by contender, in the order of the rounds.
        digits: after the point, in the report.
    """

    title: str
    unit: str
    rounds: Mapping[str, list[float]]
    digits: int = 1

    def markdown(self) -> str:
        """Return the table with median and extremes."""
        lines = [f"| {self.title} | {self.unit} (median) | lowest | highest |", "|---|---:|---:|---:|"]
        for name, values in self.rounds.items():
            numbers = (statistics.median(values), min(values), max(values))
            lines.append(f"| {name} | " + " | ".join(f"{number:.{self.digits}f}" for number in numbers) + " |")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        values = {name: {"median": statistics.median(v), "rounds": v} for name, v in self.rounds.items()}
        return {"title": self.title, "unit": self.unit, "values": values}


@dataclass(frozen=True)
class Ratio:
    """A contender against another, round by round.

    Attributes:
        name: which against which.
        rounds: one ratio a round.
        at_least: the target, if the ratio should be no smaller.
        at_most: the target, if it should be no larger.
    """

    name: str
    rounds: list[float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """True if the median meets the target; None without one."""
        if self.at_least is not None:
            return statistics.median(self.rounds) >= self.at_least
        return None if self.at_most is None else statistics.median(self.rounds) <= self.at_most

    @property
    def target(self) -> str:
        """The target in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "none" if self.at_most is None else f"at most {self.at_most:g}"

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        median = statistics.median(self.rounds)
        return {"name": self.name, "median": median, "rounds": self.rounds, "target": self.target, "met": self.met}


@dataclass
class Measurement:
    """One section of the report.

    Attributes:
        title: its heading.
        what: one paragraph: what was measured, and how.
        settings: what it was measured with, by name.
        tables: values.
        ratios: judged against their targets.
        not_measured: the reason, if it could not be measured here.
    """

    title: str
    what: str
    settings: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    not_measured: str | None = None

    def markdown(self) -> str:
        """Return the section, without its heading."""
        if self.not_measured is not None:
            return f"{self.what}\n\nNot measured: {self.not_measured}."
        parts = [self.what, "\n".join(f"- {name}: {value}" for name, value in self.settings.items())]
        parts += [table.markdown() for table in self.tables]
        if self.ratios:
            parts.append(_ratios(self.ratios))
        return "\n\n".join(part for part in parts if part)

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        if self.not_measured is not None:
            return {"title": self.title, "not_measured": self.not_measured}
        return {
            "title": self.title,
            "what": self.what,
            "settings": self.settings,
            "tables": [table.record() for table in self.tables],
            "ratios": [ratio.record() for ratio in self.ratios],
        }


def _ratios(ratios: list[Ratio]) -> str:
    lines = ["| ratio | median | lowest | highest | target | met |", "|---|---:|---:|---:|---|---|"]
    verdicts = {True: "yes", False: "**no**", None: ""}
    for ratio in ratios:
        numbers = (statistics.median(ratio.rounds), min(ratio.rounds), max(ratio.rounds))
        cells = [ratio.name, *(f"{number:.3f}" for number in numbers), ratio.target, verdicts[ratio.met]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interleaved(
    contenders: Mapping[str, Callable[[int], float]], rounds: int, what: str, *, warm_up: bool = False
) -> dict[str, list[float]]:
    """Run every contender once a round and show progress.

    Args:
        contenders: by name, what measures one: called with the number of the round, from 0 (the warm-up has -1).
        rounds: how often.
        what: name of the progress bar.
        warm_up: whether a round that does not count goes first.

    Returns:
        What the contenders returned, by name, one value a round.
    """
    names = list(contenders)
    values: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=len(names) * (rounds + warm_up), desc=what, unit="turn") as bar:
        for number in range(-warm_up, rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                value = contenders[name](number)
                if number >= 0:
                    values[name].append(value)
                bar.update()
    return values


@contextmanager
def timed(
    stages: Mapping[str, list[tuple[Any, str]]], spent: dict[str, float], clock: Callable[[], float]
) -> Iterator[None]:
    """Add the seconds that functions take to those of their stage, as long as the context lasts.

    Args:
        stages: by name, the functions of a stage, none of which calls another: where each is found, and its name.
        spent: seconds by stage.
        clock: what tells the time, in seconds.
    """

    def watched(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] += clock() - start

        return call

    with ExitStack() as stack:
        for stage, functions in stages.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, watched(getattr(owner, name), stage)))
        yield


def quotients(above: list[float], below: list[float]) -> list[float]:
    """One value over the other in each round."""
    return [one / other for one, other in zip(above, below, strict=True)]
