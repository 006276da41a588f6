"""KD Eqs. 1-7 against numbers worked out by hand, slow loops in plain Python, and finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import losses
from losses import autoregressive_loss, kl_divergence, relation_loss, response_kl, self_correlation, visual_kl


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


# ---------------------------------------------------------------------------------- by hand


def test_eq1_by_hand():
    logits = torch.stack([log(0.5, 0.25, 0.25), log(0.1, 0.1, 0.8)]) + torch.tensor([[7.0], [-3.0]])
    value = autoregressive_loss(logits, torch.tensor([0, 1]))
    assert value.item() == pytest.approx((math.log(2) + math.log(10)) / 2, rel=1e-12)


def test_eq2_and_eq3_by_hand():
    student, teacher = log(0.25, 0.75)[None], log(0.5, 0.5)[None]
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) = 0.5 ln(4 / 3); the other direction would give 0.1308
    for loss in response_kl, visual_kl:
        assert loss(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-12)


def test_eq4_by_hand():
    y = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert self_correlation(y).tolist() == [[[5.0, 11.0], [11.0, 25.0]]]


def test_eq5_by_hand():
    r_s, r_t = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 2.0], [2.0, 4.0]]])
    # flattened: (1,0,0,1) . (1,2,2,4) / (sqrt 2 x 5) = 5 / (5 sqrt 2)
    assert relation_loss(r_s, r_t).item() == pytest.approx(1 - 1 / math.sqrt(2), rel=1e-6)
    # columns: cos((1,0),(1,2)) = 1/sqrt 5, cos((0,1),(2,4)) = 2/sqrt 5
    assert relation_loss(r_s, r_t, columns=True).item() == pytest.approx(1 - 1.5 / math.sqrt(5), rel=1e-6)


def test_eq6_and_eq7_by_hand():
    terms = [torch.tensor(v) for v in (1.0, 10.0, 100.0, 1000.0)]
    assert losses.dpt_objective(*terms, alpha=2, beta=3, gamma=0.5).item() == 821
    assert losses.dft_objective(*terms, alpha=2, beta=3, gamma=0.5).item() == 821


# ---------------------------------------------------------------------------------- slow loops


def test_token_losses_against_a_slow_loop():
    student, teacher = torch.randn(5, 7).double() * 3, torch.randn(5, 9).double() * 3  # unequal padding
    targets, weights = torch.tensor([3, 0, -100, 6, 1]), torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25])
    nll = kl = 0.0
    for n in range(5):
        p_s, p_t = softmax(student[n].tolist()), softmax(teacher[n, :7].tolist())
        if weights[n]:
            nll -= weights[n].item() * math.log(p_s[targets[n]])
            kl += weights[n].item() * sum(t * math.log(t / s) for t, s in zip(p_t, p_s))
    assert autoregressive_loss(student, targets, weights).item() == pytest.approx(nll, rel=1e-9)
    assert response_kl(student, teacher, weights).item() == pytest.approx(kl, rel=1e-9)
    assert visual_kl(student, teacher, weights).item() == pytest.approx(kl, rel=1e-9)


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
    assert relation_loss(r_s, r_t).item() == pytest.approx(sum(frobenius) / 3, rel=1e-9)
    assert relation_loss(r_s, r_t, weights).item() == pytest.approx(expected, rel=1e-9)
    assert relation_loss(r_s, r_t, columns=True).item() == pytest.approx(sum(columns) / 3, rel=1e-9)


def test_relation_does_not_overflow_in_fp32():
    y_s, y_t = torch.randn(1, 6, 4) * 1e9, torch.randn(1, 6, 4) * 1e-9
    wide, narrow = (relation_loss(self_correlation(a), self_correlation(b)) for a, b in
                    ((y_s, y_t), (y_s.double(), y_t.double())))  # fmt: skip
    assert wide.item() == pytest.approx(narrow.item(), rel=1e-4)


# ---------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("columns", [False, True])
def test_gradients_against_finite_differences(columns):
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher, targets = torch.randn(4, 5).double(), torch.tensor([1, 4, 0, 2])
    weights = torch.rand(4).double()
    assert gradcheck(lambda s: autoregressive_loss(s, targets, weights), student)
    assert gradcheck(lambda s: response_kl(s, teacher, weights), student)
    assert gradcheck(lambda s: visual_kl(s, teacher), student)
    y = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    r_t = self_correlation(torch.randn(2, 3, 5).double())
    assert gradcheck(lambda s: relation_loss(self_correlation(s), r_t, columns=columns), y)


def test_masked_rows_get_exactly_no_gradient():
    student, teacher = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9)
    mask = torch.tensor([1.0, 0, 1, 0, 0, 1])
    for loss, target in (autoregressive_loss, torch.arange(6)), (response_kl, teacher), (visual_kl, teacher):
        (grad,) = torch.autograd.grad(loss(student, target, mask / 3), student)
        assert (grad[mask == 0] == 0).all()
        assert (grad[mask == 1].abs().sum(-1) > 0).all()


# ---------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_identical_logits_give_exactly_zero(dtype):
    logits = (torch.randn(2, 5, 1000) * 10).to(dtype)
    assert (kl_divergence(logits, logits.clone()) == 0).all()
    r = self_correlation(logits)
    for columns in False, True:
        assert relation_loss(r, r.clone(), columns=columns) == 0


def test_no_rows_give_zero_and_zero_gradient():
    logits = torch.zeros(0, 7, requires_grad=True)
    images = torch.zeros(0, 3, 7, requires_grad=True)
    for weights in torch.zeros(0), None:
        total = autoregressive_loss(logits, torch.zeros(0).long(), weights) + response_kl(
            logits, logits, weights
        )
        total = total + relation_loss(self_correlation(images), torch.zeros(0, 3, 3), weights)
        assert total.item() == 0
        for grad in torch.autograd.grad(total, (logits, images)):
            assert grad.shape[0] == 0


def test_an_image_without_any_signal_is_finite():
    y = torch.zeros(1, 3, 4, requires_grad=True)
    loss = relation_loss(self_correlation(y), self_correlation(torch.randn(1, 3, 4)))
    (grad,) = torch.autograd.grad(loss, y)
    assert loss.item() == pytest.approx(0.5, rel=1e-6)
    assert grad.isfinite().all()


def test_half_precision_logits_are_computed_in_fp32():
    student, teacher = (torch.randn(64, 3000) * 4 for _ in range(2))
    for dtype in torch.bfloat16, torch.float16:
        s, t = student.to(dtype), teacher.to(dtype)
        assert response_kl(s, t).item() == pytest.approx(response_kl(s.double(), t.double()).item(), rel=1e-5)
        assert response_kl(s, t).dtype == torch.float32


def test_parts_of_a_batch_add_up_to_its_mean():
    student, targets = torch.randn(10, 5), torch.randint(0, 5, (10,))
    w = torch.full((10,), 1 / 10)
    parts = sum(
        autoregressive_loss(student[k], targets[k], w[k]) for k in (slice(0, 3), slice(3, 4), slice(4, 10))
    )
    assert parts.item() == pytest.approx(autoregressive_loss(student, targets).item(), rel=1e-6)
