"""The ablations of the three papers as data, read as the papers' tables: a row is a list of stages.

A stage is its name and flags of its script, as they are typed: "dpt --gamma 0 | sft | dft". `pt` is dpt.py
without a teacher; d2d, d2s and pd are steps of mod_distill.py. Some flags are the lab's own: --llm, a model
of assets/toy (by default small); --teacher, one of TEACHERS; and --fork, a diff of docs/forks. A row that is
not in the paper's table ends with *. A new idea is one row.
"""

from typing import NamedTuple

from lab.world import SKILLS

# Steps and peak learning rate of each stage, unless the row says others. DFT's and those of the controls TIME
# and FLOPS were the best in the table rates below, D2S's of three; other rows reuse them.
DEFAULTS = {"pt": (400, 3e-3), "dpt": (400, 3e-3), "sft": (400, 2e-3), "dft": (400, 8e-3),
            "d2d": (400, 2e-3), "d2s": (400, 8e-3), "pd": (100, 5e-4)}
CKD = "--gamma 1 --relation columns"  # CKD's form of the loss
# The stages of each teacher, which reads all scenes, captions and questions.
TEACHERS = {
    "teacher": "pt --llm large | sft --max_steps 2000 --lr 1e-3",
    "assistant": "pt --llm middle | sft --max_steps 2000 --lr 1e-3",
    "distilled": f"dpt --llm middle {CKD} | sft --max_steps 2000 --lr 1e-3 | dft {CKD}",
}
# The last stage of controls without distillation that take as long, or as many FLOPs, as DPT+SFT+DFT.
TIME, FLOPS = "sft --max_steps 1400 --lr 4e-3", "sft --max_steps 3500 --lr 8e-3"


class Table(NamedTuple):
    title: str
    rows: dict[str, str]  # name: stages
    claims: list[tuple[str, ...]]  # (the better row, the worse one), in accuracy or what a third word names
    data: str = "finetune"  # what all but PT, DPT and PD read: questions, or "mixed" with descriptions
    scenes: tuple[int, ...] = (400,)  # that the student sees; each row is trained on each number of them
    questions: str = "questions"  # what is asked
    figure: str = ""  # "curves" or "differences" in the place of bars, or "experts" too: see lab.figures
    holm: bool = False  # whether verdicts are corrected for the number of claims


def cascade(*teachers: str) -> str:
    """The stages of ckd.py: DPT, SFT, DFT by each teacher in turn."""
    return " | ".join(f"dpt --teacher {t} {CKD} | sft | dft --teacher {t} {CKD}" for t in teachers)


def at(stages: str, *more: str) -> dict[str, str]:
    """Rows that differ in the peak learning rate of the last stage."""
    rows = (f"{stages.split(' --lr ')[0]} --lr {rate}" for rate in ("2e-3", "4e-3", "8e-3", "1.6e-2", *more))
    return {row.replace(" | ", ", "): row for row in rows}


def ceiling(title: str, llm: str, sft: str, dft: str, doublings: int) -> Table:
    """The last stage, longer and longer: SFT, DFT, and DFT followed by SFT, at these learning rates."""
    rows, budgets = {}, [400 * 2**k for k in range(doublings + 1)]
    for n in budgets:
        rows[f"SFT {n}"] = f"pt --llm {llm} | sft --max_steps {n} --lr {sft}"
        if 2 * n in budgets:
            half = f"--max_steps {n // 2} --lr"
            rows[f"DFT {n}"] = f"pt --llm {llm} | dft --max_steps {n} --lr {dft}"
            rows[f"DFT, SFT {n}"] = f"pt --llm {llm} | dft {half} {dft} | sft {half} {sft}"
    times = {"DFT": (1, 2, 4, 8), "DFT, SFT": (1, 2)}  # equal steps, seconds; FLOPs are at 4 to 8
    claims = [(f"{kind} {n}", f"SFT {m * n}") for kind in times for m in times[kind] for n in budgets[:-1]
              if m * n in budgets]
    quarter, half, longest = budgets[-3:]
    flat = [*((f"{kind} {half}", f"{kind} {quarter}") for kind in ("DFT", "DFT, SFT", "SFT")),
            (f"SFT {longest}", f"SFT {half}"), (f"DFT, SFT {half}", f"DFT {half}")]
    learnt = [(f"DFT {n}", f"SFT {2 * n}", skill) for n in (quarter, half)
              for skill in (*SKILLS, "unseen")]
    return Table(f"How far a student gets: {title}", rows, claims + flat + learnt, scenes=(16000,),
                 figure="curves")


