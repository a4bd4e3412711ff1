"""What a model answered: the number, or the program, in its text."""

import re
from fractions import Fraction

# A sign counts where nothing stands before it that it could be subtracted from; thousands may be grouped.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}.])-\s?[$€£]?\s?)?(?:(?P<whole>\d+)\s(?=\d+/\d))?"
    rf"(?P<top>{_DIGITS})(?:\s?/\s?(?P<bottom>{_DIGITS}))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_FENCE = re.compile(r"```[ \t]*(?:python|py|Python)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def final_number(text) -> Fraction | None:
    """The number that a text ends up with: the last in its last `\\boxed{}`, else the first behind its last `####` (as
    GSM8K marks it), else the last of all.

    Currency, units and percent signs are left out, 1,234 is 1234, and 3/4, 3 1/2 and `\\frac{3}{4}` are fractions.
    """
    box = last_boxed(text)
    if box is not None and (numbers := _numbers(box)):
        return numbers[-1]
    _, mark, rest = text.rpartition("####")
    if mark and (numbers := _numbers(rest)):
        return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def last_boxed(text) -> str | None:
    """What is in the last complete `\\boxed{...}`, braces inside included."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i, character in enumerate(text[start:], start):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                return text[start:i]
    return None


def _numbers(text):
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\,", "").replace("{,}", ",").replace("\\!", "")
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    return [number for match in _NUMBER.finditer(text) if (number := _to_fraction(match)) is not None]


def _to_fraction(match):
    whole, top, bottom = (Fraction((match[name] or "0").replace(",", "")) for name in ("whole", "top", "bottom"))
    if match["bottom"] is not None:
        if bottom == 0:
            return None
        top = whole + top / bottom
    return -top if match["sign"] else top


def extract_code(text, entry_point=None) -> str:
    """The program in an answer: of its fenced blocks the first that defines `entry_point`, or without such a name the
    first; without fences, the text between `[BEGIN]` and `[DONE]`, the marks of MBPP's prompt, as far as they are
    there."""
    blocks = _FENCE.findall(text)
    for block in blocks:
        if entry_point is None or re.search(rf"\b(?:def|class)\s+{re.escape(entry_point)}\b", block):
            return block
    if blocks:
        return blocks[0]
    return text.split("[BEGIN]")[-1].split("[DONE]")[0].strip("\n")
