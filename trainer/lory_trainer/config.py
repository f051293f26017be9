"""A training run as it is meant: every option typed, every default written out.

A file may be written with these names, with Ludwig's or with Axolotl's; config_keys.py holds what
the others are called here. This module must not know torch, peft or any data.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lory_trainer.config_translate import Translation, explain, translate
from lory_trainer.config_yaml import parse_yaml
from lory_trainer.errors import ConfigError
from lory_trainer.template import template_fields


def _number_from_text(value: Any) -> Any:
    """YAML 1.1 reads `4e-4` as text; a learning rate is meant."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number_from_text), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Auto = Literal["auto"]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Rank = Annotated[int, Field(ge=1, le=256)]


class _Options(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class LoraOptions(_Options):
    """What is added to the base."""

    r: Rank = 8
    """Rank of every adapted linear; the server takes no more than 256."""
    alpha: Positive | None = None
    """The update is scaled by alpha / r (alpha / sqrt(r) with use_rslora); 2 r if unset."""
    dropout: Share = 0.0
    """Share of the adapter's inputs dropped while training."""
    target_modules: str | list[str] = "all-linear"
    """Names of linears, one regular expression over module paths, or `all-linear`."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps high ranks learning."""
    use_dora: bool = False
    """Learn the length of each output's weights apart from their direction."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """How A begins. Inits that change the base's weights cannot share it, and are refused."""
    rank_pattern: dict[str, Rank] = {}
    """Ranks of some modules, by name or regular expression."""
    alpha_pattern: dict[str, Positive] = {}
    """Alphas of some modules."""
    lora_plus_ratio: Annotated[Number, Field(ge=1)] | None = None
    """LoRA+: B learns this many times faster than A; its authors take 16."""
    start_from: str | None = None
    """An adapter folder to go on from (relative to this file), of the same shape."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the written tensors; training itself keeps them in float32."""

    @property
    def resolved_alpha(self) -> float:
        """Whole numbers as integers, as other readers of adapter_config.json expect."""
        alpha = 2 * self.r if self.alpha is None else self.alpha
        return int(alpha) if alpha == int(alpha) else alpha


class QuantizationOptions(_Options):
    """The base's linears as they are held while training."""

    bits: Literal[4, 8] | None = None
    """4: QLoRA; 8: LLM.int8. Should be what the server serves."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The code of 4 bits; the server's is nf4."""
    double: bool = True
    """Quantize the scales of 4 bits too."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the products; auto: bfloat16 on a GPU that has it, float32 on a CPU."""


class SplitOptions(_Options):
    """Which rows are held out: the validation part is evaluated during the run, the test part
    is written to the run's folder for `lory eval`."""

    type: Literal["random", "fixed", "hash"] = "random"
    """random: by the seed; hash: by the row's own text, so more rows move none; fixed: a column."""
    probabilities: list[NotNegative] = [0.9, 0.05, 0.05]
    """Shares of training, validation and test."""
    column: str = "split"
    """For fixed: the column that holds 0, 1 or 2 (or train, validation, test)."""


PairLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "simpo",
    "orpo",
]
USUAL_OF_LOSS: dict[str, dict[str, Any]] = {
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0, "reference": "none"},
    "orpo": {"sft_weight": 1.0, "reference": "none"},
}
"""What some losses' authors take, where a file says nothing."""
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "simpo")
WITHOUT_REFERENCE = ("simpo", "orpo")
WITH_OR_WITHOUT = ("sigmoid", "sigmoid_norm", "hinge", "ipo")


class DpoOptions(_Options):
    """Preference pairs."""

    beta: Positive = 0.1
    """How strongly the model is held to its reference (simpo: 2); for orpo, the weight of the
    odds ratio."""
    loss: PairLoss = "sigmoid"
    """sigmoid is DPO's own; ipo does not run away on pairs that are never in doubt; simpo and orpo
    refer to no model. The formulas: preference.py."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be the wrong way round: cDPO (robust: 0.1, exo_pair: 0.001)."""
    gamma: NotNegative = 0.0
    """For simpo: by how much the better answer has to be likelier, times beta (simpo: 1)."""
    sft_weight: NotNegative = 0.0
    """Adds this times the chosen answer's own loss, without which what the model says may not
    change at all; 1 is a good value (orpo: 1)."""
    reference: Literal["start", "base", "none"] = "start"
    """start: the model as the run found it, lora.start_from included; base: without any adapter;
    none: no reference (sigmoid with sft_weight: 1 is CPO then)."""

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("loss"), str):
            return values
        return USUAL_OF_LOSS.get(values["loss"], {}) | values


