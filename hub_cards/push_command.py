"""What the commands that push have in common."""

import argparse
from collections.abc import Callable
from typing import Any

from huggingface_hub import CommitInfo

from .command_line import plain_errors


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all of them."""
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is created")
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="propose the commit instead of making it")
    parser.add_argument("--commit_message", help="first line of the commit (default: it says what is pushed)")
    parser.add_argument(
        "--dry_run",
        metavar="FOLDER",
        help="empty folder where everything is written to be looked at, instead of being pushed (default: push)",
    )


def run_push(push: Callable[..., CommitInfo | None], arguments: dict[str, Any]) -> None:
    """Call it with parsed arguments, and say what came of it."""
    with plain_errors(ValueError, PermissionError, RuntimeError):
        commit = push(**arguments)
    if commit is None:
        print("Next: look at README.md there, and then run the same command without --dry_run.")
    elif commit.pr_url:
        print(f"Proposed as {commit.pr_url}. Next: look at it, and merge it there.")
    else:
        print(f"Pushed as {commit.commit_url}. Next: try what the card shows, from another machine.")
