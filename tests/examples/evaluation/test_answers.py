"""What a text says in the end."""

import json
from fractions import Fraction

import pytest

from dparallel.evaluation import answers
from dparallel.evaluation.metrics import same_formula, same_number
from tests.examples.evaluation.rows import DATA, real_rows


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is $1,234.50.", "1234.5"),
        ("5-3 = 2, and 10 - 3 = 7", "7"),
        (r"so \boxed{\frac{3}{4}} and not 5", "3/4"),
        (r"\boxed{-12,000\text{ dollars}}", "-12000"),
        (r"\boxed{12} or rather \boxed{13", "12"),
        (r"nothing in \boxed{the box}, so 7", "7"),
        (r"\boxed{x_{1} = 8}", "8"),
        ("12 apples\n#### -7 apples, or 8", "-7"),
        ("it is \u22125 degrees", "-5"),
        ("= -$5.", "-5"),
        ("half of it, 18%", "18"),
        ("3 1/2 cups", "7/2"),
        (r"\boxed{3\frac{1}{2}}", "7/2"),
        (r"-\frac12", "-1/2"),
        (r"\boxed{10\text{ cm}^2}", "10"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed 7 or \fbox{8}", "8"),
        ("The answer:\n- 18 eggs", "18"),
        ("it is -4", "-4"),
        ("1 - 3/4", "3/4"),
        ("1/8 of it", "1/8"),
        (".5 or 70.", "70"),
        (r"\$1{,}000", "1000"),
        ("12,345,678 of 1,23", "23"),
        (r"9 left of the 24. \boxed{\text{15}}", "15"),
        (r"2 and \boxed{\textbf{\$1,500}}", "1500"),
        (r"\boxed{\text{15 apples}}", "15"),
        (r"\boxed{\text{\textbf{-15}}}", "-15"),
        (r"\boxed{\mathbf{x} = \mathrm{15}}", "15"),
        (r"\boxed{20\text{ 5-pound bags}}", "20"),
        (r"\boxed{9\,500} and", "9500"),
        (r"\boxed{9\;500}", "9500"),
        (r"\boxed{9\ 500}", "9500"),
        (r"\boxed{1~009~500}", "1009500"),
        (r"\boxed{9,\!500}", "9500"),
        ("it is 9\u202f500", "9500"),
        (r"\boxed{9 500}", "9500"),
        (r"\boxed{12\,345.5}", "12345.5"),
        (r"\boxed{24 m^2}", "24"),
        (r"\boxed{24\ \mathrm{cm}^{3}}", "24"),
        ("24 cm**2 of 24 m\u00b2", "24"),
        ("an area of 24 ft2", "24"),
        (r"\boxed{90^{\circ}}", "90"),
        (r"\boxed{5^{th}}", "5"),
        (r"\boxed{10^3}", "1000"),
        (r"\boxed{2^{10}}", "1024"),
        ("10\u00b3", "1000"),
        (r"\boxed{-2^2}", "-4"),
        (r"\boxed{5 \times 10^3}", "5000"),
        (r"\boxed{3\cdot 10^{-2}}", "3/100"),
        ("1.5e3", "1500"),
        ("it was 3 x 10 = 30", "30"),
        (r"\boxed{- 5}", "-5"),
        ("#### - 5", "-5"),
        ("x = - 5", "-5"),
        (r"\boxed{- \frac{1}{2}}", "-1/2"),
        (r"\boxed{- \$5}", "-5"),
        (r"\boxed{7 - 5}", "5"),
        ("7 - 5", "5"),
        (r"\boxed 1,000", "1000"),
        (r"\fbox{\text{8}}", "8"),
        (r"\boxed{\left\{8\right.}", "8"),
        (r"\boxed{{8}}", "8"),
        ("7\n\u2212 8", "8"),
        ("x = 6/0", None),
        ("none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert answers.final_number(text) == (None if number is None else Fraction(number))


def test_same_number_allows_rounding_only():
    assert same_number("0.3333333333", "1/3") and not same_number("0.333", "1/3")
    assert same_number("1000000", "1,000,000") and not same_number("1000002", "1,000,000")
    assert not same_number("1000001", "1000000") and not same_number("none", "none")
    assert not same_number("9" * 5000, "9")


def test_formulas_are_compared_as_formulas():
    assert same_formula(r"thus \boxed{\frac{\sqrt{2}}{2}}", r"\boxed{\frac{1}{\sqrt{2}}}")
    assert same_formula(r"\boxed{\sqrt{2}}", r"\sqrt{2}"), "a reference may be the expression alone"
    with pytest.raises(ValueError, match="has no expression"):
        same_formula(r"\boxed{1}", "")
    for text, expected in (
        (r"At first \boxed{3}, but really \boxed{7}.", "7"),
        (r"\boxed{3} and \boxed{5}", "5"),
        (r"\boxed{3} and \boxed{5}", r"\{3, 5\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\frac{1}{\sqrt{2}}} \boxed{7}", r"\fbox{7}"),
    ):
        assert same_formula(text, rf"\boxed{{{expected}}}" if "box" not in expected else expected), text
    assert not same_formula(r"At first \boxed{3}, but really \boxed{7}.", "3")
    assert same_formula(r"\boxed{(x+1)(x-1)}", r"\boxed{x^2-1}") and not same_formula(r"\boxed{x}", r"\boxed{y}")


@real_rows
def test_every_answer_of_gsm8k_is_read():
    for name in ("gsm8k_test.jsonl", "gsm8k_train.jsonl"):
        for line in (DATA / name).read_text().splitlines():
            answer = json.loads(line)["answer"]
            assert answers.final_number(answer) == Fraction(answer.split("####")[1].strip().replace(",", ""))


@real_rows
@pytest.mark.parametrize(
    "write",
    [
        lambda number: rf"\boxed{{\text{{{number}}}}}",
        lambda number: rf"\boxed{{\${number}\text{{ dollars}}}}",
        lambda number: rf"\boxed{{{number}\ \text{{cm}}^2}}",
        lambda number: r"\boxed{{{}}}".format(number.replace(",", "{,}")),
        lambda number: r"\boxed{{{}}}".format(number.replace(",", r"\ ")),
    ],
)
def test_answers_of_gsm8k_in_other_forms(write):
    for line in (DATA / "gsm8k_test.jsonl").read_text().splitlines():
        reasoning, _, number = json.loads(line)["answer"].partition("####")
        assert same_number(f"{reasoning}It is {write(number.strip())}.", number)
