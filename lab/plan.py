"""What a stage will need: memory of a GPU by part, arithmetic, hours. From configs alone: nothing is loaded.

    python -m lab.plan dft --student out/sft --teacher out/teacher --gpus 8 --memory 80

First the stage (dpt, sft, dft, d2d, d2s, pd), then its own flags as they will be given to it and those below.
A model is a hub name or a folder, in which config.json is enough; one that does not exist yet is written
VISION+LLM, as google/siglip-so400m-patch14-384+Qwen/Qwen1.5-4B (for pd: what d2s makes of it). Of the parts,
"losses" are logits and gradients of their chunks, "backward" is that of a layer, "set aside" is CUDA's own.
"""

import argparse
import copy
from collections.abc import Callable

import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode

import dft
import dpt
import mod_distill
import moe
import sft
from support import checkpoints, chunks
from support.checkpoints import loading
from support.flags import add_flags, cli, natural, new_parser, number, positive, require, to_argv
from support.run import precision

STAGES = {"dpt": dpt, "sft": sft, "dft": dft, "d2d": mod_distill, "d2s": mod_distill, "pd": mod_distill}
GIB = 2**30
SET_ASIDE = 2 * GIB  # of a GPU: CUDA's own, nccl's buffers, fragments


def read_config(path: str) -> hf.LlavaConfig:
    """The config of a LLaVA checkpoint, or of a new model VISION+LLM."""
    with loading("the config of", path):
        config, *llm = [checkpoints.read_config(part) for part in path.split("+")]
    require(len(llm) < 2, f"{path} has more than one +: give a LLaVA checkpoint or VISION+LLM")
    if not llm:
        kind = config.model_type
        require(kind == "llava", f"{path} is a '{kind}' model: give a LLaVA checkpoint or VISION+LLM")
        return config
    vision = getattr(config, "vision_config", config)
    vision.vision_use_head = False
    seen = "default" if vision.model_type == "clip_vision_model" else "full"  # as support/parts.py
    return hf.LlavaConfig(vision_config=vision, text_config=llm[0], vision_feature_select_strategy=seen,
                          tie_word_embeddings=llm[0].tie_word_embeddings)


def sizes(config: hf.LlavaConfig, args: argparse.Namespace | None = None) -> dict[str, float]:
    """Numbers of parameters by part; with the `args` of d2s or pd, of the sparse model that comes of it."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        llava = hf.LlavaForConditionalGeneration(config)
        model, body = llava.model, llava.model.language_model
        if args and config.text_config.model_type in moe.BLOCKS:
            moe.sparsify(model, args.experts, args.top_k, args.moe_layers)
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())
    text, sparse = config.text_config, [m for m in body.modules() if hasattr(m, "experts")]
    top_k, experts = (text.num_experts_per_tok, text.num_experts) if sparse else (1, 1)
    drops_first = config.vision_feature_select_strategy == "default"  # as model.Llava
    return {
        "visual tokens": model.vision_tower.embeddings.num_positions - drops_first,
        "all": count(llava), "vision": count(model.vision_tower), "head": count(body.embed_tokens),
        "projector": count(model.multi_modal_projector), "body": count(body) - count(body.embed_tokens),
        "moe": count(*sparse), "idle": count(*sparse) * (1 - top_k / experts), "top_k": top_k,
        "sparse layers": len(sparse), "width": text.hidden_size,
    }


def kept_by(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps of `run` for its backward pass, without weights."""
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x if x._base is None else x._base, torch.nn.Parameter):  # nor a view of one
            kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _ = run()
    return sum(storage.nbytes() for storage in kept.values())


def kept_by_llm(text: hf.PretrainedConfig, shape: tuple, dtype: torch.dtype, trained: bool) -> list[int]:
    """Bytes that a dense language model keeps for its backward pass on (B, T) tokens: without layers, by each
    layer, of that by its FFN, and by an FFN if it is trained. It is run on tensors without numbers.
    """
    text = copy.deepcopy(text)
    if text.model_type.endswith("_moe"):  # of a token each expert keeps what the dense FFN would
        dense = {"model_type": text.model_type[:-4], "intermediate_size": text.moe_intermediate_size}
        text = hf.AutoConfig.for_model(**text.to_dict() | dense)
    text.num_hidden_layers = 2
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        x = torch.empty(*shape, text.hidden_size, requires_grad=True)
        body = hf.AutoModel.from_config(text, dtype=torch.float32)  # as students are, however published
        ffns = [kept_by(lambda: body.requires_grad_(on).layers[0].mlp(x)) for on in (True, trained)]
        two = kept_by(lambda: body(inputs_embeds=x, use_cache=False))
        del body.layers[1]
        one = kept_by(lambda: body(inputs_embeds=x, use_cache=False))
    return [2 * one - two, two - one, ffns[1], ffns[0]]