SFT, KD, MIMIC, LIES = "pt | sft", "dpt | sft | dft", "pt | d2d | d2s", ("response_rate", "mention_rate")
SPARSE = "pt | d2d --kl 0 --ar 1 | d2s --kl 0"  # MIMIC without a teacher
METHOD = {"PT+SFT": SFT, "PT+SFT+SFT, equal time *": f"{SFT} | {TIME}",
          "PT+SFT+SFT, equal FLOPs *": f"{SFT} | {FLOPS}", "DPT+SFT+DFT": KD}
BEST = [("DPT+SFT+DFT", control) for control in list(METHOD)[:3]]
STUDENTS = {  # title, --llm, rates of a longer SFT and DFT, which tables `rates-` chose; ceiling's doublings
    "16x1": ("16 wide, 1 layer", "16x1", "4e-3", "1.6e-2", 6),
    "16x2": ("16 wide, 2 layers", "16x2", "4e-3", "8e-3", 6),
    "24x2": ("24 wide, 2 layers", "24x2", "4e-3", "4e-3", 5),
    "32x2": ("32 wide, 2 layers", "small", "2e-3", "8e-3", 5),
}
MORE_RATES = {"16x1, dft": ["3.2e-2"], "32x2, sft": ["1e-3"]}  # where the first or last of four was best
IDEAS = ("reverse_kl", "skewed_kl", "jsd", "top_k", "entropy", "decoupled", "projector_relation", "affinity",
         "attention", "two_teachers --teacher2 assistant", "learned_weights", "on_policy")  # docs/forks
TERMS = {
    "L_res alone": "dpt --gamma 0 --targets response | sft | dft --gamma 0 --targets response",
    "L_vis alone": "dpt --gamma 0 --targets visual | sft | dft --gamma 0 --targets visual",
    "L_rel alone": "dpt --targets | sft | dft --targets",
    "half DFT, half SFT": f"{KD} --max_steps 200 | sft --max_steps 400 --lr 4e-3",
    "DPT+SFT+DFT, as many steps": f"{KD} --max_steps 1400",
}

