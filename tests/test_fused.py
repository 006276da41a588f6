"""The chunked execution against the plain definitions: values, gradients, and what it refuses."""

import pytest
import torch

import fused
from fused import Head, gram, token_losses, visual_relation
from losses import (
    autoregressive_loss,
    common_vocabulary,
    prompt_kl,
    relation_loss,
    response_kl,
    self_correlation,
    visual_kl,
    weighted_sum,
)

COEFFICIENTS = (1.0, 0.5, 2.0, 0.25)  # of Eq. (1), response, visual and prompt KL
GAMMA = 0.7


def reverse_kl(student_logits, teacher_logits, weights=None):
    """A loss that fused.py has never heard of, as someone who forks the project would write it."""
    student_logits, teacher_logits = common_vocabulary(student_logits, teacher_logits)
    log_s, log_t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return weighted_sum((log_s.exp() * (log_s - log_t)).sum(-1), weights)


class Case:
    """Two images of three visual rows, and six text rows; heads of given sizes."""

    def __init__(self, dtype=torch.float64, v_s=11, v_t=11, tied=False):
        g = torch.Generator().manual_seed(0)
        new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
        self.hidden, self.weight = new(12, 5).requires_grad_(), new(v_s, 5).requires_grad_()
        self.teacher = Head(new(12, 4), new(v_t, 4))
        self.n = min(v_s, v_t)
        self.ids = torch.randint(0, self.n, (12,), generator=g)
        mask = lambda *rows: torch.tensor([float(k in rows) for k in range(12)])  # noqa: E731
        self.w = [mask(6, 7, 9) / 3, mask(6, 7, 9) / 3, mask(*range(6)) / 6, mask(8, 10) / 2]
        self.ids[self.w[0] == 0] = -100

    def terms(self, kl=response_kl):
        losses = (autoregressive_loss, kl, visual_kl, prompt_kl)
        targets = (self.ids, self.teacher, self.teacher, self.teacher)
        return list(zip(losses, targets, self.w, COEFFICIENTS))

    def plain(self, hidden, weight, kl=response_kl):
        """The same by the definitions, on full logits."""
        y_s = hidden @ weight.T
        y_t = self.teacher.hidden @ self.teacher.weight.T
        values = [loss(y_s, y_t if isinstance(t, Head) else t, w) for loss, t, w, _ in self.terms(kl)]
        r_s, r_t = (self_correlation(y[:6, : self.n].unflatten(0, (2, 3))) for y in (y_s, y_t))
        return [*values, relation_loss(r_s, r_t)]

    def fused(self, hidden, weight, kl=response_kl):
        g_s, g_t = gram(weight[: self.n]), gram(self.teacher.weight[: self.n])
        *values, g_s = token_losses(Head(hidden, weight), self.terms(kl), g_s)
        images = (h[:6].unflatten(0, (2, 3)) for h in (hidden, self.teacher.hidden))
        return [*values, visual_relation(next(images), g_s, next(images), g_t)]


def objective(values):
    return sum(c * v for c, v in zip((*COEFFICIENTS, GAMMA), values))


def compare(case, rel, kl=response_kl):
    results = []
    for execution in case.plain, case.fused:
        values = execution(case.hidden, case.weight, kl)
        grads = torch.autograd.grad(objective(values), (case.hidden, case.weight))
        results.append(([v.item() for v in values], grads))
    (plain, plain_grads), (chunked, chunked_grads) = results
    assert chunked == pytest.approx(plain, rel=rel, abs=rel)
    for a, b in zip(chunked_grads, plain_grads):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= rel * b.abs().max()


@pytest.fixture(params=[1 << 25, 40, 1])
def chunks(request, monkeypatch):
    """One chunk; three rows a chunk; one row a chunk. Pointwise blocks shrink with them."""
    monkeypatch.setattr(fused, "CHUNK", request.param)
    monkeypatch.setattr(fused, "BLOCK", request.param)


@pytest.mark.parametrize("vocabularies", [(11, 11), (11, 13), (13, 11)])
def test_fp64_agrees_with_the_definitions(chunks, vocabularies):
    compare(Case(v_s=vocabularies[0], v_t=vocabularies[1]), rel=1e-10)


def test_a_new_loss_needs_no_code_here(chunks):
    compare(Case(v_t=13), rel=1e-10, kl=reverse_kl)


def test_fp32_agrees_with_the_definitions(chunks):
    compare(Case(torch.float32), rel=1e-5)


@pytest.mark.parametrize("way", ["_gradient_by_hand", "_gradient_by_autograd"])
def test_both_ways_through_a_chunk_agree_with_the_definitions(monkeypatch, way):
    called, chosen = [], getattr(fused, way)
    monkeypatch.setattr(fused, "_gradient_by_hand", lambda *args: called.append(way) or chosen(*args))
    compare(Case(v_t=13), rel=1e-10)
    assert called == [way]


def test_bf16_products_are_within_bf16s_own_error(chunks):
    """Hidden states in bf16 over an fp32 head, as in training."""
    case, exact = Case(torch.float32, v_s=300, v_t=300), Case(v_s=300, v_t=300)
    reference = torch.autograd.grad(
        objective(exact.plain(exact.hidden, exact.weight)), (exact.hidden, exact.weight)
    )
    teacher = Head(case.teacher.hidden.bfloat16(), case.teacher.weight.bfloat16())
    case.teacher = teacher
    values = case.fused(case.hidden.bfloat16(), case.weight)
    grads = torch.autograd.grad(objective(values), (case.hidden, case.weight))
    for value, want in zip(values, exact.plain(exact.hidden, exact.weight)):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(want.item(), rel=0.03)
    for grad, want in zip(grads, reference):
        assert grad.dtype == torch.float32
        assert (grad - want).norm() <= 0.03 * want.norm()


