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
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from transformers.models.qwen2_moe import modeling_qwen2_moe as stock

from flags import InputError
from losses import balance_loss, routing
from model import Llava

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
    """Eq. (4), y = sum_i r~_i E_i(x), with gradients and in autocast; a token of no expert gets zero."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        expert, order = top_k_index.flatten().sort(stable=True)  # (N k,), expert by expert
        sizes = expert.bincount(minlength=self.num_experts)[: self.num_experts].tolist()  # without number E
        order = order[: sum(sizes)]
        token = order // top_k_index.shape[1]  # (S,)
        x = hidden_states[token]  # (S, D)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        gate, up = GroupedLinear.apply(x, self.gate_up_proj, sizes).chunk(2, dim=-1)
        out = GroupedLinear.apply(self.act_fn(gate) * up, self.down_proj, sizes)  # (S, D)
        out = out * top_k_weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(hidden_states).index_add(0, token, out.to(hidden_states.dtype))


class GroupedLinear(torch.autograd.Function):
    """x (S, D) in groups of rows, one for each of the weights w (E, O, D) -> (S, O), in x's precision.

    As a function of its own, because the gradients of E slices of w would be E tensors of w's size.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.sizes = sizes
        y = x.new_empty(len(x), w.shape[1])
        for y_e, x_e, w_e in zip(y.split(sizes), x.split(sizes), w):
            torch.mm(x_e, w_e.T.to(x.dtype), out=y_e)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for dx_e, dy_e, w_e in zip(dx.split(ctx.sizes), dy.split(ctx.sizes), w):
                torch.mm(dy_e, w_e.to(dy.dtype), out=dx_e)
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(w)
            for dw_e, dy_e, x_e in zip(dw, dy.split(ctx.sizes), x.split(ctx.sizes)):
                dw_e.copy_(dy_e.T @ x_e) if dw.dtype != x.dtype else torch.mm(dy_e.T, x_e, out=dw_e)
        return dx, dw, None


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


def balance(student: Llava, n_tokens: float) -> tuple[Tensor, Tensor]:
    """The balance loss, averaged over sparse layers, and the experts' shares of the tokens, (layers, E).

    Of the last batch, `n_tokens` being the number of tokens that P_i is a mean over. The shares are those of
    all ranks' batches together: ranks see the loss that one rank would see with the joined batch.
    """
    all_routers = routers(student)
    load = torch.stack([
        (F.one_hot(m.chosen, m.num_experts).sum(1) * m.real.unsqueeze(1)).sum(0).float() for m in all_routers
    ])  # fmt: skip
    dist.all_reduce(load)
    load /= load[0].sum()  # tokens x k
    losses = [balance_loss(m.r, f, m.real / n_tokens) for m, f in zip(all_routers, load)]
    return torch.stack(losses).mean(), load
