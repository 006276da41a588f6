"""Scores of answers: (questions, answers) -> percent, "accuracy" first; and the reference that each compares
with: `read_...` gives a question's in one form, or refuses it.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from string import ascii_uppercase as LETTERS

from support.flags import InputError, require

QUOTES = str.maketrans("‘’ʼ“”", "'''\"\"")


def plain(text: object) -> str:
    """What of a text is compared: composed accents (NFKC), straight quotes, no case, final stop or blanks."""
    return unicodedata.normalize("NFKC", str(text)).translate(QUOTES).strip().rstrip(".").lower()


def read_label(q: dict) -> str:
    label = q.get("label")
    one = isinstance(label, (str, int)) and not isinstance(label, bool) and plain(label)
    require(one, f"{q.get('where')} has no 'label' that is one text or whole number, but {json.dumps(label)}")
    return str(label)


def read_yes_no(q: dict) -> str:
    label = plain(read_label(q))
    require(label in ("yes", "no"), f"{q.get('where')}: 'label' must be yes or no, but is {q['label']!r}")
    return label


def read_options(q: dict) -> dict[str, str]:
    """The options by their letters, or by the names that an object gives them; {} without any."""
    options = q.get("options") or {}
    options = dict(zip(LETTERS, options)) if isinstance(options, list) else options
    right = isinstance(options, dict) and not any(isinstance(o, (list, dict)) for o in options.values())
    require(right, f"{q.get('where')}: 'options' must be a list of texts, or an object from letters to texts")
    return {plain(k).upper(): plain(text) for k, text in options.items() if text is not None and plain(text)}


def read_choice(q: dict) -> str:
    """The right option's letter, given as "B", "(b)", "B." or as the option's text."""
    label, options = plain(read_label(q)), read_options(q) or dict.fromkeys(LETTERS)
    letter = re.sub(r"^\(|\)?[.:]?$", "", label).upper()
    index = letter.isdecimal() and int(letter) <= len(options)  # from 0 or from 1?
    named = [k for k, text in options.items() if k == letter or (text == label and not index)]
    wanted = f"the letter or the text of one option of {', '.join(options)}"
    require(len(named) == 1, f"{q.get('where')}: 'label' must be {wanted}, but is {q['label']!r}")
    return named[0]


def read_humans(q: dict) -> list[str]:
    given = q["answers"] if isinstance(q.get("answers"), list) else []
    answers = [a.get("answer") if isinstance(a, dict) else a for a in given]  # VQA's own form
    several = len(answers) > 1 and all(isinstance(a, str) for a in answers)
    require(several, f"{q.get('where')}: 'answers' must be a list of several humans' answers, ten in VQA")
    return answers


def read_objects(q: dict) -> list[str]:
    objects = q.get("objects")
    named = isinstance(objects, list) and all(isinstance(o, str) and plain(o) for o in objects)
    require(named, f"{q.get('where')}: 'objects' must be the list of the names of what its image shows")
    return [plain(o) for o in objects]


def by_category(questions: list[dict], points: list[float]) -> dict:
    """The mean of `points`, over all questions and over those of each `category`."""
    groups = defaultdict(list)
    for q, point in zip(questions, points):
        groups[str(q.get("category", "all"))].append(point)
    means = {category: 100 * sum(values) / len(values) for category, values in sorted(groups.items())}
    return {"accuracy": 100 * sum(points) / len(points), "by_category": means}


def exact_match(questions: list[dict], answers: list[str]) -> dict:
    """Share of answers equal to `label` in `plain` text."""
    return by_category(questions, [plain(a) == plain(read_label(q)) for q, a in zip(questions, answers)])


def multiple_choice(questions: list[dict], answers: list[str]) -> dict:
    """Share of answers that choose the option `label`; `unclear` is the number of those that choose none."""
    chosen = [choice(answer, read_options(q)) for q, answer in zip(questions, answers)]
    points = [name == read_choice(q) for q, name in zip(questions, chosen)]
    return by_category(questions, points) | {"unclear": chosen.count(None)}


def choice(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer chooses: by a letter at its beginning ("(b)", "B) a dog", "B\\nBecause ...")
    or after words like "the answer is" (as LLaVA's ScienceQA script), by its whole text, or by the text of
    one option alone inside a sentence without "not" ("It is a dog."). "A dog" and "answer: a dog" are not A.
    """
    text = unicodedata.normalize("NFKC", answer).replace("*", "").strip()
    letter = "|".join(map(re.escape, options)) or "[A-Z]"
    first = re.match(rf"(?i)\(?({letter})(?:[.:)]+(?=\s|$)|\s*(?:\n|$))", text)
    lead = r"(?i:\b(?:answer|option|choice)(?: is)?:?) *\(?"
    if found := first or re.search(rf"{lead}((?:{letter})\b|(?i:{letter})\b(?! \w))", text):
        return found[1].upper()
    text, names = plain(text), {text: name for name, text in options.items()}
    silent = not names or re.search(r"\bnot\b|n't\b", text)
    named = {names[text]} if text in names else set() if silent else set(mentions(text, names))
    return named.pop() if len(named) == 1 else None


