"""What a stage will need: memory of a GPU by part, arithmetic, hours. From configs alone: nothing is loaded.

    python -m lab.plan dft --student out/sft --teacher out/teacher --gpus 8 --memory 80

First the stage (dpt, sft, dft, d2d, d2s, pd), then its own flags as they will be given to it and those below.
A model is a hub name or a folder, in which config.json is enough; one that does not exist yet is written
VISION+LLM, as google/siglip-so400m-patch14-384+Qwen/Qwen1.5-4B (for pd: what d2s makes of it).
"""

import argparse
import copy
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode

import dft
import dpt
import mod_distill
import moe
import sft
from support import chunks
from support.checks import loading
from support.flags import add_flags, cli, natural, new_parser, number, positive, require, to_argv
from support.run import precision

STAGES = {"dpt": dpt, "sft": sft, "dft": dft, "d2d": mod_distill, "d2s": mod_distill, "pd": mod_distill}
GIB = 2**30
SET_ASIDE = 2 * GIB  # of a GPU: CUDA's own, nccl's buffers, fragments


def read_config(path: str) -> hf.LlavaConfig:
    """The config of a LLaVA checkpoint, or of a new model VISION+LLM."""
    with loading(f"the config of {path}"):
        configs = [hf.AutoConfig.from_pretrained(part) for part in path.split("+")]
    right = [c.model_type for c in configs] == ["llava"] or len(configs) == 2
    require(right, f"{path} is a '{configs[0].model_type}' model: give a LLaVA checkpoint or VISION+LLM")
    if len(configs) == 1:
        return configs[0]
    vision, text = getattr(configs[0], "vision_config", configs[0]), configs[1]
    vision.vision_use_head = False
    return hf.LlavaConfig(vision_config=vision, text_config=text, vision_feature_select_strategy="full",
                          tie_word_embeddings=text.tie_word_embeddings)  # fmt: skip


