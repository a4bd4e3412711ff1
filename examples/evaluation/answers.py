"""What a model answered: the number in its text; and the program, see `programs`."""

import re
from fractions import Fraction

from .programs import extract_code

__all__ = ["extract_code", "final_number", "last_boxed"]

# Thousands may be grouped; a sign counts where it touches the number and nothing that it could be subtracted from.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,400})(?:\.\d{1,400})?|\.\d{1,400}"
_POWER = r"\s?(?:\^|\*\*)\s?(?:\{\s*(?P<braced>[-+]?\d{1,3})\s*\}|(?P<bare>-?\d{1,3})(?!\d))"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}.])-[$€£]?)?(?:(?P<whole>\d{{1,9}})\s+(?=\d+/\d))?"
    rf"(?P<top>{_DIGITS})(?:[eE](?P<scale>[-+]?\d{{1,2}})(?!\w)|{_POWER}|\s?/\s?(?P<bottom>{_DIGITS}))?"
)
_TIMES_TEN = re.compile(rf"(?<=\d)\s*(?:\\times|\\cdot|\u00d7|\*|x)\s*10{_POWER}")
_PART = r"(?:\{\s*([^{}]+?)\s*\}|(\d))"
_LATEX_FRACTION = re.compile(rf"(\d)?\\[cdt]?frac\s*{_PART}\s*{_PART}")
_LATEX_SPACE = r"(?:\\[,;:!> ]|~|\{,\}|\{\\,\}|,\\!|\\thinspace\s?|[\u00a0\u2009\u202f])"
_GROUPED = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_LATEX_SPACE}\d{{3}})+(?!\d)")
_EXPONENT = r"\s*(?:\^|\*\*)\s*(?:\{[^{}]*\}|-?\w)"
_LATEX_TEXT = re.compile(rf"\\(?:text\w*|math[a-z]+|mbox|hbox|emph|bm|boldsymbol)\s*\{{([^{{}}]*)\}}({_EXPONENT})?")
_UNIT = re.compile(rf"\^\s*\{{?\\circ\}}?|(?<=[^\W\d_]){_EXPONENT}|(?<=[\d\s])(?:[cdkm]?m|ft|in|yd|mi)[23](?!\w)")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_BOX = re.compile(r"\\(?:f?boxed|fbox|framebox)\s*\{|\\boxed\s+(-?\w+(?:[.,]\d+)*)")


def final_number(text: str) -> Fraction | None:
    """The number that a text ends up with: the last in its last `\\boxed{}`, else the first behind its last `####` (as
    GSM8K marks it), else the last of all.

    Currency, units (their exponents, too) and percent signs are left out. 1,234 is 1234, and so are `1\\,234` and
    `1{,}234`; 3/4, 3 1/2 and `\\frac{3}{4}` are fractions, 10^3 and 2e3 powers. In a box and behind `####`, and behind
    an equals sign, "- 5" is -5.
    """
    box = last_boxed(text)
    if box is not None and (numbers := _numbers(re.sub(r"^\s*(\d{1,3}(?: \d{3})+)\s*$", _join, box), begins=True)):
        return numbers[-1]
    _, mark, rest = text.rpartition("####")
    if mark and (numbers := _numbers(rest, begins=True)):
        return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def last_boxed(text: str) -> str | None:
    """What is in the last complete `\\boxed{...}` or `\\fbox{...}`, braces inside included, or behind `\\boxed `."""
    for match in reversed(list(_BOX.finditer(text))):
        if match[1]:
            return match[1]
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[match.end() : match.end() + brace.start()]
    return None


def _numbers(text, begins=False):
    """All numbers of a text. `begins`: it has nothing before it, so that a sign at its beginning is one."""
    text = re.sub(r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _GROUPED.sub(lambda match: re.sub(_LATEX_SPACE, "", match[0]), text)
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\,", "").replace("{,}", ",").replace("\\!", "")
    text = re.sub(r"\\[;:> ]|~", " ", text)
    for _ in range(3):  # one may stand in the other
        text = _LATEX_TEXT.sub(_text_of, text)
    text = _LATEX_FRACTION.sub(lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[3]}/{m[4] or m[5]}", text)
    text = _UNIT.sub(" ", text)
    text = _TIMES_TEN.sub(lambda match: f"e{match['braced'] or match['bare']}", text)
    text = re.sub(rf"({'^|' if begins else ''}[=({{\[])(\s*)-\s+(?=[$€£]?\s?[\d.])", r"\1\2-", text.strip())
    return [number for match in _NUMBER.finditer(text) if (number := _to_fraction(match)) is not None]


def _join(match):
    return match[0].replace(" ", "")


def _text_of(match):
    """Of LaTeX's commands for text: a number stays, with its exponent, unless one is before it. The rest are units."""
    is_number = re.match(r"\s*[-+]?\s*\\?[$€£]?\s*\.?\d", match[1])
    is_behind_one = re.search(r"[\d%]\s*$", match.string[: match.start()])
    return f"{match[1]}{match[2] or ''}" if is_number and not is_behind_one else " "


def _to_fraction(match):
    whole, top, bottom = (Fraction((match[name] or "0").replace(",", "")) for name in ("whole", "top", "bottom"))
    power = match["braced"] or match["bare"]
    if match["bottom"] is not None:
        if bottom == 0:
            return None
        top = whole + top / bottom
    elif match["scale"] is not None:
        top *= Fraction(10) ** int(match["scale"])
    elif power is not None:
        if len(match["top"]) > 20 or (top == 0 and int(power) < 0):
            return None
        top **= int(power)
    return -top if match["sign"] else top
