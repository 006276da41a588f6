"""The numbered losses of the three papers, one function each. Pure tensor mathematics; imports only torch.

Glossary of shapes
    B   samples in a batch                    T   positions of the padded sequence
    N   rows: positions that a loss reads     V   vocabulary (rows of the language-model head)
    D   width of the language model           Np  visual tokens of one image;  n  images in the batch

Conventions, for every function
    * A *row* is one position of the sequence; its logits predict the next token. Which positions are
      response, visual or prompt rows is decided once, in `data.Batch`; nothing here shifts anything.
    * Logits may be bf16, fp16, fp32 or fp64; the arithmetic is fp32 (fp64 for fp64 input).
    * A token loss has the signature `loss(student_logits, target, weights) -> scalar` and is a weighted
      *sum* over its rows. With `weights=None` it is the mean over the rows given. The stages pass
      mask / (rows in the global batch), so that micro-batches and ranks add up to the mean over the global
      batch. (Departure: Eqs. 2-3 print a sum over tokens; as a sum, Np = 729 visual terms would drown the
      rest.)
    * No rows at all: the value is 0 and so is the gradient.
    * Teacher and student may pad their vocabulary differently. Distillation compares the ids both have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is where it already has 32 bits or more."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def common_vocabulary(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both, cut to the ids that both have, (..., min(V_s, V_t)): the rest is the larger head's padding."""
    v = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return student_logits[..., :v], teacher_logits[..., :v]


def weighted_sum(rows: Tensor, weights: Tensor | float | None) -> Tensor:
    """sum_n w_n rows_n; without weights the mean (0 for no rows, where a plain mean would be 0/0)."""
    if weights is None:
        return rows.sum() / max(rows.numel(), 1)
    return (rows * weights).sum()


# ------------------------------------------------------------------------------ token losses (KD Eqs. 1-3)


def autoregressive_loss(
    student_logits: Tensor, targets: Tensor, weights: Tensor | float | None = None
) -> Tensor:
    """L_reg = - sum_m log phi(y_m | y_<m)                                   Eq. (1), arXiv 2410.16236v1

    student_logits  (N, V)  logits of phi at the position before y_m
    targets         (N,)    y_m, token ids in [0, V); rows of weight 0 may hold any id, also -100
    weights         (N,)    see the conventions above
    Returns a scalar >= 0, in nats. Also L_PT and L_SFT of the paper, and MoD Eq. (5).
    """
    return weighted_sum(-log_probability(student_logits, targets), weights)


def log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """log phi(y_m | y_<m) of every row, logits (N, V), targets (N,) as above -> (N,), <= 0, in nats."""
    log_p = F.log_softmax(full_precision(logits), dim=-1)  # (N, V)
    return log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KLD(phi_l || phi_s) = sum_j phi_l(Y_j) log(phi_l(Y_j) / phi_s(Y_j)), the summand of Eqs. (2) and (3)

    student_logits (N, V_s) of phi_s, teacher_logits (N, V_t) of phi_l -> (N,), >= 0, in nats, exactly 0
    where the logits are identical. Forward KL, temperature 1, over the common ids.
    """
    student_logits, teacher_logits = common_vocabulary(student_logits, teacher_logits)
    log_s = F.log_softmax(full_precision(student_logits), dim=-1)  # (N, V)
    log_t = F.log_softmax(full_precision(teacher_logits), dim=-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def response_kl(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor | float | None = None
) -> Tensor:
    """L_res = sum_m KLD(phi_l(y_m | y_<m), phi_s(y_m | y_<m))               Eq. (2), arXiv 2410.16236v1

    Rows m = 1..M predict the response tokens: the rows of Eq. (1). Shapes and range as in `kl_divergence`.
    """
    return weighted_sum(kl_divergence(student_logits, teacher_logits), weights)


def visual_kl(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor | float | None = None
) -> Tensor:
    """L_vis = sum_k KLD(phi_l(y_k | y_<k), phi_s(y_k | y_<k))               Eq. (3), arXiv 2410.16236v1

    Rows k = 1..K are the visual tokens' own positions: the logits *at* an image token, not before it.
    """
    return weighted_sum(kl_divergence(student_logits, teacher_logits), weights)


def prompt_kl(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor | float | None = None
) -> Tensor:
    """The same KLD on the rows that predict the prompt's text: the third target of KD's Table 4."""
    return weighted_sum(kl_divergence(student_logits, teacher_logits), weights)


# ------------------------------------------------------------------------------ relation loss (KD Eqs. 4-5)


def self_correlation(visual_logits: Tensor) -> Tensor:
    """R_v = y_v (x) y_v = y_v y_v^T                                         Eq. (4), arXiv 2410.16236v1

    visual_logits (n, Np, V), the raw logits at one image's visual tokens -> (n, Np, Np).
    """
    y = full_precision(visual_logits)
    return y @ y.mT


def relation_loss(
    student_r: Tensor, teacher_r: Tensor, weights: Tensor | float | None = None, columns: bool = False
) -> Tensor:
    """L_rel = 1 - Cos(R_s, R_t) = 1 - R_s . R_t / (|R_s| |R_t|)             Eq. (5), arXiv 2410.16236v1

    student_r, teacher_r  (n, Np, Np)  R_s, R_t of Eq. (4), any positive scale
    weights               (n,)         one per image; None: the mean over images
    columns               False: one cosine per image over the flattened matrix (KD, Frobenius);
                          True: L_cos = (1/Np) sum_i (1 - cos(R_t[:, i], R_s[:, i])), LLaVA-CKD's form
    Returns a scalar in [0, 2], exactly 0 for equal matrices: written as half the squared distance of the
    two normalised matrices, which is the same number without the cancellation of 1 - cos. A matrix (column)
    of zeros has no direction; its loss is 1/2 against any other and 0 against another zero.
    """
    dims = (-2,) if columns else (-2, -1)
    distance = (_unit(student_r, dims) - _unit(teacher_r, dims)).square().sum(dims) / 2  # (n,) or (n, Np)
    return weighted_sum(distance.mean(-1) if columns else distance, weights)


def _unit(r: Tensor, dims: tuple[int, ...]) -> Tensor:
    """r / |r|, zero where r is zero. The largest entry is divided out first: squares of R can pass fp32."""
    r = full_precision(r)
    r = r / _nonzero(r.detach().abs().amax(dims, keepdim=True))
    return r / _nonzero(r.square().sum(dims, keepdim=True)).sqrt()


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


# ------------------------------------------------------------------------------ objectives (KD Eqs. 6-7)


def dpt_objective(
    l_pt: Tensor, l_res: Tensor, l_vis: Tensor, l_rel: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """L_DPT = L_PT + alpha L_res + beta L_vis + gamma L_rel        Eq. (6), arXiv 2410.16236v1"""
    return l_pt + alpha * l_res + beta * l_vis + gamma * l_rel


def dft_objective(
    l_reg: Tensor, l_res: Tensor, l_vis: Tensor, l_rel: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """L_DFT = L_reg + alpha' L_res + beta' L_vis + gamma' L_rel        Eq. (7), arXiv 2410.16236v1"""
    return l_reg + alpha * l_res + beta * l_vis + gamma * l_rel


