"""What someone who forks a stage may get wrong: the numbers are right all the same, or it is refused."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import data_flags, log_of
from safetensors.torch import load_file
from torch import nn

import losses
import sft
from support import chunks, run, state
from support.chunks import over_rows
from support.flags import InputError


class Case:
    """Rows of two kinds, of student and teacher; a temperature; the inner state that the rows are made of."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        self.leaves = [x.requires_grad_() for x in (new(2, 6, 5), new(11, 5), new(()))]
        x, self.head, self.log_tau = self.leaves
        self.inner, self.tau, self.extra = x.tanh(), self.log_tau.exp(), new(2, 6, 3)
        self.heads = (2 * self.inner, self.head), (new(2, 6, 4), new(11, 4))
        self.kinds = {"a": torch.arange(12).view(2, 6) < 7, "b": torch.arange(12).view(2, 6) > 8}

    def loss(self, a, b, tau=1.0, inner=0.0):
        """Cross-entropies at a temperature, weighed by each row's extra values, and `inner` for each row."""
        entropy = lambda rows: -(rows.log_t.exp() * F.log_softmax(rows.log_s / tau, -1)).sum(-1)
        return sum((entropy(rows) * rows.extra.square().sum(-1) + inner).sum() for rows in (a, b)), {}

    def chunked(self, objective, **more):
        return over_rows(objective, self.kinds, torch.zeros(2, 6, dtype=torch.long), *self.heads, **more)[0]

    def full(self, **more):
        log_s, log_t = (F.log_softmax(h @ w.T, -1) for h, w in self.heads)
        rows = {name: chunks.Rows(log_s[k], log_t[k], None, self.extra[k]) for name, k in self.kinds.items()}
        return self.loss(**rows, **more)[0]


@pytest.mark.parametrize("mistake", [
    lambda a: F.kl_div(a.log_s, a.log_t, reduction="batchmean", log_target=True),
    lambda a: losses.kl_divergence(a.log_s, a.log_t).mean(),
    lambda a: losses.kl_divergence(a.log_s, a.log_t).sum() / max(len(a.y), 1),
    lambda a: losses.response_kl(a.log_s, a.log_t, 1 / 7) + 1,
    lambda a: losses.relation_loss(a.log_s[None], a.log_t[None], 1.0),
])
def test_what_is_no_sum_over_rows_is_refused(mistake):
    says = r"of 7 a rows is .*: it must be a sum over rows; take no mean.* as 1 / total.response does"
    for term in "the objective", "l_new":
        with pytest.raises(InputError, match=f"{term} {says}"):
            right = lambda a: losses.response_kl(a.log_s, a.log_t, 1 / 7)
            first, second = (mistake, right) if term == "the objective" else (right, mistake)
            Case().chunked(lambda a, b, f=first, g=second: (f(a), {"l_new": g(a)}))


def test_no_loss_takes_a_mean_when_its_weights_are_forgotten():
    signatures = [inspect.signature(f).parameters for f in vars(losses).values() if inspect.isfunction(f)]
    defaults = [parameters["weights"].default for parameters in signatures if "weights" in parameters]
    assert len(defaults) > 8
    assert set(defaults) == {inspect.Parameter.empty}


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("named", ["log_tau", "tau", "inner"])
def test_what_is_named_learns_as_with_full_logits(monkeypatch, rows, named):
    """A leaf, what was made of a leaf, and a state inside the student, with chunks of any size."""
    monkeypatch.setattr(chunks, "CHUNK", rows * 11)
    case = Case()
    uses = {"log_tau": lambda: {"tau": case.log_tau.exp()}, "tau": lambda: {"tau": case.tau},
            "inner": lambda: {"inner": case.inner.square().sum()}}[named]
    learned = {"extra": case.extra, "learned": (getattr(case, named),)}
    loss, want = case.chunked(lambda a, b: case.loss(a, b, **uses()), **learned), case.full(**uses())
    assert loss.item() == pytest.approx(want.item(), rel=1e-10)
    keep = {"retain_graph": True, "materialize_grads": True}
    for got, right in zip(*(torch.autograd.grad(3 * x, case.leaves, **keep) for x in (loss, want))):
        assert (got - right).abs().max() < 1e-10


def test_what_would_get_no_gradient_is_refused():
    case, says = Case(), r"would get no gradient: name it in over_rows\(..., learned=\(it,\)\), or detach it"
    for uses in {"tau": case.tau}, {"tau": case.log_tau.exp()}, {"inner": case.inner.square().sum()}:
        with pytest.raises(InputError, match=says):
            case.chunked(lambda a, b, uses=uses: case.loss(a, b, **uses), extra=case.extra)
    with pytest.raises(InputError, match="`extra` would get no gradient: detach it"):
        case.chunked(case.loss, extra=case.extra * case.log_tau)


def test_one_of_two_that_are_made_together_must_be_named_too():
    case = Case()
    inner, tau = torch.stack([case.log_tau, case.tau]).unbind()
    with pytest.raises(InputError, match="would get no gradient"):
        case.chunked(lambda a, b: case.loss(a, b, tau, inner), extra=case.extra, learned=(inner,))


