"""A whole run on a random tiny Llama: it learns, and what it writes is what it learned."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lory_trainer import cli, export, folders
from lory_trainer.base import attach, find_base, load_base
from lory_trainer.config import TrainOptions, parse_options
from lory_trainer.data import Example, collate
from lory_trainer.errors import ConfigError, OutputError, TrainingError
from lory_trainer.export import write_adapter
from lory_trainer.objective import Answers, accumulate
from lory_trainer.optimizer import learning_rate_at
from lory_trainer.train import TrainResult
from trainer_world import CHAT_TEMPLATE, CONFIG, events, make_world, train

# peft still reads a name that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TRAINER = Path(__file__).parents[1] / "trainer" / "lory_trainer"


@pytest.fixture
def world(tmp_path) -> Path:
    return make_world(tmp_path)


def run(world: Path, extra: str = "", **changes: Any) -> TrainResult:
    return train(world, CONFIG + extra, **changes)


def served_logits(world: Path, adapter: Path | None) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(world / "tiny")
    model = base if adapter is None else PeftModel.from_pretrained(base, adapter)
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(12)[None]).logits


def test_loss_falls_and_every_step_is_reported(world):
    result = run(world, "schedule: constant\n")
    steps = events(world, "step")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert tuple(step["loss"] for step in steps) == result.losses
    assert steps[-1]["tokens"] == 4 * 8 * 6
    assert steps[-1]["learned_tokens"] == 4 * 8 * 2
    assert [event["type"] for event in events(world)[:1] + events(world)[-1:]] == [
        "started",
        "finished",
    ]
    assert result.losses[-1] < 0.5 * result.losses[0]


def test_the_written_folder_gives_the_trained_models_logits(world, monkeypatch):
    trained: list[torch.Tensor] = []

    def watch_write(model, facts, output, **options):
        with torch.inference_mode():
            trained.append(model.eval()(input_ids=torch.arange(12)[None]).logits)
        write_adapter(model, facts, output, **options)

    monkeypatch.setattr("lory_trainer.train.write_adapter", watch_write)
    result = run(world)
    served = served_logits(world, result.output)
    assert torch.equal(served, trained[0])
    assert (served - served_logits(world, None)).abs().max() > 0.1


def test_the_folder_is_plain_peft_and_names_no_path(world):
    output = run(world).output
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json",
        "adapter_manifest.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert isinstance(config["lora_alpha"], int)
    for file in ("adapter_config.json", "adapter_manifest.json"):
        assert str(world) not in (output / file).read_text()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in output.iterdir())


def test_the_manifest_says_how_to_prompt_and_what_was_trained(world):
    manifest = json.loads((run(world).output / "adapter_manifest.json").read_text())
    assert (manifest["base"], manifest["template"]) == ("tiny", "{text}>")
    assert (manifest["fields"], manifest["eos_token"]) == (["text"], "<eos>")
    assert manifest["config"]["lora"]["alpha"] == 8
    assert manifest["config"]["learning_rate"] == 0.02
    assert set(manifest["config"]) == set(TrainOptions.model_fields)
    assert {len(manifest["base_files"][name]) for name in ("config", "tokenizer", "weights")} == {
        64
    }
    assert len(manifest["data"]["sha256"]) == 64
    assert manifest["data"]["rows"] == 8
    assert {"torch", "peft", "transformers"} <= set(manifest["libraries"])


def test_same_seed_same_bytes_other_seed_other_bytes(world):
    def tensor_bytes(extra: str) -> bytes:
        output = run(world, extra, replace=True).output
        return (output / "adapter_model.safetensors").read_bytes()

    first = tensor_bytes("")
    assert tensor_bytes("") == first
    assert tensor_bytes("seed: 1\n") != first


def test_tensors_are_written_in_the_asked_precision(world):
    text = CONFIG.replace("dtype: float32", "use_rslora: true, target_modules: [q_proj]")
    output = train(world, text).output
    with safe_open(output / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert all("q_proj" in name for name in file.keys())  # noqa: SIM118
    assert json.loads((output / "adapter_config.json").read_text())["use_rslora"] is True


def test_four_batches_of_two_are_one_batch_of_eight(world):
    options = parse_options(CONFIG)
    examples = [Example((0, *range(3, 4 + length), 1), 2) for length in range(2, 10)]

    def gradients(width: int) -> tuple[float, torch.Tensor]:
        model = attach(load_base(find_base("tiny", world), options), options)
        batches = [collate(examples[i : i + width]) for i in range(0, 8, width)]
        loss = accumulate(model, batches, Answers()).loss
        found = [tensor.grad for tensor in model.parameters() if tensor.grad is not None]
        return loss, torch.cat([gradient.flatten() for gradient in found])

    (loss, whole), (split_loss, split) = gradients(8), gradients(2)
    assert math.isclose(loss, split_loss, rel_tol=1e-5)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)
    # A mean of means would not pass: the rows differ in length.
    assert not torch.allclose(gradients(4)[1] * 1.01, whole, rtol=1e-4, atol=1e-6)


def test_the_base_is_never_trained(world):
    options = parse_options(CONFIG)
    model = attach(load_base(find_base("tiny", world), options), options)
    trainable = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_learning_rate_rises_then_falls():
    options = parse_options("base: x\ndata: x\nlearning_rate: 1.0\nwarmup_fraction: 0.2\n")
    rates = [learning_rate_at(index, 10, options, 1.0) for index in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1


def test_the_warm_up_may_be_told_in_steps():
    options = parse_options("base: x\ndata: x\nwarmup_steps: 4\nschedule: constant\n")
    rates = [learning_rate_at(index, 10, options, 1.0) for index in range(10)]
    assert rates == [0.25, 0.5, 0.75, *[1.0] * 7]
    options = parse_options("base: x\ndata: x\nwarmup_steps: 0\nschedule: constant\n")
    assert learning_rate_at(0, 10, options, 1.0) == 1


def test_a_template_that_begins_answers_is_told(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "tiny")
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}{{", "go {{ m['content'] }}{{"
    )
    tokenizer.save_pretrained(world / "tiny")
    train(world, CONFIG + "chat: true\nmax_steps: 1\n")
    assert "the base's chat template begins every answer with 'go'" in told(world)


def test_a_base_that_no_server_holds_so_is_told(tmp_path):
    world = make_world(tmp_path, hidden_size=64)
    train(world, CONFIG + "quantization: {bits: 4, type: fp4}\nmax_steps: 1\n")
    assert "the base is trained on in fp4" in told(world)
    train(world, CONFIG + "quantization: {bits: 4}\nmax_steps: 1\n", replace=True)
    assert "is trained on in" not in told(world)


def told(world: Path) -> str:
    return "\n".join(event["text"] for event in events(world, "message"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_writes_nothing(world):
    text = CONFIG.replace("2e-2", "1e30")
    with pytest.raises(TrainingError, match=r"step 2 of 8; nothing was written"):
        train(world, text)
    assert not (world / "adapters").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("r: 4", "r: 4, target_modules: [qq_proj]", "target_modules"),
        ("base: tiny", "base: ../tiny", "base: no folder"),
        ("base: tiny", "base: adapters_only", "base: no tokenizer could be loaded"),
        pytest.param(
            "base: tiny",
            "device: cuda\nbase: tiny",
            "device: cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_the_run_can_not_honour_is_refused(world, old, new, message):
    (world / "adapters_only").mkdir()
    with pytest.raises(ConfigError, match=message):
        train(world, CONFIG.replace(old, new))


def test_an_existing_adapter_is_kept_unless_replace_is_given(world):
    output = run(world).output
    before = (output / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="--replace"):
        run(world, "seed: 1\n")
    assert (output / "adapter_model.safetensors").read_bytes() == before
    run(world, "seed: 1\n", replace=True)
    assert (output / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in output.parent.iterdir()] == ["mine"]


def test_replace_never_removes_a_folder_that_is_no_adapter(world):
    with pytest.raises(OutputError, match="not an adapter folder"):
        train(world, CONFIG, output=world / "tiny", replace=True)
    assert (world / "tiny" / "model.safetensors").exists()


def test_an_adapter_is_never_half_visible(world, monkeypatch):
    """Whatever fails while writing, nothing appears under the adapter's name and no draft stays."""
    output = world / "adapters" / "mine"
    seen: list[bool] = []

    def failing_save(tensors, path, metadata):
        seen.append(output.exists())
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(export, "save_file", failing_save)
    with pytest.raises(OutputError, match="mine cannot be written: disk full; nothing was written"):
        run(world)
    assert seen == [False]
    assert list(output.parent.iterdir()) == []


