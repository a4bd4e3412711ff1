"""What the commands that push have in common."""

import argparse
from collections.abc import Callable
from typing import Any

from huggingface_hub import CommitInfo

from .command_line import plain_errors


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all of them."""
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--revision", help="branch")
    parser.add_argument("--create_pr", action="store_true", help="propose the commit instead of making it")
    parser.add_argument("--commit_message")
    parser.add_argument("--dry_run", metavar="FOLDER", help="write everything there, list it, and push nothing")


def run_push(push: Callable[..., CommitInfo | None], arguments: dict[str, Any]) -> None:
    """Call it with parsed arguments, and say what came of it."""
    with plain_errors(ValueError, PermissionError, RuntimeError):
        commit = push(**arguments)
    if commit is not None:
        print(commit.pr_url or commit.commit_url)
