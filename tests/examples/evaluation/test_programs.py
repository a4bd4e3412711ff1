"""Programs in texts of many forms: what is extracted is the program, and nothing becomes one by accident."""

import ast
import json
import textwrap

import pytest

from dparallel.evaluation.programs import called_names, extract_code
from tests.examples.evaluation.rows import DATA, FUNCTION, real_rows

FENCE = "```"
FORMS = {
    "alone": lambda code: code,
    "fence": lambda code: f"{FENCE}python\n{code}\n{FENCE}",
    "fence between sentences": lambda code: f"Here it is:\n\n{FENCE}python\n{code}\n{FENCE}\n\nIt does what you want.",
    "fence behind a sentence": lambda code: f"Sure, like this: {FENCE}python\n{code}\n{FENCE}\nThat is it.",
    "on the fence's line": lambda code: f"{FENCE}{code}{FENCE}",
    "behind the language": lambda code: f"{FENCE}python {code}{FENCE}",
    "five backticks": lambda code: f"Look:\n{FENCE}``py\n{code}\n{FENCE}``\nDone.",
    "tildes": lambda code: f"~~~~\n{code}\n~~~~\nIt works.",
    "title": lambda code: f'{FENCE}python title="a.py"\n{code}\n{FENCE}',
    "braces": lambda code: f"{FENCE}{{.python}}\n{code}\n{FENCE}",
    "not closed": lambda code: f"{FENCE}python\n{code}",
    "not opened": lambda code: f"{code}\n{FENCE}\n\nThis is it.",
    "behind a sentence": lambda code: f"The function is as follows:\n{code}",
    "before sentences": lambda code: f"{code}\n\nIt's the list's best (see above).\n\n- It is fast\n1. It is right",
    "marks": lambda code: f"[BEGIN]\n{code}\n[DONE]\n\nNow another one.\n[BEGIN]\ndef other():\n    pass\n[DONE]",
    "other marks": lambda code: f"[PYTHON]{code}[/PYTHON]",
    "tags": lambda code: f"Here: <code>{code}</code>",
    "single quotes": lambda code: f"'{code}'",
    "double quotes": lambda code: f'"{code}"',
    "curly quotes": lambda code: f"\u201c{code}\u201d",
    "a literal": repr,
    "JSON": lambda code: json.dumps({"language": "python", "code": code}),
    "quotation": lambda code: textwrap.indent(code, "> ", lambda line: True),
    "list item": lambda code: "1. so\n" + textwrap.indent(f"{FENCE}python\n{code}\n{FENCE}", "   ") + "\n2. then",
    "indented": lambda code: "The code:\n\n" + textwrap.indent(code, "    ") + "\n\nThat is all.",
    "between others": lambda code: (
        f"Run\n{FENCE}bash\npip install x\n{FENCE}\nthen\n{FENCE}python\n{code}\n{FENCE}\nso that\n"
        f"{FENCE}python\nprint(wanted(1))\n{FENCE}"
    ),
    "CRLF": lambda code: f"Sure:\n{FENCE}python\n{code}\n{FENCE}\n".replace("\n", "\r\n"),
}
PROGRAMS = {
    "one line": "def wanted(x): return x + 1",
    "imports and helpers": "from math import pi\nONE = 1\n\ndef helper(x):\n    return x\n\n\ndef wanted(x):\n"
    "    if x:\n        return helper(x) * pi\n    else:\n        return ONE",
    "backticks": f'def wanted(x):\n    """Like\n\n    {FENCE}\n    wanted(2)\n    {FENCE}\n    """\n    return x',
    "decorated class": "import functools\n\n@functools.cache\n"
    "class wanted:\n    def __init__(self, x):\n        self.x = x",
    "marks within": "def wanted(x):\n    # [DONE] is a mark\n    return '[DONE]' + str(x[END:]) + '[BEGIN]'",
}  # fmt: skip


def dump(source):
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:
        return None


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    for name, code in PROGRAMS.items():
        if name == "marks within" and form not in ("alone", "fence", "behind a sentence", "before sentences"):
            continue  # marks within and around: nobody can tell
        if name == "backticks" and form in ("on the fence's line",):
            continue
        assert dump(extract_code(FORMS[form](code), "wanted")) == dump(code), name


