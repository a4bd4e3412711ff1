"""Share a model: merged, with its code, its card and what it was measured to do.

    python -m dparallel.hub_cards.push_model runs/llada/merged user/my-model --results runs/gsm8k/results.json
    python -m dparallel.hub_cards.push_model runs/llada/merged user/my-model --dry_run my-model    # pushes nothing

The token is that of `hf auth login`, or of the environment variable HF_TOKEN.
"""

from dparallel.hub_cards import push_model
from dparallel.hub_cards.command_line import CommandParser
from dparallel.hub_cards.push_command import add_push_arguments, run_push


def main() -> None:
    parser = CommandParser(__doc__, prog="python -m dparallel.hub_cards.push_model")
    parser.add_argument("model", help="folder or Hub id of a model or of an adapter")
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--no_merge", action="store_true", help="push an adapter as it is")
    parser.add_argument("--base_model", help="folder or Hub id, if it is not where the adapter says")
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE", help="results.json of evaluations")
    parser.add_argument("--datasets", nargs="+", metavar="ID", help="it was trained on, if training.json does not say")
    parser.add_argument("--license", help="apache-2.0, for example; default: the base model's")
    parser.add_argument("--language", nargs="+", help="en, for example")
    parser.add_argument("--limitations", nargs="+", default=[], metavar="SENTENCE")
    parser.add_argument("--prompt", help="question in the card's snippet")
    parser.add_argument("--skip_snippet", action="store_true", help="do not run it (it loads the model once more)")
    add_push_arguments(parser)
    arguments = vars(parser.parse_args())
    arguments["merge"], arguments["run_snippet"] = not arguments.pop("no_merge"), not arguments.pop("skip_snippet")
    run_push(push_model, arguments)


if __name__ == "__main__":
    main()
