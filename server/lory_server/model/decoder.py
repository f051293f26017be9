"""The one decoder that every family is a configuration of.

    embed -> layers x (norm, qkv, rope + KV write, paged attention, o, norm, gate_up, act, down)
          -> norm -> head

It must not know files, quantization, schedules or checkpoints. Nor how an adapter changes it: its
linears are opaque callables that others make and wrap, the batch's `lora` is handed to them unread,
and what rows have of their own at its ends and norms, `ends` and `norms` apply.

Legend: T tokens of the step, L rows with logits, H hidden, N packed width, V vocabulary, P
positions, D head or rotary dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from lory_kernels import Ops, Segments
from lory_kernels.cpu import CpuOps
from lory_server.model.batch import ForwardBatch
from lory_server.model.ends import HeadRows, Run, embed_own, own_products, own_tokens
from lory_server.model.kv import KVCache
from lory_server.model.linear import DenseLinear, EmbeddingColumns, Linear
from lory_server.model.norms import Norm, Norms, head_norms
from lory_server.model.program import LayersProgram, Workspace
from lory_server.model.rope import RopeTable
from lory_server.model.sites import Site
from lory_server.model.spec import ModelSpec


@dataclass(slots=True)
class Layer:
    """Weights of one layer. The four linears stand in the order of the spec's sites."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    attention_norm: Norm
    """Before attention."""
    mlp_norm: Norm
    """Before the MLP."""
    post_attention_norm: Norm | None
    post_mlp_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None


