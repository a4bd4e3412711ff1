"""What the commands of this project share, those of the examples included: flags and errors.

It needs no package beyond those that `dparallel.modeling` needs, as all of `dparallel.hub_cards` that is imported with
it.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Texts as they are written, and the default of each option that takes a value, unless its own text says it."""

    def _get_help_string(self, action):
        says_it = action.nargs == 0 or action.required or not action.option_strings or "(default: " in action.help
        return action.help if says_it else super()._get_help_string(action)


def help_of(documentation: str) -> dict:
    """What an `ArgumentParser` (or a `HfArgumentParser`, a `TrlParser`) takes for a `--help` that shows a module's
    docstring: its first paragraph before the options, and the rest, which ends in examples, behind them."""
    description, _, rest = documentation.strip().partition("\n\n")
    return {"description": description, "epilog": rest, "formatter_class": HelpFormatter}


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose flags are declared with underscores, and are accepted with dashes as well, as those of
    transformers' `HfArgumentParser` are: `--max_new_tokens 64` or `--max-new-tokens 64`.

    Args:
        documentation (`str`): the docstring of the command's module, see `help_of`.
        settings: of `ArgumentParser`.
    """

    def __init__(self, documentation: str, **settings: Any):
        super().__init__(**help_of(documentation), **settings)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._with_underscores(str(word)) for word in words], namespace)

    @staticmethod
    def _with_underscores(word):
        flag, equals, value = word.partition("=")
        return f"--{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """What is imported inside needs the packages of this extra of `pyproject.toml`: where one is missing, the error
    says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'No module named {error.name!r}: install it by `pip install ".[{extra}]"` in a checkout of dparallel.',
            name=error.name,
        ) from error


@contextmanager
def plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors that are the user's: a line instead of a traceback."""
    try:
        yield
    except kinds as error:
        sys.exit(f"{type(error).__name__}: {error}")