def test_a_constant_that_is_learned_is_refused_also_where_it_is_0():
    """Once per chunk its gradient would count; as the log of a weight that begins with 1."""
    case, s = Case(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    weighed = lambda a, b: ((-s).exp() * case.loss(a, b)[0], {})
    with pytest.raises(InputError, match="without any row the objective has a gradient"):
        case.chunked(lambda a, b: (weighed(a, b)[0] + s, {}), extra=case.extra, learned=(s,))
    loss = case.chunked(weighed, extra=case.extra, learned=(s,))
    assert torch.autograd.grad(loss, s)[0].item() == pytest.approx(-loss.item(), rel=1e-10)
    assert case.chunked(weighed, extra=case.extra, learned=(s.requires_grad_(False),)) == loss  # now frozen


# ------------------------------------------------------------------------- what hangs on the student


def hang(monkeypatch, what) -> list:
    """Let SFT call `what(student)` when it has loaded one; returns the list of these students."""
    students, load = [], sft.Llava.from_checkpoint

    def loads(path):
        students.append(load(path))
        what(students[-1])
        return students[-1]

    monkeypatch.setattr(sft.Llava, "from_checkpoint", loads)
    return students


def test_what_hangs_on_the_student_survives_an_interruption(world, checkpoints, tmp_path, monkeypatch):
    """Bit by bit: an adapter that is trained, its moving average, and that of the loss, which all matter."""

    def parts(student):
        student.adapter = nn.Linear(16, 16)
        student.slow = nn.Parameter(student.adapter.weight.detach().clone(), requires_grad=False)
        student.register_buffer("average", torch.zeros(()))
        student.lm_head.register_buffer("steps", torch.zeros(()))

    students, crash = hang(monkeypatch, parts), [4]

    def adapted(objective, kinds, y, head):
        s, (h, w) = students[-1], head
        return over_rows(objective, kinds, y, (h + s.adapter(h) + s.average * (h @ s.slow), w))

    def ends_step(a_run, step, lr, logged, *more):
        if step in crash:
            raise KeyboardInterrupt(crash.pop())
        students[-1].average.lerp_(logged[0]["loss"].detach(), 0.1)
        students[-1].lm_head.steps += 1
        students[-1].slow.data.lerp_(students[-1].adapter.weight.data, 0.5)
        run.write_log(a_run, step, lr, logged, *more)

    monkeypatch.setattr(sft, "over_rows", adapted)
    monkeypatch.setattr(sft, "write_log", ends_step)
    flags = {"max_steps": 6, "epochs": 2, "save_every": 3, "lr": 0.005}
    argv = lambda name: ["--student", checkpoints["small"], *data_flags(world, out=tmp_path / name, **flags)]
    with pytest.raises(KeyboardInterrupt):
        sft.main(argv("two"))
    for name in "two", "one":
        sft.main(argv(name))
    a, b = (student.state_dict() for student in students[1:])
    assert {"adapter.bias", "slow", "average"} < a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["average"] > 0.1
    assert a["lm_head.steps"] == 6
    one, two = ([line | {"tokens_per_s": 0} for line in log_of(tmp_path / name)] for name in ("one", "two"))
    assert one == two
    saved = load_file(tmp_path / "two" / "model.safetensors")
    assert not [name for name in saved if "adapter" in name or "slow" in name or "average" in name]


def test_what_is_trained_and_gets_no_gradient_is_refused_at_the_first_step(world, checkpoints, tmp_path,
                                                                           monkeypatch):
    """A tower that is set free, and an adapter that no loss uses."""
    frees = lambda student: setattr(student.vision_tower, "requires_grad_", lambda _: None)
    hangs = lambda student: setattr(student, "adapter", nn.Linear(2, 2))
    for name, what in ("vision_tower.", frees), ("adapter.", hangs):
        argv = ["--student", checkpoints["small"], *data_flags(world, out=tmp_path / name, max_steps=2)]
        with monkeypatch.context() as patch, pytest.raises(InputError) as error:
            hang(patch, what)
            sft.main(argv)
        assert str(error.value).startswith(f"the student's ['{name}")
        assert "are trained but get no gradient: the loss does not depend on them, or" in str(error.value)
        assert not log_of(tmp_path / name)


def attend_otherwise(student) -> None:
    attention = student.language_model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "eager"


MISTAKES = {  # when they are made: the student is loaded, or what is trained is listed
    "number": ("loaded", lambda student, trained: setattr(student, "seen", 0),
               "student.*seen.* would not survive an interruption: .* a buffer by register_buffer"),
    "tensor": ("loaded", lambda student, trained: setattr(student, "seen", torch.ones(1)),
               "student.*seen.* would not survive an interruption"),
    "private": ("loaded", lambda student, trained: setattr(student, "_seen", torch.ones(1)),
                "student.*_seen.* would not survive an interruption"),
    "attention": ("loaded", lambda student, trained: attend_otherwise(student),
                  r"attend by eager .*sdpa.* not causal.*set_attn_implementation\('eager'\)"),
    "late": ("listed", lambda student, trained: setattr(student, "adapter", nn.Linear(2, 2)),
             "student.*adapter.weight.*: .*before `trained` is listed"),
    "outside": ("listed", lambda student, trained: trained.extend(nn.Linear(2, 2).parameters()),
                "2 tensors in the optimizer are not the student's.* before `trained` is listed"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_would_be_lost_or_wrong_is_refused(world, checkpoints, tmp_path, monkeypatch, what):
    when, mistake, says = MISTAKES[what]
    students = hang(monkeypatch, lambda student: when == "loaded" and mistake(student, None))

    def make(a_run, trained):
        if when == "listed":
            mistake(students[0], trained)
        return state.make_optimizer(a_run, trained)

    monkeypatch.setattr(sft, "make_optimizer", make)
    with pytest.raises(InputError, match=says):
        sft.main(["--student", checkpoints["small"], *data_flags(world, out=tmp_path / "out", max_steps=1)])
