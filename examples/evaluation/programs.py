"""The program in an answer: which parts of a text are Python that defines, or completes, the wanted function.

Python's own parser decides. Marks of a text, such as fences, only propose where a program may begin and end; a
proposal counts once it parses and defines what is wanted. What stands at the top level and does not parse is text, and
is left out. A function of which a part does not parse is wrong, and nothing is left out of it.
"""

import ast
import builtins
import itertools
import keyword
import re
import symtable
import textwrap
import warnings

# Ends that are tried for a statement or a block, and for a body: answers may have a thousand lines and no program.
MAX_ENDS, MAX_SENTENCES = 64, 8
_FENCE = re.compile(r"`{3,}|~{3,}")
_MARK = re.compile(
    r"\[(?:BEGIN|DONE|/[A-Z]+)\]|(?<![\w)\]])\[(?:END|PYTHON|CODE|ANSWER|SOLUTION|INST)\]"
    r"|</?(?:code|pre|python|answer|solution)>"
)
_QUOTES = (("'''", "'''"), ('"""', '"""'), ("'", "'"), ('"', '"'), ("`", "`"), ("\u201c", "\u201d"))
_CODE_BEGINS = r"(?:(?:async\s+)?def|class|from|import)\s+\w|@\w"
_HELPERS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def extract_code(text: str, entry_point: str | None = None, prompt: str | None = None) -> str:
    """The program in an answer.

    Of several, the first that defines `entry_point`, a fenced one before one that is not, together with what it needs
    from others: imports and functions of other blocks. Without a program, the text itself, which does not run.

    Args:
        text (`str`): the answer.
        entry_point (`str`, *optional*): the function that is wanted; any, by default.
        prompt (`str`, *optional*): a program up to the body of that function, which the answer may either complete or
            replace. The result then begins with what the prompt has before the function.
    """
    text = text.replace("\r\n", "\n")
    head = "" if prompt is None else prompt.split(f"def {entry_point}")[0]
    if _is_clean(text, entry_point):  # marks in it are a part of its strings and comments
        return head + text.strip("\n")
    for view in dict.fromkeys(_views(text)):
        runs = [run for region in _regions(view, entry_point is None) for run in _runs(region, entry_point)]
        whole = [run for run in runs if _defines(run, entry_point)]
        for run in sorted(whole, key=lambda run: _is_stub(run, entry_point)):
            if prompt is None or not _is_stub(run, entry_point):
                return head + _with_helpers(run, runs, head)
        if prompt is not None and (completed := _complete(prompt, entry_point, view)) is not None:
            return _with_helpers(completed, runs, "")
    return head + _first_block(text)


def called_names(tests: str) -> list[str]:
    """The functions that a program of tests calls and does not define, in the order of the text.

    Args:
        tests (`str`): Python code.
    """
    tree = _parse(tests)
    if not isinstance(tree, ast.Module):
        return []
    calls = sorted(
        (node.lineno, node.col_offset, node.func.id)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    )
    known = set(dir(builtins)) | _bound(tests)
    return [name for name in dict.fromkeys(name for _, _, name in calls) if name not in known]


# Where a program may be


def _views(text):
    """The text as it may be meant, the likeliest first."""
    pieces = _MARK.split(text)
    if len(pieces) > 1:
        yield from pieces
    stripped = text.strip()
    for opening, closing in _QUOTES:
        if stripped.startswith(opening) and stripped.endswith(closing) and not stripped.startswith("``"):
            yield stripped[len(opening) : -len(closing)]
    yield text
    tree = _parse(text)
    for node in [] if isinstance(tree, Exception) else ast.walk(tree):  # as in JSON
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    yield re.sub(r"^\s*(?:>>>|\.\.\.|>) ?", "", text, flags=re.MULTILINE)  # a quotation, or an interactive session
    yield re.sub(r"`+|[\u201c\u201d]", "\n", text)
    for quote in re.finditer(rf"('''|\"\"\"|'|\")(?=\s*(?:{_CODE_BEGINS}))", text):
        inner = text[quote.end() :].rpartition(quote[1])[0]
        yield inner
        yield _unescaped(inner)
    if "\n" not in stripped:
        yield _unescaped(text)


