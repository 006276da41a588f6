"""The losses of losses.py from hidden states, without T x V logits. An appendix: it adds no mathematics.

At the paper's shapes, 829 rows x 151,936 ids in fp32 are half a gigabyte, and the usual way holds about eight
copies. Two exact rearrangements avoid that:

1. A token loss is a weighted sum over rows. The rows are walked in chunks: a chunk's logits, its losses and
   their gradient are formed at once, turned into gradients of hidden states and head, and forgotten.
2. The relation loss needs no logits at all: R = Y Y^T = H (W^T W) H^T, and W^T W is only D x D.

Shapes as in losses.py: hidden states (N, D), a head's weight (V, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losses import (
    autoregressive_loss,
    full_precision,
    log_probability,
    prompt_kl,
    relation_loss,
    response_kl,
    visual_kl,
)

CHUNK = 1 << 25  # logits formed at a time: 220 rows of 151,936 ids
BLOCK = 1 << 20  # logits that pointwise work passes over at a time on a CPU: they stay in its cache


class Head(NamedTuple):
    """Logits not formed yet: hidden (N, D) @ weight (V, D)^T."""

    hidden: Tensor
    weight: Tensor


# (loss, target, weights, coefficient). The target is (N,) token ids, or the teacher's Head over the same
# rows; the coefficient is what the objective multiplies the loss with.
Term = tuple[Callable[..., Tensor], "Tensor | Head", Tensor, float]


def gram(weight: Tensor, rows: int = 1 << 14, block: int = 256) -> Tensor:
    """(V, D) -> W^T W (D, D), summed in fp32. Only the upper block triangle is computed, and mirrored."""
    width = weight.shape[1]
    g = weight.new_zeros(width, width, dtype=full_precision(weight[:0]).dtype)
    for w in map(full_precision, weight.detach().split(rows)):
        for i in range(0, width, block):
            g[i : i + block, i:].addmm_(w[:, i : i + block].T, w[:, i:])
    return g.triu() + g.triu(1).T


def visual_relation(
    student: Tensor,
    student_gram: Tensor,
    teacher: Tensor,
    teacher_gram: Tensor,
    weights: Tensor | float | None = None,
    columns: bool = False,
) -> Tensor:
    """Eqs. (4) and (5) from hidden states (n, Np, D) and Gram matrices (D, D): R = Y Y^T = H (W^T W) H^T."""
    h_s, h_t = full_precision(student), full_precision(teacher)
    return relation_loss(h_s @ student_gram @ h_s.mT, h_t @ teacher_gram @ h_t.mT, weights, columns)


def token_losses(student: Head, terms: Sequence[Term], student_gram: Tensor | None = None) -> list[Tensor]:
    """The values of several token losses over the same N rows.

    Any `loss(student_logits, target, weights)` that is a weighted sum over rows will do. Gradients are
    computed here, in the forward pass, so the coefficients must be known: if the values enter the objective
    in another proportion, its backward pass raises a RuntimeError, and so does a second backward pass.

    With `student_gram`, W^T W over the ids that the student and the teachers in `terms` share, that matrix
    comes back as one more value, as a function of the head's weight: a relation loss of it then trains the
    head too, and all of the head's gradient is in one buffer.
    """
    values, *grams = _TokenLosses.apply(student.hidden, student.weight, student_gram, terms)
    return [*values.unbind(), *grams]


def log_probabilities(head: Head, targets: Tensor) -> Tensor:
    """log p of every row's target, (N,), for losses that are not sums over rows. Logits are formed twice:
    here, and again in the backward pass, where Eq. (1) with the rows' gradients as weights is differentiated.
    """
    return _LogProbabilities.apply(head.hidden, head.weight, targets)


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        size = max(1, CHUNK // len(weight))  # rows of a chunk
        z, w = _buffer(0, hidden, min(size, len(hidden)), len(weight)), weight.to(hidden.dtype)
        rows = zip(hidden.split(size), targets.split(size))
        return torch.cat([log_probability(_logits(h, w, z[: len(h)]), y) for h, y in rows])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_rows: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        inputs = [x.detach().requires_grad_(on) for x, on in zip((hidden, weight), ctx.needs_input_grad)]
        with torch.enable_grad():
            (loss,) = token_losses(Head(*inputs), [(autoregressive_loss, targets, -d_rows, 1.0)])
        loss.backward()
        return inputs[0].grad, inputs[1].grad, None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, student_gram: Tensor | None, terms: Sequence[Term]):
        w = weight.to(hidden.dtype)  # (V, D)
        heads = list({id(target): target for _, target, _, _ in terms if isinstance(target, Head)}.values())
        losses = [loss for loss, *_ in terms]
        # By hand where all terms are of Eqs. (1)-(3) and one softmax over the student's ids serves them all.
        by_hand = set(losses) <= {autoregressive_loss, *KL} and losses.count(autoregressive_loss) == 1
        by_hand &= len(heads) <= 1 and all(len(head.weight) >= len(w) for head in heads)
        chunk_gradient = _gradient_by_hand if by_hand else _gradient_by_autograd

        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if d_weight is not None and not len(hidden):
            d_weight.zero_()
        values = torch.zeros(len(terms), dtype=full_precision(w[:0]).dtype, device=w.device)
        n_chunks = max(1, -(-len(hidden) * len(w) // CHUNK))
        size = max(1, -(-len(hidden) // n_chunks))  # rows of a chunk
        buffers = [_buffer(0, hidden, size, len(w))]
        buffers += [_buffer(k, t.hidden, size, min(len(w), len(t.weight))) for k, t in enumerate(heads, 1)]
        for first in range(0, len(hidden), size):
            rows = slice(first, first + size)
            h = hidden[rows]  # (n, D)
            z = _logits(h, w, buffers[0][: len(h)])  # (n, V)
            z_t = {id(t): _logits(t.hidden[rows], t.weight, b[: len(h)]) for t, b in zip(heads, buffers[1:])}
            parts = [
                (
                    loss,
                    z_t[id(target)] if isinstance(target, Head) else target[rows],
                    weights[rows],
                    coefficient,
                )
                for loss, target, weights, coefficient in terms
            ]
            dz = chunk_gradient(z, parts, values)  # (n, V); adds to values
            if d_hidden is not None:
                torch.mm(dz, w, out=d_hidden[rows])
            if d_weight is not None and dz.dtype == d_weight.dtype:
                d_weight.addmm_(dz.T, h, beta=float(first > 0))
            elif d_weight is not None:  # products in bf16, their sum in fp32
                d_weight.copy_(dz.T @ h) if first == 0 else d_weight.add_(dz.T @ h)
        ctx.gradients, ctx.coefficients = (d_hidden, d_weight), [coefficient for *_, coefficient in terms]
        ctx.n_common = min(len(w), *(len(head.weight) for head in heads)) if heads else len(w)
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)
        if student_gram is None:
            return (values,)
        student_gram = student_gram.clone()
        if d_weight is None:
            ctx.mark_non_differentiable(student_gram)
        return values, student_gram

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_values: Tensor | None, d_gram: Tensor | None = None):
        if ctx.gradients is None:
            raise RuntimeError("token_losses keeps its gradients for one backward pass, and this is a second")
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        asked = [0.0] * len(ctx.coefficients) if d_values is None else d_values.tolist()
        scale = max((a / c for a, c in zip(asked, ctx.coefficients) if c), key=abs, default=0.0)
        if any(abs(a - scale * c) > 1e-4 * abs(scale * c) for a, c in zip(asked, ctx.coefficients)):
            raise RuntimeError(
                f"the objective weighs the losses {asked}, token_losses was told {ctx.coefficients}"
            )
        for gradient in (d_hidden, d_weight):
            if gradient is not None and scale != 1:
                gradient.mul_(scale)
        if d_weight is not None and d_gram is not None:  # d(W^T W): dW = W (dG + dG^T)
            w = ctx.saved_tensors[0][: ctx.n_common]
            d_weight[: ctx.n_common].addmm_(w, (d_gram + d_gram.T).to(w.dtype))
        return d_hidden, d_weight, None, None


# ---------------------------------------------------------------------------------- one chunk


_buffers: dict[tuple, Tensor] = {}


def _buffer(k: int, like: Tensor, rows: int, columns: int) -> Tensor:
    """The k-th (rows, columns) buffer, in memory that is kept: fresh memory is slow on a CPU."""
    key = (k, like.device, like.dtype)
    if key not in _buffers or _buffers[key].numel() < rows * columns:
        _buffers[key] = like.new_empty(rows * columns)
    return _buffers[key][: rows * columns].view(rows, columns)


def release_buffers() -> None:
    """Give back the memory that is kept between calls."""
    _buffers.clear()


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out (n, v) <- hidden (n, D) @ weight[:v]^T. Some thousand ids at a time are faster on a CPU."""
    n_ids = out.shape[1]
    size = n_ids if out.is_cuda else 8192
    for first in range(0, n_ids, size):
        ids = slice(first, min(first + size, n_ids))
        torch.mm(hidden, weight[ids].T, out=out[:, ids])
    return out


