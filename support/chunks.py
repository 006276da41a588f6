"""Losses from hidden states, without the logits of all rows at once. No equation is here: the stage has them.

At the papers' sizes the logits of one sample, 829 rows of 151,936 ids, are half a gigabyte, and losses that
are written on them hold several copies. So rows are walked in chunks: the logits of a chunk are formed, the
objective of their log-probabilities is differentiated at once by autograd, and they are forgotten.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 25  # logits formed at a time: 220 rows of 151,936 ids; on a GPU ON_GPU times as many
ON_GPU = 4
BLOCK = 1 << 20  # logits that pointwise work passes over at a time on a CPU: they stay in its cache
Head = tuple[Tensor, Tensor]  # hidden states (B, T, D) and the weight of the language-model head (V, D)


class Rows(NamedTuple):
    """Some rows of one kind, as an objective sees them; there may be none."""

    log_s: Tensor  # (N, V_s) the student's log-probabilities of the next token
    log_t: Tensor | None  # (N, V_t) the teacher's
    y: Tensor  # (N,) the next token where it is learned, else -100


def over_rows(
    objective: Callable[..., tuple[Tensor, dict[str, Tensor]]], kinds: list[Tensor | None], y: Tensor,
    student: Head, teacher: Head | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that `objective` returns and its terms for the log, over all rows of all kinds.

    objective  a function of one `Rows` for each kind, which must be a sum over rows. It is called with a few
               rows of one kind and none of the others, until all rows have passed
    kinds      a mask (B, T) for each of its arguments; None for no rows
    y          (B, T) the next token where it is learned, else -100
    Logits and their gradients have the precision of the student's hidden states and of the teacher's head;
    softmax and losses are fp32 (fp64 for an fp64 student). The gradients are ready when this returns: the
    loss may be scaled, added to others and differentiated once (RuntimeError after that).
    """
    kinds = [torch.zeros_like(y, dtype=torch.bool) if kind is None else kind for kind in kinds]
    pick = lambda x: torch.cat([x[kind] for kind in kinds])  # (N, ...), kind by kind
    s = pick(student[0]), student[1]
    t = (pick(teacher[0]).to(teacher[1].dtype), teacher[1]) if teacher else (None, None)
    names, sizes = [], [int(kind.sum()) for kind in kinds]
    loss, *terms = _OverRows.apply(objective, names, sizes, *s, *t, pick(y))
    return loss, dict(zip(names, terms))


class _OverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, objective, names, sizes, hidden, head, t_hidden, t_head, y):
        head_s, full, values = head.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32), 0
        d_hidden, d_head = torch.empty_like(hidden), None
        if ctx.needs_input_grad[4]:
            d_head = torch.zeros_like(head)
        chunk, block = (CHUNK * ON_GPU, CHUNK * ON_GPU) if head.is_cuda else (CHUNK, BLOCK)
        chunk, block = max(1, chunk // len(head)), max(1, block // len(head))
        pieces = [(k, p) for k, size in enumerate(sizes) for p in _pieces(sum(sizes[:k]), size, chunk)]
        largest = max(len(y[rows]) for _, rows in pieces)
        out_s, out_t = (w if w is None else w.new_empty(largest, len(w)) for w in (head_s, t_head))
        for kind, rows in pieces:
            z_s = _logits(hidden[rows], head_s, out_s)  # (n, V_s)
            z_t = None if t_head is None else _logits(t_hidden[rows], t_head, out_t)  # (n, V_t)
            for part in _pieces(0, len(z_s), block):
                with torch.enable_grad():
                    leaf = z_s[part].to(full).requires_grad_()
                    log_t = None if z_t is None else F.log_softmax(z_t[part].to(full), dim=-1)
                    mine = Rows(F.log_softmax(leaf, dim=-1), log_t, y[rows][part])
                    none = Rows(*(x if x is None else x.detach()[:0] for x in mine))
                    loss, terms = objective(*(mine if k == kind else none for k in range(len(sizes))))
                    z_s[part] = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else 0
                values = values + torch.stack([loss, *terms.values()]).detach()
            torch.mm(z_s, head_s, out=d_hidden[rows])  # z_s now holds d loss / d z_s
            if d_head is not None and d_head.dtype == z_s.dtype:
                d_head.addmm_(z_s.T, hidden[rows])
            elif d_head is not None:  # products in bf16, their sum in fp32
                d_head.add_(z_s.T @ hidden[rows])
        names[:], ctx.gradients = terms, (d_hidden, d_head)
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


def _pieces(start: int, size: int, limit: int) -> list[slice]:
    """`size` rows from `start` on in even pieces of at most `limit`; no rows are one empty piece."""
    n = max(1, -(-size // limit))
    return [slice(start + size * k // n, start + size * (k + 1) // n) for k in range(n)]


def _logits(hidden: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """hidden (n, D) head^T -> (n, V) in `out`; on a CPU some ids at a time, which is faster for few rows."""
    out, ids = out[: len(hidden)], len(head) if head.is_cuda else 1024
    for z, w in zip(out.split(ids, dim=1), head.split(ids)):
        torch.mm(hidden, w.T, out=z)
    return out


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, n_ids):
        ctx.head, ctx.n_ids = head, n_ids  # no saved tensors: every micro-batch goes back through it
        width, full = head.shape[1], torch.promote_types(head.dtype, torch.float32)
        g = head.new_zeros(width, width, dtype=full)
        for w in head[:n_ids].split(1 << 14):
            for i in range(0, width, 256):  # G is symmetric: its upper triangle of blocks is enough
                g[i : i + 256, i:].addmm_(w[:, i : i + 256].T.to(full), w[:, i:].to(full))
        return g.triu() + g.triu(1).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        d_head = ctx.head @ (d + d.T).to(ctx.head.dtype)  # dW = W (dG + dG^T)
        d_head[ctx.n_ids :] = 0
        return d_head, None


def gram(head: Tensor, other: Tensor) -> Tensor:
    """G = W^T W (D, D) of a head W (V, D), in fp32, over the ids that the `other` head has too."""
    return _Gram.apply(head, min(len(head), len(other)))
