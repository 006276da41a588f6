"""Losses in chunks against full logits differentiated by autograd: values, gradients, edges."""

import pytest
import torch

from losses import autoregressive_loss, prompt_kl, relation_loss, response_kl, self_correlation, visual_kl
from support import chunks
from support.chunks import gram, over_rows


def reverse_kl(log_s, log_t, weights):
    """A loss that only someone who forks the project has heard of."""
    return ((log_s.exp() * (log_s - log_t[:, : log_s.shape[1]])).sum(-1) * weights).sum()


class Case:
    """Two sequences of six: three visual, two response, one prompt row each, one of them unread."""

    def __init__(self, dtype=torch.float64, v_s=11, v_t=11):
        g = torch.Generator().manual_seed(0)
        new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        self.hidden, self.head = new(2, 6, 5).requires_grad_(), new(v_s, 5).requires_grad_()
        self.t_hidden, self.t_head = new(2, 6, 4), new(v_t, 4)
        self.y = torch.randint(0, min(v_s, v_t), (2, 6), generator=g)
        row = torch.arange(6).expand(2, 6)
        self.visual, self.response, self.prompt = row < 3, (row == 3) | (row == 4), row == 5
        self.prompt = self.prompt & torch.tensor([[True], [False]])
        self.kinds = {"response": self.response, "visual": self.visual, "prompt": self.prompt}

    def objective(self, response, visual, prompt, kl=response_kl):
        l_reg = autoregressive_loss(response.log_s, response.y, 1 / 4)
        l_res = kl(response.log_s, response.log_t, 1 / 4)
        l_vis = visual_kl(visual.log_s, visual.log_t, 1 / 6)
        l_prompt = prompt_kl(prompt.log_s, prompt.log_t, 1 / 2)
        loss = l_reg + 0.5 * l_res + 2 * l_vis + 0.25 * l_prompt
        return loss, {"l_reg": l_reg, "l_res": l_res, "l_vis": l_vis, "l_prompt": l_prompt}

    def chunked(self, hidden, head, **more):
        loss, terms = over_rows(lambda **rows: self.objective(**rows, **more), self.kinds, self.y,
                                (hidden, head), (self.t_hidden, self.t_head))
        r_s, r_t = (self_correlation(h[:, :3], gram(w, min(len(w), len(o)))) for h, w, o in
                    ((hidden, head, self.t_head), (self.t_hidden, self.t_head, head)))
        l_rel = relation_loss(r_s, r_t, 1 / 2)
        return loss + 0.7 * l_rel, terms | {"l_rel": l_rel}

    def plain(self, hidden, head, **more):
        """The same on full logits."""
        y_s, y_t = hidden @ head.T, self.t_hidden @ self.t_head.T
        rows = {name: chunks.Rows(y_s[k].log_softmax(-1), y_t[k].log_softmax(-1), self.y[k], None)
                for name, k in self.kinds.items()}
        loss, terms = self.objective(**rows, **more)
        v = min(len(head), len(self.t_head))
        l_rel = relation_loss(self_correlation(y_s[:, :3, :v]), self_correlation(y_t[:, :3, :v]), 1 / 2)
        return loss + 0.7 * l_rel, terms | {"l_rel": l_rel}

    def gradients(self, how, **more):
        return torch.autograd.grad(how(self.hidden, self.head, **more)[0], (self.hidden, self.head))


def compare(case, rel, **more):
    want, got = case.plain(case.hidden, case.head, **more), case.chunked(case.hidden, case.head, **more)
    assert got[0].item() == pytest.approx(want[0].item(), rel=rel)
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        assert got[1][name].item() == pytest.approx(value.item(), rel=rel), name
    for a, b in zip(case.gradients(case.chunked, **more), case.gradients(case.plain, **more)):
        assert (a - b).abs().max() <= rel * b.abs().max()


