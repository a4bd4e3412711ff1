"""Share a dataset of trajectories.

python -m dparallel.hub_cards.push_dataset runs/gsm8k_trajectories user/my-trajectories --model user/teacher
"""

from dparallel.hub_cards import push_dataset
from dparallel.hub_cards.command_line import CommandParser
from dparallel.hub_cards.push_command import add_push_arguments, run_push


def main() -> None:
    parser = CommandParser(__doc__, prog="python -m dparallel.hub_cards.push_dataset")
    parser.add_argument("dataset", help="folder of save_to_disk(), generate_trajectories.py or distill.py")
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--model", help="Hub id of the teacher")
    parser.add_argument("--sources", nargs="+", metavar="ID", help="datasets that the prompts come from")
    parser.add_argument("--license", help="apache-2.0, for example")
    parser.add_argument("--language", nargs="+", help="en, for example")
    parser.add_argument("--limitations", nargs="+", default=[], metavar="SENTENCE")
    add_push_arguments(parser)
    run_push(push_dataset, vars(parser.parse_args()))


if __name__ == "__main__":
    main()
