"""One run from its options to an adapter folder: load, attach, loop, write.

This module must not know YAML, the terminal, servers or registries.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from lory_trainer.base import (
    BaseFiles,
    add_noise,
    attach,
    check_packing,
    choose_device,
    find_base,
    load_base,
    load_tokenizer,
    spare_memory,
    stop_ids,
)
from lory_trainer.checkpoint import FOLDER as CHECKPOINTS
from lory_trainer.checkpoint import (
    Identity,
    Progress,
    begun_with,
    checkpoints,
    forget_all,
    kept,
)
from lory_trainer.config import TrainOptions
from lory_trainer.curve import write_curve
from lory_trainer.data import Item, Pair
from lory_trainer.data_files import write_rows
from lory_trainer.data_load import LoadedData, load_data
from lory_trainer.destination import check_output
from lory_trainer.digests import base_digests
from lory_trainer.errors import OutputError, TrainerError
from lory_trainer.events import EVENTS_FILE, EventLog, Listener
from lory_trainer.export import AdapterFacts, round_adapter, write_adapter
from lory_trainer.folders import remove_leftovers
from lory_trainer.loop import Job, fit, plan_steps, resume
from lory_trainer.memory import telling_remedies
from lory_trainer.objective import Answers, Objective
from lory_trainer.optimizer import make_optimizer
from lory_trainer.preference import Preference
from lory_trainer.probe import learns_to_end, probe
from lory_trainer.reference import with_reference
from lory_trainer.remarks import remarks
from lory_trainer.settle import settle

TEST_FILE = "test.jsonl"
TAIL = 20
"""Steps whose mean loss is told at the end."""
NOT_THE_RUN = {
    "name",
    "output",
    "data",
    "generation",
    "tracking",
    "lint",
    "checkpoint_steps",
    "keep_checkpoints",
    "divergence_factor",
}
"""Options that may change between a run and its resumption."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where a run reads and writes."""

    folder: Path
    """Paths in the options are relative to it."""
    output: Path
    run: Path
    replace: bool = False
    """An adapter, or an earlier run, that is there."""
    resume: bool = False


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run leaves behind."""

    output: Path
    name: str
    num_steps: int
    num_rows: int
    num_dropped_rows: int
    num_trainable: int
    num_parameters: int
    losses: tuple[float, ...]
    """One a step."""
    eval_loss: float | None
    num_tokens: int
    num_learned_tokens: int
    elapsed_s: float
    published: str | None = None
    """Where it was handed to, and what requests should name there."""

    @property
    def final_loss(self) -> float:
        tail = self.losses[-TAIL:]
        return sum(tail) / len(tail)


def train_adapter(
    options: TrainOptions,
    places: Places,
    *,
    listeners: Sequence[Listener] = (),
    notes: Sequence[str] = (),
    should_stop: Callable[[], bool] = lambda: False,
    deliver: Callable[[Path, str], str | None] = lambda output, name: None,
) -> TrainResult:
    """Trains one adapter, writes its folder, and hands it to `deliver`.

    What happens is told to the run's event file and the listeners; see events.py.
    """
    check_output(places.output, replace=places.replace)
    _check_run(places)
    remove_leftovers(places.output)
    remove_leftovers(places.run / CHECKPOINTS / "step-*")
    with EventLog(places.run, *listeners) as log:
        for note in notes:
            log.message(note)
        try:
            with telling_remedies():
                result = _train(options, places, log, should_stop)
            result = replace(result, published=deliver(result.output, result.name))
            log.say("finished", **_ending(result))
        except TrainerError as error:
            _tell_failure(log, places.run, error.code, str(error))
            raise
        except KeyboardInterrupt:
            _tell_failure(log, places.run, "stopped", "interrupted")
            raise
        except OSError as error:
            _tell_failure(log, places.run, OutputError.code, str(error))
            raise
        except Exception as error:
            _tell_failure(log, places.run, "internal", f"{type(error).__name__}: {error}")
            raise
        finally:
            with suppress(OSError):  # a full disk must not hide what the run came to
                write_curve(places.run)
    return result


def _check_run(places: Places) -> None:
    """A run's checkpoints are neither mixed with another's nor thrown away unasked."""
    if places.resume or not (places.run / EVENTS_FILE).exists():
        return
    if checkpoints(places.run) and not places.replace:
        raise OutputError(
            f"{places.run} holds a run with checkpoints; give --resume to go on with it, --replace "
            "to begin anew, or another --run"
        )
    forget_all(places.run)
    (places.run / EVENTS_FILE).unlink()


def _tell_failure(log: EventLog, run: Path, code: str, text: str) -> None:
    found = checkpoints(run)
    newest = str(found[-1].relative_to(run)) if found else None
    with suppress(OutputError):  # what ended the run may be that nothing can be written
        log.say("failed", code=code, error=text, checkpoint=newest)


def _train(
    options: TrainOptions, places: Places, log: EventLog, should_stop: Callable[[], bool]
) -> TrainResult:
    base = find_base(options.base, places.folder)
    tokenizer = load_tokenizer(base)
    data = load_data(options, places.folder, tokenizer, stop_ids(base))
    if data.test:
        write_rows(data.test, places.run / TEST_FILE)
    model = attach(load_base(base, options), options, places.folder)
    is_auto = options.batch_size == "auto"
    options = settle(options, model, data.items, loaded=True)
    if places.resume and is_auto:
        options = _as_begun(options, places.run)
    job = _job(options, places, base, data, model, log, should_stop)
    progress = resume(job) if places.resume else Progress()
    _tell_start(job, base, data, places, progress)
    fit(job, progress)
    return _write(job, base, data, places, progress)


def _as_begun(options: TrainOptions, run: Path) -> TrainOptions:
    """What `auto` came to when the run began, though there may be other room now."""
    before = begun_with(run)
    names = ("batch_size", "gradient_accumulation_steps")
    return options.model_copy(update={name: before[name] for name in names if name in before})


def _job(
    options: TrainOptions,
    places: Places,
    base: BaseFiles,
    data: LoadedData,
    model: PeftModel,
    log: EventLog,
    should_stop: Callable[[], bool],
) -> Job:
    if options.packing:
        check_packing(model.get_base_model())
    spare_memory(model, options)
    items, held_out, objective = _objective(options, data, model, should_stop)
    add_noise(model, options.neftune_noise_alpha)
    steps, steps_per_epoch = plan_steps(items, options)
    return Job(
        model=model,
        optimizer=make_optimizer(model, options, choose_device(options)),
        objective=objective,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        held_out=held_out,
        options=options,
        run=places.run,
        facts=_facts(options, places, base, data),
        identity=_identity(options, base, data),
        log=log,
        should_stop=should_stop,
    )


def _objective(
    options: TrainOptions, data: LoadedData, model: PeftModel, should_stop: Callable[[], bool]
) -> tuple[Sequence[Item], Sequence[Item], Objective]:
    if options.method != "dpo":
        return data.items, data.validation, Answers()
    if options.dpo.reference == "none":
        return data.items, data.validation, Preference(options.dpo)
    base_alone = options.dpo.reference == "base"
    rows = options.batch_size if isinstance(options.batch_size, int) else 1

    def referred(items: Sequence[Item]) -> list[Pair]:
        pairs = [item for item in items if isinstance(item, Pair)]
        return with_reference(
            model, pairs, rows=rows, base_alone=base_alone, should_stop=should_stop
        )

    return referred(data.items), referred(data.validation), Preference(options.dpo)


def _identity(options: TrainOptions, base: BaseFiles, data: LoadedData) -> Identity:
    """All that decides a run's steps."""
    rows = [[list(item.ids), item.num_answer_tokens] for item in (*data.items, *data.validation)]
    return {
        "options": options.model_dump(mode="json", exclude=NOT_THE_RUN),
        "base": base_digests(base.folder),
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def _tell_start(
    job: Job, base: BaseFiles, data: LoadedData, places: Places, progress: Progress
) -> None:
    options = job.options
    num_trainable, num_parameters = job.model.get_nb_trainable_parameters()
    job.log.say(
        "started",
        step=progress.step,
        num_steps=len(job.steps),
        name=name_of(options, places.output),
        base=base.name,
        method=options.method,
        num_rows=data.num_rows,
        num_eval_rows=len(data.validation),
        num_trainable=num_trainable,
        num_parameters=num_parameters,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        max_length=options.max_length,
        seed=options.seed,
        device=choose_device(options),
        resumed_from=progress.step if progress.step else None,
    )
    for text, level in remarks(options, data):
        job.log.message(text, level)


def name_of(options: TrainOptions, output: Path) -> str:
    return options.name or output.name


def _write(
    job: Job, base: BaseFiles, data: LoadedData, places: Places, progress: Progress
) -> TrainResult:
    num_trainable, num_parameters = job.model.get_nb_trainable_parameters()
    result = TrainResult(
        output=places.output,
        name=name_of(job.options, places.output),
        num_steps=progress.step,
        num_rows=data.num_rows,
        num_dropped_rows=data.num_dropped,
        num_trainable=num_trainable,
        num_parameters=num_parameters,
        losses=tuple(progress.losses),
        eval_loss=progress.best_eval_loss if job.options.early_stop else progress.eval_loss,
        num_tokens=progress.tokens,
        num_learned_tokens=progress.learned_tokens,
        elapsed_s=progress.seconds,
    )
    dtype = job.options.lora.dtype
    round_adapter(job.model, dtype)
    facts = replace(
        job.facts, training=_training(result, progress), probe=probe(job.model, data.items)
    )
    if job.options.method == "sft" and not learns_to_end(facts.probe):
        job.log.message(
            "the adapter has not learned to end its answers (no row tried ends where it should): "
            "train longer, or give generation.stop",
            "warning",
        )
    try:
        write_adapter(job.model, facts, places.output, dtype=dtype, replace=places.replace)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{places.output} cannot be written: {error}; {kept(places.run)}"
        ) from error
    return result


