"""
Generated word problems whose worked answers can be worded in very many ways.

The sums are kept small enough for a tiny model. What is large is the choice of wording: the worked answer draws its
opener, its connectives, the words before and after every sum and its ending at random, and the alternatives differ in
length. The question therefore fixes the numbers of the answer but neither its words nor the places where the numbers
stand, so a model that fills in many tokens in one pass contradicts itself unless it has learned to settle them
together. With one fixed wording per step, a plain model would already need only a handful of passes.

    Q: Nora has 12 shells. Later Nora finds 8 more. Nora puts all shells into 4 equal piles and keeps only one pile.
       How many shells does Nora have now?
    A: Let us see. Adding the 8 gives 12 + 8 = 20 shells. Then 20 / 4 = 5, so Nora has 5. The answer is 5.

Two problems have the same content if their sums are the same, whoever the person is and whatever the wording. A hash
of the content decides which split it belongs to, so no seed of one split can give a content of another.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

# frozen: the distillation is judged on them
TEST_SEED = 20_240
NUM_TEST_PROBLEMS = 5000

SPLITS = ("train", "validation", "test")

# What the tokenizer turns into one token: a word, a single digit or a single sign, each with the space before it.
PIECE_PATTERN = r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9 ]| "
MAX_SOLUTION_PIECES = 127  # an answer of 128 tokens, less the end-of-text

_PIECE = re.compile(PIECE_PATTERN)
_ANSWER = re.compile(r"The answer is (-?(?:[0-9]{1,3}(?:,[0-9]{3}){1,3}|[0-9]{1,12}))\.(?![0-9])")


class Problem(NamedTuple):
    question: str
    solution: str
    answer: int


class Step(NamedTuple):
    kind: str  # one of "+", "-", "*", "/" and "boxes"
    a: int  # the running total before the step
    b: int  # the number that the step is about: how many more, fewer, times, shares or boxes
    c: int  # the running total after the step
    m: int = 0  # "boxes" only: how many are in each box
    p: int = 0  # "boxes" only: how many are in all boxes

    @property
    def sums(self) -> str:
        if self.kind == "boxes":
            return f"{self.b} * {self.m} = {self.p}; {self.a} + {self.p} = {self.c}"
        return f"{self.a} {self.kind} {self.b} = {self.c}"


def _alternatives(*rows: str) -> list[list[str]]:
    """Spells out "(x|y|)" in every row; a row is drawn first, so that rows with many spellings do not crowd others."""
    parts = [[part.split("|") for part in re.split(r"[()]", row)] for row in rows]
    return [["".join(choice) for choice in itertools.product(*row)] for row in parts]


# In all wordings: {n} the person, {o} the objects, and the fields of `Step`. New words cost entries of the vocabulary.
NAMES = "Adam Anna Ben Carl Dana Ella Eva Finn Hana Ivan Jan Leo Lina Maria Mia Nora Omar Rosa Sam Tom".split()
OBJECTS = (
    "apples balls beads bells books buttons cards coins cups eggs "
    "flowers keys leaves marbles nuts pens shells stamps stars stones"
).split()

QUESTION_START = _alternatives("{n} has {a} {o}.", "At first {n} has {a} {o}.", "There are {a} {o} in the box of {n}.")
QUESTION_LINK = _alternatives("", "then ", "(later|next) ", "after that ")
QUESTION_STEP = {
    "+": _alternatives("{n} (finds|buys) {b} more.", "{n} gets {b} {o} from (Dad|a friend).", "{b} more {o} come in."),
    "-": _alternatives("{n} gives away {b}( of them|).", "{n} loses {b} {o}.", "{n} sells {b}( {o}|) to a friend."),
    "*": _alternatives(
        "{n} gets so many that there are {b} times as many {o}.", "the pile grows to {b} times as many."
    ),
    "/": _alternatives(
        "{n} puts all {o} into {b} equal piles and keeps only one pile.",
        "the {o} are shared by {b} friends( in equal parts|), and {n} is one of them.",
    ),
    "boxes": _alternatives(
        "{n} buys {b} boxes with {m} {o} each.", "{n} finds {b} boxes( of {o}|), each with {m} in it."
    ),
}
QUESTION_TIMES = {
    2: _alternatives("{n} doubles the number of {o}."),
    3: _alternatives("{n} triples the number of {o}."),
}
QUESTION_END = _alternatives(
    "How many {o} does {n} have now?", "How many {o} are left( now|)?", "How many are there now?"
)

OPENER = _alternatives(
    "",
    "Let us (see|count)( step by step|).",
    "We (start|begin) with {a}( {o}|).",
    "At first (there are|{n} has) {a}( {o}|).",
    "Here is (how it goes|the count)( for {n}|).",
    "{n} has {a}( {o}|) to (start|begin) with.",
    "Step by step:",
    "We go (step by step|on from {a}).",
)
LINK = _alternatives(
    "", "", "then ", "next, ", "after that( step|), ", "now ", "from (there|here)( on|) ", "and (then|now) "
)
BEFORE_SUM = {
    "+": _alternatives(
        "",
        "adding (the |){b}( more| {o}|) (gives|makes) ",
        "{n} gets {b}( more|)( {o}|), (so|so we have|that is) ",
        "with {b} (more|new)( {o}|) (there are|we have|it is|the count is) ",
        "we add {b}( more|)( {o}|)( to the {a}|): ",
        "{b}( more|)( {o}|) (come in|come to the {a}), so ",
    ),
    "-": _alternatives(
        "",
        "taking (the |){b}( {o}|) away (leaves|gives) ",
        "{n} has {b}( {o}|) less, (so|so we have|that is) ",
        "with {b}( {o}|) less (there are|we have|it is|the count is) ",
        "we take {b}( away|)( from the {a}|): ",
        "{b}( of the {a}|)( {o}|) (go away|are gone), so ",
    ),
    "*": _alternatives(
        "",
        "{b} times (the {a}|as many|that) (is|gives|makes) ",
        "{n} has {b} times (that|as many)( {o}|), (so|so we have|that is) ",
        "with {b} times as many (there are|we have|it is|the count is) ",
        "we take {b} times (that|the {a}): ",
        "the (pile|number|count) grows( {b} times|), so ",
    ),
    "/": _alternatives(
        "",
        "one (share|part|pile) of {b}( equal parts|) (is|gives|makes) ",
        "{n} keeps one (share|part|pile) of {b}, (so|so we have|that is) ",
        "with {b} equal (parts|piles) (there are|we have|it is|the count is) ",
        "we (share|split)( the {a}|)( {o}|) (by {b}|into {b} parts): ",
        "each( one|) of the {b} (parts|piles) (has|is) ",
    ),
    "boxes": _alternatives(
        "",
        "{b} boxes (of|with) {m}( {o}|) (make|are) ",
        "we (first |)count the( new|) boxes: ",
        "the boxes have ",
        "in( all|) {b} boxes there are ",
    ),
}
SUM = {kind: [[f"{{a}} {kind} {{b}} = {{c}}"]] for kind in "+-*/"}
SUM["boxes"] = _alternatives(
    "{b} * {m} = {p}, so {a} + {p} = {c}",
    "{b} * {m} = {p}( {o}|), and (then|now|in all) {a} + {p} = {c}",
    "{b} * {m} = {p}( new|) {o}. (That makes|That gives|Now we have) {a} + {p} = {c}",
    "{b} * {m} = {p}. {a} + {p} = {c}",
)
AFTER_SUM = _alternatives(
    ".",
    " {o}.",
    "( {o}|) (now|so far|in all|for now).",
    ", so {n} has {c}( now|).",
    ", and that (is|leaves) {c}.",
    " in the (box|pile).",
)
ENDING = _alternatives(
    "",
    "That is (all|it|the end)( of it|).",
    "So {n} has {c}( {o}|)( left|)( now|).",
    "(Now we|We) are (there|at the end)( of the count|).",
    "There is no more to (count|do)( here|)( for {n}|).",
    "No more steps are left.",
    "So {c}( {o}|) are (left|there)( at the end|).",
)
FINAL = "The answer is {c}."


def _below(rng: random.Random, stop: int) -> int:
    # Python promises the same numbers in later versions for random() alone, not for choice() or randrange().
    return int(rng.random() * stop)


def _pick(rng: random.Random, items):
    return items[_below(rng, len(items))]


def _draw_step(rng: random.Random, total: int) -> Step:
    while True:
        kind = _pick(rng, ("+", "+", "+", "-", "-", "-", "*", "*", "/", "/", "boxes"))
        if kind == "+":
            b = 2 + _below(rng, 98)
            return Step(kind, total, b, total + b)
        if kind == "-" and total >= 2:
            b = 2 + _below(rng, min(total, 99) - 1)
            return Step(kind, total, b, total - b)
        # Products and shares stay within the tables of 2 to 5 up to 99, which a small model can learn by heart. This
        # also keeps every total below 1000.
        b = 2 + _below(rng, 4)
        if kind == "*" and 1 <= total <= 99:
            return Step(kind, total, b, total * b)
        if kind == "/" and total % b == 0 and 1 <= total // b <= 99:
            return Step(kind, total, b, total // b)
        if kind == "boxes":
            m = 2 + _below(rng, 18)
            return Step(kind, total, b, total + b * m, m, b * m)


def _draw_steps(rng: random.Random) -> list[Step]:
    steps = [_draw_step(rng, 2 + _below(rng, 98))]
    for _ in range(1 + _below(rng, 4)):
        steps.append(_draw_step(rng, steps[-1].c))
    return steps


def _say(rng: random.Random, *tables: list[list[str]]) -> str:
    text = "".join([_pick(rng, _pick(rng, table)) for table in tables])
    return text[:1].upper() + text[1:]


def _word_question(rng: random.Random, steps: list[Step], name: str, objects: str) -> str:
    sentences = [_say(rng, QUESTION_START).format(n=name, o=objects, a=steps[0].a)]
    for step in steps:
        table = QUESTION_STEP[step.kind]
        if step.kind == "*":
            table = table + QUESTION_TIMES.get(step.b, [])
        sentences.append(_say(rng, QUESTION_LINK, table).format(n=name, o=objects, **step._asdict()))
    sentences.append(_say(rng, QUESTION_END).format(n=name, o=objects))
    return " ".join(sentences)


def _word_solution(rng: random.Random, steps: list[Step], name: str, objects: str) -> str:
    sentences = [_say(rng, OPENER).format(n=name, o=objects, a=steps[0].a)]
    for i, step in enumerate(steps):
        link = LINK if i > 0 else [[""]]
        text = _say(rng, link, BEFORE_SUM[step.kind], SUM[step.kind], AFTER_SUM)
        sentences.append(text.format(n=name, o=objects, **step._asdict()))
    sentences.append(_say(rng, ENDING).format(n=name, o=objects, c=steps[-1].c))
    sentences.append(FINAL.format(c=steps[-1].c))
    return " ".join(filter(None, sentences))


def _word_problem(rng: random.Random, steps: list[Step]) -> Problem:
    name, objects = _pick(rng, NAMES), _pick(rng, OBJECTS)
    question = _word_question(rng, steps, name, objects)
    # An answer that comes out too long is worded again: cutting it off would lose the number at its end.
    while len(_PIECE.findall(solution := _word_solution(rng, steps, name, objects))) > MAX_SOLUTION_PIECES:
        pass
    return Problem(question, solution, steps[-1].c)


def split_of(content: str) -> str:
    """The one split that a content, the sums of a problem joined by "; ", belongs to."""
    bucket = hashlib.blake2b(content.encode(), digest_size=1).digest()[0] % 64
    return {0: "test", 1: "validation"}.get(bucket, "train")


def generate_problems(split: str, count: int, seed: int) -> Iterator[Problem]:
    """
    Yields `count` problems of `split`, the same ones for the same `split` and `seed` wherever it runs.

    A content may come again in "train". In "validation" and "test" each comes once.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(map(repr, SPLITS))}")
    return _generate(split, count, seed)  # apart, so that a wrong split raises at the call and not at the first item


def _generate(split: str, count: int, seed: int) -> Iterator[Problem]:
    rng = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    while count > 0:
        steps = _draw_steps(rng)
        content = "; ".join([step.sums for step in steps])
        if split_of(content) != split or content in seen:
            continue
        if split != "train":
            seen.add(content)
        yield _word_problem(rng, steps)
        count -= 1


def extract_answer(text: str) -> int | None:
    """The number in the last "The answer is ..." sentence of `text`, or None if there is none."""
    answers = _ANSWER.findall(text)
    return int(answers[-1].replace(",", "")) if answers else None


def is_correct(text: str, answer: int) -> bool:
    return extract_answer(text) == answer


def to_conversation(problem: Problem) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "completion": [{"role": "assistant", "content": problem.solution}],
    }
