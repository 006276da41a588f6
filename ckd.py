"""LLaVA-CKD: one student, a cascade of teachers (§3.1).

Bottom-up: the student is distilled by the weakest teacher, then by the next, and so on; each time through
all of LLaVA-KD, DPT -> SFT -> DFT (§3.3, Eqs. 4-8), starting from the student that came before.
Top-down (§4.3, Table 3): the strongest teacher distils the next weaker one, and so on down to the student.
One teacher is LLaVA-KD itself; the same one twice is LLaVA-KD with as much training as a cascade of two.
Eqs. 9-18 explain why a cascade helps; they compute nothing.

    torchrun --nproc_per_node 8 ckd.py --teachers TA TEACHER --vision google/siglip-so400m-patch14-384 \\
        --llm Qwen/Qwen2.5-0.5B --pretrain_data blip_laion_cc_sbu_558k.json \\
        --finetune_data llava_v1_5_mix665k.json --images IMAGES --out out/ckd

Every other flag (--micro_batch, --seed, ...) goes to all stages as it is: see dpt.py, sft.py, dft.py --help.
"""

import argparse
import gc
import json
import os
from pathlib import Path

import torch

import dft
import dpt
import sft
from common import process_group
from flags import InputError, add_flags, cli, new_parser, positive
from fused import release_buffers
from model import Llava


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    # fmt: off
    add_flags(parser, "models", [
        ("--teachers", [str], ..., "LLaVA checkpoints, hub names or folders, the weakest first"),
        ("--vision", str, None, "vision tower of a new student, hub name or folder; CKD: SigLIP-so400m-384"),
        ("--llm", str, None, "language model of a new student, hub name or folder; CKD: Qwen2.5-0.5B"),
        ("--student", str, None, "LLaVA checkpoint to train, instead of --vision and --llm"),
        ("--teacher_dtype", ("auto", "bf16", "fp32"), "auto", "of the teachers' weights; auto: as --dtype"),
        ("--strategy", ("bottom-up", "top-down"), "bottom-up", "who learns from whom; CKD Table 3"),
        ("--assistant_llms", [str], None,
         "top-down: LLMs of new assistants, as --teachers without the last; None: their checkpoints"),
    ])
    add_flags(parser, "objective", [
        ("--alpha", float, 1.0, "weight of L_res (CKD: L_txt); CKD §4.1"),
        ("--beta", float, 1.0, "weight of L_vis; CKD §4.1"),
        ("--gamma", float, 1.0, "weight of L_rel (CKD: L_cos); CKD §4.1"),
        ("--relation", ("columns", "matrix"), "columns", "L_rel by column of R, CKD Eq. 6, or KD's Eq. 5"),
    ])
    add_flags(parser, "training", [
        ("--pretrain_data", str, ..., "image-caption pairs of DPT"),
        ("--finetune_data", str, ..., "instructions of SFT and DFT"),
        ("--caption_only", bool, True, "DPT on image and answer, without the question; as LLaVA-1.5"),
        ("--pretrain_lr", float, 1e-3, "peak learning rate of DPT; CKD §4.1"),
        ("--pretrain_batch", positive, 256, "samples per step of DPT; CKD §4.1"),
        ("--finetune_lr", float, 2e-5, "peak learning rate of SFT and DFT; CKD §4.1"),
        ("--finetune_batch", positive, 128, "samples per step of SFT and DFT; CKD §4.1"),
        ("--out", str, ..., "folder for cascade.json and a folder per teacher with dpt, sft and dft in it"),
    ])
    # fmt: on
    args, shared = parser.parse_known_args(argv)
    if bool(args.student) == bool(args.vision and args.llm) or bool(args.vision) != bool(args.llm):
        parser.error("give either --vision and --llm, for a new student, or --student")
    if args.assistant_llms and (
        args.strategy != "top-down" or len(args.assistant_llms) != len(args.teachers) - 1
    ):
        parser.error("--assistant_llms is for --strategy top-down, one for each teacher but the last")
    if args.assistant_llms and not args.vision:
        parser.error("--assistant_llms need --vision, the tower of the new assistants")
    return args, shared