def _facts(
    options: TrainOptions, places: Places, base: BaseFiles, data: LoadedData
) -> AdapterFacts:
    lora = options.lora.model_dump(mode="json") | {"alpha": options.lora.resolved_alpha}
    config = options.model_dump(mode="json") | {"lora": lora}
    config |= {"base": base.name, "data": data.file_name, "output": None}
    config["eval_data"] = _file_name(options.eval_data)
    config["lora"]["start_from"] = _file_name(options.lora.start_from)
    generation = options.generation.model_dump(mode="json", exclude_none=True)
    return AdapterFacts(
        name=name_of(options, places.output),
        base={
            "name": base.name,
            **base_digests(base.folder),
            "quantization": _quantization(options),
        },
        prompt=_prompt(data),
        generation={key: value for key, value in generation.items() if value != []},
        config=config,
        data={
            "file": data.file_name,
            "sha256": data.digest,
            "rows": data.num_rows,
            "dropped_rows": data.num_dropped,
            "cut_rows": data.num_cut,
            "held_out_rows": len(data.validation),
            "test_rows": len(data.test),
        },
    )


def _training(result: TrainResult, progress: Progress) -> dict[str, Any]:
    return {
        "steps": result.num_steps,
        "final_loss": round(result.final_loss, 5),
        "eval_loss": None if result.eval_loss is None else round(result.eval_loss, 5),
        "trainable_parameters": result.num_trainable,
        "tokens": progress.tokens,
        "learned_tokens": progress.learned_tokens,
    }


