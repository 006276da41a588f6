"""LLaVA-CKD: one student, a cascade of teachers (§3.1, arXiv 2605.10641). A loop over dpt.py, sft.py, dft.py.

Bottom-up: the student is distilled by the weakest teacher, then by the next, and so on; each time through
all of LLaVA-KD, DPT -> SFT -> DFT (§3.3, Eqs. 4-8), starting from the student that came before.
Top-down (§4.3, Table 3): the strongest teacher distils the next weaker one, down to the student.

    torchrun --nproc_per_node 8 ckd.py --teachers TA TEACHER --vision google/siglip-so400m-patch14-384 \\
        --llm Qwen/Qwen2.5-0.5B --pretrain_data blip_laion_cc_sbu_558k.json \\
        --finetune_data llava_v1_5_mix665k.json --images IMAGES --out out/ckd
Every other flag (--micro_batch, --seed, ...) goes to all stages as it is: see dpt.py, sft.py, dft.py --help.
"""

import argparse
from collections.abc import Iterator
from types import ModuleType

import dft
import dpt
import sft
from model import Llava
from support.checkpoints import check_teacher
from support.flags import KD, REQUIRED, InputError, add_flags, add_kd_flags, cli, new_parser, require, to_argv
from support.parts import add_student_flags
from support.ranks import process_group


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    add_student_flags(parser, llm="Qwen2.5-0.5B")
    add_flags(parser, "cascade", [
        ("--teachers", [str], REQUIRED, "LLaVA checkpoints, hub names or folders, the weakest first"),
        ("--strategy", ("bottom-up", "top-down"), "bottom-up", "who learns from whom; CKD Table 3"),
        ("--assistant_llms", [str], None, "top-down: LLMs of new assistants; else teachers are trained on"),
    ])
    add_kd_flags(parser, alpha=1.0, beta=1.0, gamma=1.0, relation="columns", source="CKD §4.1")
    add_flags(parser, "training", [
        ("--pretrain_data", [str], REQUIRED, "image-caption pairs of DPT"),
        ("--finetune_data", [str], REQUIRED, "instructions of SFT and DFT"),
        ("--caption_only", bool, True, "DPT on image and answer, without the question; as LLaVA-1.5"),
        ("--pretrain_lr", float, 1e-3, "peak learning rate of DPT; CKD §4.1"),
        ("--pretrain_batch", int, 256, "samples per step of DPT; CKD §4.1"),
        ("--finetune_lr", float, 2e-5, "peak learning rate of SFT and DFT; CKD §4.1"),
        ("--finetune_batch", int, 128, "samples per step of SFT and DFT; CKD §4.1"),
        ("--out", str, REQUIRED, "folder for a folder per teacher with dpt, sft and dft in it"),
    ])
    args, shared = parser.parse_known_args(argv)
    n = len(args.teachers) - 1 if args.strategy == "top-down" and args.vision else 0
    if len(args.assistant_llms or []) not in (0, n):
        parser.error("--assistant_llms: top-down only, with --vision, and one for each teacher but the last")
    return args, shared


def plan(args: argparse.Namespace, shared: list[str]) -> Iterator[tuple[ModuleType, list[str]]]:
    """The whole cascade in order: each stage and its command line."""
    names = [teacher.rstrip("/").split("/")[-1] for teacher in args.teachers]
    student = {key: vars(args)[key] for key in ("vision", "llm", "student", "template")}
    starts, teachers = [student] + [None] * (len(names) - 1), args.teachers  # None: the last round's student
    if args.strategy == "top-down":
        new = [student | {"llm": llm} for llm in args.assistant_llms or []]
        starts = new or [{"student": teacher} for teacher in args.teachers[:-1]]
        names, starts = [*names[-2::-1], "student"], [*starts[::-1], student]
        teachers = [args.teachers[-1]] + [None] * (len(names) - 1)
    before = None
    pretrain = {"data": args.pretrain_data, "lr": args.pretrain_lr, "global_batch": args.pretrain_batch}
    finetune = {"data": args.finetune_data, "lr": args.finetune_lr, "global_batch": args.finetune_batch}
    for k, (name, start, teacher) in enumerate(zip(names, starts, teachers), 1):
        out = f"{args.out}/{k}-{name}"
        distil = {key: vars(args)[key] for key in KD} | {"teacher": teacher or before}
        for stage, flags in (
            (dpt, (start or {"student": before}) | pretrain | distil | {"caption_only": args.caption_only}),
            (sft, {"student": f"{out}/dpt"} | finetune),
            (dft, {"student": f"{out}/sft"} | finetune | distil),
        ):
            yield stage, [*to_argv(**flags, out=f"{out}/{stage.__name__}"), *shared]
        before = f"{out}/dft"


def check_teachers(args: argparse.Namespace) -> None:
    """Refuse all teachers that the student cannot learn from, before any of them is loaded whole."""
    student, problems = dpt.new_student(argparse.Namespace(**vars(args), teacher=args.teachers[0])), []
    for path in args.teachers:
        try:
            check_teacher(student, Llava.from_checkpoint(path, weights=False))
        except InputError as error:
            problems.append(f"{path}: {error}")
    require(not problems, "; ".join(problems))


def main(argv: list[str] | None = None) -> None:
    args, shared = parse_args(argv)
    for stage, flags in plan(args, shared):  # refuse now what a later stage would refuse
        stage.parse_args(flags)
    with process_group():
        check_teachers(args)
        for stage, flags in plan(args, shared):
            stage.main(flags)


if __name__ == "__main__":
    cli(main)
