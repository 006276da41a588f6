"""LLaVA-CKD: one student, a cascade of teachers (§3.1). A loop that calls dpt.py, sft.py and dft.py.

Bottom-up: the student is distilled by the weakest teacher, then by the next, and so on; each time through
all of LLaVA-KD, DPT -> SFT -> DFT (§3.3, Eqs. 4-8), starting from the student that came before.
Top-down (§4.3, Table 3): the strongest teacher distils the next weaker one, and so on down to the student.
One teacher is LLaVA-KD itself. (Eqs. 9-18 explain why a cascade helps; they compute nothing.)

    torchrun --nproc_per_node 8 ckd.py --teachers TA TEACHER --vision google/siglip-so400m-patch14-384 \\
        --llm Qwen/Qwen2.5-0.5B --pretrain_data blip_laion_cc_sbu_558k.json \\
        --finetune_data llava_v1_5_mix665k.json --images IMAGES --out out/ckd

Every other flag (--micro_batch, --seed, ...) goes to all stages as it is: see dpt.py, sft.py, dft.py --help.
"""

import argparse
import os
from collections.abc import Iterator
from types import ModuleType

import dft
import dpt
import sft
from model import check_teachers
from support.flags import add_flags, add_kd_flags, add_student_flags, cli, command_line, new_parser, positive
from support.ranks import process_group

DISTILLATION = ("teacher_dtype", "targets", "alpha", "beta", "gamma", "relation", "delta")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    add_student_flags(parser, llm="Qwen2.5-0.5B")
    add_flags(parser, "cascade", [
        ("--teachers", [str], ..., "LLaVA checkpoints, hub names or folders, the weakest first"),
        ("--strategy", ("bottom-up", "top-down"), "bottom-up", "who learns from whom; CKD Table 3"),
        ("--assistant_llms", [str], None, "top-down: language models of new assistants, one for each teacher "
         "but the last; without them, those teachers are distilled further"),
    ])  # fmt: skip
    add_kd_flags(parser, gamma=1.0, relation="columns", source="CKD §4.1")
    add_flags(parser, "training", [
        ("--pretrain_data", str, ..., "image-caption pairs of DPT"),
        ("--finetune_data", str, ..., "instructions of SFT and DFT"),
        ("--caption_only", bool, True, "DPT on image and answer, without the question; as LLaVA-1.5"),
        ("--pretrain_lr", float, 1e-3, "peak learning rate of DPT; CKD §4.1"),
        ("--pretrain_batch", positive, 256, "samples per step of DPT; CKD §4.1"),
        ("--finetune_lr", float, 2e-5, "peak learning rate of SFT and DFT; CKD §4.1"),
        ("--finetune_batch", positive, 128, "samples per step of SFT and DFT; CKD §4.1"),
        ("--out", str, ..., "folder for a folder per teacher with dpt, sft and dft in it"),
    ])  # fmt: skip
    args, shared = parser.parse_known_args(argv)
    assisted = args.strategy == "top-down" and args.vision and len(args.teachers) - 1
    if args.assistant_llms and len(args.assistant_llms) != assisted:
        parser.error("--assistant_llms: top-down only, with --vision, and one for each teacher but the last")
    return args, shared


def plan(args: argparse.Namespace, shared: list[str]) -> Iterator[tuple[ModuleType, list[str]]]:
    """The whole cascade in order: each stage and its command line."""
    names = [os.path.basename(os.path.normpath(teacher)) for teacher in args.teachers]
    student = {"vision": args.vision, "llm": args.llm, "student": args.student}
    starts, teachers = [student] + [None] * (len(names) - 1), args.teachers  # None: the last round's student
    if args.strategy == "top-down":
        starts = [{"student": teacher} for teacher in args.teachers[:-1]]
        if args.assistant_llms:
            starts = [{"vision": args.vision, "llm": llm} for llm in args.assistant_llms]
        names, starts = [*names[-2::-1], "student"], [*starts[::-1], student]
        teachers = [args.teachers[-1]] + [None] * (len(names) - 1)
    pretrain = {"data": args.pretrain_data, "lr": args.pretrain_lr, "global_batch": args.pretrain_batch}
    finetune = {"data": args.finetune_data, "lr": args.finetune_lr, "global_batch": args.finetune_batch}
    before = None
    for k, (name, start, teacher) in enumerate(zip(names, starts, teachers), 1):
        out = f"{args.out}/{k}-{name}"
        distil = {key: vars(args)[key] for key in DISTILLATION} | {"teacher": teacher or before}
        for stage, flags in (
            (dpt, (start or {"student": before}) | pretrain | distil | {"caption_only": args.caption_only}),
            (sft, {"student": f"{out}/dpt"} | finetune),
            (dft, {"student": f"{out}/sft"} | finetune | distil),
        ):
            yield stage, [*command_line(**flags, out=f"{out}/{stage.__name__}"), *shared]
        before = f"{out}/dft"


def main(argv: list[str] | None = None) -> None:
    args, shared = parse_args(argv)
    for stage, flags in plan(args, shared):
        stage.parse_args(flags)  # refuses now what a later stage would refuse
    with process_group():
        check_teachers(args)
        for stage, flags in plan(args, shared):
            stage.main(flags)


if __name__ == "__main__":
    cli(main)
