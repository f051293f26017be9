"""The training loop: step by step, with evaluations, checkpoints and what goes wrong.

Everything that decides a step is fixed before the first one (the order of rows by the seed, the
learning rate by the step), so a run that goes on from a checkpoint takes the very steps it would
have taken. This module must not know YAML, tokenizers or the terminal.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from typing import cast

import torch
from peft import PeftModel
from safetensors import SafetensorError

from lory_trainer.base import load_adapter
from lory_trainer.checkpoint import (
    Identity,
    Progress,
    checkpoint_path,
    checkpoints,
    forget_old,
    kept,
    load_checkpoint,
    save_checkpoint,
)
from lory_trainer.config import TrainOptions
from lory_trainer.data import Batch, Item, collate, epoch_batches, longest
from lory_trainer.errors import OutOfMemoryError, OutputError, StoppedError, TrainingError
from lory_trainer.events import EventLog
from lory_trainer.export import AdapterFacts
from lory_trainer.memory import is_out_of_memory, peak_bytes, remedies
from lory_trainer.objective import Objective, Outcome, accumulate, evaluate
from lory_trainer.optimizer import learning_rate_at, set_learning_rate, trainable

Step = list[list[Item]]
"""The batches of one optimizer step."""
LEAST_INTERVAL = 25
"""Steps between checkpoints that nobody asked for."""
WINDOW = 10
"""Steps whose mean is compared to tell whether a run diverges."""


@dataclass(frozen=True, slots=True)
class Job:
    """All that a run is made of, and never changes while it runs."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    objective: Objective
    steps: Sequence[Step]
    steps_per_epoch: int
    held_out: Sequence[Item]
    options: TrainOptions
    """With `auto` settled."""
    run: Path
    facts: AdapterFacts
    """What is known of the adapter before it is trained."""
    identity: Identity
    log: EventLog
    should_stop: Callable[[], bool]

    @property
    def rate(self) -> float:
        return cast(float, self.options.learning_rate)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def plan_steps(items: Sequence[Item], options: TrainOptions) -> tuple[list[Step], int]:
    """Every optimizer step of the run, and how many a pass has; a pass's last may be short."""
    rng, width = Random(options.seed), options.gradient_accumulation_steps or 1
    size = cast(int, options.batch_size)
    steps: list[Step] = []
    per_pass = 0
    while not _is_enough(len(steps), per_pass, options):
        batches = epoch_batches(items, size, rng)
        steps += [batches[i : i + width] for i in range(0, len(batches), width)]
        per_pass = per_pass or len(steps)
    return steps[: options.max_steps], per_pass


def _is_enough(num_steps: int, per_pass: int, options: TrainOptions) -> bool:
    wanted = options.epochs * per_pass if options.max_steps is None else options.max_steps
    return per_pass > 0 and num_steps >= wanted


def resume(job: Job) -> Progress:
    """From the newest whole checkpoint, or from the start if there is none."""
    found = checkpoints(job.run)
    if not found:
        return Progress()
    return load_checkpoint(found[-1], job.model, job.optimizer, identity=job.identity)


def fit(job: Job, progress: Progress) -> Progress:
    """Takes every step that is left; raises StoppedError, after a checkpoint, when asked to."""
    job.model.train()
    _preflight(job, progress)
    if progress.step == 0 and job.should_stop():
        raise StoppedError("stopped before the first step")
    while progress.step < len(job.steps):
        started_s = perf_counter()
        _take_step(job, progress, started_s)
        is_last = progress.step == len(job.steps)
        if _is_due(progress.step, _eval_interval(job)) or is_last:
            _evaluate(job, progress)
        progress.seconds += perf_counter() - started_s
        if job.should_stop():
            _checkpoint(job, progress)
            raise StoppedError(
                f"stopped at step {progress.step} of {len(job.steps)}, after a checkpoint"
            )
        if _is_worse_for_long(job, progress):
            job.log.message(
                f"no better for {progress.num_worse} evaluations: ended at step {progress.step} "
                f"of {len(job.steps)}; the best was step {progress.best_step}"
            )
            break
        if _is_due(progress.step, _checkpoint_interval(job)) and not is_last:
            _checkpoint(job, progress)
    _take_best(job, progress)
    return progress