def step(args: argparse.Namespace, tokens: int | None = None) -> dict[str, float]:
    """Bytes by part in a step, and FLOPs of a sample: an image and --text tokens, or `tokens` in all."""
    config = read_config(args.student)
    theirs = read_config(args.teacher) if getattr(args, "teacher", None) else None
    text, gpu = config.text_config, args.gpus > 0
    dtype = precision(args.dtype, torch.bfloat16 if gpu else torch.float32)
    n, answers = sizes(config, args if args.stage in mod_distill.SPARSE else None), 1 + (args.stage == "pd")
    llm = n["all"] - n["vision"] - n["projector"]
    part = {"dpt": 0, "d2s": n["moe"], "pd": n["moe"]}.get(args.stage, llm)  # of it that is trained
    trained, head_too = n["projector"] + part, args.stage in ("sft", "dft", "d2d")
    t, t_bytes = dict.fromkeys(n, 0), 0  # the teacher's, if there is one
    if theirs:
        t, t_bytes = sizes(theirs), precision(args.teacher_dtype, dtype).itemsize
        looks = [(checkpoints.kind_of(c.vision_config), c.vision_config.hidden_size, c.vision_feature_layer)
                 for c in (config, theirs)]
        if looks[0] == looks[1]:  # then, if its weights are the same too, one tower serves both
            t["all"], t["vision"] = t["all"] - t["vision"], 0
    n_visual = (t if theirs else n)["visual tokens"]  # the teacher's, which a new student takes over
    tokens = tokens or n_visual + args.text
    require(tokens > n_visual, f"samples of {tokens} tokens have no room for an image of {n_visual}")
    targets, gamma = getattr(args, "targets", []), bool(getattr(args, "gamma", 0))

    # ---- memory
    rows, n_layers = args.micro_batch * answers, text.num_hidden_layers
    stream = 4 * rows * tokens * n["width"]  # the hidden states between two layers
    in_bf16 = 2 * (dtype != torch.float32)  # bytes of a weight's copy, as products take it
    rest, layer, ffn, expert = kept_by_llm(text, (rows, tokens), dtype, head_too)
    copies = in_bf16 * n["idle"] / max(n["sparse layers"], 1)  # of other experts; a token goes through top_k
    more = (expert * n["top_k"] + copies - ffn) * (n["moe"] > 0)  # of a sparse layer
    kept = n_layers * layer + n["sparse layers"] * more
    if args.gradient_checkpointing:
        kept = layer + more + n_layers * stream
    n_read = rows * (tokens if "visual" in targets else tokens - n_visual)  # whose logits are formed
    logits, d_head = n_read * text.vocab_size, 4 * n["head"] * head_too
    cast = in_bf16 * n["head"] * (1 + head_too * (1 if gpu else 3))  # casts of the head and of d_head's parts
    chunk = min(logits, chunks.CHUNK * (chunks.ON_GPU if gpu else 1))
    block = chunk if gpu else min(logits, chunks.BLOCK)
    grams = 8 * gamma * (n["width"] ** 2 + t["width"] ** 2)
    need = {
        "student": 4 * n["all"], "teacher": t_bytes * t["all"], "gradients": 4 * trained,
        "optimizer": 8 * trained / (args.gpus if args.shard == "optimizer" and gpu else 1),
        "activations": rest + stream + kept,
        "losses": chunk * (dtype.itemsize + t_bytes) + 28 * block + d_head + cast + grams,
        "backward": layer + more + d_head, "set aside": SET_ASIDE * gpu,
    }
    # Gradients of a single pass come into being as activations go; between several passes they stay.
    stay = args.gpus > 1 or args.global_batch > args.micro_batch
    during = need["activations"] + max(need["losses"], need["backward"]) + need["gradients"] * stay
    most = max(during, need["gradients"] + need["backward"])
    need["together"] = most + sum(need[name] for name in ("student", "teacher", "optimizer", "set aside"))

    # ---- arithmetic: two operations for a weight and token, two for the gradient of what goes in, and two
    # for the gradient of the weight, if it is trained. Attention's own products are left out.
    passes, moved = 2 + args.gradient_checkpointing, min(part, n["body"]) - (part > 0) * n["idle"]
    several = args.global_batch > max(args.gpus, 1) * args.micro_batch
    ahead = args.stage in mod_distill.SPARSE and several  # a forward pass, to see where the tokens go
    again = ahead and args.stage == "pd" and args.po == "kto"  # with the teacher's, and the log-ratios
    flops = 2 * tokens * answers * ((n["body"] - n["idle"]) * (passes + ahead) + moved)
    flops += 2 * n_visual * (n["vision"] * (1 + ahead) + n["projector"] * (3 + ahead))
    flops += 2 * n_read / args.micro_batch * n["head"] * (2 + head_too + again)
    of_teacher = tokens * answers * t["body"] + n_visual * (t["vision"] + t["projector"])
    flops += 2 * (1 + again) * (of_teacher + n_read / args.micro_batch * t["head"])
    flops += 6 * n["head"] * n["width"] / args.micro_batch * gamma * head_too  # W^T W and its gradient
    return need | {"flops": flops, "n_student": n["all"], "n_trained": trained, "n_teacher": t["all"]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("stage", choices=tuple(STAGES), help="the stage, before its own flags")
    add_flags(parser, "the plan", [
        ("--gpus", natural, 8, "GPUs of the run; 0: on the CPU"),
        ("--memory", number(float, 0), 80.0, "GiB of one GPU"),
        ("--tflops", number(float, 1e-3), 150.0, "TFLOP/s that a GPU reaches; half of an A100's peak is 156"),
        ("--text", positive, 100, "text tokens of an average sample"),
        ("--samples", positive, None, "samples of the data; without it as in the papers, 558k or 665k"),
    ])
    args, rest = parser.parse_known_args(argv)
    known = {"data": "-", "out": "-"} | ({"step": args.stage} if STAGES[args.stage] is mod_distill else {})
    needless = to_argv(**{flag: value for flag, value in known.items() if f"--{flag}" not in rest})
    args = argparse.Namespace(**vars(STAGES[args.stage].parse_args([*needless, *rest])) | vars(args))
    args.student = args.student or f"{args.vision}+{args.llm}"
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    need, longest, limit = step(args), step(args, args.max_len)["together"], args.memory * GIB
    where = f"{args.gpus} GPUs" if args.gpus else "the CPU"
    print(f"{args.stage} on {where}: {args.micro_batch} images with {args.text} tokens at a time")
    billions = (f"{name} {need[f'n_{name}'] / 1e9:.2f}" for name in ("student", "trained", "teacher"))
    print(f"{', '.join(billions)} billion parameters\n")
    for part in ("student", "teacher", "gradients", "optimizer", "activations", "losses", "backward",
                 "set aside", "together"):
        print(f"{part:12s}{need[part] / GIB:8.2f} GiB")
    fits = longest <= limit
    print(f"with samples of --max_len {args.max_len}: {longest / GIB:.2f} GiB\n")
    print(f"it {'fits' if fits else 'does not fit'} into {args.memory:g} GiB")
    if not fits:
        shard = "optimizer" if args.gpus > 1 else args.shard
        least = {"gradient_checkpointing": True, "micro_batch": 1, "shard": shard}
        then = step(argparse.Namespace(**vars(args) | least), args.max_len)["together"]
        print(f"the least it can take is {then / GIB:.2f} GiB, with {' '.join(to_argv(**least))}")
    samples = args.samples or (558_000 if args.stage == "dpt" else 665_000)
    hours = samples * args.epochs * need["flops"] / (max(args.gpus, 1) * args.tflops * 1e12) / 3600
    print(f"{need['flops'] / 1e12:.2f} TFLOP a sample: {samples:,} samples, {args.epochs} time(s), take "
          f"{hours:.1f} hours at {args.tflops:g} TFLOP/s a GPU")
    return need | {"longest": longest, "hours": hours, "fits": fits}


if __name__ == "__main__":
    cli(main)
