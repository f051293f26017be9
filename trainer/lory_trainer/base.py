"""The base: where it lies, its tokenizer, its weights, and the adapter attached to them.

This module must not know data, loops or what is written at the end.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from lory_trainer.config import LoraOptions, QuantizationOptions, TrainOptions
from lory_trainer.errors import ConfigError

ADAPTER_TENSORS = "adapter_model.safetensors"
PACKING_TOLERANCE = 0.02
"""Of the largest logit: rounding in 16 bits is below it, another row's influence above."""


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """Where a base lies."""

    source: str
    """A folder or a hub id, as transformers takes it."""
    folder: Path

    @property
    def name(self) -> str:
        """Folder name or hub id; never a path of this machine."""
        return self.folder.name if Path(self.source).is_dir() else self.source


def find_base(base: str, folder: Path) -> BaseFiles:
    """The base's folder if there is one, else the text as a hub id."""
    local = folder / base
    if local.is_dir():
        return BaseFiles(str(local.resolve()), local.resolve())
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ConfigError(f"base: no folder {base!r} beside the configuration")
    try:
        config = cached_file(base, "config.json")
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: no model could be loaded from {base!r}: {error}") from error
    return BaseFiles(base, Path(str(config)).parent)


def load_tokenizer(base: BaseFiles) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(base.source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base: no tokenizer could be loaded from {base.name!r}: {error}"
        ) from error


def load_base(base: BaseFiles, options: TrainOptions) -> torch.nn.Module:
    device = choose_device(options)
    quantization = bits_and_bytes(options.quantization, device)
    placed: dict[str, Any] = {"device_map": {"": device}} if quantization is not None else {}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base.source,
            dtype=options.dtype,
            use_safetensors=True,
            quantization_config=quantization,
            **placed,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: no model could be loaded from {base.name!r}: {error}") from error
    _keep_gradients(model)
    model.config.use_cache = False
    return model if placed else model.to(device)


def _keep_gradients(model: torch.nn.Module) -> None:
    """bitsandbytes repacks a 4-bit weight at its first forward in eval mode on CPUs with bfloat16
    instructions; what is repacked passes no gradient on, and says so in a warning alone."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def bits_and_bytes(options: QuantizationOptions, device: str) -> BitsAndBytesConfig | None:
    if options.bits is None:
        return None
    if options.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.type,
        bnb_4bit_use_double_quant=options.double,
        bnb_4bit_compute_dtype=compute_dtype(options, device),
    )


def compute_dtype(options: QuantizationOptions, device: str) -> torch.dtype:
    if options.compute_dtype != "auto":
        return getattr(torch, options.compute_dtype)
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def shape_of_base(base: BaseFiles, options: TrainOptions) -> torch.nn.Module:
    """The base without its weights: for counting."""
    try:
        config = AutoConfig.from_pretrained(base.source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: {base.name!r} cannot be read: {error}") from error
    dtype = config.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    return cast(torch.nn.Module, model)


def choose_device(options: TrainOptions) -> str:
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for and this machine has none; use auto or cpu")
    return options.device


def attach(base: torch.nn.Module, options: TrainOptions, folder: Path = Path()) -> PeftModel:
    """The base with a fresh adapter on the chosen linears; only the adapter is trainable."""
    torch.manual_seed(options.seed)
    try:
        with peft_warnings():
            # Of a quantized base PEFT turns the small tensors to float32 by itself.
            model = get_peft_model(base, lora_config(options.lora))  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error
    if options.lora.start_from is not None:
        start = _start_folder(options.lora.start_from, folder)
        try:
            load_adapter(model, start)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"lora.start_from: {start.name}/{ADAPTER_TENSORS} cannot be read: {error}"
            ) from error
        except RuntimeError as error:
            raise ConfigError(
                f"lora.start_from: {start.name} is of another shape than this run's: {error}"
            ) from error
    return cast(PeftModel, model)


def lora_config(lora: LoraOptions) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.resolved_alpha,  # pyright: ignore[reportArgumentType] -- a float is fine
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
    )


def _start_folder(start: str, folder: Path) -> Path:
    found = folder / start
    if not (found / ADAPTER_TENSORS).is_file():
        raise ConfigError(f"lora.start_from: {start!r} is no adapter folder")
    return found


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Gives the model's adapter the tensors of a folder, each of them and no other."""
    tensors = load_file(folder / ADAPTER_TENSORS)
    with peft_warnings():
        result = set_peft_model_state_dict(model, tensors)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        wrong = (missing or result.unexpected_keys)[0]
        raise ConfigError(
            f"lora.start_from: {folder.name} is of another shape than this run's adapter; the "
            f"first tensor that does not fit: {wrong}"
        )


@contextmanager
def peft_warnings() -> Iterator[None]:
    """PEFT still reads a name that transformers is about to rename."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def spare_memory(model: PeftModel, options: TrainOptions) -> bool:
    """Computes activations twice instead of keeping them, where that is wished."""
    wished = options.gradient_checkpointing
    is_on = choose_device(options) == "cuda" if wished == "auto" else wished
    if is_on:
        inner: Any = model.get_base_model()
        if hasattr(inner, "activation_checkpointing_enable"):
            inner.activation_checkpointing_enable()
        else:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
    return is_on


def add_noise(model: PeftModel, alpha: float) -> None:
    """NEFTune: uniform noise on the embeddings while training, less the longer the row."""

    def noisy(module: torch.nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        size = alpha / (embedded.shape[1] * embedded.shape[2]) ** 0.5
        return embedded + torch.empty_like(embedded).uniform_(-size, size)

    if alpha:
        embedding: Any = cast(Any, model.get_base_model()).get_input_embeddings()
        embedding.register_forward_hook(noisy)


@torch.no_grad()
def check_packing(model: torch.nn.Module) -> None:
    """Raises ConfigError if what is said of a row depends on the row before it in a pack."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    row = torch.arange(1, 7, device=device)[None]
    before = torch.tensor([[5, 3, 1]], device=device)
    alone = model(input_ids=row, use_cache=False).logits[0]
    places = torch.cat([torch.arange(3), torch.arange(6)])[None].to(device)
    packed = torch.cat([before, row], dim=1)
    beside = model(input_ids=packed, position_ids=places, use_cache=False).logits[0, 3:]
    model.train(was_training)
    if (beside - alone).abs().max() > PACKING_TOLERANCE * alone.abs().max():
        raise ConfigError("packing: this base lets the rows of a pack see each other; leave it off")


def stop_ids(base: BaseFiles) -> tuple[int, ...]:
    """What the base's generation_config.json says ends an answer."""
    path = base.folder / "generation_config.json"
    if not path.is_file():
        return ()
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return tuple(token for token in ids if isinstance(token, int))