AdaptHead = Callable[[Tensor, Tensor, Segments], None]
"""Changes the head's own logits_LV of hidden_LH."""

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
        rope: RopeTable,
    ) -> None:
        self.spec = spec
        self.ops = ops
        self.sites: tuple[Site, ...] = spec.sites()
        self.adapter_sites: tuple[Site, ...] = (*self.sites, *spec.end_sites())
        """With head and embedding."""
        self.max_model_len = rope.max_model_len
        self.short_tokens = rope.short_tokens
        """Most tokens of a sequence that is rotated by the first rows of the table; 0: all are."""
        self._embedding_VH = embedding_VH
        self._layers = layers
        self._last_norm = Norm("model.norm", norm_H)
        self._norms = Norms(ops, spec.norm_eps, spec.unit_offset_norms)
        self.head = head
        self._adapt_head: AdaptHead | None = None
        self._rope_PD = rope.rows_PD
        self._windows = tuple(window or 0 for window in spec.windows)
        self._softcap = spec.attention_softcap or 0.0
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
        own = self._embedding_VH.nbytes + self._last_norm.weight.nbytes + self._rope_PD.nbytes
        head = self.head
        shared = isinstance(head, DenseLinear) and head.weight_NK is self._embedding_VH
        head_bytes = 0 if shared else head.num_bytes
        return own + head_bytes + sum(_layer_bytes(layer) for layer in self._layers)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order of `sites`."""
        return tuple(getattr(layer, name) for layer in self._layers for name in LINEARS)

    @property
    def adapter_linears(self) -> tuple[Linear | EmbeddingColumns, ...]:
        """In the order of `adapter_sites`, for their numbers."""
        return (*self.linears, self.head, EmbeddingColumns(self._embedding_VH))

    @property
    def adapts_head(self) -> bool:
        return self._adapt_head is not None

    def adapt_head(self, adapt: AdaptHead) -> None:
        """Have `adapt` change the head's product where rows ask for it."""
        self._adapt_head = adapt

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
    def logits(self, hidden_LH: Tensor, own: HeadRows | None = None) -> Tensor:
        """logits_LV, float32, of normalised hidden states; `own`: rows whose head is adapted."""
        if not hidden_LH.shape[0]:
            return torch.empty((0, self.spec.vocab_size), dtype=torch.float32, device=self.device)
        logits_LV = self.head(hidden_LH, None)
        if own is not None:
            self._adapt_logits(hidden_LH, logits_LV, own)
        return self._capped(logits_LV.float())

    @torch.inference_mode()
    def own_logits(self, hidden_RH: Tensor, head_WH: Tensor) -> Tensor:
        """logits_RW, float32, over a vocabulary of another size than the base's."""
        return self._capped(functional.linear(hidden_RH, head_WH).float())

    def _capped(self, logits_LV: Tensor) -> Tensor:
        cap = self.spec.logit_softcap
        return logits_LV if cap is None else logits_LV.div_(cap).tanh_().mul_(cap)

    def _adapt_logits(self, hidden_LH: Tensor, logits_LV: Tensor, own: HeadRows) -> None:
        own_products(hidden_LH, logits_LV, own.runs)
        own_tokens(hidden_LH, logits_LV, own.runs)
        if own.lora is not None:
            assert self._adapt_head is not None, "no adapters are attached to the head"
            self._adapt_head(logits_LV, hidden_LH, own.lora)

    @torch.inference_mode()
    def hidden(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """hidden_LH of the batch's logit rows, after the last norm; writes the batch's KV."""
        num_tokens = batch.token_ids_T.shape[0]
        norms = batch.ends.norms if batch.ends else None
        program = self._program if norms is None else None
        if program is None:
            work = self._workspace(num_tokens)
            self._embed(batch, work.residual_TH)
            branch_TH = self._run_layers(work, batch, kv)
        else:
            work = program.work.first(num_tokens)
            self._embed(batch, work.residual_TH)
            branch_TH = program.run(batch, kv)
        rows_L = batch.logit_rows_L
        runs = norms.logits if norms else None
        return self._norms.enter(work.residual_TH[rows_L], branch_TH[rows_L], self._last_norm, runs)

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
        residual_TH = work.residual_TH
        runs = batch.ends.norms.tokens if batch.ends and batch.ends.norms else None
        branch_TH: Tensor | None = None
        for number, layer in enumerate(self._layers):
            x_TH = self._norms.enter(residual_TH, branch_TH, layer.attention_norm, runs)
            y_TH = self._attend(number, layer, x_TH, work.mixed_TN, batch, kv, runs)
            y_TH = self._norms.leave(y_TH, layer.post_attention_norm, runs)
            x_TH = self._norms.enter(residual_TH, y_TH, layer.mlp_norm, runs)
            y_TH = self._mlp(layer, x_TH, work.inner_TI, batch)
            branch_TH = self._norms.leave(y_TH, layer.post_mlp_norm, runs)
        assert branch_TH is not None
        return branch_TH

    def _embed(self, batch: ForwardBatch, out_TH: Tensor) -> None:
        token_ids_T, num_tokens = batch.token_ids_T, self._embedding_VH.shape[0]
        if batch.ends is not None and batch.ends.widest_vocabulary > num_tokens:
            # Of tokens that the base does not have, any row: it is written over.
            token_ids_T = token_ids_T.clamp_max(num_tokens - 1)
        torch.index_select(self._embedding_VH, 0, token_ids_T, out=out_TH)
        if batch.ends is not None:
            embed_own(batch.token_ids_T, out_TH, batch.ends.embedding)
        if self._embedding_scale != 1.0:
            out_TH.mul_(self._embedding_scale)

    def _attend(
        self,
        number: int,
        layer: Layer,
        x_TH: Tensor,
        mixed_TN: Tensor,
        batch: ForwardBatch,
        kv: KVCache,
        runs: Sequence[Run] | None,
    ) -> Tensor:
        spec, ops = self.spec, self.ops
        keys, values = kv.keys[number], kv.values[number]
        qkv_TN = layer.qkv(x_TH, batch.lora)
        for rows, q_norm_D, k_norm_D in head_norms(layer.q_norm, layer.k_norm, runs):
            ops.rope_write_kv(
                qkv_TN[rows],
                batch.positions_T[rows],
                self._rope_PD,
                keys,
                values,
                batch.kv_slots_T[rows],
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                q_norm_D=q_norm_D,
                k_norm_D=k_norm_D,
                norm_eps=spec.norm_eps,
                norm_weight_in_fp32=spec.unit_offset_norms,
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
        return layer.o(mixed_TN, batch.lora)

    def _mlp(self, layer: Layer, x_TH: Tensor, inner_TI: Tensor, batch: ForwardBatch) -> Tensor:
        gate_up_TN = layer.gate_up(x_TH, batch.lora)
        self._act_mul(gate_up_TN, inner_TI)
        return layer.down(inner_TI, batch.lora)


def _layer_bytes(layer: Layer) -> int:
    parts = [getattr(layer, part.name) for part in fields(layer)]
    tensors = sum(part.weight.nbytes for part in parts if isinstance(part, Norm))
    return tensors + sum(getattr(layer, name).num_bytes for name in LINEARS)