def test_a_bf16_teacher_of_an_fp32_student(chunks):
    case = Case(torch.float32)
    case.teacher = Head(*(t.bfloat16() for t in case.teacher))
    values = case.fused(case.hidden, case.weight)
    grads = torch.autograd.grad(objective(values), (case.hidden, case.weight))
    case.teacher = Head(*(t.float() for t in case.teacher))
    want = case.plain(case.hidden, case.weight)
    want_grads = torch.autograd.grad(objective(want), (case.hidden, case.weight))
    assert [v.item() for v in values] == pytest.approx([v.item() for v in want], rel=0.03)
    for a, b in zip(grads, want_grads):
        assert (a - b).norm() <= 0.03 * b.norm()


def test_finite_differences():
    case, step = Case(v_t=13), 1e-6
    grads = torch.autograd.grad(objective(case.fused(case.hidden, case.weight)), (case.hidden, case.weight))
    for tensor, grad in zip((case.hidden, case.weight), grads):
        for index in range(0, tensor.numel(), 3):
            sides = []
            for sign in 1, -1:
                with torch.no_grad():
                    tensor.view(-1)[index] += sign * step
                    sides.append(objective(case.fused(case.hidden, case.weight)).item())
                    tensor.view(-1)[index] -= sign * step
            slope = (sides[0] - sides[1]) / (2 * step)
            assert grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_frozen_head_and_a_frozen_body():
    case = Case()
    want = torch.autograd.grad(objective(case.plain(case.hidden, case.weight)), (case.hidden, case.weight))
    (got,) = torch.autograd.grad(objective(case.fused(case.hidden, case.weight.detach())), case.hidden)
    assert (got - want[0]).abs().max() < 1e-10
    (got,) = torch.autograd.grad(objective(case.fused(case.hidden.detach(), case.weight)), case.weight)
    assert (got - want[1]).abs().max() < 1e-10


def test_a_tied_head_gets_the_gradient_of_both_uses():
    embedding = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    case = Case()
    picks = torch.randint(0, 11, (12,))
    grads = [torch.autograd.grad(objective(run(embedding[picks].tanh(), embedding)), embedding)[0]
             for run in (case.plain, case.fused)]  # fmt: skip
    assert (grads[0] - grads[1]).abs().max() < 1e-10


def test_teacher_tensors_may_come_from_inference_mode():
    case = Case(v_t=13)
    for kl in response_kl, reverse_kl:
        want = [v.item() for v in case.plain(case.hidden, case.weight, kl)]
        with torch.inference_mode():
            case.teacher = Head(case.teacher.hidden.clone(), case.teacher.weight)
        values = case.fused(case.hidden, case.weight, kl)
        objective(values).backward()
        assert [v.item() for v in values] == pytest.approx(want, rel=1e-10)


def test_rows_without_weight_get_exactly_no_gradient():
    case = Case()
    values = token_losses(Head(case.hidden, case.weight), case.terms())
    (grad,) = torch.autograd.grad(objective(values), case.hidden)
    idle = sum(case.w) == 0
    assert idle.any()
    assert (grad[idle] == 0).all()


def test_no_rows():
    case = Case()
    none = Head(case.hidden[:0], case.weight)
    teacher = Head(case.teacher.hidden[:0], case.teacher.weight)
    terms = [
        (autoregressive_loss, case.ids[:0], case.w[0][:0], 1.0),
        (response_kl, teacher, case.w[0][:0], 1.0),
    ]
    *values, g = token_losses(none, terms, gram(case.weight))
    images = torch.zeros(0, 3, 5, dtype=torch.float64)
    total = sum(values) + visual_relation(images, g, images[..., :4], gram(case.teacher.weight))
    (grad,) = torch.autograd.grad(total, case.weight)
    assert total.item() == 0
    assert (grad == 0).all()


def test_identical_models_give_exactly_zero():
    case = Case(torch.float32, v_s=1000, v_t=1000)
    student = Head(case.hidden, case.weight)
    teacher = Head(case.hidden.detach(), case.weight.detach())
    _, kl = token_losses(
        student, [(autoregressive_loss, case.ids, case.w[0], 1.0), (visual_kl, teacher, case.w[2], 1.0)]
    )
    assert kl.item() == 0
    images, g = case.hidden[:6].unflatten(0, (2, 3)), gram(case.weight)
    assert visual_relation(images, g, images.detach(), g).item() == 0


def test_other_proportions_and_second_passes_are_refused():
    case = Case()
    values = token_losses(Head(case.hidden, case.weight), case.terms())
    with pytest.raises(RuntimeError, match="weighs the losses"):
        sum(values).backward()
    values = token_losses(Head(case.hidden, case.weight), case.terms())
    total = objective(values)
    (3 * total).backward(retain_graph=True)  # the same proportion
    with pytest.raises(RuntimeError, match="second"):
        total.backward()


def test_gram_is_wtw():
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        w = torch.randn(1000, 37).to(dtype)
        want = w.double().T @ w.double()
        for rows, block in ((1 << 14, 256), (64, 8), (1000, 37)):
            g = gram(w, rows, block)
            assert (g - want).abs().max() <= error * want.abs().max()
            assert torch.equal(g, g.T)