def sizes(config: hf.LlavaConfig, args: argparse.Namespace | None = None) -> dict[str, float]:
    """Numbers of parameters by part; with the `args` of d2s or pd, of the sparse model that comes of it."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = hf.LlavaForConditionalGeneration(config).model
        body = model.language_model
        if args and config.text_config.model_type == "qwen2":
            student = SimpleNamespace(config=config, language_model=body)
            moe.sparsify(student, args.experts, args.top_k, args.moe_layers)
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    text, sparse = config.text_config, [m for m in body.modules() if hasattr(m, "shared_expert_gate")]
    n = {"vision": count(model.vision_tower), "projector": count(model.multi_modal_projector),
         "head": count(body.embed_tokens), "body": count(body) - count(body.embed_tokens),
         "moe": sum(map(count, sparse)), "sparse layers": len(sparse)}  # fmt: skip
    heads, top_k = n["head"] * (1 if config.tie_word_embeddings else 2), 1
    if sparse:
        top_k = text.num_experts_per_tok
        n["idle"] = n["moe"] * (1 - top_k / text.num_experts)
    return {"idle": 0, "top_k": top_k, "all": n["vision"] + n["projector"] + n["body"] + heads} | n


def kept_for_backward(text: hf.PretrainedConfig, shape: tuple[int, int], dtype: torch.dtype) -> list[int]:
    """Bytes that a dense language model keeps for its backward pass on (B, T) tokens: without layers, by each
    layer, and of that by its FFN. It is run on tensors that have shapes and no numbers.
    """
    seen, amounts = {}, []
    if text.model_type == "qwen2_moe":  # of a token each expert keeps what the dense FFN would
        dense = {"model_type": "qwen2", "intermediate_size": text.moe_intermediate_size}
        text = hf.Qwen2Config(**text.to_dict() | dense)

    def pack(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.nn.Parameter):
            seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes(), x
        return x

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        x = torch.empty(*shape, text.hidden_size, requires_grad=True)
        for n_layers in 1, 2:
            text = copy.deepcopy(text)
            text.num_hidden_layers, text.layer_types = n_layers, text.layer_types[:1] * n_layers
            body = hf.AutoModel.from_config(text)
            for run in (lambda: body(inputs_embeds=x, use_cache=False), lambda: body.layers[0].mlp(x)):
                seen.clear()
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                    out = run()
                amounts.append(sum(n_bytes for n_bytes, _ in seen.values()))
                del out
    one, ffn, two, _ = amounts
    return [2 * one - two, two - one, ffn]


def step(args: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Bytes by part in a step on samples of an image and `tokens` tokens in all, and FLOPs of a sample."""
    config = read_config(args.student)
    text, vision, gpu = config.text_config, config.vision_config, args.gpus > 0
    dtype = precision(args.dtype, torch.bfloat16 if gpu else torch.float32)
    n_visual = (vision.image_size // vision.patch_size) ** 2
    require(tokens > n_visual, f"samples of {tokens} tokens have no room for an image of {n_visual}")
    n, answers = sizes(config, args if args.stage in mod_distill.SPARSE else None), 1 + (args.stage == "pd")
    whole = n["all"] - n["vision"] - n["projector"]
    part = {"dpt": 0, "d2s": n["moe"], "pd": n["moe"]}.get(args.stage, whole)
    trained, head_too, t_bytes = n["projector"] + part, args.stage in ("sft", "dft", "d2d"), 0
    t, t_width = dict.fromkeys(n, 0), 0
    if getattr(args, "teacher", None):
        theirs = read_config(args.teacher)
        t, t_bytes = sizes(theirs), precision(args.teacher_dtype, dtype).itemsize
        t_width = theirs.text_config.hidden_size
        looks = [c.vision_config.to_dict() | {"layer": c.vision_feature_layer} for c in (config, theirs)]
        if looks[0] == looks[1]:  # then one tower serves both
            t["all"], t["vision"] = t["all"] - t["vision"], 0

    # ---- memory
    d, v, rows = text.hidden_size, text.vocab_size, args.micro_batch * answers
    stream, n_layers = 4 * rows * tokens * d, text.num_hidden_layers  # the hidden states between two layers
    rest, layer, ffn = kept_for_backward(text, (rows, tokens), dtype)
    more = ffn * (n["top_k"] - 1)  # of a sparse layer
    kept = {False: n_layers * layer + n["sparse layers"] * more, True: layer + more + n_layers * stream}
    n_read = rows * (tokens if "visual" in getattr(args, "targets", []) else tokens - n_visual)
    gamma, d_head = bool(getattr(args, "gamma", 0)), 4 * v * d * head_too
    at_once = (chunks.CHUNK * chunks.ON_GPU,) * 2 if gpu else (chunks.CHUNK, chunks.BLOCK)
    chunk, block = (min(n_read * v, size) for size in at_once)
    need = {
        "student": 4 * n["all"], "teacher": t_bytes * t["all"], "gradients": 4 * trained,
        "optimizer": 8 * trained / (args.gpus if args.shard == "optimizer" and gpu else 1),
        "kept": rest + stream + kept[args.gradient_checkpointing],
        "otherwise": rest + stream + kept[not args.gradient_checkpointing],
        "losses": chunk * (dtype.itemsize + t_bytes) + 28 * block + d_head + 8 * gamma * (d**2 + t_width**2),
        "backward": layer + more + d_head,
    }  # fmt: skip
    # Gradients of a single pass come into being as activations go; between several passes they stay.
    stay = args.gpus > 1 or args.global_batch > args.micro_batch
    during = need["kept"] + max(need["losses"], need["backward"]) + need["gradients"] * stay
    most = max(during, need["gradients"] + need["backward"])
    need["together"] = need["student"] + need["teacher"] + need["optimizer"] + most + SET_ASIDE * gpu

    # ---- arithmetic: two operations for a weight and token, two for the gradient of what goes in, and two
    # for the gradient of the weight, if it is trained. Attention's own products are left out.
    passes, moved = 2 + args.gradient_checkpointing, min(part, n["body"]) - (part > 0) * n["idle"]
    flops = 2 * tokens * answers * ((n["body"] - n["idle"]) * passes + moved + t["body"])
    flops += 2 * n_visual * (n["vision"] + t["vision"] + 3 * n["projector"] + t["projector"])
    flops += 2 * n_read / args.micro_batch * (n["head"] * (2 + head_too) + t["head"])
    flops += 6 * n["head"] * d / args.micro_batch * gamma * head_too  # W^T W and its gradient
    return need | {"flops": flops, "n_student": n["all"], "n_trained": trained, "n_teacher": t["all"]}


def changes(args: argparse.Namespace) -> Iterator[tuple[str, argparse.Namespace]]:
    """What makes a run smaller, one flag more each time: the flags changed so far, and all arguments."""
    halves = [("micro_batch", args.micro_batch >> k) for k in range(1, args.micro_batch.bit_length())]
    sharding, changed = [("shard", "optimizer")] if args.gpus > 1 else [], {}
    for name, value in [("gradient_checkpointing", True), *sharding, *halves]:
        if getattr(args, name) != value:
            changed[name] = value
            yield " ".join(to_argv(**changed)), argparse.Namespace(**vars(args) | changed)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("stage", choices=tuple(STAGES), help="the stage, before its own flags")
    add_flags(parser, "the plan", [
        ("--gpus", natural, 8, "GPUs of the run; 0: on the CPU"),
        ("--memory", number(float, 0), 80.0, "GiB of one GPU"),
        ("--tflops", number(float, 1e-3), 150.0, "TFLOP/s that a GPU reaches; half of an A100's peak is 156"),
        ("--text", positive, 100, "text tokens of an average sample"),
        ("--samples", positive, None, "samples of the data; without it as in the papers, 558k or 665k"),
    ])  # fmt: skip
    args, rest = parser.parse_known_args(argv)
    needless = ["--data", "-", "--out", "-"] + ["--step", args.stage] * (STAGES[args.stage] is mod_distill)
    args = argparse.Namespace(**vars(STAGES[args.stage].parse_args([*needless, *rest])) | vars(args))
    args.student = args.student or f"{args.vision}+{args.llm}"
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    tower = read_config(args.student).vision_config
    tokens = (tower.image_size // tower.patch_size) ** 2 + args.text
    need, longest, limit = step(args, tokens), step(args, args.max_len)["together"], args.memory * GIB
    other = f"   (with{'out' * args.gradient_checkpointing} --gradient_checkpointing)"
    where = f"each of {args.gpus} GPUs" if args.gpus else "the CPU"
    print(f"{args.stage} on {where}: {args.micro_batch} samples of {tokens} tokens at a time")
    billions = (f"{name} {need[f'n_{name}'] / 1e9:.2f}" for name in ("student", "trained", "teacher"))
    print(f"{', '.join(billions)} billion parameters\n")
    for text, n_bytes in {
        "the student's weights": need["student"], "the teacher's weights": need["teacher"],
        "gradients": need["gradients"], "AdamW's state": need["optimizer"],
        "activations kept for the backward pass": need["kept"], other: need["otherwise"],
        "chunks of the losses": need["losses"], "backward pass of a layer": need["backward"],
        "CUDA, nccl and fragments (set aside)": SET_ASIDE * (args.gpus > 0), "together": need["together"],
        f"together, samples of --max_len {args.max_len}": longest,
    }.items():  # fmt: skip
        print(f"{text:44s} {n_bytes / GIB:8.2f} GiB")
    verdict = "the longest samples do not fit" if need["together"] <= limit else "it does not fit"
    print(f"\n{'it fits' if longest <= limit else verdict} into {args.memory:g} GiB")
    for flags, smaller in changes(args) if longest > limit else ():
        then = step(smaller, args.max_len)["together"]
        print(f"   with {flags} {then / GIB:.2f} GiB" + ": fits" * (then <= limit))
        if then <= limit:
            break
    samples = args.samples or (558_000 if args.stage == "dpt" else 665_000)
    hours = samples * args.epochs * need["flops"] / (max(args.gpus, 1) * args.tflops * 1e12) / 3600
    print(f"{need['flops'] / 1e12:.2f} TFLOP a sample: {samples:,} samples, {args.epochs} time(s), take "
          f"{hours:.1f} hours at {args.tflops:g} TFLOP/s a GPU")  # fmt: skip
    return need | {"longest": longest, "hours": hours, "fits": longest <= limit}


if __name__ == "__main__":
    cli(main)