# ------------------------------------------------------------------------------ LLaVA-MoD: the sparse student


def routing(
    scores: Tensor, top_k: int, renormalise: bool = True, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """r = Softmax(x W_r), r~ = Top-k(r)                         Eqs. (2) and (3), arXiv 2408.15881

    scores       (N, E)  x W_r, the router's output for N tokens and E experts
    renormalise  divide the k kept values by their sum. Departure: the paper keeps r_i as it is; divided by
                 the sum, E equal experts are exactly the dense FFN they were copied from
    noise        (N, E)  added to the scores when experts are picked, not to their weights (RSample)
    Returns r (N, E), the kept values (N, k) and which experts they belong to (N, k).
    """
    r = F.softmax(full_precision(scores), dim=-1)
    ranked = r if noise is None else full_precision(scores) + noise
    chosen = ranked.topk(top_k, dim=-1).indices
    kept = r.gather(-1, chosen)
    return r, kept / kept.sum(-1, keepdim=True) if renormalise else kept, chosen


def balance_loss(r: Tensor, load: Tensor, weights: Tensor | float | None = None) -> Tensor:
    """E sum_i f_i P_i, the loss that keeps experts busy alike (Fedus et al., 2022, Eq. 4), of one MoE layer

    r        (N, E)  routing values of Eq. (2), one row per token
    load     (E,)    f_i, the share of routed tokens that expert i received; sums to 1; carries no gradient
    weights  (N,)    of the rows whose mean is P_i; None: all alike
    Returns a scalar, 1 where load or routing values are uniform, at most E.
    """
    return weighted_sum((r * load.detach()).sum(-1), weights) * r.shape[-1]


def d2s_objective(l_ar: Tensor, l_kl: Tensor) -> Tensor:
    """L_D2S = - E[log pi_S] + E_(pi_T)[log pi_T / pi_S]         Eq. (7), arXiv 2408.15881

    Eq. (1) of LLaVA-KD and the KL on the same rows; the KL alone is L_D2D, Eq. (6). Departure: Eqs. (6) and
    (7) print a minus before the KL, which would drive the student away from the teacher.
    """
    return l_ar + l_kl


# ------------------------------------------------------------------------------ preference losses (MoD Eq. 8)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float = 0.1, weights: Tensor | float | None = None
) -> Tensor:
    """- log sigma(beta log pi_S(y+)/pi_T(y+) - beta log pi_S(y-)/pi_T(y-))      Eq. (8), arXiv 2408.15881

    chosen, rejected  (B,)  log pi_S(y|x) - log pi_T(y|x) of y+ and y-, each summed over the answer's tokens
    weights           (B,)  one per pair; None: the mean over pairs
    Returns a scalar >= 0; log 2 where the student is the teacher.
    """
    return weighted_sum(-F.logsigmoid(beta * (chosen - rejected)), weights)


def kto_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    beta: float = 0.1,
    weights: Tensor | float | None = None,
) -> Tensor:
    """Kahneman-Tversky optimisation on pairs: the loss of MoD's preference distillation (§3.2, Table 16)

    [1 - sigma(beta (chosen - KL_rejected)) + 1 - sigma(beta (KL_chosen - rejected))] / 2 per pair

    chosen, rejected        (B,)  log-ratios as in `dpo_loss`
    chosen_kl, rejected_kl  ()    `kl_baseline` of each: of a good answer's reward what bad answers get is
                                  subtracted, and the reverse (Ethayarajh et al., 2024, with its pairs)
    weights                 (B,)  one per pair; None: the mean over pairs
    Returns a scalar in [0, 1]. Departure: the paper names KTO without an equation; this is the form for
    pairs that its released code uses.
    """
    good = 1 - torch.sigmoid(beta * (chosen - rejected_kl))
    bad = 1 - torch.sigmoid(beta * (chosen_kl - rejected))
    return weighted_sum((good + bad) / 2, weights)


def kl_baseline(mean_log_ratio: Tensor) -> Tensor:
    """The reference point of KTO: the mean log-ratio over the whole batch, never below 0, no gradient."""
    return mean_log_ratio.detach().clamp_min(0)
