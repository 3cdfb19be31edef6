"""Refuse wrong data before the first step, and name the file of an error during the run.

A missing image would end MMDetection's training when it is drawn, hours later. A label image of another size than its
image, or classes of another model, would be trained on silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from hatnet_dense.errors import cut, said
from hatnet_dense.records import unknown_class
from hatnet_dense.survey import PHASES, Survey, classes_problem, survey, unwrapped


@HOOKS.register_module()
class DataCheckHook(Hook):  # type: ignore[misc]  # mmengine ships no types
    """Refuse missing or unreadable files, misread annotations and wrong classes; log the contents of the data.

    The first process reads, and all raise the same error.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Any) -> None:
        """Check the training and the validation data."""
        _check_once(runner, runner.train_dataloader.dataset, PHASES["train"])
        if runner.val_loop is not None:
            _check_once(runner, runner.val_dataloader.dataset, PHASES["val"])

    def before_test(self, runner: Any) -> None:
        """Check the test data."""
        _check_once(runner, runner.test_dataloader.dataset, PHASES["test"])


def check_dataset(dataset: Any, name: str) -> Survey:
    """Survey a dataset, and refuse one with problems; arguments as for :func:`hatnet_dense.survey.survey`.

    Raises:
        ValueError: naming the files of the first problems, and what is wrong with them.
    """
    found = survey(dataset, name)
    if found.problems:
        raise ValueError(f"{name}: {shortened(found.problems)}")
    return found


def check_classes(model: nn.Module, metainfo: Mapping[str, Any], name: str) -> None:
    """Refuse a dataset, called ``name``, with another number of classes than a head of the model.

    Raises:
        ValueError: naming the head and both numbers; see :func:`hatnet_dense.survey.classes_problem`.
    """
    for problem in classes_problem(model, metainfo):
        raise ValueError(f"{name}: {problem}")


def shortened(problems: Sequence[str]) -> str:
    """Join the first few problems in one line."""
    if len(problems) == 1:
        return problems[0]
    rest = "; … ('hatnet-dense check' lists all)" if len(problems) > 3 else ""
    return f"{len(problems)} problems: {'; '.join(problems[:3])}{rest}"


def naming_files(build: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a runner's ``build_dataloader``, so that errors of the datasets name the file."""

    def built(*arguments: Any, **options: Any) -> Any:
        loader = build(*arguments, **options)
        # before the loader is used, because its workers copy the datasets
        for part in unwrapped(loader.dataset):
            if hasattr(part, "pipeline"):
                classes, ignore_index = part.metainfo.get("classes"), getattr(part, "ignore_index", None)
                part.pipeline = _NamingPipeline(part.pipeline, classes, ignore_index)
        return loader

    return built


class _NamingPipeline:
    """Pipeline of transforms whose errors name the file.

    Args:
        pipeline: from a record to the input of the model.
        classes: of the dataset.
        ignore_index: of a dataset of MMSegmentation, whose label images are compared with its classes; else None.
    """

    def __init__(self, pipeline: Any, classes: Sequence[str] | None, ignore_index: int | None) -> None:
        self._pipeline = pipeline
        self._classes = classes or ()
        self._ignore_index = ignore_index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # else copying, which asks before there is a pipeline, would recurse
            raise AttributeError(name)
        return getattr(self._pipeline, name)

    def __call__(self, record: dict[str, Any]) -> Any:
        image, labels = record.get("img_path"), record.get("seg_map_path")
        try:
            packed = self._pipeline(record)
        except Exception as error:  # the loaders raise anything on a broken file
            if image is None:
                raise
            files = f"{image} with {labels}" if labels else image
            raise ValueError(f"{files}: cannot be used ({cut(said(error))})") from error
        if self._ignore_index is not None and self._classes and labels and packed is not None:
            self._check_labels(packed["data_samples"], labels)
        return packed

    def _check_labels(self, sample: Any, labels: str) -> None:
        if "gt_sem_seg" not in sample:
            return
        values = sample.gt_sem_seg.data
        unknown = values[(values >= len(self._classes)) & (values != self._ignore_index)]
        if len(unknown):
            raise ValueError(unknown_class(labels, int(unknown[0]), len(self._classes), self._ignore_index))


def _check_once(runner: Any, dataset: Any, name: str) -> None:
    """Check a dataset in the first process, and raise its error in all."""
    outcome: list[str | None] = [None]
    if is_main_process():
        try:
            check_classes(runner.model, getattr(dataset, "metainfo", {}), name)
            runner.logger.info(str(check_dataset(dataset, name)))
        except Exception as error:  # of any kind, since the other processes wait
            outcome = [str(error) or type(error).__name__]
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise ValueError(outcome[0])
