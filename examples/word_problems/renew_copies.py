"""Renew what the two model folders beside this file hold copies of: the remote code, which is that of `modeling/`, and
the student's configuration and tokenizer, which are the teacher's.

They are copies and not links, since a checkout on Windows has no links. A test compares them with the originals.

    python examples/word_problems/renew_copies.py
"""

import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from dparallel.hub_cards.command_line import CommandParser

HERE = Path(__file__).parent
CODE = HERE.parents[1] / "modeling"
TEACHER, STUDENT = HERE / "checkpoint", HERE / "student"
SAME_IN_BOTH = ("config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


def originals() -> dict[Path, Path]:
    """The path of each copy, with that of its original."""
    model = CODE / "modeling_llada.py"
    code = {model, *map(Path, get_relative_import_files(model))}
    return {
        **{folder / path.name: path for folder in (TEACHER, STUDENT) for path in sorted(code)},
        **{STUDENT / name: TEACHER / name for name in SAME_IN_BOTH},
    }


def main():
    CommandParser(__doc__).parse_args()
    copies = originals()
    for folder in (TEACHER, STUDENT):
        for path in set(folder.glob("*.py")) - set(copies):
            path.unlink()
    for copy, original in copies.items():
        copy.unlink(missing_ok=True)  # a link would have its target written
        shutil.copyfile(original, copy)
    print(f"{len(copies)} copies are renewed in {TEACHER} and {STUDENT}. Next: git status")


if __name__ == "__main__":
    main()
