"""Share a dataset of trajectories on the Hub, with a card.

A dry run writes everything to a folder instead. The token is that of `hf auth login`, or of the environment variable
HF_TOKEN.

    python -m dparallel.hub_cards.push_dataset runs/gsm8k_trajectories user/my-trajectories --dry_run my-trajectories
    python -m dparallel.hub_cards.push_dataset runs/gsm8k_trajectories user/my-trajectories --model user/teacher
"""

from dparallel.hub_cards import push_dataset
from dparallel.hub_cards.command_line import CommandParser
from dparallel.hub_cards.push_command import add_push_arguments, run_push


def main() -> None:
    parser = CommandParser(__doc__, prog="python -m dparallel.hub_cards.push_dataset")
    parser.add_argument("dataset", help="folder that save_to_disk(), generate_trajectories.py or distill.py wrote")
    parser.add_argument("repo_id", help="where it goes on the Hub: user/name")
    parser.add_argument("--model", help="Hub id of the teacher (default: as the dataset says)")
    parser.add_argument(
        "--sources",
        nargs="+",
        metavar="ID",
        help="Hub ids of the datasets that the prompts come from (default: as the dataset says)",
    )
    parser.add_argument("--license", help="license of the dataset, such as apache-2.0 (default: none is named)")
    parser.add_argument("--language", nargs="+", help="languages of the dataset, such as en (default: none is named)")
    parser.add_argument(
        "--limitations",
        nargs="+",
        default=[],
        metavar="SENTENCE",
        help="sentences for the card on what the dataset is not good for (default: none)",
    )
    add_push_arguments(parser)
    run_push(push_dataset, vars(parser.parse_args()))


if __name__ == "__main__":
    main()
