"""What commands have in common."""

import sys
from contextlib import contextmanager


@contextmanager
def plain_errors(*kinds):
    """Errors that are the user's: a line instead of a traceback."""
    try:
        yield
    except kinds as error:
        sys.exit(f"{type(error).__name__}: {error}")


def add_push_arguments(parser):
    """The flags that the commands which push have in common."""
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--revision", help="branch")
    parser.add_argument("--create-pr", action="store_true", help="propose the commit instead of making it")
    parser.add_argument("--commit-message")
    parser.add_argument("--dry-run", metavar="FOLDER", help="write everything there, list it, and push nothing")


def run_push(push, arguments):
    """Call it with parsed arguments, and say what came of it."""
    with plain_errors(ValueError, PermissionError, RuntimeError):
        commit = push(**arguments)
    if commit is not None:
        print(commit.pr_url or commit.commit_url)
