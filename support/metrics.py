"""Scores of answers: (questions, answers) -> percent, "accuracy" first."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from support.flags import InputError


def exact_match(questions: list[dict], answers: list[str]) -> dict:
    """Share of answers equal to `label` but for case, outer blanks and a final full stop."""
    plain = lambda s: s.strip().rstrip(".").lower()  # noqa: E731
    return by_category(
        questions, [float(plain(a) == plain(str(q["label"]))) for q, a in zip(questions, answers)]
    )


def by_category(questions: list[dict], points: list[float]) -> dict:
    """The mean of `points`, over all questions and over those of each `category`."""
    groups = defaultdict(list)
    for q, point in zip(questions, points):
        groups[str(q.get("category", "all"))].append(point)
    mean = lambda values: 100 * sum(values) / len(values)  # noqa: E731
    return {"accuracy": mean(points), "by_category": {c: mean(groups[c]) for c in sorted(groups)}}


def multiple_choice(questions: list[dict], answers: list[str]) -> dict:
    """Share of answers that name the option `label`, a letter: "B", "(B)", "B. ...", "The answer is B" (as
    LLaVA's ScienceQA script), or the option's own text where `options` are given.
    """
    points = []
    for q, answer in zip(questions, answers):
        answer, options = answer.strip(), [str(o).strip().rstrip(".").lower() for o in q.get("options", [])]
        found = re.fullmatch(r"\(?([A-Z])\)?[.:]?", answer) or re.match(r"\(?([A-Z])\)?[.:] ", answer)
        found = found or re.search(r"[Tt]he answer is:? \(?([A-Z])\b", answer)
        choice = found.group(1) if found else None
        if answer.rstrip(".").lower() in options:
            choice = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[options.index(answer.rstrip(".").lower())]
        points.append(float(choice == str(q["label"]).upper()))
    return by_category(questions, points)


def pope(questions: list[dict], answers: list[str]) -> dict:
    """POPE's scores as its own script has them, "yes" being the positive class: of an answer the first
    sentence is read, and it is "no" if one of its words is "No", "not" or "no", else "yes".
    """
    tp = fp = tn = fn = 0
    for q, answer in zip(questions, answers):
        words = answer.split(".")[0].replace(",", "").split(" ")
        yes, truth = not {"No", "not", "no"} & set(words), q["label"] != "no"
        tp, fp = tp + (yes and truth), fp + (yes and not truth)
        tn, fn = tn + (not yes and not truth), fn + (not yes and truth)
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    return {
        "accuracy": 100 * (tp + tn) / len(questions),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * 2 * precision * recall / max(precision + recall, 1e-12),
        "yes_ratio": 100 * (tp + fp) / len(questions),
    }


def vqa(questions: list[dict], answers: list[str]) -> dict:
    """VQA soft accuracy: an answer counts min(1, humans who gave it / 3), averaged over all subsets that
    leave one of the (ten) humans out. Departure: both sides are normalised alike; the official script
    normalises references by punctuation only, and not at all where the humans agree.
    """
    points = []
    for q, answer in zip(questions, answers):
        given, humans = normalize_vqa(answer), [normalize_vqa(str(h)) for h in q["answers"]]
        same = [human == given for human in humans]
        points.append(sum(min(1.0, (sum(same) - me) / 3) for me in same) / len(same))
    return by_category(questions, points)


NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))  # fmt: skip
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
# Every spelling with one of the apostrophes missing.
CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in CONTRACTED for i, letter in enumerate(w) if letter == "'"}


def normalize_vqa(text: str) -> str:
    """The official VQA normalisation: punctuation, number words, articles, contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for p in PUNCTUATION:
        removed = p + " " in text or " " + p in text or re.search(r"\d,\d", text)
        out = out.replace(p, "" if removed else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [NUMBERS.get(w, w) for w in out.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def hallucination(questions: list[dict], answers: list[str]) -> dict:
    """Object HalBench's two rates after CHAIR (Rohrbach et al., 2018; MoD Tables 2, 4): how many descriptions
    name an object that is not there, and how many of the objects named are not there.

    A question's `objects` are those in its image, and `vocabulary` maps every wording to the object it means
    (`read_vocabulary`). An object named twice in an answer counts once. `recall` is the share of the image's
    objects that are named: without it, silence would look perfect.
    """
    wrong_answers = wrong = named = found = there = 0
    for q, answer in zip(questions, answers):
        truth, mentioned = set(q["objects"]), set(mentions(answer, q["vocabulary"]))
        wrong_answers += bool(mentioned - truth)
        wrong, named = wrong + len(mentioned - truth), named + len(mentioned)
        found, there = found + len(mentioned & truth), there + len(truth)
    response = 100 * wrong_answers / len(questions)
    mention, recall = (100 * a / max(b, 1) for a, b in ((wrong, named), (found, there)))
    return {"accuracy": 100 - response, "response_rate": response, "mention_rate": mention, "recall": recall}


def mentions(answer: str, vocabulary: dict[str, str]) -> Iterator[str]:
    """The objects that a text names, the longest wording first: a "hot dog" is not a dog."""
    wordings = "|".join(re.escape(w) for w in sorted(vocabulary, key=len, reverse=True))
    for match in re.finditer(rf"\b({wordings})(?:e?s)?\b", answer.lower()):
        yield vocabulary[match.group(1)]


def read_vocabulary(questions: list[dict], path: str | None) -> None:
    """Give every question its `vocabulary`: all objects of the questions, or those of a file with an object a
    line, its other wordings after it (as CHAIR's synonyms.txt: `person, girl, boy`).
    """
    vocabulary = {}
    if path:
        try:
            lines = open(path, encoding="utf-8").read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the objects' file {path}: {error}") from None
        for line in lines:
            wordings = [w.strip().lower() for w in line.split(",") if w.strip()]
            vocabulary |= dict.fromkeys(wordings, wordings[0])
    for q in questions:
        if not isinstance(q["objects"], list) or not all(isinstance(o, str) for o in q["objects"]):
            raise InputError(f"{q['where']}: 'objects' must be the list of the names of what its image shows")
        if not path:
            vocabulary |= {o.lower(): o.lower() for o in q["objects"]}
    for q in questions:
        unknown = [o for o in q["objects"] if o.lower() not in vocabulary]
        if unknown:
            raise InputError(f"{q['where']}: the object {unknown[0]!r} is not in {path}; add a line for it")
        q |= {"objects": [vocabulary[o.lower()] for o in q["objects"]], "vocabulary": vocabulary}
    if not vocabulary:
        raise InputError("no question has an object: hallucination cannot be told from truth")


METRICS = {"exact": (exact_match, "label"), "choice": (multiple_choice, "label"), "pope": (pope, "label"),
           "vqa": (vqa, "answers"), "hallucination": (hallucination, "objects"),
           "none": (None, None)}  # fmt: skip
