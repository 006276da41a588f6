"""The sparse student of LLaVA-MoD (§3.1, Eqs. 2-4, arXiv 2408.15881): upcycling a dense one, and its router.

    x -> r = Softmax(x W_r) (N, E) -> top-k of it, r~ -> y = sum_i r~_i E_i(x)

The layers are those of transformers' Qwen2-MoE: a sparse checkpoint is a stock LLaVA one, with nothing of
ours in it. While training, router and experts are replaced: the router can be noisy, leaves padding out and
keeps what the balance loss is computed from; experts take all tokens routed to them together, however many
there are (the published code drops those beyond a capacity of 1.5).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.models.qwen2_moe import modeling_qwen2_moe as stock

from losses import balance_loss, routing
from model import Llava
from support.flags import InputError

JITTER = 1e-2  # DeepSpeed's width of the multiplicative noise
# Which layers become sparse, out of a number of them.
LAYERS = {
    "every_other": lambda n: range(0, n, 2),
    "all": lambda n: range(n),
    "first_half": lambda n: range(n // 2),
}


class Router(stock.Qwen2MoeTopKRouter):
    """Eqs. (2) and (3); the weight is W_r^T (E, D). `kind` is one of Table 14's; noise is for training."""

    kind = "topk"
    real: Tensor | None = None  # (N,) of the coming batch: True at tokens, False at padding
    r: Tensor  # (N, E), the routing values of the last batch
    chosen: Tensor  # (N, k), and the experts

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)  # (N, D)
        noise = None
        if self.training and self.kind == "jitter":
            x = x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER)
        scores = F.linear(x, self.weight)  # (N, E)
        if self.training and self.kind == "rsample":  # Gumbel noise: experts are sampled from r
            noise = -torch.empty_like(scores, dtype=torch.float32).exponential_().log()
        self.r, kept, self.chosen = routing(scores, self.top_k, self.norm_topk_prob, noise)
        chosen = self.chosen
        if self.real is not None:  # to the stock experts, number E means none of them
            chosen = chosen.masked_fill(~self.real.unsqueeze(1), self.num_experts)
            kept = kept * self.real.unsqueeze(1)
        return scores, kept.to(scores.dtype), chosen


