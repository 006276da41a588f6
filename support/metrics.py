"""Scores of answers: (questions, answers) -> percent, "accuracy" first."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from support.flags import InputError, require


def by_category(questions: list[dict], points: list[float]) -> dict:
    """The mean of `points`, over all questions and over those of each `category`."""
    groups = defaultdict(list)
    for q, point in zip(questions, points):
        groups[str(q.get("category", "all"))].append(point)
    means = {category: 100 * sum(values) / len(values) for category, values in sorted(groups.items())}
    return {"accuracy": 100 * sum(points) / len(points), "by_category": means}


def exact_match(questions: list[dict], answers: list[str]) -> dict:
    """Share of answers equal to `label` but for case, outer blanks and a final full stop."""
    plain = lambda s: s.strip().rstrip(".").lower()  # noqa: E731
    return by_category(questions, [plain(a) == plain(str(q["label"])) for q, a in zip(questions, answers)])


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
        points.append(choice == str(q["label"]).upper())
    return by_category(questions, points)


def pope(questions: list[dict], answers: list[str]) -> dict:
    """POPE's scores as its own script has them, "yes" being the positive class: of an answer the first
    sentence is read, and it is "no" if one of its words is "No", "not" or "no", else "yes".
    """
    words = [set(answer.split(".")[0].replace(",", "").split(" ")) for answer in answers]
    count = Counter((not w & {"No", "not", "no"}, q["label"] != "no") for w, q in zip(words, questions))
    right = count[True, True]
    yes, true = right + count[True, False], right + count[False, True]
    precision, recall, n = right / max(yes, 1), right / max(true, 1), len(questions)
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    scores = {"accuracy": (right + count[False, False]) / n, "precision": precision, "recall": recall,
              "f1": f1, "yes_ratio": yes / n}  # fmt: skip
    return {name: 100 * value for name, value in scores.items()}


def vqa(questions: list[dict], answers: list[str]) -> dict:
    """VQA soft accuracy: an answer counts min(1, humans who gave it / 3), averaged over all subsets that
    leave one of the (ten) humans out. Departure: both sides are normalised alike; the official script
    normalises references by punctuation only, and not at all where the humans agree.
    """
    points = []
    for q, answer in zip(questions, answers):
        same = [normalize_vqa(str(human)) == normalize_vqa(answer) for human in q["answers"]]
        points.append(sum(min(1.0, (sum(same) - me) / 3) for me in same) / len(same))
    return by_category(questions, points)


NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))  # fmt: skip
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
# Every spelling with one of the apostrophes missing.
CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in CONTRACTED for i, letter in enumerate(w) if letter == "'"}


def normalize_vqa(text: str) -> str:
    """The official VQA normalisation: punctuation, number words, articles, contractions."""
    text = out = text.replace("\n", " ").replace("\t", " ").strip()
    for p in ';/[]"{}()=+\\_-><@`,?!':
        removed = p + " " in text or " " + p in text or re.search(r"\d,\d", text)
        out = out.replace(p, "" if removed else " ")
    words = [NUMBERS.get(w, w) for w in re.sub(r"\.(?!\d)", "", out).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def hallucination(questions: list[dict], answers: list[str]) -> dict:
    """Object HalBench's two rates after CHAIR (Rohrbach et al., 2018; MoD Tables 2, 4): how many descriptions
    name an object that is not there, and how many of the objects named are not there.

    A question's `objects` are those in its image; an object named twice in an answer counts once. `recall` is
    the share of the image's objects that are named: without it, silence would look perfect.
    """
    truths = [set(q["objects"]) for q in questions]
    named = [set(mentions(answer, q["vocabulary"])) for answer, q in zip(answers, questions)]
    count = lambda *sets: sum(map(len, sets))  # noqa: E731
    lies = [said - truth for said, truth in zip(named, truths)]
    response, mention = 100 * sum(map(bool, lies)) / len(lies), 100 * count(*lies) / max(count(*named), 1)
    recall = 100 * (count(*named) - count(*lies)) / max(count(*truths), 1)
    return {"accuracy": 100 - response, "response_rate": response, "mention_rate": mention, "recall": recall}


def mentions(answer: str, vocabulary: dict[str, str]) -> Iterator[str]:
    """The objects that a text names, the longest wording first: a "hot dog" is not a dog."""
    wordings = "|".join(re.escape(w) for w in sorted(vocabulary, key=len, reverse=True))
    for match in re.finditer(rf"\b({wordings})(?:e?s)?\b", answer.lower()):
        yield vocabulary[match.group(1)]


def read_vocabulary(questions: list[dict], path: str | None) -> None:
    """Give every question a `vocabulary`, from every wording to the object it means: all objects of the
    questions, or a file with an object a line, its other wordings after it (as CHAIR's `person, girl, boy`).
    """
    vocabulary = {}
    try:
        for line in open(path, encoding="utf-8") if path else []:
            wordings = [w.strip().lower() for w in line.split(",") if w.strip()]
            vocabulary |= dict.fromkeys(wordings, wordings[0])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the objects' file {path}: {error}") from None
    for q in questions:
        named = isinstance(q["objects"], list) and all(isinstance(o, str) for o in q["objects"])
        require(named, f"{q['where']}: 'objects' must be the list of the names of what its image shows")
        q["objects"], q["vocabulary"] = [o.lower() for o in q["objects"]], vocabulary
        if not path:
            vocabulary |= {o: o for o in q["objects"]}
    require(bool(vocabulary), "no question has an object: hallucination cannot be told from truth")
    for q in questions:
        for unknown in (o for o in q["objects"] if o not in vocabulary):
            raise InputError(f"{q['where']}: the object {unknown!r} is not in {path}; add a line for it")
        q["objects"] = [vocabulary[o] for o in q["objects"]]


# fmt: off
METRICS = {"exact": (exact_match, "label"), "choice": (multiple_choice, "label"), "pope": (pope, "label"),
           "vqa": (vqa, "answers"), "hallucination": (hallucination, "objects"), "none": (None, None)}
