"""A decoder's norms by the checkpoint's names, and how rows with weights of their own get them.

One call of an op where all rows take the base's weight, a call for each run of rows else. It must
not know layers' order, nor where weights come from.

Legend: T tokens, H hidden, D head dimension, N packed width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lory_kernels import Ops
from lory_server.model.ends import Run, norm_weights


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    module: str
    weight: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Norms:
    """RMS norms as one family computes them."""

    ops: Ops
    eps: float
    in_fp32: bool

    def enter(
        self,
        residual_TH: Tensor,
        branch_TH: Tensor | None,
        norm: Norm,
        runs: Sequence[Run] | None,
    ) -> Tensor:
        """Join a branch to the residual, if there is one yet, and norm what comes next."""
        if runs is not None:
            return self._enter_runs(residual_TH, branch_TH, norm, runs)
        if branch_TH is None:
            return self.ops.rms_norm(
                residual_TH, norm.weight, self.eps, weight_in_fp32=self.in_fp32
            )
        return self.ops.add_rms_norm(
            residual_TH, branch_TH, norm.weight, self.eps, branch_TH, weight_in_fp32=self.in_fp32
        )

    def _enter_runs(
        self, residual_TH: Tensor, branch_TH: Tensor | None, norm: Norm, runs: Sequence[Run]
    ) -> Tensor:
        out_TH = torch.empty_like(residual_TH) if branch_TH is None else branch_TH
        for rows, weight_H in norm_weights(runs, norm.module, norm.weight):
            run = Norm(norm.module, weight_H)
            if branch_TH is None:
                self._norm(residual_TH[rows], run, out_TH[rows])
            else:
                self.enter(residual_TH[rows], branch_TH[rows], run, None)
        return out_TH

    def leave(self, y_TH: Tensor, norm: Norm | None, runs: Sequence[Run] | None) -> Tensor:
        """Norm a branch in place before it joins, where a family does."""
        if norm is None:
            return y_TH
        if runs is None:
            return self._norm(y_TH, norm, y_TH)
        for rows, weight_H in norm_weights(runs, norm.module, norm.weight):
            self._norm(y_TH[rows], Norm(norm.module, weight_H), y_TH[rows])
        return y_TH

    def _norm(self, x_TH: Tensor, norm: Norm, out_TH: Tensor) -> Tensor:
        return self.ops.rms_norm(x_TH, norm.weight, self.eps, out_TH, weight_in_fp32=self.in_fp32)


def head_norms(
    q_norm: Norm | None, k_norm: Norm | None, runs: Sequence[Run] | None
) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
    """The rows of a step and what norms their queries and keys."""
    if runs is None or q_norm is None or k_norm is None:
        yield slice(None), q_norm and q_norm.weight, k_norm and k_norm.weight
        return
    of_q = norm_weights(runs, q_norm.module, q_norm.weight)
    of_k = norm_weights(runs, k_norm.module, k_norm.weight)
    for (rows, q_norm_D), (_, k_norm_D) in zip(of_q, of_k, strict=True):
        yield rows, q_norm_D, k_norm_D
