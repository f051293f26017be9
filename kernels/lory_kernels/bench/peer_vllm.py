"""vLLM's LoRA kernels: lora_shrink and lora_expand, in the configuration that it starts with.

Its engine gives every slot the largest rank and folds an adapter's scale into B; so does this. It
sizes the grid by the slots there are, here those of the case. It must not know how calls are timed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lory_kernels.bench.case import Contender, Place, Run
from lory_kernels.bench.foreign import ForeignPackage, nothing
from lory_kernels.bench.sgmv import SCALE, SgmvInputs

OPS = "vllm.lora.ops.triton_ops"


def load(root: Path, place: Place) -> tuple[Contender[SgmvInputs], ...]:
    """From the folder that holds the package."""
    modules = _kernels(root, place)
    return (
        Contender(
            "vllm",
            "peer",
            lambda inputs: _bind(modules, inputs),
            per_step=lambda inputs: _bind_metadata(modules, inputs),
        ),
    )


def _kernels(root: Path, place: Place) -> SimpleNamespace:
    import triton
    import triton.language as tl

    package = ForeignPackage(root, "vllm")
    package.folders(["vllm.lora", "vllm.lora.ops", OPS, "vllm.utils"])
    package.stand_in(
        "vllm.envs",
        VLLM_BATCH_INVARIANT=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
        VLLM_LORA_DISABLE_PDL=False,
    )
    package.stand_in("vllm.logger", init_logger=_silent)
    package.stand_in("vllm.platforms", current_platform=_platform(place.device))
    package.stand_in("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True)
    package.stand_in("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    package.stand_in(
        "vllm.utils.torch_utils",
        # Without an op of that name registered, its modules fall back to the plain functions.
        direct_register_custom_op=nothing,
        async_tensor_h2d=torch.tensor,
    )
    return SimpleNamespace(
        shrink=package.module(f"{OPS}.lora_shrink_op").lora_shrink,
        expand=package.module(f"{OPS}.lora_expand_op").lora_expand,
        metadata=package.module(f"{OPS}.lora_kernel_metadata").LoRAKernelMeta,
        addresses=package.module(f"{OPS}.utils"),
    )


def _silent(_name: str) -> SimpleNamespace:
    return SimpleNamespace(info_once=nothing, warning_once=nothing)


def _platform(device: torch.device) -> SimpleNamespace:
    has_cuda = device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if has_cuda else (0, 0)
    capability = 10 * major + minor
    return SimpleNamespace(
        is_cuda=lambda: has_cuda,
        is_device_capability=lambda wanted: capability == wanted,
        has_device_capability=lambda wanted: capability >= wanted,
    )


def _bind(modules: SimpleNamespace, inputs: SgmvInputs) -> Run:
    x_TH, y_TN = inputs.x_TH, inputs.y_TN
    a_weights, b_weights = _weights(inputs)
    rank = a_weights[0].shape[1]
    shape = (len(a_weights), x_TH.shape[0], rank)
    buffer = torch.empty(shape, dtype=torch.float32, device=x_TH.device)
    arguments = _metadata(modules, inputs)[1]
    # It remembers weights by their addresses alone, which others had before.
    modules.addresses._LORA_A_PTR_DICT.clear()
    modules.addresses._LORA_B_PTR_DICT.clear()

    def run() -> tuple[Tensor, ...]:
        modules.shrink(x_TH, a_weights, buffer, *arguments, 1.0)
        modules.expand(buffer, b_weights, y_TN, *arguments, offset_start=0, add_inputs=True)
        return (y_TN,)

    return run


def _weights(inputs: SgmvInputs) -> tuple[list[Tensor], list[Tensor]]:
    """(A, B) of each slice: [slots, rank, in] and [slots, out, rank], the largest rank for all."""
    most, slots = max(inputs.ranks), range(len(inputs.ranks))
    a_weights: list[Tensor] = []
    b_weights: list[Tensor] = []
    for k in range(len(inputs.site.out_features)):
        factors = [inputs.factors(slot, k) for slot in slots]
        a_weights.append(torch.stack([_padded(a_RH, most) for a_RH, _ in factors]))
        b_SRN = torch.stack([_padded(b_RN * SCALE, most) for _, b_RN in factors])
        b_weights.append(b_SRN.transpose(1, 2).contiguous())
    return a_weights, b_weights


def _padded(factor: Tensor, rank: int) -> Tensor:
    return pad(factor, (0, 0, 0, rank - factor.shape[0]))


def _metadata(
    modules: SimpleNamespace, inputs: SgmvInputs
) -> tuple[Callable[[Tensor], None], Sequence[Any], Tensor]:
    """(What renews the arguments for a step, the arguments, that step)."""
    device, rows = inputs.x_TH.device, inputs.x_TH.shape[0]
    metadata = modules.metadata.make(len(inputs.ranks), rows, device)
    slot_of_row = torch.tensor(inputs.mix.slot_of_row, dtype=torch.int32, device=device)
    metadata.prepare_tensors(slot_of_row)
    return metadata.prepare_tensors, metadata.meta_args(rows, False), slot_of_row


def _bind_metadata(modules: SimpleNamespace, inputs: SgmvInputs) -> Run:
    prepare, arguments, slot_of_row = _metadata(modules, inputs)

    def run() -> tuple[Tensor, ...]:
        prepare(slot_of_row)
        return tuple(one for one in arguments if isinstance(one, Tensor))

    return run