class Experts(stock.Qwen2MoeExperts):
    """Eq. (4), y = sum_i r~_i E_i(x), for all tokens of an expert at once; a token of no expert gets zero."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        number, order = top_k_index.flatten().sort(stable=True)  # (N k,), expert by expert
        sizes = number.bincount(minlength=self.num_experts)[: self.num_experts].tolist()  # without number E
        order = order[: sum(sizes)]  # (S,)
        token = order // top_k_index.shape[1]  # (S,)
        experts = zip(self.gate_up_proj.unbind(), self.down_proj.unbind())
        y = [self._expert(x, *e) for x, e in zip(hidden_states[token].split(sizes), experts)]
        y = torch.cat(y) * top_k_weights.flatten()[order].unsqueeze(1)  # (S, D)
        return torch.zeros_like(hidden_states).index_add(0, token, y.to(hidden_states.dtype))

    def _expert(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, down)


def sparsify(
    student: Llava, experts: int, top_k: int, layers: str = "every_other", renormalise: bool = True
) -> None:
    """Sparse upcycling: each chosen layer's FFN becomes `experts` copies of itself and a linear router."""
    config = student.config.text_config
    if config.model_type == "qwen2_moe":
        raise InputError("the student is sparse already: --step d2s begins with the dense one of --step d2d")
    if config.model_type != "qwen2":
        raise InputError(
            f"a '{config.model_type}' language model cannot be made sparse, only Qwen1.5, 2 and 2.5 ('qwen2')"
        )
    if not 1 <= top_k <= experts:
        raise InputError(f"--top_k {top_k} of --experts {experts}: each token needs 1 to {experts} experts")
    sparse = sorted(set(chosen_layers(layers, config.num_hidden_layers)))
    known = hf.Qwen2MoeConfig().to_dict().keys() - {"model_type", "architectures"}
    shared = {k: v for k, v in config.to_dict().items() if k in known}
    moe = hf.Qwen2MoeConfig(**shared | {
        "num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": renormalise,
        "moe_intermediate_size": config.intermediate_size, "shared_expert_intermediate_size": 0,
        "mlp_only_layers": [i for i in range(config.num_hidden_layers) if i not in sparse],
        "architectures": ["Qwen2MoeForCausalLM"],
    })  # fmt: skip
    moe._attn_implementation = config._attn_implementation
    for i in sparse:
        layer = student.language_model.layers[i]
        gate, up, down = (getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        block = stock.Qwen2MoeSparseMoeBlock(moe).to(down.device, down.dtype)
        with torch.no_grad():
            block.experts.gate_up_proj.copy_(torch.cat([gate, up]))  # to every expert
            block.experts.down_proj.copy_(down)
            block.gate.weight.normal_(std=config.initializer_range)
            block.shared_expert_gate.weight.zero_()  # of a shared expert of width 0, which adds nothing
        layer.mlp = block
    student.config.text_config = moe
    student.language_model.config = copy.deepcopy(moe)
    prepare(student)


def chosen_layers(layers: str, n: int) -> list[int]:
    """`every_other`, `all`, `first_half`, or a list such as 0,2,5 -> the numbers of the layers."""
    if layers in LAYERS:
        return list(LAYERS[layers](n))
    try:
        picked = [int(i) for i in layers.split(",")]
    except ValueError:
        picked = []
    if not picked or not all(0 <= i < n for i in picked):
        raise InputError(
            f"--moe_layers {layers!r} is neither {', '.join(LAYERS)} nor a list of layers from 0 to {n - 1}"
        )
    return picked


def is_sparse(student: Llava) -> bool:
    return student.config.text_config.model_type == "qwen2_moe"


def routers(student: Llava) -> list[Router]:
    """The routers, one per sparse layer."""
    return [m for m in student.language_model.modules() if isinstance(m, Router)]


def routers_and_experts(student: Llava) -> list[nn.Module]:
    return [m for m in student.language_model.modules() if isinstance(m, Router | Experts)]


def prepare(student: Llava, kind: str = "topk") -> None:
    """Put `Router`s of this kind and `Experts` in the place of the stock ones, with their weights."""
    for layer in student.language_model.layers:
        if isinstance(layer.mlp, stock.Qwen2MoeSparseMoeBlock):
            for name, new in ("gate", Router), ("experts", Experts):
                old = getattr(layer.mlp, name)
                with torch.device("meta"):
                    part = new(student.config.text_config)
                for weight, value in list(old.named_parameters()):
                    setattr(part, weight, value)
                setattr(layer.mlp, name, part.train(old.training))
            layer.mlp.gate.kind = kind


def route(student: Llava, attention_mask: Tensor | None) -> None:
    """Tell all routers which positions of the coming batch (B, T) are tokens."""
    for router in routers(student):
        router.real = None if attention_mask is None else attention_mask.flatten().bool()


def expert_load(student: Llava) -> Tensor:
    """How many tokens of the last batch each expert got, (sparse layers, E)."""
    return torch.stack([
        (F.one_hot(m.chosen, m.num_experts).sum(1) * m.real.unsqueeze(1)).sum(0).double()
        for m in routers(student)
    ])  # fmt: skip


def balance(student: Llava, load: Tensor, n_tokens: float) -> Tensor:
    """The last batch's share of the balance loss, averaged over sparse layers.

    load  (sparse layers, E)  f_i, the experts' shares of the tokens in the global batch, which has n_tokens
    """
    losses = [balance_loss(m.r, f, m.real / n_tokens) for m, f in zip(routers(student), load.float())]
    return torch.stack(losses).mean()