def plan(args: argparse.Namespace, shared: list[str]) -> list[tuple[str, object, list[str]]]:
    """The whole cascade: (folder, the stage's main, its command line), in order."""
    student = ["--vision", args.vision, "--llm", args.llm] if args.vision else ["--student", args.student]
    names = [os.path.basename(os.path.normpath(teacher)) for teacher in args.teachers]
    if args.strategy == "bottom-up":
        rounds = [(name, teacher, None) for name, teacher in zip(names, args.teachers)]
        rounds[0] = (*rounds[0][:2], student)  # the next ones start from the student of the one before
    else:
        starts = [["--student", teacher] for teacher in args.teachers[:-1]]
        if args.assistant_llms:
            starts = [["--vision", args.vision, "--llm", llm] for llm in args.assistant_llms]
        learners = [*reversed(list(zip(names, starts))), ("student", student)]
        rounds = [
            (name, args.teachers[-1] if k == 0 else None, start) for k, (name, start) in enumerate(learners)
        ]
    objective = [
        "--alpha",
        args.alpha,
        "--beta",
        args.beta,
        "--gamma",
        args.gamma,
        "--relation",
        args.relation,
    ]
    pretrain = ["--data", args.pretrain_data, "--lr", args.pretrain_lr, "--global_batch", args.pretrain_batch]
    finetune = ["--data", args.finetune_data, "--lr", args.finetune_lr, "--global_batch", args.finetune_batch]
    caption = ["--caption_only" if args.caption_only else "--no-caption_only"]
    stages, last = [], None
    for k, (name, teacher, start) in enumerate(rounds, 1):
        folder = f"{k}-{name}"
        teaches = ["--teacher", teacher or last, "--teacher_dtype", args.teacher_dtype]
        at = {stage: f"{args.out}/{folder}/{stage}" for stage in ("dpt", "sft", "dft")}
        for stage, main, flags in (
            ("dpt", dpt.main, (start or ["--student", last]) + caption + teaches + objective + pretrain),
            ("sft", sft.main, ["--student", at["dpt"], *finetune]),
            ("dft", dft.main, ["--student", at["sft"]] + teaches + objective + finetune),
        ):
            argv = [*map(str, flags), *shared, "--out", at[stage]]
            stages.append((f"{folder}/{stage}", main, argv))
        last = at["dft"]
    return stages


def check(args: argparse.Namespace, stages: list) -> None:
    """Refuse what some later stage would refuse: its flags, and teachers that do not fit the student."""
    parsers = {dpt.main: dpt.parse_args, sft.main: sft.parse_args, dft.main: dft.parse_args}
    for _, main, argv in stages:
        parsers[main](argv)
    student = Llava.from_checkpoint(args.student) if args.student else Llava.from_parts(args.vision, args.llm)
    problems = []
    for teacher in args.teachers:
        try:
            student.check_teacher(Llava.from_checkpoint(teacher, weights=False))
        except InputError as error:
            problems.append(f"{teacher}: {error}")
    if problems:
        raise InputError("; ".join(problems))


def main(argv: list[str] | None = None) -> None:
    args, shared = parse_args(argv)
    stages = plan(args, shared)
    with process_group() as group:
        check(args, stages)
        path = Path(args.out) / "cascade.json"
        command = json.loads(json.dumps({"flags": vars(args), "of every stage": shared}))
        done = []
        if path.exists():
            there = json.loads(path.read_text())
            if there["command"] != command:
                raise InputError(
                    f"--out {args.out} holds another cascade: {there['command']} there, {command} now"
                )
            done = there["done"]
        for folder, stage_main, stage_argv in stages:
            if folder in done:
                continue
            if group.rank == 0:
                print(f"cascade: {folder}", flush=True)
            stage_main(stage_argv)
            release_buffers()  # the next stage has another teacher: give back all of this one's memory
            gc.collect()
            torch.cuda.empty_cache()
            done.append(folder)
            if group.rank == 0:
                path.write_text(json.dumps({"command": command, "done": done}, indent=1) + "\n")


if __name__ == "__main__":
    cli(main)