def _unescaped(text):
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), text)


def _regions(text, prefers_python):
    """Parts of a text: fenced blocks, what is before the first fence, and all of it."""
    blocks, fences, i = [], list(_FENCE.finditer(text)), 0
    while i < len(fences):
        language, block, i = _block(text, fences, i)
        blocks.append((language, block))
    if prefers_python:
        blocks.sort(key=lambda block: not block[0].startswith("py"))
    return [block for _, block in blocks] + [text[: fences[0].start()] if fences else "", text]


def _block(text, fences, i):
    """The block that a fence opens: its language, its code, and the number of the fence to go on with.

    It reaches to the next fence that leaves Python between; one at the beginning of a line is looked at before one
    that is not, as fences in docstrings are no ends. If there is none, it reaches to the next fence at all."""
    opener = fences[i]
    closers = [(j, each.start()) for j, each in enumerate(fences) if j > i and _closes(opener[0], each[0])]
    closers.sort(key=lambda closer: bool(text[: closer[1]].rpartition("\n")[2].strip()))
    language = re.match(r"[ \t{.]*(\w*)", text[opener.end() :])[1].lower()
    for j, end in [*closers[:MAX_ENDS], (len(fences), len(text))]:
        for code in _codes(text[opener.end() : end]):
            if _statements(_parse(code)):
                return language, code, j + 1
    following = i + 1
    end = fences[following].start() if following < len(fences) else len(text)
    return language, next(_codes(text[opener.end() : end])), following


def _closes(opener, fence):
    return fence[0] == opener[0] and len(fence) >= len(opener)


def _codes(content):
    """What the code of a fenced block may be, as some stands on the line of the fence, behind its language or not."""
    info, _, rest = content.partition("\n")
    begins, behind_language = re.search(_CODE_BEGINS, info), re.sub(r"^\s*\S+[ \t]*", "", content)
    yield _dedent(content)
    if begins:
        yield _dedent(f"{info[begins.start() :]}\n{rest}")
    if not re.match(r"\w+=[\"']", behind_language):  # title="a.py"
        yield _dedent(behind_language)
    yield _dedent(rest)


def _dedent(text):
    """As `textwrap.dedent`, but lines of spaces, which a docstring may have, stay as they are."""
    lines = text.strip("\n").rstrip().split("\n")
    margin = min((_indentation(line) for line in lines if line.strip()), key=len, default="")
    return "\n".join(line.removeprefix(margin) for line in lines)