def test_a_failed_rename_gives_the_old_adapter_back(world, monkeypatch):
    output = run(world).output
    before = (output / "adapter_model.safetensors").read_bytes()
    rename = Path.rename

    def failing_rename(path, to):
        if to == output and not path.name.endswith(".old"):
            raise OSError("no")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OutputError, match="cannot be written: no;"):
        run(world, "seed: 1\n", replace=True)
    assert (output / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["mine"]


def test_everything_is_on_disk_before_the_rename(world, monkeypatch):
    order: list[str] = []
    rename, sync = Path.rename, folders._sync
    monkeypatch.setattr(folders, "_sync", lambda folder: (order.append("sync"), sync(folder)))
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (order.append(f"rename {to.name}"), rename(path, to))[1]
    )
    run(world)
    assert order == ["sync", "rename mine"]


def test_command_trains_and_tells_how_to_serve(world, monkeypatch):
    (world / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(world)
    result = CliRunner().invoke(command(), [str(world / "run.yaml")])
    assert result.exit_code == 0, result.output
    assert (world / "adapters" / "run" / "adapter_config.json").exists()
    assert "adapter_id is run" in result.output


def test_command_tells_the_mistake_without_a_traceback(world):
    (world / "run.yaml").write_text(CONFIG + "'[bold]epoch': 1\n")
    result = CliRunner().invoke(command(), [str(world / "run.yaml")])
    assert result.exit_code == 1
    assert "[bold]epoch: no such key" in result.output
    assert "Traceback" not in result.output


def test_command_finds_an_existing_folder_before_it_loads_anything(world, monkeypatch):
    (world / "run.yaml").write_text(CONFIG)
    monkeypatch.setattr(cli, "_load_libraries", lambda _: pytest.fail("torch was loaded"))
    arguments = [str(world / "run.yaml"), "--output", str(world / "tiny")]
    result = CliRunner().invoke(command(), arguments)
    assert (result.exit_code, "exists; choose another --output" in result.output) == (1, True)


def test_an_interrupted_replacement_leaves_the_old_adapter(world, monkeypatch):
    run(world)
    old = (world / "adapters" / "mine" / "adapter_model.safetensors").read_bytes()
    rename = Path.rename

    def interrupted(path: Path, to: Path):
        if to.name == "mine" and not path.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(world, "seed: 1\n", replace=True)
    assert (world / "adapters" / "mine" / "adapter_model.safetensors").read_bytes() == old


def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(cli.train)
    return app


def test_importing_the_command_does_not_import_torch():
    code = "import sys, lory_trainer.cli; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_trainer_imports_neither_router_nor_engine():
    for path in TRAINER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("lory_router", "lory_server")) for name in names)