def _is_due(step: int, interval: int) -> bool:
    return step % interval == 0


def _checkpoint_interval(job: Job) -> int:
    return job.options.checkpoint_steps or max(LEAST_INTERVAL, math.ceil(len(job.steps) / 10))


def _eval_interval(job: Job) -> int:
    return job.options.eval_steps or job.steps_per_epoch


# -- one step --------------------------------------------------------------------------------


def _take_step(job: Job, progress: Progress, started_s: float) -> None:
    index, options = progress.step, job.options
    rate = learning_rate_at(index, len(job.steps), options, job.rate)
    set_learning_rate(job.optimizer, rate)
    step = job.steps[index]
    outcome = _gradients(job, progress, step)
    parameters = trainable(job.model)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, options.max_gradient_norm))
    _check_finite(outcome.loss, norm, job, progress)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    progress.step = index + 1
    progress.losses.append(outcome.loss)
    progress.tokens += sum(len(item.ids) for batch in step for item in batch)
    progress.learned_tokens += sum(item.num_answer_tokens for batch in step for item in batch)
    _check_divergence(job, progress)
    seconds = progress.seconds + perf_counter() - started_s
    job.log.say(
        "step",
        step=progress.step,
        epoch=round(progress.step / job.steps_per_epoch, 4),
        loss=outcome.loss,
        grad_norm=norm,
        learning_rate=rate,
        tokens=progress.tokens,
        learned_tokens=progress.learned_tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(progress.tokens / seconds, 1),
        memory_bytes=peak_bytes(job.device),
        **outcome.more,
    )


def _gradients(job: Job, progress: Progress, step: Step) -> Outcome:
    """Of a whole step; batches that do not fit are split, which changes no sum."""
    while True:
        try:
            return accumulate(job.model, _collated(step, progress.num_parts), job.objective)
        except (RuntimeError, MemoryError) as error:
            _halve(job, progress, step, error)
        _let_go(job)


def _let_go(job: Job) -> None:
    """Once the error is forgotten: its frames hold the tensors that did not fit."""
    job.optimizer.zero_grad(set_to_none=True)
    if job.device.type == "cuda":
        torch.cuda.empty_cache()


def _collated(step: Step, num_parts: int) -> list[Batch]:
    return [collate(part) for batch in step for part in split_batch(batch, num_parts)]


def split_batch(batch: Sequence[Item], num_parts: int) -> list[Sequence[Item]]:
    size = math.ceil(len(batch) / num_parts)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _halve(job: Job, progress: Progress, step: Step, error: BaseException) -> None:
    """Twice as many parts from now on; raises if a batch is one row already."""
    if not is_out_of_memory(error):
        raise error
    rows = max(len(part) for batch in step for part in split_batch(batch, progress.num_parts))
    if rows == 1:
        tokens = max(longest(item) for batch in step for item in batch)
        raise OutOfMemoryError(
            f"one row of {tokens} tokens does not fit the memory. What helps:\n{remedies()}"
        ) from error
    progress.num_parts *= 2
    job.log.message(
        f"out of memory with {rows} rows at a time: from now on {math.ceil(rows / 2)}, and "
        "gradient accumulation doubled; what is learned stays the same",
        "warning",
    )


def _preflight(job: Job, progress: Progress) -> None:
    """The longest batch there can be, forward and backward, before anything depends on it."""
    size = cast(int, job.options.batch_size)
    items = {id(item): item for step in job.steps for batch in step for item in batch}
    batch = sorted(items.values(), key=longest, reverse=True)[:size]
    with torch.random.fork_rng():
        _gradients(job, progress, [batch])
    job.optimizer.zero_grad(set_to_none=True)


