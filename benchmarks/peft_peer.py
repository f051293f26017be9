"""transformers + PEFT as a peer: one static batch at a time, in a process of its own.

    python -m benchmarks.peft_peer --base FOLDER --adapters FOLDER --names a00,a01 --threads 2

Reads a batch a line on stdin, {"prompts": [[ids]], "adapters": [name or ""], "output_tokens": n},
and answers each with a line on stdout, {"wall_s": s, "output_tokens": n}. A batch of one adapter is
run with that adapter active, a mixed one with PEFT's `adapter_names`. It must not know Lory.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

BASE_ROW = "__base__"
"""What PEFT calls a row without adapter."""


def load(base: Path, adapters: Path, names: Sequence[str], quantize: str) -> PeftModel:
    """The base in bfloat16 or NF4 with all adapters beside it, in bfloat16."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        quantization_config=nf4 if quantize == "nf4" else None,
    )
    model.generation_config.eos_token_id = None
    peft_model = PeftModel.from_pretrained(
        model, adapters / names[0], adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name in names[1:]:
        peft_model.load_adapter(adapters / name, adapter_name=name, autocast_adapter_dtype=False)
    return peft_model.eval()


@torch.inference_mode()
def run_batch(
    model: PeftModel, prompts: Sequence[Sequence[int]], names: Sequence[str], output_tokens: int
) -> tuple[float, Tensor]:
    """Seconds, and the new tokens of every row."""
    prompts_RT = torch.tensor(prompts, device=model.device)
    arguments: dict[str, Any] = {
        "input_ids": prompts_RT,
        "attention_mask": torch.ones_like(prompts_RT),
        "max_new_tokens": output_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "use_cache": True,
    }
    scope: AbstractContextManager[Any] = nullcontext()
    if not any(names):
        scope = model.disable_adapter()
    elif len(set(names)) == 1:
        model.set_adapter(names[0])
    else:
        arguments["adapter_names"] = [name or BASE_ROW for name in names]
    began_s = time.perf_counter()
    with scope:
        output_RT = model.generate(**arguments).cpu()
    wall_s = time.perf_counter() - began_s
    return wall_s, output_RT[:, prompts_RT.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peft_peer")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--names", required=True, help="adapters to load, with commas")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = arguments.names.split(",")
    model = load(arguments.base, arguments.adapters, names, arguments.quantize)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        wall_s, output_RT = run_batch(
            model, batch["prompts"], batch["adapters"], batch["output_tokens"]
        )
        print(json.dumps({"wall_s": wall_s, "output_tokens": output_RT.numel()}), flush=True)


if __name__ == "__main__":
    main()