TABLES = {
    "kd2": Table("LLaVA-KD, Table 2: which stages are distilled", METHOD | {
        "PT+DFT": "pt | dft",
        "DPT+SFT": "dpt | sft",
        "DPT+DFT": "dpt | dft",
        "PT+SFT+DFT *": "pt | sft | dft",
    }, [*BEST, ("PT+DFT", "PT+SFT"), ("DPT+SFT", "PT+SFT"), ("DPT+DFT", "DPT+SFT"),
        ("DPT+SFT+DFT", "DPT+SFT"), ("DPT+SFT+DFT", "DPT+DFT"), ("DPT+SFT+DFT", "PT+SFT+DFT *")]),
    "kd3": Table("LLaVA-KD, Table 3 (A1, A2): MDist and RDist, in DPT and in DFT", {
        "DPT by RDist, SFT": "dpt --targets | sft",
        "DPT by MDist, SFT": "dpt --gamma 0 | sft",
        "DPT by both, SFT": "dpt | sft",
        "DPT, SFT, DFT by RDist": "dpt | sft | dft --targets",
        "DPT, SFT, DFT by MDist": "dpt | sft | dft --gamma 0",
        "DPT, SFT, DFT by both": KD,
    }, [("DPT by RDist, SFT", "DPT by MDist, SFT"), ("DPT by both, SFT", "DPT by RDist, SFT"),
        ("DPT, SFT, DFT by MDist", "DPT, SFT, DFT by RDist"),
        ("DPT, SFT, DFT by both", "DPT, SFT, DFT by MDist")]),
    "kd4": Table("LLaVA-KD, Table 4 (A3, A4): whose distribution is distilled, without RDist", {
        "DPT: answers": "dpt --gamma 0 --targets response | sft",
        "DPT: answers, prompts": "dpt --gamma 0 --targets response prompt | sft",
        "DPT: answers, images": "dpt --gamma 0 | sft",
        "DPT: all": "dpt --gamma 0 --targets response prompt visual | sft",
        "DFT: answers": "dpt | sft | dft --gamma 0 --targets response",
        "DFT: answers, prompts": "dpt | sft | dft --gamma 0 --targets response prompt",
        "DFT: answers, images": "dpt | sft | dft --gamma 0",
        "DFT: all": "dpt | sft | dft --gamma 0 --targets response prompt visual",
    }, [(f"{stage}: answers, images", f"{stage}: {other}") for stage in ("DPT", "DFT")
        for other in ("answers", "answers, prompts", "all")]),
    "mod4": Table("LLaVA-MoD, Tables 3 and 4: preference distillation", {
        "mimic": MIMIC, "mimic, equal time *": f"{MIMIC} --max_steps 600", "mimic, PD": f"{MIMIC} | pd"
    }, [*(("mimic, PD", other, rate) for other in ("mimic", "mimic, equal time *") for rate in LIES),
        ("mimic", "mimic, PD", "accuracy"), ("mimic", "mimic, PD", "recall")], "mixed"),
    "mod5": Table("LLaVA-MoD, Table 5: KD against SFT of the same sparse student", {
        "SFT": SPARSE, "SFT, equal time *": f"{SPARSE} --max_steps 950",
        "SFT, equal FLOPs *": f"{SPARSE} --max_steps 3200", "KD": MIMIC,
    }, [("KD", control) for control in ("SFT", "SFT, equal time *", "SFT, equal FLOPs *")], "mixed"),
    "mod6": Table("LLaVA-MoD, Table 6: dense first, or sparse at once (on the same data here)", {
        "D2S": "pt | d2s --max_steps 800", "D2D+D2S": MIMIC
    }, [("D2D+D2S", "D2S")], "mixed"),
    "mod7": Table("LLaVA-MoD, Table 7: distilled tokens", {
        "response and instruction":
            "pt | d2d --distill response+instruction | d2s --distill response+instruction",
        "response": MIMIC,
    }, [("response", "response and instruction")], "mixed"),
    "mod8": Table("LLaVA-MoD, Table 8: sparse E4T1 against dense", {
        "dense": "pt | d2d | d2d --ar 1 --lr 8e-3",
        "sparse": f"{MIMIC} --top_k 1 --no-renormalise",
        "sparse, values divided by their sum *": f"{MIMIC} --top_k 1",
    }, [("sparse", "dense"), ("sparse, values divided by their sum *", "dense")], "mixed"),
    "mod12": Table("LLaVA-MoD, Tables 12 and 13: experts, and experts a token", {
        "E4T1": f"{MIMIC} --top_k 1 --no-renormalise", "E4T2": MIMIC, "E8T2": f"{MIMIC} --experts 8"
    }, [("E4T2", "E8T2"), ("E4T2", "E4T1")], "mixed", figure="experts"),
    "mod14": Table("LLaVA-MoD, Table 14: routers", {
        "Top-K": MIMIC, "RSample": f"{MIMIC} --router rsample", "Jitter": f"{MIMIC} --router jitter"
    }, [("Top-K", "RSample"), ("Top-K", "Jitter")], "mixed"),
    "mod16": Table("LLaVA-MoD, Tables 15 and 16: KTO against DPO", {
        "mimic": MIMIC, "DPO": f"{MIMIC} | pd --po dpo", "KTO": f"{MIMIC} | pd"
    }, [("KTO", "DPO", rate) for rate in (*LIES, "accuracy", "recall")], "mixed"),
    "ckd1": Table("LLaVA-CKD, Table 1: a cascade against one teacher", {
        "PT+SFT": SFT,
        "KD by the assistant": cascade("assistant"),
        "KD by the teacher": cascade("teacher"),
        "KD by the teacher, twice *": cascade("teacher", "teacher"),
        "CKD": cascade("assistant", "teacher"),
    }, [("KD by the teacher", "PT+SFT"), ("KD by the teacher", "KD by the assistant"),
        ("CKD", "KD by the teacher"), ("CKD", "KD by the teacher, twice *")]),
    "ckd3": Table("LLaVA-CKD, Table 3: who learns from whom", {
        "top-down": cascade("distilled"), "top-down, as many steps *": cascade("distilled", "distilled"),
        "bottom-up": cascade("assistant", "teacher"),
    }, [("bottom-up", "top-down"), ("bottom-up", "top-down, as many steps *")]),
    "curve": Table("The gain against the number of the student's scenes", {
        "PT+SFT+SFT, equal time *": f"{SFT} | {TIME}",
        "DPT+SFT+DFT": KD,
    }, [("DPT+SFT+DFT", "PT+SFT+SFT, equal time *")], scenes=(200, 400, 1000, 4000, 16000)),
    "ends": Table("LLaVA-KD against both controls, at both ends", METHOD, BEST, scenes=(200, 16000)),
    "terms": Table("The terms of the loss one at a time, and more steps", METHOD | TERMS,
        [*((row, "PT+SFT+SFT, equal time *") for row in ("DPT+SFT+DFT", *TERMS)),
         ("DPT+SFT+DFT, as many steps", "PT+SFT+SFT, equal FLOPs *")], scenes=(200, 16000)),
    "wide": Table("The gain of a wider student", {
        "PT+SFT+SFT, equal time *": f"pt --llm middle | sft | {TIME}",
        "DPT+SFT+DFT": "dpt --llm middle | sft | dft",
    }, [("DPT+SFT+DFT", "PT+SFT+SFT, equal time *")], scenes=(400, 4000, 16000)),
    "rates": Table("Learning rates of the last stage, on questions of their own", at(SFT)
        | at(f"{SFT} | {TIME}") | at(f"{SFT} | {FLOPS}") | at(KD), [], scenes=(400, 16000), questions="val"),
    "rates-mod": Table("Learning rates of the last stage of LLaVA-MoD, on questions of their own",
        at(MIMIC) | at(f"{SPARSE} --max_steps 750"), [], "mixed", questions="val"),
    **{f"rates-{name}": Table(f"Learning rates of a last stage of 1,600 steps: {title}",
        at(f"pt --llm {llm} | sft --max_steps 1600", *MORE_RATES.get(f"{name}, sft", []))
        | at(f"pt --llm {llm} | dft --max_steps 1600", *MORE_RATES.get(f"{name}, dft", [])), [],
        scenes=(16000,), questions="val") for name, (title, llm, *_) in STUDENTS.items()},
    **{f"ceiling-{name}": ceiling(*student) for name, student in STUDENTS.items()},
    "half-rates": Table("Half the rate, which runs of 1,600 steps chose, in the longest: 16 wide, 1 layer", {
        f"{kind.upper()} {n} at {rate}": f"pt --llm 16x1 | {kind} --max_steps {n} --lr {rate}"
        for kind, n, rates in (("sft", 25600, ("4e-3", "2e-3")), ("dft", 12800, ("1.6e-2", "8e-3")))
        for rate in rates
    }, [("SFT 25600 at 2e-3", "SFT 25600 at 4e-3"), ("DFT 12800 at 8e-3", "DFT 12800 at 1.6e-2"),
        *(("DFT 12800 at 8e-3", "SFT 25600 at 4e-3", what) for what in ("accuracy", *SKILLS)),
        ("DFT 12800 at 8e-3", "SFT 25600 at 2e-3")], scenes=(16000,)),
    "forks": Table("Twelve ideas against LLaVA-KD", {
        "LLaVA-KD": KD, **{idea.split()[0]: f"{KD} --fork {idea}" for idea in IDEAS}
    }, [(idea.split()[0], "LLaVA-KD") for idea in IDEAS], scenes=(200, 16000), figure="differences",
        holm=True),
}


def table_named(name: str) -> Table:
    """A table; after "letters-" the same in that world; before "-teachers" each seed has its own teachers."""
    table = TABLES[name.removeprefix("letters-").removesuffix("-teachers")]
    more = ": the world of letters" * name.startswith("letters-")
    more += ": each seed with its own teachers" * name.endswith("-teachers")
    return table._replace(title=table.title + more)