class GenerationOptions(_Options):
    """The adapter's defaults when it is asked; a request's own values go first."""

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """0 is greedy."""
    max_new_tokens: Count | None = None
    """Longest answer."""
    top_k: Whole | None = None
    """Sample among so many; 0: all."""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Sample among the likeliest that have this share together."""
    do_sample: bool | None = None
    """false is greedy."""
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    """Above 1, what was said is said less."""
    stop: Annotated[list[Stop], Field(max_length=16)] = []
    """Texts that end an answer, beside the end of sequence."""


class TrackingOptions(_Options):
    """Experiment trackers, through transformers' own callbacks; events.jsonl is always written."""

    to: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Which; each needs its own package installed."""
    run_name: str | None = None
    """The run's name there; the adapter's if unset."""
    project: str = "lory"
    """The project there (wandb)."""


class TrainOptions(_Options):
    """A whole training run."""

    base: str
    """Folder of the base (relative to this file) or its hub id."""
    data: str
    """File of rows, or a folder of them (relative to this file): JSONL, JSON, CSV, Parquet."""
    eval_data: str | None = None
    """Rows to evaluate on during the run, from a file of their own."""
    name: str | None = None
    """The adapter's name once it is served; else the output folder's."""
    output: str | None = None
    """Adapter folder to write (relative to where the command runs); --output goes first."""
    method: Literal["sft", "pretrain", "dpo"] = "sft"
    """sft: answers; pretrain: plain text, every token; dpo: preference pairs."""
    template: str | None = None
    """The prompt: text with `{column}` fields. Unset: by the columns of the rows."""
    chat: bool = False
    """Put the prompt through the base's chat template, as a user's message."""
    completion: str | None = None
    """Column that holds the answer; unset: by the columns of the rows."""
    completion_prefix: str = ""
    """Text between prompt and answer, learned as the answer's beginning."""
    chosen: str = "chosen"
    """For dpo: the column of the better answer."""
    rejected: str = "rejected"
    """For dpo: the column of the worse answer."""
    train_on_prompt: bool = False
    """Learn the prompt's tokens too, not the answer's alone."""
    max_rows: Count | None = None
    """Only so many rows, from the first."""
    split: SplitOptions | None = None
    """Rows held out of `data`; unset: none."""
    lint: Literal["error", "warn"] = "warn"
    """error: what the linter finds wrong ends the run before it begins."""

    lora: LoraOptions = LoraOptions()
    """What is added to the base."""
    quantization: QuantizationOptions = QuantizationOptions()
    """The base's linears as they are held while training."""
    dpo: DpoOptions = DpoOptions()
    """Preference pairs."""
    generation: GenerationOptions = GenerationOptions()
    """Defaults when the adapter is asked."""
    tracking: TrackingOptions = TrackingOptions()
    """Experiment trackers."""

    epochs: Count = 1
    """Passes over the data."""
    max_steps: Count | None = None
    """Optimizer steps; ends the run before its epochs do, or makes it go through them again."""
    learning_rate: Positive | Auto = 2e-4
    """Peak of the schedule; auto: by the base's width."""
    learning_rate_multiplier: Positive = 1.0
    """Times the learning rate: of use with auto."""
    learning_rate_min: NotNegative = 0.0
    """Where the schedule ends."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: Share = 0.03
    """Share of the steps in which the learning rate rises to its peak."""
    warmup_steps: Whole | None = None
    """So many steps instead."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd"] = "adamw"
    """8bit and paged ones are bitsandbytes'; paged states may leave a GPU's memory."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's averages."""
    epsilon: Positive = 1e-8
    """AdamW's floor."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay on the adapter."""
    max_gradient_norm: Positive = 1.0
    """Gradients longer than this are scaled down to it."""
    batch_size: Count | Auto = 8
    """Rows in one forward pass; auto: as many as fit, up to effective_batch_size."""
    eval_batch_size: Count | None = None
    """Rows in one forward pass of an evaluation; unset: as batch_size."""
    gradient_accumulation_steps: Count | None = None
    """Forward passes before each optimizer step; 1 if unset."""
    effective_batch_size: Count | None = None
    """Rows of one optimizer step, in place of gradient_accumulation_steps; 16 for auto."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest row, prompt and answer together, in tokens."""
    overlong: Literal["error", "drop", "cut_prompt"] = "error"
    """What happens to a longer row; cut_prompt takes the prompt's beginning. An answer is never
    cut: its end teaches the model to stop."""
    packing: bool = False
    """Several rows in one sequence that do not see each other: no padding."""
    neftune_noise_alpha: NotNegative = 0.0
    """NEFTune: noise on the embeddings while training; 5 is usual."""
    gradient_checkpointing: bool | Auto = "auto"
    """Compute activations twice and keep few; auto: on a GPU."""
    checkpoint_steps: Whole = 0
    """Optimizer steps between checkpoints; 0: a tenth of the run, at least 25."""
    keep_checkpoints: Count = 2
    """The newest so many stay."""
    eval_steps: Whole = 0
    """Optimizer steps between evaluations, if rows are held out; 0: once a pass."""
    early_stop: Whole = 0
    """Evaluations without a better loss that end the run, which then keeps the best; 0: never."""
    divergence_factor: Annotated[Number, Field(gt=1)] | None = 3.0
    """A run ends when ten steps' mean loss is so many times the best ten's and above the first."""
    seed: Whole = 0
    """Fixes the adapter's first weights, the order of rows, splits, noise and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision the base is loaded in; auto takes the checkpoint's own."""


