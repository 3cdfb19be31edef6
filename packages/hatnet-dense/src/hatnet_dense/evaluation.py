"""Report metrics of 0 for a detector that finds nothing, where MMDetection's CocoMetric reports none.

Without them, the first validation may log nothing, and a checkpoint hook with ``save_best`` fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mmengine.logging import print_log

ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
"""Default ``metric_items`` of CocoMetric for boxes and masks."""

PROPOSAL_ITEMS = ("AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000")
"""Default ``metric_items`` of CocoMetric for proposals."""


def fill_with_zeros(evaluator: Any) -> None:
    """Make every CocoMetric report 0 for metrics that it omits, and log a warning.

    Args:
        evaluator: MMEngine's ``Evaluator``, or another object with a list of ``metrics``.
    """
    for metric in evaluator.metrics:
        # by name, because MMDetection may be missing, and subclasses such as LVISMetric have other metrics
        if type(metric).__name__ == "CocoMetric" and not metric.format_only:
            metric.compute_metrics = partial(_filled, metric, metric.compute_metrics)


def _filled(metric: Any, compute: Callable[[list[Any]], dict[str, float]], results: list[Any]) -> dict[str, float]:
    measured = compute(results)
    missing = [name for name in _names(metric) if name not in measured]
    if missing:
        prefix = f"{metric.prefix}/" if metric.prefix else ""
        names = ", ".join(f"{prefix}{name}" for name in missing)
        print_log(f"metrics are 0, because the model found nothing: {names}", "current", level=logging.WARNING)
    return {**measured, **dict.fromkeys(missing, 0.0)}


def _names(metric: Any) -> Iterator[str]:
    """Yield the names of metrics that a CocoMetric may omit; ``proposal_fast`` is always reported."""
    for kind in metric.metrics:
        if kind == "proposal":
            yield from metric.metric_items or PROPOSAL_ITEMS
        elif kind in ("bbox", "segm"):
            if metric.classwise:
                yield from (f"{name}_precision" for name in metric.dataset_meta["classes"])
            yield from (f"{kind}_{item}" for item in metric.metric_items or ITEMS)