def _first_block(text):
    """Where nothing parses: a block of Python, or the first, or everything."""
    text = text.split("[DONE]")[0].split("[BEGIN]", 1)[-1]
    fences = re.findall(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)(?:```|\Z)", text, re.DOTALL | re.MULTILINE)
    if not fences:
        return text.split("```")[0].strip("\n")
    block = next((block for language, block in fences if language.lower().startswith("py")), fences[0][1])
    return textwrap.dedent(block).rstrip()


# What of it is Python


def _parse(source, runs=True):
    """The tree of a program, or the error. With `runs`, what cannot stand in a module, as `return`, is an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model's program, such as of its escapes
            tree = ast.parse(source)
            if runs:
                compile(tree, "<answer>", "exec", dont_inherit=True)
        return tree
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return error


def _statements(tree):
    """The statements at the top level that do something, as words of a text that happen to parse do not."""
    return [] if isinstance(tree, Exception) else [node for node in tree.body if _does_something(node)]


def _does_something(node):
    if isinstance(node, ast.AnnAssign):
        return node.value is not None
    acts = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return not isinstance(node, ast.Expr) or is_text or any(isinstance(each, acts) for each in ast.walk(node))


def _is_clean(source, entry_point):
    tree = _parse(source)
    if isinstance(tree, Exception) or len(_statements(tree)) < len(tree.body):
        return False
    return bool(tree.body) and _defines(source, entry_point)


def _runs(text, entry_point):
    """The programs of a text: statements with nothing but blank lines and comments between, as they stand there."""
    source = _dedent(text)
    tree = _parse(source)
    if not isinstance(tree, Exception):
        return [_without_words(source, tree)] if _statements(tree) else []
    lines, runs, run, i, definition = text.split("\n"), [], [], 0, None
    if entry_point is not None:
        definition = re.compile(rf"(?:\b(?:async\s+)?def|\bclass)\s+{re.escape(entry_point)}\b")
    while i < len(lines):
        stop, source, tree = _statement(lines, i)
        begins = definition and tree is None and definition.search(lines[i])
        if begins and lines[i][: begins.start()].strip():  # behind a sentence
            indentation = _indentation(lines[i])
            lines[i] = indentation + lines[i][begins.start() :]
            stop, source, tree = _statement(lines, i)
        if tree is not None:
            run += [_without_words(source, tree)] if _statements(tree) else []
        elif re.match(r"\s*(?:async\s+def|def|class)\s+\w", lines[i]):  # broken: what is inside is no program
            while stop < len(lines) and not (lines[stop].strip() and _is_outside(lines[stop], _indentation(lines[i]))):
                stop += 1
            runs, run = [*runs, run], []
        elif lines[i].strip() and not lines[i].lstrip().startswith("#"):
            runs, run = [*runs, run], []
        i = stop
    return ["\n".join(run) for run in [*runs, run] if run]


def _statement(lines, start):
    """The statement at the top level that begins in a line: the line behind it, its source and tree; where none does,
    the next line and None twice."""
    indentation, found = _indentation(lines[start]), (start + 1, None, None)
    if not lines[start].strip() or lines[start].lstrip().startswith("#"):
        return found
    ends = (j for j in range(start + 1, len(lines)) if lines[j].strip() and _is_outside(lines[j], indentation))
    for stop in itertools.islice(itertools.chain(ends, [len(lines)]), MAX_ENDS):
        source = "\n".join(line.removeprefix(indentation) for line in lines[start:stop])
        tree = _parse(source)
        is_error = isinstance(tree, Exception)
        if is_error and (found[2] is not None or not _is_open(tree, source)):
            break
        if not is_error:  # and it may go on, as with `else:`, or behind a comment
            if found[2] is not None and len(tree.body) > len(found[2].body):
                break
            found = (stop, source.rstrip(), tree)
    return found


def _indentation(line):
    return line[: len(line) - len(line.lstrip())]


def _is_outside(line, indentation):
    return len(_indentation(line)) <= len(indentation)


def _is_open(error, source):
    """May more lines mend what does not parse: an open string or bracket, or an end where more is expected?"""
    if not isinstance(error, SyntaxError):
        return False
    at_end = error.lineno is None or error.lineno >= source.rstrip().count("\n") + 1
    return at_end or "never closed" in error.msg or ("unterminated" in error.msg and "triple" in error.msg)


def _without_words(source, tree):
    """Without statements that do nothing; the rest as it is."""
    kept = _statements(tree)
    if len(kept) == len(tree.body):
        return source
    lines = {number for node in tree.body if node not in kept for number in range(node.lineno, node.end_lineno + 1)}
    lines -= {number for node in kept for number in range(node.lineno, node.end_lineno + 1)}
    return "\n".join(line for number, line in enumerate(source.split("\n"), 1) if number not in lines).strip("\n")


# What a program defines and needs


def _bound(source) -> set[str]:
    """Names that a program's top level binds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = symtable.symtable(source, "<answer>", "exec").get_symbols()
    return {name.get_name() for name in names if name.is_assigned() or name.is_imported()}


def _needed(source) -> set[str]:
    """Names that a program takes from its top level or from elsewhere, and does not bind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = [symtable.symtable(source, "<answer>", "exec")]
    names = set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        is_top = table.get_type() == "module"
        names |= {
            name.get_name() for name in table.get_symbols() if name.is_referenced() and (is_top or name.is_global())
        }
    return names - _bound(source) - set(dir(builtins))


def _definitions(source, name):
    """The functions and classes at the top level of a program: all, or those of a name."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in _parse(source, runs=False).body if isinstance(node, kinds) and name in (None, node.name)]


def _defines(source, name) -> bool:
    return bool(_definitions(source, None)) if name is None else name in _bound(source)


def _is_stub(source, name) -> bool:
    """Has the last definition of a function nothing but a docstring, imports, or `...`?"""
    found = _definitions(source, name)
    return bool(found) and not any(map(_is_work, found[-1].body))


def _is_work(node):
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return not (is_constant or isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom)))


