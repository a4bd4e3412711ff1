"""Share a model on the Hub: merged if it is an adapter, with its code, its card and what it was measured to do.

The token is that of `hf auth login`, or of the environment variable HF_TOKEN. A dry run pushes nothing.

    python -m dparallel.hub_cards.push_model runs/llada/merged user/my-model --dry_run my-model
    python -m dparallel.hub_cards.push_model runs/llada/merged user/my-model --results runs/gsm8k/results.json
"""

from dparallel.hub_cards import push_model
from dparallel.hub_cards.command_line import CommandParser
from dparallel.hub_cards.push_command import add_push_arguments, run_push


def main() -> None:
    parser = CommandParser(__doc__, prog="python -m dparallel.hub_cards.push_model")
    parser.add_argument("model", help="folder or Hub id of a model or of an adapter")
    parser.add_argument("repo_id", help="where it goes on the Hub: user/name")
    parser.add_argument(
        "--no_merge", action="store_true", help="push an adapter as it is, instead of merging it into its base model"
    )
    parser.add_argument(
        "--base_model", help="folder or Hub id of the base model of an adapter (default: as the adapter says)"
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results.json files of evaluations, for the card (default: none)",
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="ID",
        help="Hub ids of the datasets that the model was trained on (default: as its training.json says)",
    )
    parser.add_argument("--license", help="license of the model, such as apache-2.0 (default: the base model's)")
    parser.add_argument("--language", nargs="+", help="languages of the model, such as en (default: none is named)")
    parser.add_argument(
        "--limitations",
        nargs="+",
        default=[],
        metavar="SENTENCE",
        help="sentences for the card on what the model is not good for (default: none)",
    )
    parser.add_argument("--prompt", help="question that the card's snippet asks the model (default: a general one)")
    parser.add_argument(
        "--skip_snippet",
        action="store_true",
        help="do not try the card's snippet before the push; trying it loads the model once more",
    )
    add_push_arguments(parser)
    arguments = vars(parser.parse_args())
    arguments["merge"], arguments["run_snippet"] = not arguments.pop("no_merge"), not arguments.pop("skip_snippet")
    run_push(push_model, arguments)


if __name__ == "__main__":
    main()
