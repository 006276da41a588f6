"""The losses of the three papers, one function each: what stands here is what is differentiated.

Glossary of shapes
    B   samples in a rank's micro-batch       T   positions of the padded sequence
    N   rows of a kind (see below)            V   token ids (rows of the language-model head)
    D   width of the language model           Np  visual tokens of one image;  n  images in it

Conventions, for every function
    * A *row* is one position of the sequence; its distribution is over the next token. Which positions are
      response, visual or prompt rows is decided once, in `data.LlavaData.collate`; nothing here shifts
      anything. A row may be of two kinds: the last image token before a caption is visual and response.
    * `log_s` and `log_t` are log-probabilities, log phi_s and log phi_l of the papers: natural logarithms, in
      fp32 or fp64. The paper's phi_s is the student (small), phi_l the teacher (large).
    * A loss is a weighted *sum* over its rows (images, pairs), never a mean of those it is given: only some
      are given at a time. The stages pass 1 / (rows in the global batch) as `weights`, so that the losses of
      all chunks, micro-batches and ranks add up to the mean over the global batch. (Departure: Eqs. 1 to 3
      print a sum over tokens. As a sum, the 729 visual terms of an image would drown all others.)
    * Without any row a loss is 0, and so is its gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Tensor | float  # one for each row, or one for all of them


def weighted_sum(rows: Tensor, weights: Weights) -> Tensor:
    """sum_n w_n rows_n, rows (N,)."""
    return (rows * weights).sum()


def autoregressive_loss(log_s: Tensor, y: Tensor, weights: Weights) -> Tensor:
    """L_reg = - sum_m log phi(y_m | y_<m)                                   Eq. (1), arXiv 2410.16236v1

    log_s  (N, V)  log phi(. | y_<m), at the position before y_m
    y      (N,)    y_m, token ids in [0, V); a row of weight 0 may hold -100
    Returns a scalar >= 0, in nats. Also L_PT and L_SFT of the paper, and Eq. (5) of LLaVA-MoD. (The paper
    prints phi_l, as it first trains the teacher by it; phi is whichever model is trained.)
    """
    return weighted_sum(-log_probability(log_s, y), weights)


def log_probability(log_p: Tensor, y: Tensor) -> Tensor:
    """log phi(y_m | y_<m) of every row: log_p (N, V), y (N,) -> (N,), <= 0."""
    return log_p.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)


def kl_divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KLD(phi_l || phi_s) = sum_j phi_l(Y_j) log(phi_l(Y_j) / phi_s(Y_j)), the summand of Eqs. (2) and (3)

    log_s (N, V_s), log_t (N, V_t) -> (N,), >= 0, in nats; exactly 0 where both are the same numbers.
    The forward KL at temperature 1, over the token ids that both heads have. The expectation is over the
    *second* argument's distribution.
    """
    log_s, log_t = over_common_ids(log_s, log_t)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def over_common_ids(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Both as distributions over the min(V_s, V_t) ids that both heads have; the rest is padding.

    The log-softmax of cut log-probabilities is the log-softmax of the cut logits: nothing is approximated.
    """
    v = min(log_s.shape[-1], log_t.shape[-1])
    return tuple(x if x.shape[-1] == v else F.log_softmax(x[..., :v], dim=-1) for x in (log_s, log_t))


def response_kl(log_s: Tensor, log_t: Tensor, weights: Weights) -> Tensor:
    """L_res = sum_m KLD(phi_l(y_m | y_<m), phi_s(y_m | y_<m))               Eq. (2), arXiv 2410.16236v1

    Rows m = 1..M predict the tokens of the response: the rows of Eq. (1). Shapes as in `kl_divergence`.
    """
    return weighted_sum(kl_divergence(log_s, log_t), weights)


def visual_kl(log_s: Tensor, log_t: Tensor, weights: Weights) -> Tensor:
    """L_vis = sum_k KLD(phi_l(y_k | y_<k), phi_s(y_k | y_<k))               Eq. (3), arXiv 2410.16236v1

    Rows k = 1..K are the visual tokens' own positions: what the model predicts *at* a visual token.
    """
    return weighted_sum(kl_divergence(log_s, log_t), weights)


def prompt_kl(log_s: Tensor, log_t: Tensor, weights: Weights) -> Tensor:
    """The same on the rows that predict the text of the prompt: the third target of KD's Table 4."""
    return weighted_sum(kl_divergence(log_s, log_t), weights)


def self_correlation(y: Tensor, gram: Tensor | None = None) -> Tensor:
    """R_v = y_v (x) y_v = y_v y_v^T                                         Eq. (4), arXiv 2410.16236v1

    y     (n, Np, V)  the raw logits at the visual tokens of each of n images, or
          (n, Np, D)  the hidden states h that they come from, y = h W^T, together with
    gram  (D, D)      G = W^T W of the language-model head W (V, D): then y y^T = h W^T W h^T = h G h^T
    Returns (n, Np, Np). The paper says "visual logits"; here they are raw.
    """
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    return y @ y.mT if gram is None else y @ gram @ y.mT


def relation_loss(r_s: Tensor, r_t: Tensor, weights: Weights, columns: bool = False) -> Tensor:
    """L_rel = 1 - Cos(R_s, R_t) = 1 - R_s . R_t / (|R_s| |R_t|)             Eq. (5), arXiv 2410.16236v1

    r_s, r_t  (n, Np, Np)  R_s, R_t of Eq. (4), their scale does not matter
    weights   (n,)         one per image
    columns   False: one cosine per image, over the flattened matrix (KD, Frobenius norm);
              True: L_cos = (1/Np) sum_i (1 - cos(R_t[:, i], R_s[:, i])), Eq. (6) of LLaVA-CKD, arXiv
              2605.10641, as its damaged print is read here
    Returns a scalar in [0, 2] if the weights sum to 1. In fp64: in fp32, 1 - cos would be lost in rounding
    near 0, and squares of large entries would overflow. A matrix of zeros has no direction: its cosine is 0.
    """
    r_s, r_t = r_s.double(), r_t.double()
    if columns:
        distance = (1 - F.cosine_similarity(r_s, r_t, dim=-2)).mean(-1)  # (n, Np) -> (n,)
    else:
        distance = 1 - F.cosine_similarity(r_s.flatten(1), r_t.flatten(1))  # (n,)
    return weighted_sum(distance, weights)


def routing(
    scores: Tensor, top_k: int, renormalise: bool = True, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """r = Softmax(x W_r), r~ = Top-k(r)                         Eqs. (2) and (3), arXiv 2408.15881

    scores       (N, E)  x W_r, the router's output for N tokens and E experts
    renormalise  divide the k kept values by their sum. Departure: the paper keeps r_i as it is; divided by
                 the sum (as DeepSpeed does it for the paper's released code), E equal experts are exactly
                 the dense FFN that they were copied from
    noise        (N, E)  added to the scores when experts are picked, not to the kept values (RSample)
    Returns r (N, E), the kept values (N, k) and which experts they belong to (N, k).
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    r = F.softmax(scores, dim=-1)
    chosen = (r if noise is None else scores + noise).topk(top_k, dim=-1).indices
    kept = r.gather(-1, chosen)
    return r, kept / kept.sum(-1, keepdim=True) if renormalise else kept, chosen


def balance_loss(r: Tensor, load: Tensor, weights: Weights) -> Tensor:
    """E sum_i f_i P_i, which keeps the experts equally busy (Fedus et al., 2022, Eq. 4), of one MoE layer

    r        (N, E)  routing values of Eq. (2), one row per token
    load     (E,)    f_i, the share of routed tokens that expert i received; sums to 1; carries no gradient
    weights  (N,)    of the rows whose mean is P_i
    Returns a scalar, 1 where load or routing values are uniform, at most E.
    """
    return weighted_sum((r * load.detach()).sum(-1), weights) * r.shape[-1]


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, weights: Weights) -> Tensor:
    """- log sigma(beta log pi_S(y+)/pi_T(y+) - beta log pi_S(y-)/pi_T(y-))      Eq. (8), arXiv 2408.15881

    chosen, rejected  (B,)  log pi_S(y|x) - log pi_T(y|x) of y+ and y-, each summed over the answer's tokens
    weights           (B,)  one per pair
    Returns a scalar >= 0; log 2 where the student is the teacher.
    """
    return weighted_sum(-F.logsigmoid(beta * (chosen - rejected)), weights)


def kto_loss(
    chosen: Tensor, rejected: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, beta: float,
    weights: Weights,
) -> Tensor:
    """Kahneman-Tversky optimisation on pairs: the loss of MoD's preference distillation (§3.2, Table 16)

    [1 - sigma(beta (chosen - KL_rejected)) + 1 - sigma(beta (KL_chosen - rejected))] / 2 per pair

    chosen, rejected        (B,)  log-ratios as in `dpo_loss`
    chosen_kl, rejected_kl  ()    the `kl_baseline` of each kind of answer. A good answer's reward is compared
                                  with what bad answers get, and the reverse (Ethayarajh et al., 2024)
    weights                 (B,)  one per pair
    Returns a scalar in [0, 1]. Departure: the paper names KTO without an equation; this is the form for
    pairs that its released code uses.
    """
    good = 1 - torch.sigmoid(beta * (chosen - rejected_kl))
    bad = 1 - torch.sigmoid(beta * (chosen_kl - rejected))
    return weighted_sum((good + bad) / 2, weights)


def kl_baseline(mean_log_ratio: Tensor) -> Tensor:
    """KTO's point of reference: the mean log-ratio over the global batch, at least 0, without a gradient."""
    return mean_log_ratio.detach().clamp_min(0)
