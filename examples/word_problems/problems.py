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
QUESTION_STEP = {
    "+": _alternatives("{n} (finds|buys) {b} more.", "{n} gets {b} {o} from (Dad|a friend).", "{b} more {o} come in."),
    "-": _alternatives("{n} gives away {b}( of them|).", "{n} loses {b} {o}.", "{n} sells {b}( {o}|) to a friend."),
    "*": _alternatives("{n} gets {b} times as many {o}.", "The pile grows to {b} times as many."),
    "/": _alternatives("{n} keeps one of {b} equal piles.", "The {o} are shared by {b}, and {n} is one of them."),
    "boxes": _alternatives("{n} buys {b} boxes with {m} {o} each.", "{n} finds {b} boxes( of {o}|) with {m} in each."),
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
    "Let us see.",
    "We start with {a} {o}.",
    "{n} has {a} {o} to begin with.",
    "Here is how it goes for {n}, step by step.",
)
# One kind of step in five lengths: which one was drawn decides where everything behind it stands.
SOLUTION_STEP = {
    "+": _alternatives(
        "{a} + {b} = {c}.",
        "Then {a} + {b} = {c} {o}.",
        "We add {b} and get {a} + {b} = {c}.",
        "With {b} more {o} the count is {a} + {b} = {c} in all.",
        "After that {n} has {b} {o} more than before, so now there are {a} + {b} = {c} {o}.",
    ),
    "-": _alternatives(
        "{a} - {b} = {c}.",
        "Then {a} - {b} = {c} {o}.",
        "We take {b} and get {a} - {b} = {c}.",
        "With {b} {o} less the count is {a} - {b} = {c} in all.",
        "After that {n} has {b} {o} less than before, so now there are {a} - {b} = {c} {o}.",
    ),
    "*": _alternatives(
        "{a} * {b} = {c}.",
        "Then {a} * {b} = {c} {o}.",
        "{b} times as many gives {a} * {b} = {c}.",
        "With {b} times the {o} the count is {a} * {b} = {c} in all.",
        "After that {n} has {b} times as many {o} as before, so now there are {a} * {b} = {c} {o}.",
    ),
    "/": _alternatives(
        "{a} / {b} = {c}.",
        "Then {a} / {b} = {c} {o}.",
        "We share by {b} and get {a} / {b} = {c}.",
        "With {b} equal parts the count is {a} / {b} = {c} in each.",
        "After that {n} has one of {b} equal parts of the {o}, so now there are {a} / {b} = {c} {o}.",
    ),
    "boxes": _alternatives(
        "{b} * {m} = {p} and {a} + {p} = {c}.",
        "Then {b} * {m} = {p} {o} and {a} + {p} = {c}.",
        "The boxes have {b} * {m} = {p}, and we get {a} + {p} = {c}.",
        "With {b} boxes of {m} we have {b} * {m} = {p} more, and the count is {a} + {p} = {c} in all.",
        "After that {n} has {b} boxes of {m} with {b} * {m} = {p} {o}, so now there are {a} + {p} = {c} {o}.",
    ),
}
ENDING = _alternatives(
    "",
    "That is all.",
    "No more steps are left.",
    "So {n} has {c} {o} left.",
    "Now we are at the end of the count for {n}.",
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
            b = 2 + _below(rng, 58)
            return Step(kind, total, b, total + b)
        if kind == "-" and total >= 2:
            b = 2 + _below(rng, min(total, 59) - 1)
            return Step(kind, total, b, total - b)
        # Products and shares stay within what a small model can learn by heart: 2 to 5 times up to 50.
        b = 2 + _below(rng, 4)
        if kind == "*" and 1 <= total <= 50:
            return Step(kind, total, b, total * b)
        if kind == "/" and total % b == 0 and 1 <= total // b <= 50:
            return Step(kind, total, b, total // b)
        if kind == "boxes":
            m = 2 + _below(rng, 11)
            return Step(kind, total, b, total + b * m, m, b * m)


def _draw_steps(rng: random.Random) -> list[Step]:
    steps = [_draw_step(rng, 2 + _below(rng, 58))]
    for _ in range(1 + _below(rng, 3)):
        steps.append(_draw_step(rng, steps[-1].c))
    return steps


def _say(rng: random.Random, table: list[list[str]]) -> str:
    return _pick(rng, _pick(rng, table))


def _word_question(rng: random.Random, steps: list[Step], name: str, objects: str) -> str:
    sentences = [_say(rng, QUESTION_START).format(n=name, o=objects, a=steps[0].a)]
    for step in steps:
        table = QUESTION_STEP[step.kind]
        if step.kind == "*":
            table = table + QUESTION_TIMES.get(step.b, [])
        sentences.append(_say(rng, table).format(n=name, o=objects, **step._asdict()))
    sentences.append(_say(rng, QUESTION_END).format(n=name, o=objects))
    return " ".join(sentences)


def _word_solution(rng: random.Random, steps: list[Step], name: str, objects: str) -> str:
    sentences = [_say(rng, OPENER).format(n=name, o=objects, a=steps[0].a)]
    for step in steps:
        sentences.append(_say(rng, SOLUTION_STEP[step.kind]).format(n=name, o=objects, **step._asdict()))
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
