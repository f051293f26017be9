"""Makes the models that are measured: random weights of stated shapes, and adapters for them.

    python -m benchmarks.models small --adapters 32

Speed does not depend on what weights say, so nothing is downloaded: each folder is made once, from
a fixed seed, under .bench/models, and made again when its description changes. It must not know
how models are served.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent / ".bench" / "models"
DESCRIPTION = "made.json"
INITIAL_STD = 0.02
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """A Llama, in numbers."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int = 2048
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Out and in features of a layer's seven projections."""
        hidden, inner = self.hidden_size, self.intermediate_size
        kv = self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    @property
    def modules(self) -> Iterator[tuple[str, int, int]]:
        """Every projection of every layer: its path, out and in features."""
        for layer in range(self.num_layers):
            for name, (out_features, in_features) in self.projections.items():
                yield f"model.layers.{layer}.{name}", out_features, in_features


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 2, 4, 2, 128, 256, max_positions=512),
        Shape("small", 512, 8, 8, 4, 1408, 4096),
        Shape("tinyllama", 2048, 22, 32, 4, 5632, 32000),
    )
}


@dataclass(frozen=True)
class Adapters:
    """Adapters of one rank on all seven projections."""

    shape: Shape
    rank: int
    count: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"a{number:02d}" for number in range(self.count))


def ensure_base(shape: Shape, root: Path = ROOT) -> Path:
    """The base's folder, made if it is not there."""
    folder = root / shape.name

    def make(target: Path) -> None:
        save_file(_base_tensors(shape), target / "model.safetensors", metadata={"format": "pt"})
        _config(shape).save_pretrained(target)
        _tokenizer(shape).save_pretrained(target)

    _ensure(folder, {"shape": asdict(shape), "weights": f"normal, std {INITIAL_STD}"}, make)
    return folder


def ensure_adapters(adapters: Adapters, root: Path = ROOT) -> Path:
    """The folder of PEFT folders, with at least the adapters asked for and no others in it."""
    shape, rank = adapters.shape, adapters.rank
    folder = root / "adapters" / f"{shape.name}-r{rank}-n{adapters.count}"

    def make(target: Path) -> None:
        for number, name in enumerate(adapters.names):
            (target / name).mkdir()
            tensors = adapter_tensors(shape, rank, seed=1000 + number)
            save_file(
                tensors, target / name / "adapter_model.safetensors", metadata={"format": "pt"}
            )
            config = json.dumps(adapter_config(shape, rank), indent=1)
            (target / name / "adapter_config.json").write_text(config + "\n")

    _ensure(folder, {"shape": asdict(shape), "rank": rank, "names": adapters.names}, make)
    return folder


def _ensure(folder: Path, description: dict[str, object], make: Callable[[Path], None]) -> None:
    """Make `folder` whole or not at all; its description lies beside it."""
    text = json.dumps(description, indent=1) + "\n"
    marker = folder.with_name(f"{folder.name}.{DESCRIPTION}")
    if folder.is_dir() and marker.is_file() and marker.read_text() == text:
        return
    marker.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch) / folder.name
        target.mkdir()
        make(target)
        target.rename(folder)
    marker.write_text(text)


def _config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """One word a token, so that any token ids can be written and read."""
    words = [*SPECIAL_TOKENS, *(f"t{i}" for i in range(len(SPECIAL_TOKENS), shape.vocab_size))]
    vocabulary = {word: number for number, word in enumerate(words)}
    unknown, begin, end = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=unknown,
    )


def _base_tensors(shape: Shape) -> dict[str, Tensor]:
    draw = _Draw(shape.seed)
    outer = (shape.vocab_size, shape.hidden_size)
    tensors = {
        "model.embed_tokens.weight": draw(outer, INITIAL_STD),
        "lm_head.weight": draw(outer, INITIAL_STD),
        "model.norm.weight": torch.ones(shape.hidden_size, dtype=torch.bfloat16),
    }
    for module, out_features, in_features in shape.modules:
        tensors[f"{module}.weight"] = draw((out_features, in_features), INITIAL_STD)
    for layer in range(shape.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            ones = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
            tensors[f"model.layers.{layer}.{norm}.weight"] = ones
    return tensors


def adapter_tensors(shape: Shape, rank: int, seed: int) -> dict[str, Tensor]:
    draw = _Draw(seed)
    tensors: dict[str, Tensor] = {}
    for module, out_features, in_features in shape.modules:
        prefix = f"base_model.model.{module}"
        std = 1 / math.sqrt(in_features)
        tensors[f"{prefix}.lora_A.weight"] = draw((rank, in_features), std)
        tensors[f"{prefix}.lora_B.weight"] = draw((out_features, rank), INITIAL_STD)
    return tensors


def adapter_config(shape: Shape, rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in shape.projections],
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


class _Draw:
    """Normal bfloat16 tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: Sequence[int], std: float) -> Tensor:
        values = torch.randn(tuple(shape), generator=self._generator)
        return values.mul_(std).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.models", description="Make a model.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--adapters", type=int, default=32, help="how many")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds all of them")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    print(ensure_base(shape, arguments.root))
    print(ensure_adapters(Adapters(shape, arguments.rank, arguments.adapters), arguments.root))


if __name__ == "__main__":
    main()
