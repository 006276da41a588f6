"""Losses from hidden states, without the logits of all rows at once. No equation is here: the stage has them.

At the papers' sizes the logits of one sample, 829 rows of 151,936 ids, are half a gigabyte, and losses that
are written on them hold several copies. So rows are walked in chunks: the logits of a chunk are formed, the
objective of their log-probabilities is differentiated at once by autograd, and they are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 25  # logits formed at a time: 220 rows of 151,936 ids
BLOCK = 1 << 20  # logits that pointwise work passes over at a time on a CPU: they stay in its cache

Head = tuple[Tensor, Tensor]  # hidden states (B, T, D) and the weight of the language-model head (V, D)


class Rows(NamedTuple):
    """Some rows of one kind, as an objective sees them; there may be none."""

    log_s: Tensor  # (N, V_s) the student's log-probabilities of the next token
    log_t: Tensor | None  # (N, V_t) the teacher's
    y: Tensor  # (N,) the next token


def over_rows(
    objective: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    kinds: list[Tensor | None],
    y: Tensor,
    student: Head,
    teacher: Head | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that `objective` returns and its terms for the log, over all rows of all kinds.

    objective  a function of one `Rows` for each kind, which must be a sum over rows. It is called with a few
               rows of one kind and none of the others, until all rows have passed
    kinds      a mask (B, T) for each of its arguments; None for no rows
    y          (B, T) the token that follows each position
    Logits are formed in the precision of the student's hidden states and of the teacher's head; all else is
    computed in fp32 (fp64 for an fp64 student). The gradients are ready when this returns: the loss may be
    scaled and added to others, and differentiated once (RuntimeError after that).
    """
    kinds = [torch.zeros_like(y, dtype=torch.bool) if kind is None else kind for kind in kinds]
    sizes = [int(kind.sum()) for kind in kinds]
    hidden, y = (torch.cat([x[kind] for kind in kinds]) for x in (student[0], y))  # (N, D), (N,)
    t_hidden = t_head = None
    if teacher is not None:
        t_head = teacher[1]
        t_hidden = torch.cat([teacher[0][kind] for kind in kinds]).to(t_head.dtype)
    names: list[str] = []
    loss, *terms = _OverRows.apply(objective, names, sizes, hidden, student[1], t_hidden, t_head, y)
    return loss, dict(zip(names, terms))


class _OverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, objective, names, sizes, hidden, head, t_hidden, t_head, y):
        head_s, full = head.to(hidden.dtype), _full(hidden.dtype)
        d_hidden, d_head = torch.empty_like(hidden), None
        if ctx.needs_input_grad[4]:
            d_head = torch.zeros_like(head)
        chunks = list(_chunks(sizes, max(1, CHUNK // len(head))))
        largest = max(rows.stop - rows.start for _, rows in chunks)
        z_s, z_t = head_s.new_empty(largest, len(head)), None
        if t_head is not None:
            z_t = t_head.new_empty(largest, len(t_head))
        block = len(hidden) + 1 if head.is_cuda else max(1, BLOCK // len(head))
        values = 0
        for kind, rows in chunks:
            _logits(hidden[rows], head_s, out=z_s)
            if t_head is not None:
                _logits(t_hidden[rows], t_head, out=z_t)
            n = rows.stop - rows.start
            for first in range(0, max(n, 1), block):
                part = slice(first, min(first + block, n))
                with torch.enable_grad():
                    leaf = z_s[part].to(full).requires_grad_()
                    log_s = F.log_softmax(leaf, dim=-1)
                    log_t = None if z_t is None else F.log_softmax(z_t[part].to(full), dim=-1)
                    mine = Rows(log_s, log_t, y[rows][part])
                    none = Rows(*(x if x is None else x.detach()[:0] for x in mine))
                    loss, terms = objective(*(mine if k == kind else none for k in range(len(sizes))))
                    z_s[part] = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else 0
                values = values + torch.stack([loss, *terms.values()]).detach()
            dz = z_s[:n]  # (n, V)
            torch.mm(dz, head_s, out=d_hidden[rows])
            if d_head is not None and d_head.dtype == dz.dtype:
                d_head.addmm_(dz.T, hidden[rows])
            elif d_head is not None:  # products in bf16, their sum in fp32
                d_head.add_(dz.T @ hidden[rows])
        names[:] = terms
        ctx.gradients = d_hidden, d_head
        loss, *terms = values.unbind()
        ctx.mark_non_differentiable(*terms)
        return loss, *terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("over_rows keeps its gradients for one backward pass, and this is a second")
        gradients, ctx.gradients = ctx.gradients, None
        d_hidden, d_head = (g if g is None or d_loss == 1 else g.mul_(d_loss) for g in gradients)
        return None, None, None, d_hidden, d_head, None, None, None


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(sizes: list[int], limit: int) -> Iterator[tuple[int, slice]]:
    """(kind, its rows) in even pieces of at most `limit` rows; a kind without rows is one empty piece."""
    start = 0
    for kind, size in enumerate(sizes):
        step = -(-size // max(1, -(-size // limit)))
        for first in range(0, max(size, 1), max(step, 1)):
            yield kind, slice(start + first, start + min(first + step, size))
        start += size


def _logits(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """out (n, V) = hidden (n, D) head^T; on a CPU some ids at a time, which is faster where rows are few."""
    ids = len(head) if head.is_cuda else 1024
    for z, w in zip(out[: len(hidden)].split(ids, dim=1), head.split(ids)):
        torch.mm(hidden, w.T, out=z)


def values_of_rows(
    function: Callable[[Tensor, Tensor], Tensor], kind: Tensor, y: Tensor, model: Head
) -> Tensor:
    """function(log_p (N, V), y (N,)) -> (N,) of all rows of a mask (B, T), for losses that are no sum over
    rows. The logits are formed in chunks, and once more in the backward pass.
    """
    hidden, head, size = model[0][kind], model[1], max(1, CHUNK // len(model[1]))

    def of_chunk(h: Tensor, y: Tensor) -> Tensor:
        z = h @ head.to(h.dtype).T
        return function(F.log_softmax(z.to(_full(z.dtype)), dim=-1), y)

    parts = zip(hidden.split(size), y[kind].split(size))
    return torch.cat([checkpoint(of_chunk, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def gram(head: Tensor, other: Tensor) -> Tensor:
    """G = W^T W (D, D) of a head W (V, D), in fp32, over the ids that the `other` head has too."""
    return _Gram.apply(head, min(len(head), len(other)))


class _Gram(torch.autograd.Function):
    """dW = W (dG + dG^T)."""

    @staticmethod
    def forward(ctx, head, n_ids):
        ctx.head, ctx.n_ids = head, n_ids  # no saved tensors: each micro-batch of a step goes back through it
        width = head.shape[1]
        g = head.new_zeros(width, width, dtype=_full(head.dtype))
        for w in head[:n_ids].split(1 << 14):
            w = w.to(g.dtype)
            for i in range(0, width, 256):  # G is symmetric: its upper triangle of blocks is enough
                g[i : i + 256, i:].addmm_(w[:, i : i + 256].T, w[:, i:])
        return g.triu() + g.triu(1).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        d_head = ctx.head @ (d + d.T).to(ctx.head.dtype)
        d_head[ctx.n_ids :] = 0
        return d_head, None
