"""KD Eqs. 1-5 against numbers worked out by hand, slow loops in plain Python, and finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from losses import autoregressive_loss, kl_divergence, relation_loss, response_kl, self_correlation, visual_kl


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def random_log_p(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return (torch.randn(*shape, dtype=dtype) * 3).log_softmax(-1)


# ---------------------------------------------------------------------------------- by hand


def test_eq1_by_hand():
    log_s = torch.stack([log(0.5, 0.25, 0.25), log(0.1, 0.1, 0.8)])
    value = autoregressive_loss(log_s, torch.tensor([0, 1]), 1 / 2)
    assert value.item() == pytest.approx((math.log(2) + math.log(10)) / 2, rel=1e-12)


def test_eq2_and_eq3_by_hand():
    student, teacher = log(0.25, 0.75)[None], log(0.5, 0.5)[None]
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) = 0.5 ln(4 / 3); the other direction would give 0.1308
    for loss in response_kl, visual_kl:
        assert loss(student, teacher, 1.0).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-12)


def test_unequal_heads_by_hand():
    """Each is a distribution over the ids that both have: 1/4, 3/4 of (0.2, 0.6, 0.2), and 1/2, 1/2."""
    longer, shorter = log(0.2, 0.6, 0.2)[None], log(0.5, 0.5)[None]
    assert response_kl(longer, shorter, 1.0).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-12)
    other_way = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert response_kl(shorter, longer, 1.0).item() == pytest.approx(other_way, rel=1e-12)


def test_eq4_by_hand():
    y = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert self_correlation(y).tolist() == [[[5.0, 11.0], [11.0, 25.0]]]
    h, w = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1.0], [1.0], [2.0]])  # y = h W^T = 1,1,2 and 2,2,4
    assert (
        self_correlation(h, w.T @ w).tolist() == self_correlation(h @ w.T).tolist() == [[[6, 12], [12, 24]]]
    )


def test_eq5_by_hand():
    r_s, r_t = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 2.0], [2.0, 4.0]]])
    # flattened: (1,0,0,1) . (1,2,2,4) / (sqrt 2 x 5) = 5 / (5 sqrt 2)
    assert relation_loss(r_s, r_t, 1.0).item() == pytest.approx(1 - 1 / math.sqrt(2), rel=1e-6)
    # columns: cos((1,0),(1,2)) = 1/sqrt 5, cos((0,1),(2,4)) = 2/sqrt 5
    columns = relation_loss(r_s, r_t, 1.0, columns=True).item()
    assert columns == pytest.approx(1 - 1.5 / math.sqrt(5), rel=1e-6)


# ---------------------------------------------------------------------------------- slow loops


def test_token_losses_against_a_slow_loop():
    student, teacher = torch.randn(5, 7).double() * 3, torch.randn(5, 9).double() * 3  # unequal padding
    y, weights = torch.tensor([3, 0, -100, 6, 1]), torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25])
    nll = kl = 0.0
    for n in range(5):
        p_s, p_t = softmax(student[n].tolist()), softmax(teacher[n, :7].tolist())
        if weights[n]:
            nll -= weights[n].item() * math.log(p_s[y[n]])
            kl += weights[n].item() * sum(t * math.log(t / s) for t, s in zip(p_t, p_s))
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    assert autoregressive_loss(log_s, y, weights).item() == pytest.approx(nll, rel=1e-9)
    assert response_kl(log_s, log_t, weights).item() == pytest.approx(kl, rel=1e-9)
    assert visual_kl(log_s, log_t, weights).item() == pytest.approx(kl, rel=1e-9)


def test_relation_against_a_slow_loop():
    y_s, y_t = torch.randn(3, 4, 6).double(), torch.randn(3, 4, 8).double()
    frobenius, columns = [], []
    for a, b in zip(y_s.tolist(), y_t.tolist()):
        r_s, r_t = ([[sum(u * v for u, v in zip(i, j)) for j in y] for i in y] for y in (a, b))

        def cos(u, v):
            return sum(x * y for x, y in zip(u, v)) / math.sqrt(sum(x * x for x in u) * sum(y * y for y in v))

        frobenius.append(1 - cos(sum(r_s, []), sum(r_t, [])))
        columns.append(sum(1 - cos(u, v) for u, v in zip(zip(*r_s), zip(*r_t))) / 4)
    r_s, r_t = self_correlation(y_s), self_correlation(y_t)
    weights = torch.tensor([1.0, 0.5, 2.0])
    expected = sum(w * f for w, f in zip(weights.tolist(), frobenius))
    assert relation_loss(r_s, r_t, 1 / 3).item() == pytest.approx(sum(frobenius) / 3, rel=1e-9)
    assert relation_loss(r_s, r_t, weights).item() == pytest.approx(expected, rel=1e-9)
    assert relation_loss(r_s, r_t, 1 / 3, columns=True).item() == pytest.approx(sum(columns) / 3, rel=1e-9)


def test_relation_does_not_overflow_in_fp32():
    """Entries of 1e24: their squares do not fit."""
    y_s, y_t = torch.randn(1, 6, 4) * 1e12, torch.randn(1, 6, 4)
    got, want = [], []
    for dtype, values in (torch.float32, got), (torch.float64, want):
        a, b = (y.to(dtype).requires_grad_() for y in (y_s, y_t))
        for columns in False, True:
            loss = relation_loss(self_correlation(a), self_correlation(b), 1.0, columns=columns)
            grads = torch.autograd.grad(loss, (a, b))
            values += [loss.view(1), grads[0].flatten() * 1e12, grads[1].flatten()]
    assert torch.allclose(torch.cat(got).double(), torch.cat(want), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("columns", [False, True])
def test_gradients_against_finite_differences(columns):
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    log_t, y = random_log_p(4, 5), torch.tensor([1, 4, 0, 2])
    weights = torch.rand(4).double()
    assert gradcheck(lambda s: autoregressive_loss(s.log_softmax(-1), y, weights), student)
    assert gradcheck(lambda s: response_kl(s.log_softmax(-1), log_t, weights), student)
    assert gradcheck(lambda s: response_kl(s.log_softmax(-1), log_t[:, :4], weights), student)
    assert gradcheck(lambda s: visual_kl(s.log_softmax(-1), log_t, 0.5), student)
    visual = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    r_t = self_correlation(torch.randn(2, 3, 5).double())
    assert gradcheck(lambda s: relation_loss(self_correlation(s), r_t, 0.5, columns=columns), visual)
    head = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s, w: relation_loss(self_correlation(s, w.T @ w), r_t, 0.5), (visual, head))


def test_masked_rows_get_exactly_no_gradient():
    student, log_t = torch.randn(6, 9, requires_grad=True), random_log_p(6, 9).float()
    mask = torch.tensor([1.0, 0, 1, 0, 0, 1])
    for loss, target in (autoregressive_loss, torch.arange(6)), (response_kl, log_t), (visual_kl, log_t):
        (grad,) = torch.autograd.grad(loss(student.log_softmax(-1), target, mask / 3), student)
        assert (grad[mask == 0] == 0).all()
        assert (grad[mask == 1].abs().sum(-1) > 0).all()


# ---------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_distributions_give_exactly_zero(dtype):
    log_p = random_log_p(2, 5, 1000, dtype=dtype)
    assert (kl_divergence(log_p, log_p.clone()) == 0).all()
    r = self_correlation(log_p)
    for columns in False, True:
        assert abs(relation_loss(r, r.clone(), 1.0, columns=columns)) < 1e-14


def test_no_rows_give_zero_and_zero_gradient():
    log_p = torch.zeros(0, 7, requires_grad=True)
    images = torch.zeros(0, 3, 7, requires_grad=True)
    for weights in torch.zeros(0), 0.5:
        total = autoregressive_loss(log_p, torch.zeros(0).long(), weights) + response_kl(
            log_p, log_p, weights
        )
        total = total + relation_loss(self_correlation(images), torch.zeros(0, 3, 3), weights)
        assert total.item() == 0
        for grad in torch.autograd.grad(total, (log_p, images)):
            assert grad.shape[0] == 0


def test_an_image_without_any_signal_is_finite():
    y = torch.zeros(1, 3, 4, requires_grad=True)
    loss = relation_loss(self_correlation(y), self_correlation(torch.randn(1, 3, 4)), 1.0)
    (grad,) = torch.autograd.grad(loss, y)
    assert loss.item() == pytest.approx(1.0, rel=1e-6)
    assert grad.isfinite().all()


def test_half_precision_hidden_states_are_correlated_in_fp32():
    y = torch.randn(1, 64, 3000).bfloat16()
    assert self_correlation(y).dtype == torch.float32
    assert torch.allclose(self_correlation(y).double(), self_correlation(y.double()), rtol=1e-4, atol=1e-2)


def test_parts_of_a_batch_add_up_to_its_mean():
    log_s, y = random_log_p(10, 5), torch.randint(0, 5, (10,))
    parts = [slice(0, 3), slice(3, 4), slice(4, 10)]
    total = sum(autoregressive_loss(log_s[k], y[k], 1 / 10) for k in parts)
    assert total.item() == pytest.approx(-log_s.gather(1, y[:, None]).mean().item(), rel=1e-6)