def _file_name(path: str | None) -> str | None:
    """A manifest names no path of this machine."""
    return None if path is None else Path(path).name


def _quantization(options: TrainOptions) -> dict[str, Any] | None:
    """Of the base while training; a server should hold it alike."""
    if options.quantization.bits is None:
        return None
    return options.quantization.model_dump(mode="json")


def _prompt(data: LoadedData) -> dict[str, Any]:
    """template: the prompt's text by columns; chat: through the base's chat template, of the
    template's text as a user's message if there is one."""
    plan, tokenizer = data.plan, data.encoder.tokenizer
    chat_template = str(tokenizer.chat_template) if plan.chat else None
    return {
        "template": plan.template,
        "fields": list(plan.fields),
        "chat": plan.chat,
        "chat_template_sha256": (
            hashlib.sha256(chat_template.encode()).hexdigest() if chat_template else None
        ),
        "completion_prefix": plan.prefix,
        "eos_token": str(tokenizer.eos_token),
    }


def _ending(result: TrainResult) -> dict[str, Any]:
    return {
        "output": str(result.output),
        "adapter_id": result.name,
        "loss": result.final_loss,
        "eval_loss": result.eval_loss,
        "tokens": result.num_tokens,
        "learned_tokens": result.num_learned_tokens,
        "seconds": round(result.elapsed_s, 3),
        "num_rows": result.num_rows,
        "published": result.published,
    }
