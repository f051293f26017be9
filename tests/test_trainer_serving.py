"""What the trainer's model says, the engine says: logits of one are logits of the other."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lory_server.adapters.manner import MANIFEST_NAME, read_manner
from lory_server.messages import EngineOptions
from lory_trainer.base import find_base, load_base
from lory_trainer.config import parse_options
from ludwig_seed import LUDWIG_CONFIG
from parity_world import Session
from trainer_world import CONFIG, events, make_base, make_world, train, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Unused or unrecognized kwargs.*:UserWarning"),
]
ATOL = 1e-4
"""Of log-probabilities, on a base in float32 and on one in NF4. A scale that is wrong by one in a
hundred moves them further, and so does a base that is quantized in another way."""
DEMO_BASE = Path(__file__).parents[1] / "demo" / "base"


def probes(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "adapter_manifest.json").read_text())["probe"]["rows"]


def served(base: Path, adapters: Path, rows: list[dict[str, Any]], **options: Any) -> Iterator[Any]:
    """Of each row, what the engine says of its tokens: log-probabilities and the best tokens."""
    fields: dict[str, Any] = {
        "dtype": "float32",
        "block_size": 8,
        "kv_bytes": 1 << 20,
        "reader_processes": 0,
    }
    fields |= {"adapter_pool_bytes": 8 << 20, "adapter_host_bytes": 64 << 20}
    fields |= {"model": str(base), "adapters_dir": str(adapters), "device": "cpu"}
    world = Session(EngineOptions(**(fields | options)))
    manner = read_manner((adapters / "mine" / MANIFEST_NAME).read_bytes()).digest
    for number, row in enumerate(rows):
        world.submit(
            number,
            row["ids"],
            "mine",
            manner=manner,
            max_new_tokens=1,
            prompt_logprobs=True,
            num_top_logprobs=1,
        )
    world.run()
    for number, row in enumerate(rows):
        answer = world.answers[number]
        assert answer.finished is not None
        assert answer.finished.failure is None
        first = row["start"] - 1
        yield (
            list(answer.prompt_logprobs or ())[first:],
            [best[0][0] for best in answer.prompt_top[first:]],
        )
    world.close()


def worst_difference(base: Path, output: Path, **options: Any) -> float:
    rows = probes(output)
    worst = 0.0
    for row, (logprobs, top) in zip(
        rows, served(base, output.parent, rows, **options), strict=True
    ):
        assert len(logprobs) == len(row["logprobs"]) > 0
        worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, row["logprobs"], strict=True)))
        if not options:
            assert top == row["top"]
    return worst


def full(text: str, name: str) -> Any:
    return pytest.param(text, id=name, marks=pytest.mark.full)


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param("{r: 4, dtype: float32}", id="lora"),
        pytest.param("{r: 4, use_dora: true, use_rslora: true, alpha: 3}", id="dora-rslora"),
        full("{r: 4}", "bfloat16"),
        full("{r: 4, use_rslora: true, alpha: 3}", "rslora"),
        full("{r: 4, use_dora: true, dtype: float32}", "dora"),
        full("{r: 4, rank_pattern: {q_proj: 2}, alpha_pattern: {up_proj: 5.0}}", "patterns"),
    ],
)
def test_the_engine_says_what_the_trainer_said(tmp_path, lora):
    world = make_world(tmp_path)
    result = train(world, CONFIG.replace("{r: 4, dtype: float32}", lora))
    assert worst_difference(world / "tiny", result.output) < ATOL


def test_a_wrong_scale_would_be_seen(tmp_path):
    world = make_world(tmp_path)
    output = train(world, CONFIG).output
    config = json.loads((output / "adapter_config.json").read_text())
    config["lora_alpha"] *= 1.01
    (output / "adapter_config.json").write_text(json.dumps(config))
    rows = probes(output)
    found = [logprobs for logprobs, _ in served(world / "tiny", output.parent, rows)]
    wanted = [row["logprobs"] for row in rows]
    worst = max(
        abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert worst > ATOL


QLORA = CONFIG + "quantization: {bits: 4}\n"


def quantized_world(folder: Path) -> Path:
    """bitsandbytes packs blocks of 64."""
    return make_world(folder, hidden_size=64)


def test_qlora_learns_and_the_engine_says_the_same_of_the_same_base(tmp_path):
    world = quantized_world(tmp_path)
    result = train(world, QLORA)
    assert result.losses[-1] < 0.7 * result.losses[0]
    manifest = json.loads((result.output / "adapter_manifest.json").read_text())
    assert manifest["base_files"]["quantization"]["bits"] == 4
    nf4 = {"quantize": "nf4", "double_quant": True}
    assert worst_difference(world / "tiny", result.output, **nf4) < ATOL
    assert worst_difference(world / "tiny", result.output, quantize="nf4") > 10 * ATOL
    tensors = load_file(result.output / "adapter_model.safetensors")
    scaled = {name: t * 1.01 if "lora_B" in name else t for name, t in tensors.items()}
    save_file(scaled, result.output / "adapter_model.safetensors", {"format": "pt"})
    assert worst_difference(world / "tiny", result.output, **nf4) > 10 * ATOL


def test_an_evaluation_does_not_cut_qloras_gradients(tmp_path):
    """bitsandbytes repacks weights at a forward in eval mode, on CPUs that have bfloat16."""
    world = quantized_world(tmp_path)
    plain = train(world, QLORA).losses
    write_rows(world / "held.jsonl", {"text": "ab", "completion": "y"})
    text = QLORA + "eval_data: held.jsonl\neval_steps: 1\n"
    assert train(world, text, replace=True).losses == plain
    norms = [event["grad_norm"] for event in events(world, "step")]
    assert all(norm > 0 for norm in norms)


def test_double_quantization_and_fp4_are_what_was_asked_for(tmp_path):
    world = quantized_world(tmp_path)

    def first_linear(text: str) -> Any:
        options = parse_options(CONFIG + f"quantization: {text}\n")
        base: Any = load_base(find_base("tiny", world), options)
        return base.model.layers[0].self_attn.q_proj.weight.quant_state

    assert (first_linear("{bits: 4}").quant_type, first_linear("{bits: 4}").nested) == ("nf4", True)
    other = first_linear("{bits: 4, type: fp4, double: false}")
    assert (other.quant_type, other.nested) == ("fp4", False)


def test_peft_on_the_quantized_base_says_the_same(tmp_path):
    """The folder in transformers + PEFT, loaded as anybody would."""
    world = quantized_world(tmp_path)
    result = train(world, QLORA.replace("dtype: float32", "dtype: bfloat16"))
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base: Any = AutoModelForCausalLM.from_pretrained(
        world / "tiny", quantization_config=quantized, device_map={"": "cpu"}
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(base, result.output).eval()
    for row in probes(result.output):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row["ids"]])).logits[0, row["start"] - 1 : -1]
        assert logits.argmax(-1).tolist() == row["top"]
        torch.testing.assert_close(
            logits.max(-1).values, torch.tensor(row["logits"]), atol=ATOL, rtol=0
        )


def test_ludwigs_configuration_trains_on_the_demos_base(tmp_path):
    """Unmodified but for its base; with 4 bits, all of it on a CPU."""
    rows = [
        {"instruction": "Repeat.", "input": f"word {n}", "output": f"word {n}"} for n in range(36)
    ]
    write_rows(tmp_path / "rows.jsonl", *rows)
    text = LUDWIG_CONFIG.replace("meta-llama/Llama-2-7b-hf", str(DEMO_BASE))
    result = train(tmp_path, text + "dataset: rows.jsonl\n")
    assert (result.num_rows, result.num_steps) == (32, 2)
    assert all(math.isfinite(loss) for loss in result.losses)
    manifest = json.loads((result.output / "adapter_manifest.json").read_text())
    assert manifest["generation"] == {"max_new_tokens": 512, "temperature": 0.1}
    assert manifest["fields"] == ["instruction", "input"]
    assert (tmp_path / "runs" / "mine" / "test.jsonl").read_text().count("\n") == 2


def test_a_base_of_another_kind_is_known_by_its_digests(tmp_path):
    from lory_trainer.digests import base_digests

    first, second = make_base(tmp_path / "a"), make_base(tmp_path / "b")
    assert base_digests(first) == base_digests(second)
    tensors = load_file(second / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0] += 1
    save_file(tensors, second / "model.safetensors", {"format": "pt"})
    changed = base_digests(second)
    assert changed["weights"] != base_digests(first)["weights"]
    assert changed["config"] == base_digests(first)["config"]
