"""Losses from hidden states, without the logits of all rows at once. No loss is here: the stage has them.

At the papers' sizes the logits of one sample, 829 rows of 151,936 ids, are half a gigabyte, and losses that
are written on them hold several copies. So rows are walked in chunks: the logits of a chunk are formed, the
objective of their log-probabilities is differentiated at once by autograd, and they are forgotten.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support.flags import require

CHUNK = 1 << 25  # logits formed at a time: 220 rows of 151,936 ids; on a GPU ON_GPU times as many
ON_GPU = 4
BLOCK = 1 << 20  # logits that an objective sees at a time on a CPU: they stay in its cache
Head = tuple[Tensor, Tensor]  # what logits are made of: hidden states (B, T, D), weight of the head (V, D)
Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]
_sums = set()  # (code, kind) of objectives that were seen to be sums over the rows of this kind


class Rows(NamedTuple):
    """Some rows of one kind, as an objective sees them; there may be none."""

    log_s: Tensor  # (N, V_s) the student's log-probabilities of the next token
    log_t: Tensor | None  # (N, V_t) the teacher's
    y: Tensor  # (N,) the next token where it is learned, else -100
    extra: Tensor | None  # (N, ...) what else the stage says of each row


def over_rows(
    objective: Objective, kinds: dict[str, Tensor | None], y: Tensor, student: Head,
    teacher: Head | None = None, extra: Tensor | None = None, learned: tuple[Tensor, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that `objective` returns and its terms for the log, over all rows of all kinds.

    objective  a function of one `Rows` for each kind. It is called with some rows of one kind at a time; the
               arguments for the other kinds are then empty. It returns a *sum* over the rows it is given, and
               terms that are such sums. It must do nothing else: it is also called without rows,
               and at first a few times more, to see that it is a sum. (If the head is frozen, it may return a
               loss for each row (N,) instead; then so does this.)
    kinds      the names of its arguments, each with the mask (B, T) of its rows; None for no rows
    y          (B, T) the next token where it is learned, else -100
    extra      (B, T, ...) anything that the objective wants to know of each row, such as a weight
    learned    what else the objective learns: tensors that need a gradient, such as a temperature

    Products have the precision of the student's hidden states and of the teacher's head; softmax and losses
    are fp32 (fp64 for an fp64 student). The gradients are ready when this returns: the loss may be scaled,
    added to others and differentiated once. InputError for an objective that is no sum over rows, or learns
    what is not named.
    """
    advice = "`extra` would get no gradient: detach it, or name what the objective learns in `learned`"
    require(extra is None or not extra.requires_grad, advice)
    no_rows = y.new_zeros(0)
    at = {name: no_rows if mask is None else mask.flatten().nonzero()[:, 0] for name, mask in kinds.items()}
    order = torch.cat([*at.values()])  # the numbers of all rows, kind by kind
    pick = lambda x: None if x is None else x.flatten(0, 1).index_select(0, order)
    (hidden, head), (t_hidden, t_head) = (pick(student[0]), student[1]), (None, None)
    if teacher:
        t_hidden, t_head = pick(teacher[0]).to(teacher[1].dtype), teacher[1]
    learned = tuple(x for x in learned if x.requires_grad)
    y, extra, inputs = pick(y), pick(extra), (hidden, head, *learned)
    h, w = hidden.detach(), head.detach().to(hidden.dtype)
    full = torch.promote_types(h.dtype, torch.float32)
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    def rows(z_s: Tensor, z_t: Tensor | None, part: slice) -> tuple[Tensor, Rows]:
        """Some rows' logits of the student as a leaf for autograd, and what the objective sees of them."""
        z_s = z_s.to(full).requires_grad_(needed)
        log_t = None if z_t is None else F.log_softmax(z_t.to(full), dim=-1)
        return z_s, Rows(F.log_softmax(z_s, dim=-1), log_t, y[part], None if extra is None else extra[part])

    def logits(part: slice) -> tuple[Tensor, Tensor | None]:
        return h[part] @ w.T, None if t_head is None else t_hidden[part] @ t_head.T  # (n, V_s), (n, V_t)

    with torch.no_grad():
        nothing = dict.fromkeys(kinds, rows(*logits(slice(0)), slice(0))[1])
        loss, terms = objective(**nothing)
    losses, totals = [loss.detach()], {name: value.detach() for name, value in terms.items()}
    d_hidden = torch.zeros_like(h)
    d_others = [torch.zeros_like(x) if x.requires_grad else None for x in inputs[1:]]
    chunk, block = (CHUNK * ON_GPU, CHUNK * ON_GPU) if head.is_cuda else (CHUNK, BLOCK)
    for name, part in _chunks(at, max(1, chunk // len(head))):
        z_s, z_t = logits(part)
        for start in range(0, len(z_s), size := max(1, block // len(head))):
            few = slice(start, start + size)
            at_rows = slice(part.start + start, min(part.start + start + size, part.stop))
            leaf, mine = rows(z_s[few], z_t if z_t is None else z_t[few], at_rows)
            loss, terms = objective(**nothing | {name: mine})
            _require_sum(objective, nothing, name, mine, learned)
            losses.append(loss.detach())
            totals = {name: total + terms[name].detach() for name, total in totals.items()}
            d_z, d_learned = 0, ()
            if loss.requires_grad:
                _require_named(loss, (leaf, *learned))
                d_z, *d_learned = torch.autograd.grad(loss.sum(), (leaf, *learned), materialize_grads=True)
            z_s[few] = d_z
            for total, d in zip(d_others[1:], d_learned):
                total.add_(d)
        if needed:  # z_s now holds d loss / d z_s
            torch.mm(z_s, w, out=d_hidden[part])
        if needed and head.requires_grad and z_s.dtype == head.dtype:
            d_others[0].addmm_(z_s.T, h[part])
        elif needed and head.requires_grad:  # products in bf16, their sum in fp32
            d_others[0].add_(z_s.T @ h[part])
    loss = torch.cat(losses) if loss.dim() else sum(losses)
    only = "a loss for each row has a gradient for hidden states alone: freeze the head, or return the sum"
    require(not (loss.dim() and needed and any(x.requires_grad for x in inputs[1:])), only)
    return _WithGradients.apply(loss, [d_hidden, *d_others], *inputs), totals


def _chunks(at: dict[str, Tensor], limit: int) -> Iterator[tuple[str, slice]]:
    """Rows that lie kind by kind, in even chunks of at most `limit` rows."""
    start = 0
    for name, size in ((name, len(numbers)) for name, numbers in at.items()):
        n = -(-size // limit)
        yield from ((name, slice(start + size * k // n, start + size * (k + 1) // n)) for k in range(n))
        start += size


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss, gradients, *inputs):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        if ctx.gradients is None:
            raise RuntimeError("over_rows keeps its gradients for one backward pass, and this is a second")
        gradients, ctx.gradients = ctx.gradients, None
        scale = d_loss.unsqueeze(-1) if d_loss.dim() else d_loss
        return None, None, *(g if g is None else g.mul_(scale) for g in gradients)


def _require_sum(objective: Objective, nothing: dict[str, Rows], kind: str, rows: Rows,
                 learned: tuple[Tensor, ...]) -> None:
    """Refuse, once for each kind, an objective of a few rows that is not the sum of those of their halves."""
    known = getattr(objective, "__code__", objective), kind
    if known in _sums or len(rows.y) < 2:
        return
    few = Rows(*(x if x is None else x[:8].detach() for x in rows))
    few = few._replace(log_s=few.log_s.flip(0))  # beside another row's teacher: no loss is 0 by chance

    names, half = ["the objective", *objective(**nothing)[1]], len(few.y) // 2

    @torch.no_grad()
    def of(start: int, end: int) -> Tensor:
        part = Rows(*(x if x is None else x[start:end] for x in few))
        loss, terms = objective(**nothing | {kind: part})
        return torch.stack([loss.sum(), *terms.values()]).double()

    values = torch.stack([of(0, 8), of(0, half), of(half, 8), of(0, 0)], dim=1).tolist()  # one wait for a GPU
    for name, (whole, a, b, none) in zip(names, values):
        is_sum = none == 0 and not abs(whole - a - b) > 1e-3 * (abs(a) + abs(b))  # NaN: found later
        found = f"is {whole:.4g}, of their halves {a:.4g} and {b:.4g}, of none {none:.4g}"
        advice = "take no mean, but divide by the rows of the global batch, as 1 / total.response does"
        require(is_sum, f"{name} of {len(few.y)} {kind} rows {found}: it must be a sum over rows; {advice}")
    if learned:  # a constant may be 0 by its value alone, as the log of a weight that begins with 1
        loss = objective(**nothing)[0].sum()
        gradients = torch.autograd.grad(loss, learned, materialize_grads=True) if loss.requires_grad else ()
        what = "without any row the objective has a gradient, so it is no sum over rows"
        advice = "add such a term to over_rows' loss instead, divided by micro-batches and ranks"
        require(not any(g.any() for g in gradients), f"{what}; {advice}")
    _sums.add(known)


def _require_named(loss: Tensor, known: tuple[Tensor, ...]) -> None:
    """Refuse a loss whose graph leads to a tensor that needs a gradient and is not `known`."""
    seen, edges = {(x.grad_fn, x.output_nr) for x in known}, [(loss.grad_fn, loss.output_nr)]
    while edges:
        edge = edges.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        edges += edge[0].next_functions
        leaf = getattr(edge[0], "variable", known[0])
        lost = f"the objective learns a tensor of shape {tuple(leaf.shape)}, which would get no gradient"
        advice = "name it in over_rows(..., learned=(it,)), or detach it"
        require(any(leaf is x for x in known), f"{lost}: {advice}")


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, n_ids):
        ctx.head, ctx.n_ids = head, n_ids  # no saved tensors: every micro-batch goes back through it
        full = torch.promote_types(head.dtype, torch.float32)
        g = head.new_zeros(head.shape[1], head.shape[1], dtype=full)
        for w in head[:n_ids].split(1 << 14):
            g.addmm_(w.T.to(full), w.to(full))
        return g

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        d_head = ctx.head @ (d + d.T).to(ctx.head.dtype)  # dW = W (dG + dG^T)
        d_head[ctx.n_ids :] = 0
        return d_head, None


def gram(head: Tensor, n_ids: int) -> Tensor:
    """G = W^T W (D, D) of the first `n_ids` rows of a head W (V, D), in fp32."""
    return _Gram.apply(head, n_ids)