# z (n, V) are the chunk's student logits; parts are the terms, with targets (token ids or teacher logits) and
# weights cut to the chunk. Both functions return dZ (n, V), the gradient of sum(coefficient x loss), and add
# the terms' values to `values`.


def _gradient_by_autograd(z: Tensor, parts: list[tuple], values: Tensor) -> Tensor:
    """For any losses: what losses.py says, differentiated."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        terms = torch.stack([loss(leaf, target, weights) for loss, target, weights, _ in parts])
        (dz,) = torch.autograd.grad((terms * terms.new_tensor([c for *_, c in parts])).sum(), leaf)
    values += terms.detach()
    return dz


KL = (response_kl, visual_kl, prompt_kl)


def _gradient_by_hand(z: Tensor, parts: list[tuple], values: Tensor) -> Tensor:
    """For Eq. (1) with any of Eqs. (2), (3), which share a softmax, in place of the logits:

    dZ = (w_ar + w_kl) P_s - w_kl P_t - w_ar onehot(y), w being the terms' weights times their coefficients.
    """
    n, vocabulary = z.shape
    ids, z_t = torch.zeros(n, 1, dtype=torch.long, device=z.device), None
    w_ar, w_kl, ar, kl = torch.zeros(4, n, 1, dtype=values.dtype, device=z.device)
    for loss, target, weights, coefficient in parts:
        if loss in KL:
            z_t = target
            w_kl += coefficient * weights.unsqueeze(1)
        else:
            ids = target.clamp_min(0).unsqueeze(1)
            w_ar += coefficient * weights.unsqueeze(1)
    size = n if z.is_cuda else max(1, BLOCK // vocabulary)
    scratch = torch.empty(3, size, vocabulary, dtype=values.dtype, device=z.device)
    for first in range(0, n, size):
        rows = slice(first, first + size)
        a, b, p = (s[: len(z[rows])] for s in scratch)
        a = z[rows] if z.dtype == a.dtype else a.copy_(z[rows])  # fp32 logits are worked on where they are
        if z_t is not None:
            b = z_t[rows] if z_t.dtype == b.dtype else b.copy_(z_t[rows])
        sum_s = torch.exp(a.sub_(a.amax(1, keepdim=True)), out=p).sum(1, keepdim=True)
        ar[rows] = sum_s.log() - a.gather(1, ids[rows])  # P_s = exp(a) / sum_s
        if z_t is None:
            torch.mul(p, w_ar[rows] / sum_s, out=a)
        else:
            sum_t = torch.exp(b.sub_(b.amax(1, keepdim=True)), out=p).sum(1, keepdim=True)  # P_t = p / sum_t
            kl[rows] = b.sub_(a).mul_(p).sum(1, keepdim=True) / sum_t + (sum_s.log() - sum_t.log())
            a.exp_().mul_((w_ar + w_kl)[rows] / sum_s)
            a.sub_(p.mul_(w_kl[rows] / sum_t))
        a.scatter_add_(1, ids[rows], -w_ar[rows])
        if a.dtype != z.dtype:
            z[rows] = a
    for k, (loss, _, weights, _) in enumerate(parts):
        values[k] += ((kl if loss in KL else ar).squeeze(1) * weights).sum()
    return z