@pytest.fixture(params=[1 << 25, 40, 11])
def pieces(request, monkeypatch):
    """One chunk; three rows a chunk; one row a chunk. Blocks shrink with them."""
    monkeypatch.setattr(chunks, "CHUNK", request.param)
    monkeypatch.setattr(chunks, "BLOCK", request.param // 2)


@pytest.mark.parametrize("vocabularies", [(11, 11), (11, 13), (13, 11)])
def test_fp64_agrees_with_full_logits(pieces, vocabularies):
    compare(Case(v_s=vocabularies[0], v_t=vocabularies[1]), rel=1e-10)


def test_a_vocabulary_of_many_slices(pieces):
    compare(Case(v_s=3000, v_t=2500), rel=1e-10)


def test_a_new_loss_needs_no_code_here(pieces):
    compare(Case(), rel=1e-10, kl=reverse_kl)


def test_fp32_agrees_with_full_logits(pieces):
    compare(Case(torch.float32), rel=1e-5)


def test_each_row_is_passed_once_and_among_its_kind(pieces):
    case, seen = Case(), {"response": [], "visual": [], "prompt": []}

    def objective(**kinds):
        assert sum(len(rows.y) > 0 for rows in kinds.values()) <= 1
        for name, rows in kinds.items():
            if torch.is_grad_enabled():  # not the first look, at a few rows
                seen[name] += rows.y.tolist()
            assert len(rows.log_s) == len(rows.log_t) == len(rows.y)
        return sum(rows.log_s.sum() for rows in kinds.values()), {}

    over_rows(objective, case.kinds, case.y, (case.hidden, case.head), (case.t_hidden, case.t_head))
    assert seen == {name: case.y[kind].tolist() for name, kind in case.kinds.items()}


def test_a_kind_that_is_not_asked_for(pieces):
    case = Case()
    nothing = case.kinds | {"prompt": torch.zeros_like(case.prompt)}
    heads = (case.hidden, case.head), (case.t_hidden, case.t_head)
    want = over_rows(case.objective, nothing, case.y, *heads)[0]
    case.kinds["prompt"] = None
    got = over_rows(case.objective, case.kinds, case.y, *heads)
    assert got[0] == want
    assert got[1]["l_prompt"] == 0


def test_an_objective_may_leave_a_kind_alone(pieces):
    case = Case()
    objective = lambda response, visual, prompt: (response.log_s.square().sum(), {})
    loss, _ = over_rows(objective, case.kinds, case.y, (case.hidden, case.head), (case.t_hidden, case.t_head))
    want = (case.hidden @ case.head.T)[case.response].log_softmax(-1).square().sum()
    assert loss.item() == pytest.approx(want.item(), rel=1e-10)
    for a, b in zip(*(torch.autograd.grad(x, (case.hidden, case.head)) for x in (loss, want))):
        assert (a - b).abs().max() < 1e-10


def test_bf16_products_are_within_bf16s_own_error(pieces):
    """Hidden states in bf16 over an fp32 head, and a bf16 teacher, as in training."""
    case, exact = Case(torch.float32, v_s=300, v_t=300), Case(v_s=300, v_t=300)
    case.t_head = case.t_head.bfloat16()
    loss, terms = over_rows(case.objective, case.kinds, case.y, (case.hidden.bfloat16(), case.head),
                            (case.t_hidden, case.t_head))
    want, want_terms = over_rows(exact.objective, exact.kinds, exact.y, (exact.hidden, exact.head),
                                 (exact.t_hidden, exact.t_head))
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(want_terms[name].item(), rel=0.03)
    grads = torch.autograd.grad(loss, (case.hidden, case.head))
    for grad, b in zip(grads, torch.autograd.grad(want, (exact.hidden, exact.head))):
        assert grad.dtype == torch.float32
        assert (grad - b).norm() <= 0.03 * b.norm()


def test_an_objective_gets_fp32_whatever_the_precision_of_products():
    case = Case(torch.bfloat16, v_s=300, v_t=300)

    def objective(**kinds):
        for log_p in (log_p for rows in kinds.values() for log_p in (rows.log_s, rows.log_t)):
            assert log_p.dtype == torch.float32
            assert (log_p.exp().sum(-1) - 1).abs().sum() < 1e-5 * max(len(log_p), 1)
        return sum(rows.log_s.sum() for rows in kinds.values()), {}

    over_rows(objective, case.kinds, case.y, (case.hidden, case.head.float()), (case.t_hidden, case.t_head))


def test_the_heads_gradient_is_summed_in_fp32(monkeypatch):
    """Of 512 equal rows, one a chunk: a sum in bf16 would stand still long before the last."""
    monkeypatch.setattr(chunks, "CHUNK", 1)
    torch.manual_seed(0)
    h, w, n = torch.randn(7).bfloat16(), torch.randn(13, 7).requires_grad_(), 512
    objective = lambda rows: (autoregressive_loss(rows.log_s, rows.y, 1 / n), {})
    y = torch.zeros(1, n, dtype=torch.long)
    loss, _ = over_rows(objective, {"rows": y == 0}, y, (h.expand(1, n, 7), w))
    z = (w.detach().bfloat16() @ h).float()
    d_z = ((z.softmax(0) - torch.eye(13)[0]) / n).bfloat16()
    want = n * torch.outer(d_z, h).float()
    (got,) = torch.autograd.grad(loss, w)
    assert (got - want).norm() <= 1e-3 * want.norm()


def test_finite_differences():
    case, step = Case(v_t=13), 1e-6
    grads = case.gradients(case.chunked)
    for tensor, grad in zip((case.hidden, case.head), grads):
        for index in range(0, tensor.numel(), 3):
            sides = []
            for sign in 1, -1:
                with torch.no_grad():
                    tensor.view(-1)[index] += sign * step
                    sides.append(case.chunked(case.hidden, case.head)[0].item())
                    tensor.view(-1)[index] -= sign * step
            slope = (sides[0] - sides[1]) / (2 * step)
            assert grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_frozen_head_and_a_frozen_body():
    case = Case()
    want = case.gradients(case.plain)
    (got,) = torch.autograd.grad(case.chunked(case.hidden, case.head.detach())[0], case.hidden)
    assert (got - want[0]).abs().max() < 1e-10
    (got,) = torch.autograd.grad(case.chunked(case.hidden.detach(), case.head)[0], case.head)
    assert (got - want[1]).abs().max() < 1e-10


def test_a_tied_head_gets_the_gradient_of_both_uses():
    embedding = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    case = Case()
    picks = torch.randint(0, 11, (2, 6))
    grads = [torch.autograd.grad(how(embedding[picks].tanh(), embedding)[0], embedding)[0]
             for how in (case.plain, case.chunked)]
    assert (grads[0] - grads[1]).abs().max() < 1e-10


def test_rows_of_no_kind_get_exactly_no_gradient():
    case = Case()
    loss, _ = over_rows(case.objective, case.kinds, case.y, (case.hidden, case.head),
                        (case.t_hidden, case.t_head))
    (grad,) = torch.autograd.grad(loss, case.hidden)
    read = case.response | case.visual | case.prompt
    assert (grad[~read] == 0).all()
    assert (grad[read].abs().sum(-1) > 0).all()


def test_no_rows_at_all():
    case = Case()
    case.kinds = {name: torch.zeros_like(kind) for name, kind in case.kinds.items()}
    loss, terms = over_rows(case.objective, case.kinds, case.y, (case.hidden, case.head),
                            (case.t_hidden, case.t_head))
    images = torch.zeros(0, 3, 5, dtype=torch.float64)
    g_s, g_t = gram(case.head, 11), gram(case.t_head, 11)
    loss = loss + relation_loss(self_correlation(images, g_s), self_correlation(images[..., :4], g_t), 1.0)
    assert [loss.item(), *(t.item() for t in terms.values())] == [0] * 5
    for grad in torch.autograd.grad(loss, (case.hidden, case.head)):
        assert (grad == 0).all()


def test_identical_models_give_exactly_zero():
    case = Case(torch.float32, v_s=1000, v_t=1000)
    case.t_hidden, case.t_head = case.hidden.detach(), case.head.detach()
    _, terms = case.chunked(case.hidden, case.head)
    for name in "l_res", "l_vis", "l_prompt", "l_rel":  # up to the order in which products are summed
        assert abs(terms[name].item()) < 1e-9
    assert terms["l_reg"] > 0


def test_the_loss_may_be_scaled_and_differentiated_once():
    case = Case()
    heads = (case.hidden, case.head), (case.t_hidden, case.t_head)

    def run():
        return over_rows(case.objective, case.kinds, case.y, *heads)[0]

    once = torch.autograd.grad(run(), (case.hidden, case.head))
    for a, b in zip(torch.autograd.grad(3 * run(), (case.hidden, case.head)), once):
        assert torch.allclose(a, 3 * b, rtol=1e-12)
    loss = run()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()


def test_gram_is_wtw():
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        for width in 37, 300:
            w = torch.randn(1000, width).to(dtype)
            want = w[:900].double().T @ w[:900].double()
            g = gram(w, 900)
            assert (g - want).abs().max() <= error * want.abs().max()
            assert torch.equal(g, g.T)


def test_one_gram_serves_all_micro_batches_of_a_step():
    w = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    g = gram(w, 7)
    for part in h:
        self_correlation(part[None], g).square().sum().backward()
    want = torch.autograd.grad(self_correlation(h @ w[:7].T).square().sum(), w)[0]
    assert torch.allclose(w.grad, want, rtol=1e-10)