def load_options(path: Path, **changes: Any) -> TrainOptions:
    """Reads and checks a YAML file; raises ConfigError naming each wrong key."""
    return read_config(path, **changes)[0]


def read_config(path: Path, **changes: Any) -> tuple[TrainOptions, tuple[str, ...]]:
    """The options, with `changes` in place of the file's own; and what there is to say of them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return _check(text, str(path), changes)


def parse_options(text: str, source: str = "config") -> TrainOptions:
    return _check(text, source, {})[0]


def _check(text: str, source: str, changes: dict[str, Any]) -> tuple[TrainOptions, tuple[str, ...]]:
    found = translate(parse_yaml(text, source), source, TrainOptions)
    try:
        options = TrainOptions.model_validate(found.values | changes)
        _check_together(options, found)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain(error, found))
        raise ConfigError(f"{source}:\n{lines}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}:\n  {error}") from error
    return options, found.notes


def _check_together(options: TrainOptions, found: Translation) -> None:
    """What is wrong about two options at once."""
    if options.template is not None:
        columns = template_fields(options.template)
        if (shown := options.completion) in columns:
            raise ConfigError(f"template: shows the answer, column `{shown}`, in the prompt")
    for key, text in _contradictions(options):
        raise ConfigError(f"{found.name_of(key)}: {text}")
    if options.split is not None:
        _check_split(options.split, found.name_of("split"))


def _contradictions(options: TrainOptions) -> Iterator[tuple[str, str]]:
    given = options.quantization.model_fields_set
    if options.effective_batch_size and options.gradient_accumulation_steps:
        yield "effective_batch_size", "give it or gradient_accumulation_steps, not both"
    if options.warmup_steps is not None and "warmup_fraction" in options.model_fields_set:
        yield "warmup_steps", "give it or warmup_fraction, not both"
    if given and "bits" not in given:
        yield "quantization.bits", "is missing beside the other keys; give 4 or 8"
    if options.early_stop and options.split is None and options.eval_data is None:
        yield "early_stop", "needs rows to evaluate; give split or eval_data"
    yield from _of_another_method(options)
    if options.method == "dpo":
        yield from _contradictions_of_pairs(options.dpo)


def _of_another_method(options: TrainOptions) -> Iterator[tuple[str, str]]:
    """Options that the method has no use for."""
    method, dpo = options.method, options.dpo.model_fields_set
    if method == "dpo":
        if options.train_on_prompt:
            yield "train_on_prompt", "is not for dpo: both prompts are the same"
        if options.packing:
            yield "packing", "pairs are not packed; leave it off for dpo"
        return
    of_pairs = [key for key in ("chosen", "rejected") if key in options.model_fields_set]
    of_pairs += [f"dpo.{key}" for key in sorted(dpo, key=lambda key: (key != "loss", key))]
    for key in of_pairs:
        yield key, f"is for method: dpo, and this is {method}"
    for key in ("completion", "completion_prefix", "chat"):
        if method == "pretrain" and getattr(options, key):
            yield key, "is not for pretrain: all of a text is learned, as it is"


def _contradictions_of_pairs(dpo: DpoOptions) -> Iterator[tuple[str, str]]:
    loss = dpo.loss
    if dpo.label_smoothing and loss not in SMOOTHED:
        yield "dpo.label_smoothing", f"is for {_either(SMOOTHED)}; {loss} has none"
    if not dpo.label_smoothing and loss == "exo_pair":
        yield "dpo.label_smoothing", "has to be above 0 for exo_pair; its authors take 0.001"
    if dpo.gamma and loss != "simpo":
        yield "dpo.gamma", f"is for simpo; {loss} has none"
    if dpo.reference != "none" and loss in WITHOUT_REFERENCE:
        yield "dpo.reference", f"{loss} refers to no other model; leave it out"
    if dpo.reference == "none" and loss not in (*WITHOUT_REFERENCE, *WITH_OR_WITHOUT):
        yield "dpo.reference", f"{loss} is measured against one: start or base"


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _check_split(split: SplitOptions, name: str) -> None:
    shares = split.probabilities
    if len(shares) != 3 or abs(sum(shares) - 1) > 1e-6 or shares[0] <= 0:
        raise ConfigError(
            f"{name}.probabilities: three shares that sum to 1, the first above 0; given: {shares}"
        )
