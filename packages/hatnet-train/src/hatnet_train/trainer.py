"""The training loop: :class:`Trainer` takes the steps and epochs of a :class:`TrainConfig`; callbacks do the rest.

A step reads: next batch, forward and backward, agree, step, callbacks. Start with :meth:`Trainer.step`. Before the
update, all ranks agree in one message on the loss, unreadable images, non-finite values and requests to stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import Tensor

from hatnet_train.callbacks import Callback, Step
from hatnet_train.config import TrainConfig
from hatnet_train.data import Source
from hatnet_train.data.loader import Batch, global_order, prepare, train_batches
from hatnet_train.deepspeed.config import deepspeed_config
from hatnet_train.deepspeed.ema import Ema
from hatnet_train.deepspeed.engine import build_engine
from hatnet_train.deepspeed.partition import gradients
from hatnet_train.evaluate import held_out_metrics
from hatnet_train.optim import Schedule, set_lr, set_training_mode
from hatnet_train.precision import settle_precision
from hatnet_train.results import Predictions
from hatnet_train.run.nonfinite import NonFiniteError
from hatnet_train.run.record import open_run_folder, run_record
from hatnet_train.run.state import RunState, Saved, restore, seed_step
from hatnet_train.signals import Preempted


class Trainer:
    """A run: data, engine and state. Building one checks everything that can be checked before the first step.

    Args:
        config: the run.
        training: training images.
        held_out: images to evaluate with.
        user: a user's own DeepSpeed configuration, whose fields are part of ``config`` already.
        callbacks: called in this order, on all ranks.
        data: identifies the data in checkpoints.
        saved: checkpoint to resume from.
        loader: makes this rank's batches; takes what :func:`~hatnet_train.data.loader.train_batches` takes.

    Raises:
        ValueError: if ranks cannot share a batch evenly, or timm, DeepSpeed or the initial weights refuse a value.
    """

    def __init__(
        self,
        config: TrainConfig,
        training: Source,
        held_out: Source,
        user: Mapping[str, Any],
        *,
        callbacks: Sequence[Callback] = (),
        data: Mapping[str, str] | None = None,
        saved: Saved | None = None,
        loader: Callable[..., Generator[Batch, None, None]] = train_batches,
    ) -> None:
        self.config = config = settle_precision(config, saved.config if saved is not None else {})
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.training, self.held_out = training, held_out
        self.order = global_order(training, config)
        self.schedule = Schedule.of(config, self.order.steps)
        self.epochs = -(-self.schedule.total_steps // self.order.steps)
        self.settings = deepspeed_config(config, world_size=self.world_size, user=user)
        self.callbacks, self.data = list(callbacks), dict(data or {})
        self.out, self.stopping, self.origin = Path(), False, saved.folder if saved is not None else None
        self.predictions: Predictions | None = None
        self._loader = loader
        self._build(saved)

    def _build(self, saved: Saved | None, skipped: Collection[int] = ()) -> None:
        """Build engine and batches as they are after ``saved``, or at the start."""
        self.state = saved.state if saved is not None else RunState()
        self.state.skipped = sorted({*self.state.skipped, *skipped})
        weights = saved.weights if saved is not None else None
        self.engine = build_engine(self.config, self.settings, len(self.training.classes), weights)
        self.dtype = next(self.engine.module.parameters()).dtype
        self.ema = Ema(self.engine, self.config.optimisation.ema_decay) if self.config.optimisation.ema_decay else None
        if saved is not None:
            restore(self.engine, self.ema, saved)
        self.batches = self._loader(
            self.training,
            self.order,
            self.config,
            rank=self.rank,
            world_size=self.world_size,
            first_step=self.state.step,
            skipped=frozenset(self.state.skipped),
        )

    def run(self, out: Path, *, resume: bool = False) -> list[dict[str, Any]]:
        """Train to the end; return the metrics of the epochs, see :meth:`epoch`.

        Args:
            out: run folder, created if missing; gets ``config.json`` and whatever the callbacks write.
            resume: ``out`` may contain this run already.

        Raises:
            ValueError: if ``out`` contains another run or cannot be created, or an image cannot be read.
            FloatingPointError: if loss or gradients are not finite and no callback recovers from that.
            Preempted: if a callback asked to stop.
        """
        open_run_folder(out, run_record(self.config, self.settings, self.world_size, self.data), resume=resume)
        self.out = out
        try:
            self.call("on_start")
            while not self.stopping and (
                self.state.step < self.schedule.total_steps or len(self.state.rows) < self.epochs
            ):
                try:
                    self.epoch()
                except Exception as error:
                    recovered = [callback.on_exception(self, error) for callback in self.callbacks]  # all of them
                    if True not in recovered:
                        raise
            self.call("after_run")
        finally:
            self.batches.close()  # its workers ignore SIGTERM, with which Python would end them, and wait for them
            self.call("close")
        return self.state.rows

    def stop(self) -> None:
        """End the run after this epoch, with final weights. All ranks have to call it."""
        self.stopping = True

    def restart(self, saved: Saved | None, skipped: Collection[int] = ()) -> None:
        """Return to a checkpoint, or to the start, and skip further steps from there. All ranks have to call it."""
        self.batches.close()
        self.engine.destroy()
        del self.engine, self.ema
        self._build(saved, skipped)
        self.call("on_start")

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def epoch(self) -> None:
        """Train the remaining steps of the epoch, evaluate, and add a row of metrics to ``state.rows``.

        ``epoch`` (from 1), the metrics of :class:`RunState`, ``eval_loss``, ``top1`` and ``top5`` (percent of the
        ``eval_images`` held-out images), with a moving average ``ema_top1`` and so on, ``bad_images``.
        """
        epoch = len(self.state.rows) + 1
        self.train_epoch(epoch - 1)
        row = {"epoch": epoch, **self.state.metrics(self.order.batch_size), **self.evaluate()}
        row["bad_images"] = self.state.bad_images  # of training and evaluation
        if not all(math.isfinite(row[name]) for name in row if name.endswith("eval_loss")):
            loss = row["eval_loss"]
            raise FloatingPointError(f"held-out loss {loss} after epoch {epoch} is not finite; a lower --lr may help")
        self.state.rows.append(row)
        self.state.begin_epoch()
        self.call("after_epoch", row)

    def train_epoch(self, epoch: int) -> None:
        """Train the remaining steps of an epoch, counted from 0."""
        self.engine.train()
        set_training_mode(self.engine.module)
        self.call("before_epoch")
        while self.state.step < min((epoch + 1) * self.order.steps, self.schedule.total_steps):
            step = self.step()
            self.call("after_step", step)
            if step.stop:
                raise Preempted(self.state.step)

    def step(self) -> Step:
        """Take one optimizer step, or skip it; raise NonFiniteError on every rank instead of a bad update."""
        state = self.state
        if state.step in state.skipped:
            state.step += 1
            return Step(loss=math.nan)
        start = time.perf_counter()
        seed_step(self.config.optimisation.seed, state.step, self.rank)
        state.lr = set_lr(self.engine, self.schedule(state.step - self.engine.skipped_steps))
        losses, bad = list[Tensor](), 0
        for _ in range(self.config.compute.accumulation):
            if losses:
                self.engine.step()  # counts the pass; the update comes with the last
            batch = self._next_batch()
            bad += batch.report_bad()
            losses.append(self._forward_backward(batch))
        step = self._agree(torch.stack(losses), bad)
        if step.nonfinite:
            raise NonFiniteError(state.step, step.loss, [float(loss) for loss in losses])
        self.engine.step()
        if self.ema is not None:
            self.ema.update()
        state.count(step.loss, time.perf_counter() - start)
        state.count_bad(step.bad_images, self.config.faults.max_bad_images)
        return step

    def _next_batch(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.batches)
        self.state.waited += time.perf_counter() - start
        self.call("before_wait")
        return batch

    def _forward_backward(self, batch: Batch) -> Tensor:
        """Run a micro-batch; return the loss of this rank."""
        images, targets, smoothing = prepare(batch, self.config, len(self.training.classes), self.engine.device)
        logits = self.engine(images.to(self.dtype))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        self.engine.backward(loss)
        self.call("after_backward", loss.detach())
        return loss.detach()

    def _agree(self, losses: Tensor, bad: int) -> Step:
        """Sum up what every rank knows of the step; they wait for each other here, and for the device."""
        finite = losses.isfinite().all()
        if not self.engine.fp16_enabled() and self.config.compute.precision != "fp16":  # loss scaling handles those
            finite &= torch.nn.utils.get_total_norm(gradients(self.engine)).isfinite()
        loss, nonfinite, bad_images, stop = self._sum(losses.double().mean() / self.world_size, ~finite, bad)
        return Step(loss, nonfinite > 0, stop > 0, int(bad_images))

    def _sum(self, *numbers: Tensor | bool | int) -> list[Any]:
        """Sum numbers of this rank, and whether a callback asks to stop, over all ranks."""
        stop = any(callback.wants_stop(self) for callback in self.callbacks)
        message = torch.stack([torch.as_tensor(n).to(self.engine.device, torch.float64) for n in (*numbers, stop)])
        self.call("before_wait")
        if self.world_size > 1:
            dist.all_reduce(message)
        return message.tolist()

    def evaluate(self) -> dict[str, Any]:
        """Measure the weights, whose ``predictions`` are kept, and their average, on the held-out images."""
        bad_before, self.predictions = self.state.bad_images, Predictions(len(self.held_out))
        of = self.engine, self.ema, self.held_out, self.config
        try:
            return held_out_metrics(*of, between=self._agree_between, predictions=self.predictions)
        except Preempted:
            self.state.bad_images = bad_before  # the evaluation starts again
            raise

    def _agree_between(self, batch: Batch) -> None:
        """Agree after a batch of the evaluation, as :meth:`_agree` does after a step."""
        bad_images, stop = self._sum(batch.report_bad())
        if stop:
            raise Preempted(self.state.step)
        self.state.count_bad(int(bad_images), self.config.faults.max_bad_images)