def pope(questions: list[dict], answers: list[str]) -> dict:
    """POPE's scores as its own script has them, "yes" being the positive class: of an answer the first
    sentence is read, and it is "no" if one of its words is "No", "not" or "no", else "yes". `unclear` is the
    number of answers that do not begin with what is read there: "NO" and "**No**" (read as yes), "A dog".
    """
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


def vqa(questions: list[dict], answers: list[str]) -> dict:
    """VQA soft accuracy: an answer counts min(1, humans who gave it / 3), averaged over all subsets that
    leave one of the (ten) humans out. Departure: both sides are normalised alike; the official script
    normalises references by punctuation only, and not at all where the humans agree.
    """
    points = []
    for q, answer in zip(questions, answers):
        same = [normalize_vqa(human) == normalize_vqa(answer) for human in read_humans(q)]
        points.append(sum(min(1.0, (sum(same) - me) / 3) for me in same) / len(same))
    return by_category(questions, points)


NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))
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
    """The official VQA normalisation (punctuation, number words, articles, contractions) of `plain` text."""
    text = out = re.sub(r"\s+%", "%", plain(text)).replace("\n", " ").replace("\t", " ")
    for p in ';/[]"{}()=+\\_-><@`,?!':
        removed = p + " " in text or " " + p in text or re.search(r"\d,\d", text)
        out = out.replace(p, "" if removed else " ")
    words = [NUMBERS.get(w, w) for w in re.sub(r"\.(?!\d)", "", out).split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


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
    for match in re.finditer(rf"(?<!\w)({wordings})(?:e?s)?(?!\w)", plain(answer)):
        yield known[match.group(1)]


def read_vocabulary(questions: list[dict], path: str | None) -> None:
    """Give every question a `vocabulary`, from every wording to the object it means: all objects of the
    questions, or a file with an object a line, its other wordings after it (as CHAIR's `person, girl, boy`).
    """
    vocabulary = {}
    try:
        for line in open(path, encoding="utf-8") if path else []:
            wordings = [plain(w) for w in line.split(",") if plain(w)]
            vocabulary |= dict.fromkeys(wordings, wordings[0])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the objects' file {path}: {error}") from None
    for q in questions:
        q["objects"], q["vocabulary"] = read_objects(q), vocabulary
        if not path:
            vocabulary |= {o: o for o in q["objects"]}
    require(bool(vocabulary), "no question has an object: hallucination cannot be told from truth")
    for q in questions:
        for unknown in (o for o in q["objects"] if o not in vocabulary):
            raise InputError(f"{q['where']}: the object {unknown!r} is not in {path}; add a line for it")
        q["objects"] = [vocabulary[o] for o in q["objects"]]


# How to score, the field with the reference, and how that is read.
METRICS = {"exact": (exact_match, "label", read_label), "choice": (multiple_choice, "label", read_choice),
           "pope": (pope, "label", read_yes_no), "vqa": (vqa, "answers", read_humans),
           "hallucination": (hallucination, "objects", read_objects), "none": (None, None, None)}
