"""Scores of answers: (questions, answers) -> percent, "accuracy" first; and the reference that each compares
with: `read_...` gives the field of a question that holds it in one form, or refuses it.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from support.flags import InputError, require

QUOTES = str.maketrans("‘’ʼ“”", "'''\"\"")
FULL_WIDTH = {0xFEE0 + code: code for code in range(0x21, 0x7F)} | {ord("。"): "."}  # to plain ASCII


def plain(text: str) -> str:
    """What of a text is compared: words in one form (NFKC, straight quotes), no case and no final stop."""
    words = unicodedata.normalize("NFKC", text).translate(QUOTES).split()
    return " ".join(words).rstrip(".。! ").lower()


def wording(text: str) -> str:
    """What of an object's name is compared: `plain` text, a hyphen being a blank (hot-dog)."""
    return plain(text.replace("-", " "))


def read_label(q: dict) -> dict:
    label = q.get("label", q.get("answer"))
    one = isinstance(label, (str, int)) and not isinstance(label, bool) and plain(str(label))
    require(one, f"{q['where']} has no 'label' that is one text or whole number, but {json.dumps(label)}")
    return {"label": str(label)}


def read_yes_no(q: dict) -> dict:
    label = read_label(q)["label"]
    require(plain(label) in ("yes", "no"), f"{q['where']}: 'label' must be yes or no, but is {label!r}")
    return {"label": plain(label)}


def read_objects(q: dict) -> dict:
    objects = q.get("objects")
    named = isinstance(objects, list) and all(isinstance(o, str) and wording(o) for o in objects)
    require(named, f"{q['where']}: 'objects' must be the list of the names of what its image shows")
    return {"objects": [wording(o) for o in objects]}


def exact_match(questions: list[dict], answers: list[str]) -> dict:
    """Share of answers equal to `label` in `plain` text, of all questions and of those of each `category`."""
    groups = defaultdict(list)
    for q, answer in zip(questions, answers):
        groups[str(q.get("category", "all"))].append(plain(answer) == plain(q["label"]))
    percent = lambda points: 100 * sum(points) / len(points)
    means = {category: percent(points) for category, points in sorted(groups.items())}
    return {"accuracy": percent(list(chain(*groups.values()))), "by_category": means}


def pope(questions: list[dict], answers: list[str]) -> dict:
    """POPE's scores as its own script has them, "yes" being the positive class: of an answer the first
    sentence is read, and it is "no" if one of its words is "No", "not" or "no", else "yes". `unclear` is the
    number of answers that do not begin with what is read there: "NO" and "**No**" (read as yes), "A dog".
    Full-width letters and stops, which the script does not know, are first made plain ones.
    """
    answers, labels = [a.translate(FULL_WIDTH) for a in answers], [q["label"] for q in questions]
    words = [set(answer.split(".")[0].replace(",", "").split(" ")) for answer in answers]
    said = ["no" if w & {"No", "not", "no"} else "yes" for w in words]
    same = [s for s, label in zip(said, labels) if s == label]
    n, right, yes, true = len(said), same.count("yes"), said.count("yes"), labels.count("yes")
    scores = {"accuracy": len(same) / n, "precision": right / max(yes, 1), "recall": right / max(true, 1),
              "f1": 2 * right / max(yes + true, 1), "yes_ratio": yes / n}
    unclear = sum(not re.match(rf"(?i)[\W_]*{s}(?![^\W_])", a) for s, a in zip(said, answers))
    return {name: 100 * value for name, value in scores.items()} | {"unclear": unclear}


def hallucination(questions: list[dict], answers: list[str]) -> dict:
    """Object HalBench's two rates after CHAIR (Rohrbach et al., 2018; MoD Tables 2, 4): how many descriptions
    name an object that is not there, and how many of the objects named are not there. An object named twice
    in an answer counts once. `recall` is the share of the objects there that are named: without it, silence
    would look perfect.
    """
    truths = [set(q["objects"]) for q in questions]
    named = [set(mentions(answer, q["vocabulary"])) for answer, q in zip(answers, questions)]
    lies = [said - truth for said, truth in zip(named, truths)]
    n_true, n_named, n_lies = (sum(map(len, sets)) for sets in (truths, named, lies))
    response, mention = 100 * sum(map(bool, lies)) / len(lies), 100 * n_lies / max(n_named, 1)
    recall = 100 * (n_named - n_lies) / max(n_true, 1)
    return {"accuracy": 100 - response, "response_rate": response, "mention_rate": mention, "recall": recall}


# Endings of plurals that do more than add (e)s.
PLURALS = {"person": "people", "man": "men", "child": "children", "mouse": "mice", "goose": "geese",
           "foot": "feet", "tooth": "teeth", "fe": "ves", "f": "ves", "y": "ies"}


def mentions(answer: str, vocabulary: dict[str, str]) -> Iterator[str]:
    """The objects that a text names, the longest wording first: a "hot dog" is not a dog."""
    plurals = {word.removesuffix(end) + plural: name for word, name in vocabulary.items()
               for end, plural in PLURALS.items() if word.endswith(end)}
    known = plurals | vocabulary
    wordings = "|".join(re.escape(w) for w in sorted(known, key=len, reverse=True))
    for match in re.finditer(rf"(?<!\w)({wordings})(?:e?s)?(?!\w)", wording(answer)):
        yield known[match.group(1)]


def read_vocabulary(questions: list[dict], path: str | None) -> None:
    """Give every question a `vocabulary`, wordings to objects: the file's, else all questions' objects."""
    vocabulary = read_wordings(path) if path else {o: o for q in questions for o in q["objects"]}
    require(vocabulary, "no question has an object: hallucination cannot be told from truth")
    for q in questions:
        unknown = next((repr(o) for o in q["objects"] if o not in vocabulary), None)
        require(not unknown, f"{q['where']}: the object {unknown} is not in {path}; add a line for it")
        q |= {"objects": [vocabulary[o] for o in q["objects"]], "vocabulary": vocabulary}


def read_wordings(path: str) -> dict[str, str]:
    """From wordings to objects, of a file of lines as CHAIR's: an object, then its other wordings."""
    vocabulary, wanted = {}, "a line is an object and its other wordings, as in: dog, puppy"
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the objects' file {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        words = [wording(w) for w in re.split(r"[,;\t，；、]", line) if wording(w)]
        for w in words:
            where, other = f"{path} line {number}: {w!r}", vocabulary.setdefault(w, words[0])
            require(re.fullmatch(r'\w[^][(){}":=|/]*', w), f"{where} cannot be an object's name; {wanted}")
            twice = f"{where} means {words[0]!r} here and {other!r} before; take it out of one of the lines"
            require(other == words[0], twice)
    return vocabulary


# How to score, and how a question's reference is read.
METRICS = {"exact": (exact_match, read_label), "pope": (pope, read_yes_no),
           "hallucination": (hallucination, read_objects), "none": (None, lambda q: {})}
