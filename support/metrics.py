"""Scores of answers: (questions, answers) -> percent, "accuracy" first; and the reference that each compares
with: `read_...` gives a question's in one form, or refuses it.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
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


def read_label(q: dict) -> str:
    label = q.get("label")
    one = isinstance(label, (str, int)) and not isinstance(label, bool) and plain(str(label))
    require(one, f"{q.get('where')} has no 'label' that is one text or whole number, but {json.dumps(label)}")
    return str(label)


def read_yes_no(q: dict) -> str:
    label = plain(read_label(q))
    require(label in ("yes", "no"), f"{q.get('where')}: 'label' must be yes or no, but is {q['label']!r}")
    return label


def read_objects(q: dict) -> list[str]:
    objects = q.get("objects")
    named = isinstance(objects, list) and all(isinstance(o, str) and wording(o) for o in objects)
    require(named, f"{q.get('where')}: 'objects' must be the list of the names of what its image shows")
    return [wording(o) for o in objects]


def wording(text: str) -> str:
    """What of an object's name is compared: `plain` text, a hyphen being a blank (hot-dog)."""
    return plain(text.replace("-", " "))


def exact_match(questions: list[dict], answers: list[str]) -> dict:
    """Share of answers equal to `label` in `plain` text, of all questions and of those of each `category`."""
    groups = defaultdict(list)
    for q, answer in zip(questions, answers):
        groups[str(q.get("category", "all"))].append(plain(answer) == plain(read_label(q)))
    percent = lambda points: 100 * sum(points) / len(points)
    means = {category: percent(points) for category, points in sorted(groups.items())}
    return {"accuracy": percent(list(chain(*groups.values()))), "by_category": means}


def pope(questions: list[dict], answers: list[str]) -> dict:
    """POPE's scores as its own script has them, "yes" being the positive class: of an answer the first
    sentence is read, and it is "no" if one of its words is "No", "not" or "no", else "yes". `unclear` is the
    number of answers that do not begin with what is read there: "NO" and "**No**" (read as yes), "A dog".
    Full-width letters and stops, which the script does not know, are first made plain ones.
    """
    answers = [answer.translate(FULL_WIDTH) for answer in answers]
    words = [set(answer.split(".")[0].replace(",", "").split(" ")) for answer in answers]
    said = ["no" if w & {"No", "not", "no"} else "yes" for w in words]
    count = Counter((s == "yes", read_yes_no(q) == "yes") for s, q in zip(said, questions))
    right = count[True, True]
    yes, true = right + count[True, False], right + count[False, True]
    precision, recall, n = right / max(yes, 1), right / max(true, 1), len(questions)
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    scores = {"accuracy": (right + count[False, False]) / n, "precision": precision, "recall": recall,
              "f1": f1, "yes_ratio": yes / n}
    unclear = sum(not re.match(rf"(?i)[\W_]*{s}(?![^\W_])", a) for s, a in zip(said, answers))
    return {name: 100 * value for name, value in scores.items()} | {"unclear": unclear}


def hallucination(questions: list[dict], answers: list[str]) -> dict:
    """Object HalBench's two rates after CHAIR (Rohrbach et al., 2018; MoD Tables 2, 4): how many descriptions
    name an object that is not there, and how many of the objects named are not there.

    A question's `objects` are those in its image; an object named twice in an answer counts once. `recall` is
    the share of the image's objects that are named: without it, silence would look perfect.
    """
    truths = [set(q["objects"]) for q in questions]
    named = [set(mentions(answer, q["vocabulary"])) for answer, q in zip(answers, questions)]
    count = lambda *sets: sum(map(len, sets))
    lies = [said - truth for said, truth in zip(named, truths)]
    response, mention = 100 * sum(map(bool, lies)) / len(lies), 100 * count(*lies) / max(count(*named), 1)
    recall = 100 * (count(*named) - count(*lies)) / max(count(*truths), 1)
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
    vocabulary = read_wordings(path) if path else {o: o for q in questions for o in read_objects(q)}
    require(vocabulary, "no question has an object: hallucination cannot be told from truth")
    for q in questions:
        objects = read_objects(q)
        unknown = next((repr(o) for o in objects if o not in vocabulary), None)
        require(not unknown, f"{q['where']}: the object {unknown} is not in {path}; add a line for it")
        q |= {"objects": [vocabulary[o] for o in objects], "vocabulary": vocabulary}


def read_wordings(path: str) -> dict[str, str]:
    """From wordings to objects, of a file of lines as CHAIR's: an object, then its other wordings."""
    vocabulary = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the objects' file {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        words = [wording(w) for w in re.split(r"[,;\t，；、]", line) if wording(w)]
        for w in words:
            where = f"{path} line {number}: {w!r}"
            a_line = "a line is an object and its other wordings, as in: dog, puppy"
            require(re.fullmatch(r'\w[^][(){}":=|/]*', w), f"{where} cannot be an object's name; {a_line}")
            other = vocabulary.setdefault(w, words[0])
            twice = f"{where} means {words[0]!r} here and {other!r} before; take it out of one of the lines"
            require(other == words[0], twice)
    return vocabulary


# How to score, the field with the reference, and how that is read.
METRICS = {"exact": (exact_match, "label", read_label), "pope": (pope, "label", read_yes_no),
           "hallucination": (hallucination, "objects", read_objects), "none": (None, None, None)}
