"""The one decoder that every family is a configuration of.

    embed -> layers x (norm, qkv, rope + KV write, paged attention, o, norm, gate_up, act, down)
          -> norm -> head

It must not know adapters, quantization, schedules or checkpoints: its linears are opaque
callables that others make and wrap, and the batch's `lora` is handed to them unread.

Legend: T tokens of the step, L rows with logits, H hidden, N packed width, V vocabulary, P
positions, D head or rotary dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lory_kernels import Ops
from lory_kernels.cpu import CpuOps
from lory_server.model.batch import ForwardBatch
from lory_server.model.kv import KVCache
from lory_server.model.linear import DenseLinear, Linear
from lory_server.model.program import LayersProgram, Workspace
from lory_server.model.sites import Site
from lory_server.model.spec import ModelSpec


@dataclass(slots=True)
class Layer:
    """Weights of one layer. The four linears stand in the order of the spec's sites."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    attention_norm_H: Tensor
    """Before attention."""
    mlp_norm_H: Tensor
    """Before the MLP."""
    post_attention_norm_H: Tensor | None
    post_mlp_norm_H: Tensor | None
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None


LINEARS = ("qkv", "o", "gate_up", "down")


class Decoder:
    """One base, ready to compute."""

    def __init__(
        self,
        spec: ModelSpec,
        ops: Ops,
        embedding_VH: Tensor,
        layers: tuple[Layer, ...],
        norm_H: Tensor,
        head: Linear,
        rope_PD: Tensor,
    ) -> None:
        self.spec = spec
        self.ops = ops
        self.sites: tuple[Site, ...] = spec.sites()
        self.max_model_len = rope_PD.shape[0]
        self._embedding_VH = embedding_VH
        self._layers = layers
        self._norm_H = norm_H
        self._head = head
        self._rope_PD = rope_PD
        self._windows = tuple(window or 0 for window in spec.windows)
        self._softcap = spec.attention_softcap or 0.0
        self._norm_in_fp32 = spec.unit_offset_norms
        # Rounded as transformers does: sqrt(3072) is 55.5 in bfloat16.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=self.dtype).item()
        self._program: LayersProgram | None = None
        self._act_mul = ops.silu_mul if spec.activation == "silu" else ops.gelu_tanh_mul

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding_VH.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding_VH.device

    @property
    def num_bytes(self) -> int:
        """Device bytes of all weights and tables."""
        own = self._embedding_VH.nbytes + self._norm_H.nbytes + self._rope_PD.nbytes
        head = self._head
        shared = isinstance(head, DenseLinear) and head.weight_NK is self._embedding_VH
        head_bytes = 0 if shared else head.num_bytes
        return own + head_bytes + sum(_layer_bytes(layer) for layer in self._layers)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order of `sites`."""
        return tuple(getattr(layer, name) for layer in self._layers for name in LINEARS)

    def wrap_linears(self, wrap: Callable[[int, Linear], Linear]) -> None:
        """Replace linear i, that of `sites[i]`, by wrap(i, linear)."""
        for number, layer in enumerate(self._layers):
            for place, name in enumerate(LINEARS):
                linear = wrap(number * len(LINEARS) + place, getattr(layer, name))
                setattr(layer, name, linear)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """logits_LV, float32, of the batch's logit rows."""
        return self.logits(self.hidden(batch, kv))

    @torch.inference_mode()
    def logits(self, hidden_LH: Tensor) -> Tensor:
        """logits_LV, float32, of normalised hidden states."""
        if not hidden_LH.shape[0]:
            return torch.empty((0, self.spec.vocab_size), dtype=torch.float32, device=self.device)
        logits_LV = self._head(hidden_LH, None).float()
        cap = self.spec.logit_softcap
        return logits_LV if cap is None else logits_LV.div_(cap).tanh_().mul_(cap)

    @torch.inference_mode()
    def hidden(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """hidden_LH of the batch's logit rows, after the last norm; writes the batch's KV."""
        num_tokens = batch.token_ids_T.shape[0]
        program = self._program
        if program is None:
            work = self._workspace(num_tokens)
            self._embed(batch.token_ids_T, work.residual_TH)
            branch_TH = self._run_layers(work, batch, kv)
        else:
            work = program.work.first(num_tokens)
            self._embed(batch.token_ids_T, work.residual_TH)
            branch_TH = program.run(batch, kv)
        rows_L = batch.logit_rows_L
        return self._enter(work.residual_TH[rows_L], branch_TH[rows_L], self._norm_H)

    @torch.inference_mode()
    def record(self, kv: KVCache, max_tokens: int) -> None:
        """Make a program of all layers, where they can be recorded; once adapters are attached.

        From then on steps have at most `max_tokens` tokens and write to `kv`.
        """
        ops = self.ops
        if not isinstance(ops, CpuOps) or not ops.can_record(self.dtype, self.spec.head_dim):
            return
        if all(linear.is_recordable for linear in self.linears):
            work = self._workspace(max_tokens)
            self._program = LayersProgram(ops, self._run_layers, work, kv)

    @property
    def is_recorded(self) -> bool:
        return self._program is not None

    @property
    def recorded_bytes(self) -> int:
        """Of the buffers that a recorded step works in."""
        return 0 if self._program is None else self._program.num_bytes

    def _workspace(self, num_tokens: int) -> Workspace:
        spec = self.spec
        widths = (spec.hidden_size, spec.q_size, spec.intermediate_size)
        return Workspace(*(self._embedding_VH.new_empty((num_tokens, width)) for width in widths))

    def _run_layers(self, work: Workspace, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """The branch that the last layer leaves beside the residual."""
        ops, eps = self.ops, self.spec.norm_eps
        residual_TH = work.residual_TH
        branch_TH: Tensor | None = None
        for number, layer in enumerate(self._layers):
            x_TH = self._enter(residual_TH, branch_TH, layer.attention_norm_H)
            y_TH = self._attend(number, layer, x_TH, work.mixed_TN, batch, kv)
            x_TH = ops.add_rms_norm(
                residual_TH, y_TH, layer.mlp_norm_H, eps, y_TH, weight_in_fp32=self._norm_in_fp32
            )
            branch_TH = self._mlp(layer, x_TH, work.inner_TI, batch)
        assert branch_TH is not None
        return branch_TH

    def _embed(self, token_ids_T: Tensor, out_TH: Tensor) -> None:
        torch.index_select(self._embedding_VH, 0, token_ids_T, out=out_TH)
        if self._embedding_scale != 1.0:
            out_TH.mul_(self._embedding_scale)

    def _enter(self, residual_TH: Tensor, branch_TH: Tensor | None, norm_H: Tensor) -> Tensor:
        """Join a branch to the residual, if there is one yet, and norm what comes next."""
        eps, in_fp32 = self.spec.norm_eps, self._norm_in_fp32
        if branch_TH is None:
            return self.ops.rms_norm(residual_TH, norm_H, eps, weight_in_fp32=in_fp32)
        return self.ops.add_rms_norm(
            residual_TH, branch_TH, norm_H, eps, branch_TH, weight_in_fp32=in_fp32
        )

    def _attend(
        self,
        number: int,
        layer: Layer,
        x_TH: Tensor,
        mixed_TN: Tensor,
        batch: ForwardBatch,
        kv: KVCache,
    ) -> Tensor:
        spec, ops = self.spec, self.ops
        keys, values = kv.keys[number], kv.values[number]
        qkv_TN = layer.qkv(x_TH, batch.lora)
        ops.rope_write_kv(
            qkv_TN,
            batch.positions_T,
            self._rope_PD,
            keys,
            values,
            batch.kv_slots_T,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            q_norm_D=layer.q_norm_D,
            k_norm_D=layer.k_norm_D,
            norm_eps=spec.norm_eps,
            norm_weight_in_fp32=self._norm_in_fp32,
        )
        ops.paged_attention(
            qkv_TN,
            keys,
            values,
            batch.block_tables_RM,
            batch.query_starts_R1,
            batch.context_lens_R,
            mixed_TN,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.attention_scale,
            window=self._windows[number],
            softcap=self._softcap,
        )
        return self._post_norm(layer.o(mixed_TN, batch.lora), layer.post_attention_norm_H)

    def _mlp(self, layer: Layer, x_TH: Tensor, inner_TI: Tensor, batch: ForwardBatch) -> Tensor:
        gate_up_TN = layer.gate_up(x_TH, batch.lora)
        self._act_mul(gate_up_TN, inner_TI)
        return self._post_norm(layer.down(inner_TI, batch.lora), layer.post_mlp_norm_H)

    def _post_norm(self, y_TH: Tensor, norm_H: Tensor | None) -> Tensor:
        if norm_H is None:
            return y_TH
        return self.ops.rms_norm(
            y_TH, norm_H, self.spec.norm_eps, y_TH, weight_in_fp32=self._norm_in_fp32
        )


def _layer_bytes(layer: Layer) -> int:
    parts = [getattr(layer, part.name) for part in fields(layer)]
    tensors = sum(part.nbytes for part in parts if isinstance(part, Tensor))
    return tensors + sum(getattr(layer, name).num_bytes for name in LINEARS)