def _with_helpers(program, others, head):
    """A program behind the imports, functions and constants of others that it needs."""
    helpers = [
        node for other in others if other != program for node in _parse(other).body if isinstance(node, _HELPERS)
    ]
    while helpers and (missing := _needed(program) - (_bound(head) if _is_program(head) else set())):
        helper = next((node for node in helpers if _bound_by(node) & (missing | {"*"})), None)
        if helper is None:
            break
        helpers.remove(helper)
        program = f"{ast.unparse(helper)}\n{program}"
    return program


def _is_program(source):
    return not isinstance(_parse(source), Exception)


def _bound_by(node):
    if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
        return {"*"}
    return _bound(ast.unparse(node))


# A body that completes a function


def _complete(prompt, name, text):
    """The prompt with the body that a text holds, or None."""
    fences = list(_FENCE.finditer(text))
    contents = []
    for opener, closer in itertools.zip_longest(fences, fences[1:]):
        contents += _codes_as_they_are(text[opener.end() : closer.start() if closer else len(text)])
    for content in [*contents, text[: fences[0].start()] if fences else text]:
        for body in _bodies(content):
            for lines, to_its_end in _completions(body, _body_indentation(prompt, name)):
                if (program := _completed(prompt, name, lines, to_its_end)) is not None:
                    return program
    return None


def _codes_as_they_are(content):
    info, _, rest = content.partition("\n")
    if re.fullmatch(
        r"[ \t]*[\w.{}+-]*[ \t]*|[ \t]*[\w.{}+-]+[ \t]+\w+=[\"'].*", info
    ):  # a language, and perhaps title="a.py"
        return [rest]
    return [content, re.sub(r"^\s*\w+", "", content)]


def _bodies(text):
    """All lines of a text, and those between its sentences."""
    lines = text.rstrip().split("\n")
    while lines and not lines[0].strip():
        del lines[0]
    sentences = [i for i, line in enumerate(lines) if _is_sentence(line)]
    first = 0
    while first < len(lines) and (first in sentences or not lines[first].strip()):
        first += 1
    for start in dict.fromkeys((0, first)):
        for stop in [len(lines), *[i for i in sentences if i > start][MAX_SENTENCES::-1]]:
            if any(line.strip() for line in lines[start:stop]):
                yield lines[start:stop]


def _is_sentence(line):
    """Is this line, which is no Python, one of a text? It has two words beside each other, or ends like a sentence."""
    if _is_program(line.strip()):
        return False
    line = re.sub(r"""#.*|'[^']*'|"[^"]*\"""", "", line).rstrip()
    pairs = re.findall(r"(?=\b([^\W\d]\w*)\s+([^\W\d]\w*)\b)", line)
    ends = re.search(r"\w\s.*[^\W\d][)`'\"*]*[.!?]$", line)
    return bool(ends) or any(not set(pair) & set(keyword.kwlist) for pair in pairs)


def _completions(lines, indentation):
    """A body with its indentation, and with that mended: of all lines, or of the first. What is mended must be Python
    to its end."""
    yield lines, False
    yield textwrap.indent(textwrap.dedent("\n".join(lines)), indentation).split("\n"), True
    yield [indentation + lines[0].lstrip(), *lines[1:]], True


def _body_indentation(prompt, name):
    for source in (prompt, f"{prompt.rstrip()}\n    pass"):
        if _is_program(source) and (found := _definitions(source, name)):
            return " " * found[-1].body[0].col_offset
    return " " * 4


def _completed(prompt, name, lines, to_its_end):
    """The prompt with a body behind it, up to what is no Python any more; None if that gives the function none."""
    source = f"{prompt.rstrip()}\n" + "\n".join(lines)
    if to_its_end and not _is_program(source):
        return None
    program = next((run for run in _runs(source, name) if _definitions(run, name)), None)
    if program is None or _is_stub(program, name):
        return None
    ends_in = _definitions(program, name)[-1].body[-1]  # a function here is the wanted one, and stands in itself
    return None if isinstance(ends_in, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else program
