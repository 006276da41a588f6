"""The sparse student of LLaVA-MoD (§3.1, Eqs. 2-4, arXiv 2408.15881): upcycling a dense one, and its router.

    x -> r = Softmax(x W_r) (N, E) -> top-k of it, r~ -> y = sum_i r~_i E_i(x)

The layers are those of transformers' Qwen2-MoE and Qwen3-MoE: a sparse checkpoint is a stock LLaVA one, with
nothing of ours in it. While training, router and experts are replaced: the router can be noisy, leaves
padding out and keeps what the balance loss is computed from; experts take all tokens routed to them, however
many there are (departure: the published code drops those beyond a capacity of 1.5).
"""

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.models.qwen2_moe import modeling_qwen2_moe as stock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from losses import balance_loss, routing
from model import Llava
from support.flags import require

JITTER = 1e-2  # DeepSpeed's width of the multiplicative noise
BLOCKS = {"qwen2": (hf.Qwen2MoeConfig, stock.Qwen2MoeSparseMoeBlock),
          "qwen3": (hf.Qwen3MoeConfig, Qwen3MoeSparseMoeBlock)}


class Router(stock.Qwen2MoeTopKRouter):
    """Eqs. (2) and (3); the weight is W_r^T (E, D). `kind` is one of Table 14's; noise is for training."""

    kind = "topk"
    real: Tensor | None = None  # (N,) of the coming batch: True at tokens, False at padding
    keeps: bool = True  # what follows; not in the backward pass, where layers may be computed again
    r: Tensor  # (N, E), the routing values of the last batch
    chosen: Tensor  # (N, k), and the experts

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, noise = hidden_states.reshape(-1, self.hidden_dim), None  # (N, D)
        if self.training and self.kind == "jitter":
            x = x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER)
        with torch.autocast(x.device.type, enabled=False):  # in fp32, as the published code
            scores = F.linear(x.to(self.weight.dtype), self.weight)  # (N, E)
        if self.training and self.kind == "rsample":  # Gumbel noise: experts are sampled from r
            noise = -torch.empty_like(scores, dtype=torch.float32).exponential_().log()
        r, kept, chosen = routing(scores, self.top_k, self.norm_topk_prob, noise)
        if self.keeps:
            self.r, self.chosen = r, chosen
        if self.real is not None:  # to the experts, number E means none of them
            chosen = chosen.masked_fill(~self.real.unsqueeze(1), self.num_experts)
            kept = kept * self.real.unsqueeze(1)
        return scores, kept.to(scores.dtype), chosen


class Experts(stock.Qwen2MoeExperts):
    """Eq. (4), y = sum_i r~_i E_i(x), for all tokens of an expert at once; a token of no expert gets zero."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        number, order = top_k_index.flatten().sort(stable=True)  # (N k,), expert by expert
        ends = torch.searchsorted(number, torch.arange(self.num_experts, device=number.device), right=True)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()  # of experts, the only wait for the device
        order = order[: sum(sizes)]  # (S,)
        token, y = order // top_k_index.shape[1], []  # (S,)
        xs = hidden_states[token].split(sizes)
        for x, gate_up, down in zip(xs, self.gate_up_proj.unbind(), self.down_proj.unbind()):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            y.append(F.linear(self.act_fn(gate) * up, down))
        y = torch.cat(y) * top_k_weights.flatten()[order].unsqueeze(1)  # (S, D)
        return torch.zeros_like(hidden_states).index_add(0, token, y.to(hidden_states.dtype))


def sparsify(student: Llava, experts: int, top_k: int, layers: str, renormalise: bool = True) -> None:
    """Sparse upcycling: each chosen layer's FFN becomes `experts` copies of itself and a linear router."""
    config = student.config.text_config
    only = "cannot be made sparse; only a dense Qwen1.5, 2, 2.5 ('qwen2') or 3 ('qwen3', of equal layers) can"
    fits = config.model_type == "qwen2" or config.model_type == "qwen3" and not config.use_sliding_window
    require(fits, f"a '{config.model_type}' language model {only}")
    config_kind, block_kind = BLOCKS[config.model_type]
    advice = f"each token needs 1 to {experts} experts"
    require(1 <= top_k <= experts, f"--top_k {top_k} of --experts {experts}: {advice}")
    known = {*config_kind().to_dict(), "head_dim"} - {"model_type", "architectures"}
    sparse, n = chosen_layers(layers, config.num_hidden_layers), config.num_hidden_layers
    moe = config_kind(**{k: v for k, v in config.to_dict().items() if k in known} | {
        "num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": renormalise,
        "moe_intermediate_size": config.intermediate_size, "shared_expert_intermediate_size": 0,
        "mlp_only_layers": [i for i in range(n) if i not in sparse],
        "architectures": [block_kind.__name__.replace("SparseMoeBlock", "ForCausalLM")],
    })
    moe._attn_implementation = config._attn_implementation
    for layer in (student.language_model.layers[i] for i in sparse):
        dense = layer.mlp
        layer.mlp = block_kind(moe).to(dense.down_proj.weight)
        with torch.no_grad():  # to every expert
            layer.mlp.experts.gate_up_proj.copy_(torch.cat([dense.gate_proj.weight, dense.up_proj.weight]))
            layer.mlp.experts.down_proj.copy_(dense.down_proj.weight)
            layer.mlp.gate.weight.normal_(std=config.initializer_range)
            if config.model_type == "qwen2":  # has a shared expert, here of width 0, which adds nothing
                layer.mlp.shared_expert_gate.weight.zero_()
    student.config.text_config = moe
    prepare(student)


