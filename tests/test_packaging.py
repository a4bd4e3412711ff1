"""The wheel and the sdist hold every package, and the wheel works outside the checkout."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

from dparallel.hub_cards.model_cards import PAPERS

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling", "trainer", "hub_cards", "examples")


def run(*command, **kwargs):
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_extras_have_names_that_every_pip_finds():
    """Older ones look for an extra by the very name that the metadata has, which is the normalised one."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"^([\w.-]+) = \[", text.split("[project.optional-dependencies]")[1].split("\n\n")[0], re.M)
    assert {"train", "eval", "lm-eval", "test"} == set(extras) == set(map(canonicalize_name, extras))
    for extras in re.findall(r"\.\[([\w,.-]+)\]", (ROOT / "README.md").read_text()):
        assert set(extras.split(",")) <= {"train", "eval", "lm-eval", "test"}


def test_the_oldest_versions_are_tested():
    """`.ci/run` installs what `pyproject.toml` has as lower bounds of the package and of its extra `train`."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r"^(?:dependencies|train) = \[(.+)\]$", text, re.M)
    promised = dict(re.findall(r'"([\w-]+)>=([\d.]+)', " ".join(listed)))
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert promised.keys() - {"torch"} == tested.keys()
    assert all(Version(tested[name]) == Version(promised[name]) for name in tested)


def test_remote_code_names_its_licence_and_version():
    """`pyproject.toml` has the version; the files of `modeling/` carry it to where nothing else says it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    licence, version = (re.search(f'^{name} = "(.+)"$', text, re.M)[1] for name in ("license", "version"))
    for path in (ROOT / "modeling").glob("*.py"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# SPDX-License-Identifier: {licence}; dparallel {version}", (
            f"{path.name}: run `sed -i '1s/dparallel .*/dparallel {version}/' modeling/*.py`"
        )


def test_the_citation_has_the_papers_of_the_cards():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors"} <= citation.keys() and citation["license"] == "Apache-2.0"
    cited = {
        (each["title"], each["url"].rpartition("/")[2]): " and ".join(
            f"{author['family-names']}, {author['given-names']}" for author in each["authors"]
        )
        for each in citation["references"]
    }
    for title, arxiv, authors in PAPERS.values():
        assert cited[title, arxiv] == authors


@pytest.mark.journey
def test_a_checkout_that_is_not_installed_has_a_version():
    code = """
import importlib.metadata as metadata
found = metadata.version
def version(name):
    if name == "dparallel":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import dparallel.modeling
print(dparallel.modeling.__version__)
"""
    assert run("-c", code).strip() == "0+unknown"


def test_text_is_read_and_written_as_utf_8():
    """Elsewhere than on Linux the default is another. ruff sees it where it knows that something is a path."""
    found = []
    for path in (path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                keywords = {keyword.arg for keyword in node.keywords}
                is_text = node.func.attr in ("read_text", "write_text") or {"text", "capture_output"} & keywords
                if is_text and "encoding" not in keywords:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


@pytest.mark.journey
def test_wheel_and_sdist(tmp_path):
    run("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    wheel, sdist = next(tmp_path.glob("*.whl")), next(tmp_path.glob("*.tar.gz"))
    sources = {
        f"dparallel/{folder.name}/{path.name}"
        for folder in (ROOT / "modeling", ROOT / "trainer", ROOT / "hub_cards", ROOT / "examples" / "evaluation")
        for path in folder.glob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert sources <= names
    assert {name for name in names if name.endswith(".py")} == sources
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        assert {"modeling/__init__.py", "README.md", "LICENSE"} <= {
            n.split("/", 1)[1] for n in archive.getnames() if "/" in n
        }
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import dparallel.modeling as m, dparallel.trainer as t, dparallel.hub_cards, dparallel.evaluation, torch
assert m.__file__.startswith(sys.argv[1]) and t.__file__.startswith(sys.argv[1]), m.__file__
assert m.__version__ == t.__version__ == sys.argv[3], m.__version__
model = m.LLaDAModelLM.from_pretrained(sys.argv[2])
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape)
"""
    fixture = ROOT / "tests" / "fixtures" / "llada_tiny"
    version = wheel.name.split("-")[1]
    assert "[1, 8]" in run("-c", code, str(tmp_path / "site"), str(fixture), version, cwd=tmp_path)