def _check_finite(loss: float, norm: float, job: Job, progress: Progress) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    raise TrainingError(
        f"{what} at step {progress.step + 1} of {len(job.steps)}; {kept(job.run)}. Lower "
        f"learning_rate ({job.rate:g}) or lora.alpha, or use dtype: float32"
    )


def _check_divergence(job: Job, progress: Progress) -> None:
    factor = job.options.divergence_factor
    if factor is None or progress.step % WINDOW:
        return
    if has_diverged(progress.losses, factor):
        now = sum(progress.losses[-WINDOW:]) / WINDOW
        raise TrainingError(
            f"the loss runs away: {now:.3g} on average over the last {WINDOW} steps, at step "
            f"{progress.step} of {len(job.steps)}; {kept(job.run)}. Lower learning_rate "
            f"({job.rate:g}), raise warmup_fraction, or set divergence_factor: null to go on"
        )


def has_diverged(losses: Sequence[float], factor: float) -> bool:
    """The newest window's mean is many times the best one's, and above the first one's."""
    if len(losses) < 2 * WINDOW:
        return False
    windows = [
        sum(losses[end - WINDOW : end]) / WINDOW for end in range(len(losses), WINDOW - 1, -WINDOW)
    ]
    first = sum(losses[:WINDOW]) / WINDOW
    return windows[0] > factor * min(windows) and windows[0] > first


# -- evaluations and checkpoints ---------------------------------------------------------------


def _evaluate(job: Job, progress: Progress) -> None:
    if not job.held_out:
        return
    started_s = perf_counter()
    outcome = _held_out_loss(job, progress)
    progress.eval_loss = outcome.loss
    if progress.best_eval_loss is None or outcome.loss < progress.best_eval_loss:
        progress.best_eval_loss, progress.best_step = outcome.loss, progress.step
        progress.num_worse = 0
        if job.options.early_stop:
            _checkpoint(job, progress)
    else:
        progress.num_worse += 1
    seconds = round(perf_counter() - started_s, 3)
    rows = len(job.held_out)
    job.log.say("eval", loss=outcome.loss, rows=rows, seconds=seconds, **outcome.more)


def _held_out_loss(job: Job, progress: Progress) -> Outcome:
    size = job.options.eval_batch_size or cast(int, job.options.batch_size)
    rows = sorted(job.held_out, key=longest)
    step = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    while True:
        try:
            return evaluate(job.model, _collated(step, progress.num_parts), job.objective)
        except (RuntimeError, MemoryError) as error:
            _halve(job, progress, step, error)
        _let_go(job)


def _is_worse_for_long(job: Job, progress: Progress) -> bool:
    return bool(job.options.early_stop) and progress.num_worse >= job.options.early_stop


def _checkpoint(job: Job, progress: Progress) -> None:
    try:
        path = save_checkpoint(
            job.run,
            job.model,
            job.optimizer,
            progress,
            facts=job.facts,
            identity=job.identity,
        )
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the checkpoint of step {progress.step} cannot be written: {error}; {kept(job.run)}. "
            "Make room, and go on with --resume"
        ) from error
    best = progress.best_step if job.options.early_stop else None
    spared = checkpoint_path(job.run, best) if best is not None else None
    forget_old(job.run, job.options.keep_checkpoints, spared)
    job.log.say(
        "checkpoint",
        path=str(path.relative_to(job.run)),
        loss=progress.losses[-1],
        eval_loss=progress.eval_loss,
    )


def _take_best(job: Job, progress: Progress) -> None:
    """With early stopping the adapter is the best one, not the last."""
    best = progress.best_step
    if job.options.early_stop and best is not None and best != progress.step:
        load_adapter(job.model, checkpoint_path(job.run, best))
        job.log.message(f"the adapter is that of step {best}, whose evaluation was the best")