@real_rows
def test_references_in_every_form():
    """A part of all rows, each in a few forms that go round."""
    forms = list(FORMS.values())
    rows = [json.loads(line) for line in (DATA / "mbpp.jsonl").read_text().splitlines()][::7]
    pairs = [(row["code"].replace("\r\n", "\n"), called_names("\n".join(row["test_list"]))) for row in rows]
    for line in (DATA / "humaneval.jsonl").read_text().splitlines()[::5]:
        row = json.loads(line)
        pairs.append((row["prompt"] + row["canonical_solution"], [row["entry_point"]]))
    for i, (code, names) in enumerate(pairs):
        for form in forms[i % 4 : 22 : 4]:
            assert dump(extract_code(form(code), names[0] if names else None)) == dump(code), (i, form(code))


@real_rows
def test_what_was_right_stays_right():
    """All references, in the forms that were always read."""
    rows = [json.loads(line) for line in (DATA / "mbpp.jsonl").read_text().splitlines()]
    codes = [(row["code"].replace("\r\n", "\n"), called_names("\n".join(row["test_list"]))) for row in rows]
    rows = [json.loads(line) for line in (DATA / "humaneval.jsonl").read_text().splitlines()]
    codes += [(row["prompt"] + row["canonical_solution"], [row["entry_point"]]) for row in rows]
    for code, names in codes:
        for form in ("alone", "fence", "marks"):
            assert dump(extract_code(FORMS[form](code), names[0] if names else None)) == dump(code), (form, code)
    for row in rows:
        assert dump(extract_code(row["canonical_solution"], row["entry_point"], row["prompt"])) == dump(
            row["prompt"] + row["canonical_solution"]
        )


BODIES = {
    "alone": lambda body: body,
    "fence": lambda body: f"{FENCE}python\n{body}{FENCE}",
    "fence, no language": lambda body: f"The body:\n{FENCE}\n{body}\n{FENCE}\nThis is it.",
    "fence behind a sentence": lambda body: f"The body is: {FENCE}python\n{body}{FENCE}\nIt loops over all.",
    "on the fence's line": lambda body: f"{FENCE}{body}{FENCE}",
    "closing fence": lambda body: f"{body}{FENCE}\nIt walks over the input.\n",
    "a space more": lambda body: f" {body}",
    "a space less": lambda body: body[1:],
    "first indentation lost": lambda body: body.lstrip(" "),
    "indentation lost": textwrap.dedent,
    "indentation lost, fence": lambda body: f"Here:\n{FENCE}python\n{textwrap.dedent(body)}{FENCE}\nIt returns it.",
    "indentation lost, sentence": lambda body: f"{textwrap.dedent(body)}\nIt walks over the input.",
    "first indentation lost, sentence": lambda body: f"{body.lstrip()}It walks over the input.",
    "sentence": lambda body: f"{body}\nIt walks over the input.\n",
    "behind a sentence": lambda body: f"Here's the body of the function:\n\n{body}",
    "marks": lambda body: f"[BEGIN]\n{body}[DONE]",
    "deeper": lambda body: textwrap.indent(body, "    "),
    "tabs": lambda body: textwrap.indent(textwrap.dedent(body), "\t"),
    "goes on": lambda body: f"{body}\n\ndef check(candidate):\n    assert candidate(1)\n",
}


def function(source, name):
    """The last definition of a function in a program, as far as it does something."""
    found = [node for node in ast.parse(source).body if getattr(node, "name", None) == name]
    return ast.dump(found[-1])


def assert_completes(row):
    for form, write in BODIES.items():
        got = extract_code(write(row["canonical_solution"]), row["entry_point"], row["prompt"])
        wanted = function(row["prompt"] + row["canonical_solution"], row["entry_point"])
        assert function(got, row["entry_point"]) == wanted, (row["task_id"], form)


@pytest.mark.parametrize(
    "body",
    [
        "    return 2 * x\n",
        "    if x:\n        return 2 * x\n    return 0\n",
        "    total = 0\n    for each in [x, x]:\n        total += each  # the sum\n\n    return total\n",
    ],
)
def test_every_form_of_a_body(body):
    assert_completes({**FUNCTION, "canonical_solution": body})


