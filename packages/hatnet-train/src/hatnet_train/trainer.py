"""The training run: :class:`Trainer` leads model, optimizer and data through the epochs of a :class:`TrainConfig`.

At every step, before the update, all ranks agree in one message on what concerns them all: the loss, whether loss and
gradients are finite, how many images could not be read, whether a signal asks for the end.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import Tensor

from hatnet_core import HATNet, save_checkpoint
from hatnet_core.checkpoint import WEIGHTS
from hatnet_train import checkpoint
from hatnet_train.accuracy import evaluate
from hatnet_train.config import TrainConfig
from hatnet_train.data import Source
from hatnet_train.data.augment import MEAN, STD, normalise
from hatnet_train.data.loader import Batch, evaluation_batches, train_batches
from hatnet_train.data.mixing import mix, mix_labels
from hatnet_train.deepspeed_config import deepspeed_config
from hatnet_train.deepspeed_json import AUTOCAST_DTYPES
from hatnet_train.engine import build_engine
from hatnet_train.launch import AgreedError
from hatnet_train.monitor import METRICS, Monitor, Progress, peak_memory_gb
from hatnet_train.nonfinite import NonFiniteError, dump
from hatnet_train.record import open_run_folder, run_record
from hatnet_train.sampler import GlobalOrder
from hatnet_train.sharding import gradients
from hatnet_train.signals import Preempted, Signals
from hatnet_train.state import (
    AVERAGE,
    RunState,
    Saved,
    contents,
    read_saved,
    restore,
    seed_step,
    set_schedule,
)
from hatnet_train.watch import Watch
from hatnet_train.weights import Ema, full_weights, whole_model

logger = logging.getLogger(__name__)

FAILED_SAVES = 3
"""Checkpoints in a row that cannot be written before a run stops; until then it goes on, and tries again."""


_Value = TypeVar("_Value")


class Verdict(NamedTuple):
    """What the ranks agreed on at a step."""

    loss: float
    """Mean over all ranks and passes."""

    nonfinite: bool
    """Whether a rank has a loss or gradient that is not finite."""

    stop: bool
    """Whether a rank got a signal that asks for the end."""

    bad_images: int
    """Images that were replaced, over all ranks."""


class Trainer:
    """A run: the data, the engine, and what is reported. Making one checks all that can be checked before the start.

    Runs in every process of a launch, after ``launch.join``.

    Args:
        config: the run.
        training: the images to train with.
        held_out: those to evaluate with.
        user: a user's own DeepSpeed configuration, whose fields went into ``config``.
        data: what tells the data from others, for checkpoints.
        saved: the checkpoint to go on from.
        watch: what tells the others that this process gets on.
        signals: what this process was sent.

    Raises:
        ValueError: if the processes cannot share a batch evenly, or a value is refused by timm, DeepSpeed or the file
            of weights to start from.
    """

    def __init__(
        self,
        config: TrainConfig,
        training: Source,
        held_out: Source,
        user: Mapping[str, Any],
        *,
        data: Mapping[str, str] | None = None,
        saved: Saved | None = None,
        watch: Watch | None = None,
        signals: Signals | None = None,
    ) -> None:
        self.config, options = config, config.optimisation
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.training, self.held_out = training, held_out
        self.order = GlobalOrder(
            length=len(training),
            batch_size=config.optimisation.batch_size,
            seed=config.optimisation.seed,
            repeats=config.augmentation.repeats,
        )
        self.settings = deepspeed_config(config, world_size=self.world_size, user=user)
        self.data = data or {}
        self._watch, self._signals = watch, signals
        self.monitor: Monitor | None = None
        self.out = Path()
        self._origin = saved.folder if saved is not None else None
        self._failed_saves = self._bad_before = 0
        warmup, steps = round(options.warmup_epochs * self.order.steps), options.epochs * self.order.steps
        if warmup >= steps:
            logger.warning(
                "the warm-up takes all %d steps of the run, and the learning rate never falls; use fewer "
                "--warmup-epochs than %g, or more --epochs",
                steps,
                options.warmup_epochs,
            )
        self._begin(saved)

    def _begin(self, saved: Saved | None, skipped: Collection[int] = ()) -> None:
        """Make engine and batches as they are after ``saved``, or at the start, and leave out further steps."""
        self.state = saved.state if saved is not None else RunState()
        self.state.skipped = sorted({*self.state.skipped, *skipped})
        weights = saved.weights if saved is not None else None
        self.engine = build_engine(self.config, self.settings, self.order.steps, len(self.training.classes), weights)
        self.dtype = next(self.engine.module.parameters()).dtype
        self.ema = Ema(self.engine, self.config.optimisation.ema_decay) if self.config.optimisation.ema_decay else None
        if saved is not None:
            restore(self.engine, self.ema, saved)
        self.batches = train_batches(
            self.training,
            self.order,
            self.config,
            rank=self.rank,
            world_size=self.world_size,
            first_step=self.state.step,
            skipped=frozenset(self.state.skipped),
        )

    def _open_monitor(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
        if self.rank == 0:
            self.monitor = Monitor(self.out, self.state.rows, self.state.step)

    def run(self, out: Path, *, go_on: bool = False) -> list[dict[str, Any]]:
        """Train to the end and leave weights, checkpoints, metrics and curves in ``out``.

        Rank 0 writes ``config.json``, ``metrics.jsonl``, ``curves.png``, ``tensorboard/``, ``checkpoints/`` and, at
        the end, ``model.safetensors``, ``model_ema.safetensors`` and ``manifest.json``.

        Args:
            out: run folder; made if it is not there.
            go_on: it may hold this run already.

        Returns:
            One dict an epoch: ``epoch`` (from 1), ``train_loss``, ``eval_loss``, ``top1`` and ``top5`` (percent of the
            ``eval_images`` held-out images), with a moving average ``ema_top1`` and so on, ``lr`` of its last step,
            ``bad_images`` (that were replaced or not counted), ``images_per_second`` over all processes,
            ``data_wait`` (share of the time), ``memory_gb`` (peak of rank 0), ``seconds`` of the training.

        Raises:
            ValueError: if ``out`` already holds another run or cannot be made, an image cannot be read, or checkpoints
                cannot be written.
            FloatingPointError: if more steps than ``max_skipped_steps`` have a loss or gradients that are not finite.
            Preempted: after SIGTERM or SIGUSR1, when the state is saved.
        """
        record = run_record(self.config, self.settings, self.world_size, self.data)
        open_run_folder(out, record, go_on=go_on)
        self.out = out
        try:
            self._open_monitor()
            while len(self.state.rows) < self.config.optimisation.epochs:
                try:
                    self.epoch()
                except NonFiniteError as error:
                    self._roll_back(error)
            self.finish()
        finally:
            self.batches.close()  # its workers ignore SIGTERM, with which Python would end them, and wait for them
        return self.state.rows

    def epoch(self) -> None:
        """Train what is left of the epoch, evaluate, report, and save."""
        epoch = len(self.state.rows)
        self.train_epoch(epoch)
        state = self.state
        row = {"epoch": epoch + 1, **self.training_metrics(), **self._evaluation_metrics()}
        row["bad_images"] = state.bad_images  # of both
        if not all(math.isfinite(row[name]) for name in row if name.endswith("eval_loss")):
            raise FloatingPointError(
                f"held-out loss {row['eval_loss']} after epoch {epoch + 1} is not finite; a lower --lr may help"
            )
        state.rows.append(row)
        state.begin_epoch()
        if self.monitor is not None:
            self.monitor.epoch(state.rows, self.config.optimisation.epochs, state.step)
        self.save()

    def train_epoch(self, epoch: int) -> None:
        """Train the steps of an epoch, counted from 0, that are not behind the run."""
        self.engine.train()
        end = (epoch + 1) * self.order.steps
        progress = None
        if self.monitor is not None and self.state.step < end:
            progress = Progress(
                epoch, self.config.optimisation.epochs, self.order, done=self.state.step % self.order.steps
            )
        while self.state.step < end:
            verdict = self._step()
            if progress is not None:
                progress.step(verdict.loss, self.state.waited / max(self.state.seconds, 1e-9))
            every = self.config.checkpoints.checkpoint_steps
            if verdict.stop:
                self.save(last=True)
                raise Preempted(self.state.step)
            if every and self.state.step % every == 0 and self.state.step < end:
                self.save()
        if progress is not None:
            progress.close()

    def finish(self) -> None:
        """Write the final weights, with what is needed to use them, and the manifest of the run folder."""
        row = self.state.rows[-1]
        final = {}
        if self.ema is not None:
            final[AVERAGE] = (self.ema.weights(), row["ema_top1"])
        final[WEIGHTS] = (full_weights(self.engine), row["top1"])
        problem = None
        if self.monitor is not None:
            self.monitor.close()
            try:
                for name, (weights, top1) in final.items():
                    model = whole_model(self.engine, weights)
                    save_checkpoint(model, self.out / name, {**self._description(), "top1": top1})
                checkpoint.write_manifest(self.out, [*final, METRICS], {"step": self.state.step})
            except OSError as error:
                reason = error.strerror or error
                problem = f"cannot write the final weights to {self.out}: {reason}; --resume auto tries again"
        if problem := self._told_by_rank_0(problem):
            raise AgreedError(problem)

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint of where the run is; all ranks together.

        Args:
            last: the run ends after it.

        Raises:
            AgreedError: on every rank, if it cannot be written and is the last, or the third in a row.
        """
        state = self.state
        evaluated = len(state.rows) * self.order.steps == state.step
        top1 = {"top1": state.rows[-1]["top1"]} if evaluated and state.rows else {}
        about = {"step": state.step, "epochs": len(state.rows), **top1}
        files = contents(
            self.engine, self.ema, state, self.config, data=self.data, description={**self._description(), **top1}
        )
        problem = None
        if self.rank == 0:
            folder = self.out / "checkpoints"
            try:
                written = checkpoint.commit(
                    folder, checkpoint.folder_name(state.step, evaluated=evaluated), files, about
                )
            except OSError as error:
                problem = f"cannot save step {state.step} in {folder}: {error.strerror or error}"
            else:
                checkpoint.tidy(folder, self.config.checkpoints.keep_checkpoints, written)
        problem = self._told_by_rank_0(problem)
        self._failed_saves = self._failed_saves + 1 if problem else 0
        if problem and (last or self._failed_saves == FAILED_SAVES):
            reason = "and the run ends here" if last else f"for the {FAILED_SAVES}rd time in a row, so the run stops"
            raise AgreedError(f"{problem}, {reason}; the checkpoints before remain")
        if problem:
            logger.warning("%s; training continues, the earlier checkpoints remain", problem)

    def _step(self) -> Verdict:
        """One optimizer step, or none where it is to be skipped.

        Raises:
            NonFiniteError: on every rank, before the update.
            AgreedError: likewise, if too many images could not be read.
        """
        state, config = self.state, self.config
        if state.step in state.skipped:
            state.step += 1
            set_schedule(self.engine, state.step)
            return Verdict(math.nan, nonfinite=False, stop=False, bad_images=0)
        start, waited = time.perf_counter(), 0.0
        seed_step(config.optimisation.seed, state.step, self.rank)
        lr = self.engine.get_lr()[0]
        losses, bad = [], 0
        for part in range(config.compute.accumulation):
            before = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - before
            self._mark()
            bad += self._report_bad(batch)
            losses.append(self._pass(batch))
            if part + 1 < config.compute.accumulation:
                self.engine.step()  # counts the pass; the update comes with the last
        verdict = self._agree(torch.stack(losses), bad)
        if verdict.nonfinite:
            raise self._nonfinite(verdict, losses)
        self.engine.step()
        if self.ema is not None:
            self.ema.update()
        state.step += 1
        state.trained += 1
        state.loss += verdict.loss
        state.lr = lr
        state.seconds += time.perf_counter() - start
        state.waited += waited
        if self.monitor is not None:
            self.monitor.train_step(state.step, verdict.loss, lr)
        self._count_bad(verdict.bad_images)
        return verdict

    def _report_bad(self, batch: Batch) -> int:
        """Name the images of this rank that could not be read; how many they are."""
        for problem in batch.bad:
            logger.warning("skipped: %s", problem, extra={"all_ranks": True})
        return len(batch.bad)

    def _count_bad(self, images: int) -> None:
        """Count images of the epoch that could not be read; on every rank AgreedError, if they are too many."""
        self.state.bad_images += images
        if self.state.bad_images > self.config.faults.max_bad_images:
            raise AgreedError(
                f"{self.state.bad_images} images of epoch {len(self.state.rows) + 1} could not be read by step "
                f"{self.state.step}; --max-bad-images is {self.config.faults.max_bad_images}"
            )

    def _pass(self, batch: Batch) -> Tensor:
        """One forward and backward pass. Returns the loss of this rank."""
        device, config = self.engine.device, self.config
        images = normalise(batch.images.to(device, non_blocking=True))
        targets = batch.labels.to(device, non_blocking=True)
        smoothing = config.augmentation.label_smoothing
        if config.mixes:
            mixing = batch.mixing.to(device, non_blocking=True)
            images = mix(images, mixing)
            targets, smoothing = mix_labels(targets, mixing, len(self.training.classes), smoothing), 0.0
        logits = self.engine(images.to(self.dtype))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        self.engine.backward(loss)
        return loss.detach()

    def _agree(self, losses: Tensor, bad: int) -> Verdict:
        """What all ranks know after this: they wait for each other here, and for the device."""
        finite = losses.isfinite().all()
        if (
            not self.engine.fp16_enabled() and self.config.compute.precision != "fp16"
        ):  # there the loss scaling sees to it
            norms = torch._foreach_norm(list(gradients(self.engine)))
            finite &= torch.stack(norms).isfinite().all()
        self._mark()
        mean = losses.double().mean() / self.world_size
        message = torch.stack([mean, (~finite).double(), *torch.tensor([self._asked_to_stop(), bad]).to(mean)])
        if self.world_size > 1:
            dist.all_reduce(message)
        loss, nonfinite, stop, bad_images = message.tolist()
        return Verdict(loss, nonfinite > 0, stop > 0, int(bad_images))

    def _nonfinite(self, verdict: Verdict, losses: Sequence[Tensor]) -> NonFiniteError:
        """The error of this step, after what is known of it has been written down."""
        step = self.state.step
        epoch, of_epoch = divmod(step, self.order.steps)
        shares = self.order.shares(epoch, rank=self.rank, world_size=self.world_size, first_step=of_epoch)
        folder = self.out / "nonfinite" / f"step-{step:010d}"
        generators = {"seed": self.config.optimisation.seed, "epoch": epoch, "step": step, "rank": self.rank}
        try:
            dump(folder, self.engine, next(shares), self.training, [float(loss) for loss in losses], generators)
        except OSError as error:
            logger.warning("cannot write %s: %s", folder, error.strerror or error)
        return NonFiniteError(step, f"loss {verdict.loss} or gradients are not finite at step {step}; see {folder}")

    def _roll_back(self, error: NonFiniteError) -> None:
        """Go back to the newest checkpoint, and on from there without the step that failed.

        Raises:
            FloatingPointError: on every rank, if that happened too often.
        """
        skipped = [*self.state.skipped, error.step]
        if len(skipped) > self.config.faults.max_skipped_steps:
            raise FloatingPointError(
                f"{error}; {len(skipped) - 1} steps were skipped before, --max-skipped-steps is "
                f"{self.config.faults.max_skipped_steps}; a lower --lr may help"
            )
        newest = checkpoint.set_aside(self.out / "checkpoints")[0] if self.rank == 0 else None
        folder = self._told_by_rank_0(newest or self._origin)
        saved = read_saved(folder) if folder is not None else None
        back = saved.state.step if saved is not None else 0
        logger.warning("%s; resuming from step %d without that step", error, back)
        self.batches.close()
        self.engine.destroy()
        del self.engine, self.ema
        self._begin(saved, skipped)
        self._open_monitor()

    def training_metrics(self) -> dict[str, float]:
        """Of the steps of the epoch that are behind the run; see :meth:`run`."""
        state = self.state
        seconds = max(state.seconds, 1e-9)
        return {
            "train_loss": state.loss / state.trained if state.trained else math.nan,
            "lr": state.lr,
            "images_per_second": state.trained * self.order.batch_size / seconds,
            "data_wait": state.waited / seconds,
            "memory_gb": peak_memory_gb(),
            "seconds": state.seconds,
        }

    def _evaluation_metrics(self) -> dict[str, Any]:
        """Of the weights and of their average."""
        self._bad_before = self.state.bad_images
        self.engine.eval()
        models: list[Any] = [self.engine]
        if self.ema is not None:
            models.append(self._autocast(whole_model(self.engine, self.ema.weights())))
        config = self.config
        batches = evaluation_batches(
            self.held_out,
            size=config.images.image_size,
            crop_fraction=config.images.crop_fraction,
            batch_size=max(1, config.optimisation.batch_size // self.world_size // config.compute.accumulation),
            workers=config.images.workers,
            rank=self.rank,
            world_size=self.world_size,
            skip_bad=config.faults.on_bad_image == "replace",
        )
        with contextlib.closing(batches):
            measured, *averaged = evaluate(models, batches, self.engine.device, self.dtype, between=self._between)
        for metrics in averaged:
            measured |= {f"ema_{name}": metrics[name] for name in ("eval_loss", "top1", "top5")}
        return measured

    def _between(self, batch: Batch) -> None:
        """Agree after a batch of the evaluation on what :meth:`_agree` does after one of the training."""
        self._mark()
        message = torch.tensor([self._asked_to_stop(), self._report_bad(batch)], device=self.engine.device)
        dist.all_reduce(message)
        stop, bad_images = message.tolist()
        if stop:
            self.state.bad_images = self._bad_before  # the evaluation begins anew
            self.save(last=True)
            raise Preempted(self.state.step)
        self._count_bad(bad_images)

    def _autocast(self, model: HATNet) -> Any:
        """The model as the engine runs it: under autocast of the run's precision, in its dtype."""
        dtype = AUTOCAST_DTYPES.get(self.config.compute.precision)
        context = torch.autocast(
            self.engine.device.type, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None
        )
        return context(model.to(self.dtype))

    def _description(self) -> dict[str, Any]:
        """What a classifier needs beside the model."""
        return {
            "classes": self.training.classes,
            "image_size": self.config.images.image_size,
            "crop_fraction": self.config.images.crop_fraction,
            "mean": MEAN,
            "std": STD,
        }

    def _told_by_rank_0(self, value: _Value) -> _Value:
        """The value that rank 0 has, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def _asked_to_stop(self) -> bool:
        return self._signals is not None and self._signals.received

    def _mark(self) -> None:
        if self._watch is not None:
            self._watch.mark()