def chosen_layers(layers: str, n: int) -> list[int]:
    """`every_other`, `all`, `first_half`, or a list such as 0,2,5 -> the numbers of the layers."""
    named = {"every_other": range(0, n, 2), "all": range(n), "first_half": range(n // 2)}
    picked = named.get(layers, [int(i) if i.isdecimal() else n for i in layers.split(",")])
    choices = f"{', '.join(named)} nor a list of layers from 0 to {n - 1}"
    require(max(picked, default=n) < n, f"--moe_layers {layers!r} is neither {choices}")
    return sorted(set(picked))


def is_sparse(student: Llava) -> bool:
    return student.config.text_config.model_type in {kind.model_type for kind, _ in BLOCKS.values()}


def prepare(student: Llava, kind: str = "topk") -> None:
    """Turn the stock routers and experts into `Router`s of this kind and `Experts`, with their weights."""
    for block in (layer.mlp for layer in student.language_model.layers):
        if isinstance(block, tuple(kind for _, kind in BLOCKS.values())):
            block.gate.__class__ = Router
            block.gate.kind = kind
            block.experts.__class__ = Experts


def modules(student: Llava, kind: type) -> list[nn.Module]:
    """The student's `Router`s, or its `Experts`: one of each in a sparse layer."""
    return [m for m in student.language_model.modules() if isinstance(m, kind)]


def watch(student: Llava, attention_mask: Tensor | None) -> None:
    """Let all routers keep what they do with the coming batch (B, T), of which some positions are tokens."""
    for router in modules(student, Router):
        router.real = None if attention_mask is None else attention_mask.flatten().bool()
        router.keeps = True


def unwatch(student: Llava) -> None:
    """From here on the routers keep nothing more: the backward pass comes."""
    for router in modules(student, Router):
        router.keeps = False


def expert_load(student: Llava) -> Tensor:
    """How many tokens of the last batch each expert got, (sparse layers, E)."""
    return torch.stack([(F.one_hot(m.chosen, m.num_experts) * m.real.view(-1, 1, 1)).sum((0, 1))
                        for m in modules(student, Router)])


def mean_balance_loss(student: Llava, load: Tensor, n_tokens: float) -> Tensor:
    """The last batch's share of the balance loss, averaged over sparse layers; load (sparse layers, E) holds
    the experts' shares f_i of the tokens in the global batch, which has n_tokens.
    """
    pairs = zip(modules(student, Router), load.float())
    return torch.stack([balance_loss(router.r, f, router.real / n_tokens) for router, f in pairs]).mean()
