"""What a model answered: the number in its text; and the program, see `programs`."""

import re
from fractions import Fraction

from .programs import extract_code

__all__ = ["extract_code", "final_number", "last_boxed"]

# Thousands may be grouped; a sign counts where it touches the number and nothing that it could be subtracted from.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,400})(?:\.\d{1,400})?|\.\d{1,400}"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}.])-[$€£]?)?(?:(?P<whole>\d{{1,9}})\s+(?=\d+/\d))?"
    rf"(?P<top>{_DIGITS})(?:\s?/\s?(?P<bottom>{_DIGITS}))?"
)
_PART = r"(?:\{\s*([^{}]+?)\s*\}|(\d))"
_LATEX_FRACTION = re.compile(rf"(\d)?\\[cdt]?frac\s*{_PART}\s*{_PART}")
_LATEX_UNIT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}(?:\s*\^\s*(?:\{[^{}]*\}|\w))?|\^\s*\{?\\circ\}?")
_BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{|\\boxed\s+(\w+)")


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
    """What is in the last complete `\\boxed{...}` or `\\fbox{...}`, braces inside included, or behind `\\boxed `."""
    for match in reversed(list(_BOX.finditer(text))):
        if match[1]:
            return match[1]
        depth, start = 1, match.end()
        for i, character in enumerate(text[start:], start):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                return text[start:i]
    return None


def _numbers(text):
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\,", "").replace("{,}", ",").replace("\\!", "")
    text = _LATEX_FRACTION.sub(lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[3]}/{m[4] or m[5]}", text)
    text = _LATEX_UNIT.sub(" ", text)
    return [number for match in _NUMBER.finditer(text) if (number := _to_fraction(match)) is not None]


def _to_fraction(match):
    whole, top, bottom = (Fraction((match[name] or "0").replace(",", "")) for name in ("whole", "top", "bottom"))
    if match["bottom"] is not None:
        if bottom == 0:
            return None
        top = whole + top / bottom
    return -top if match["sign"] else top