@real_rows
def test_bodies_of_references():
    for line in (DATA / "humaneval.jsonl").read_text().splitlines()[::9]:
        assert_completes(json.loads(line))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{FENCE}python\nimport math\n{FENCE}\nand\n{FENCE}python\ndef wanted(x):\n    return math.pi\n{FENCE}",
         "import math\ndef wanted(x):\n    return math.pi"),
        (f"First\n{FENCE}\ndef wanted(x):\n    return helper(x)\n{FENCE}\nwith\n{FENCE}\nfrom math import pi\n\ndef "
         f"helper(x):\n    return pi\n{FENCE}",
         "from math import pi\ndef helper(x):\n    return pi\ndef wanted(x):\n    return helper(x)"),
        (f"import math\n\n{FENCE}python\ndef wanted(x):\n    return math.pi\n{FENCE}",
         "import math\ndef wanted(x):\n    return math.pi"),
        (f"{FENCE}\ndef wanted(x):\n    ...\n{FENCE}\nor\n{FENCE}\ndef wanted(x):\n    return 1\n{FENCE}",
         "def wanted(x):\n    return 1"),
        (f"{FENCE}\ndef wanted(x):\n    return 1\n{FENCE}\nor\n{FENCE}\ndef wanted(x):\n    return 2\n{FENCE}",
         "def wanted(x):\n    return 1"),
        ("def wanted(x):\n    return 1\n\nDone", "def wanted(x):\n    return 1"),
        ("Note: this\n\nwanted = lambda x: 1\nYes, sure", "wanted = lambda x: 1"),
    ],
)  # fmt: skip
def test_blocks_that_belong_together(text, expected):
    assert dump(extract_code(text, "wanted")) == dump(expected)


@pytest.mark.parametrize(
    "text",
    [
        "", "I do not know.", "Done", "The answer is 42.", "def", "Call wanted(3) to see.",
        "We define wanted(x) as x.",
        "def wanted(x):\n    y = x *\n    return x", "def wanted(x)\n    return x", "def wanted(x):\nreturn x",
        "def wanted(x):\n    if x:\n  return x",
        f"{FENCE}python\ndef wanted(x:\n    wanted = 1\n    return x\n{FENCE}",
        "def wanted(x): return x would be wrong", f"{FENCE}python\nwanted(3)\n{FENCE}",
        "class Other:\n    def wanted(self):\n        return 1", "# def wanted(x): return x",
    ],
)  # fmt: skip
def test_no_program_by_accident(text):
    space = {}
    try:
        exec(compile(extract_code(text, "wanted"), "<text>", "exec"), space)
    except (SyntaxError, NameError):
        pass
    assert "wanted" not in space


@pytest.mark.parametrize(
    "text",
    [
        "", "no idea", "x = x *\n    return 2 * x", "x = x *\nreturn 2 * x", "    x = x *\n    return 2 * x",
        f"{FENCE}python\n    x = (\n    return 2 * x\n{FENCE}", "return 2 * x\nelse:\n    return x",
        "    return 2 * x\n    else:\n", "def double(x)\n    return 2 * x",
        f"{FENCE}return (2 * x\n    return x{FENCE}",
        "    def double(x):\n        return 2 * x *",
    ],
)  # fmt: skip
def test_a_broken_body_completes_nothing(text):
    space = {}
    try:
        exec(compile(extract_code(text, "double", FUNCTION["prompt"]), "<text>", "exec"), space)
        found = space["double"](3)
    except (SyntaxError, NameError, KeyError):
        found = None
    assert found is None


def test_called_names():
    assert called_names("assert set(alike((1,), (2,))) == set([1])") == ["alike"]
    assert called_names("four = double(2)\nassert four == half(8)") == ["double", "half"]
    assert called_names("def check(f):\n    assert f(1)\ncheck(wanted)\nassert sum(1) == (") == []


@pytest.mark.parametrize(
    ("text", "entry_point", "code"),
    [
        ("Here:\n```python\ndef f():\n    pass\n```\nDone.", None, "def f():\n    pass"),
        ("```\nx = 1\n```\n```py\ndef f(): pass\n```", "f", "def f(): pass"),
        ("```python\nx = 1\n```", "f", "x = 1"),
        ("```python\ndef f():\n    return 1", "f", "def f():\n    return 1"),  # cut off
        ("def f(): pass\n```", "f", "def f(): pass"),
        ("```bash\npip install x\n```\n```Python3\r\ndef f(): pass\r\n```", None, "def f(): pass"),
        ("1. so\n   ```python\n   def f():\n       pass```", "f", "def f():\n    pass"),
        ("```\nassert f()\n```\n```\ndef f(): pass\n```", "f", "def f(): pass"),
        ("[BEGIN]\ndef f(): pass\n[DONE]\n[BEGIN]\ndef g(): pass\n```python\nf()\n```", "f", "def f(): pass"),
        ("[BEGIN]\ndef f(): pass\n[DONE]\nand more", None, "def f(): pass"),
        ("\ndef f(): pass\n", None, "def f(): pass"),
    ],
)
def test_extract_code(text, entry_point, code):
    assert extract_code(text, entry_point) == code
