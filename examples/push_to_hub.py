"""Share a model on the Hub: merged if it is an adapter, with its code, its card and what it was measured to do.

`python -m dparallel.hub_cards.push_model --help` lists what else can be set, a dry run among it.

    hf auth login
    python examples/push_to_hub.py examples/word_problems/student user/my-model
"""

from dparallel.hub_cards import push_model
from dparallel.hub_cards.command_line import CommandParser
from dparallel.hub_cards.push_command import run_push


def main():
    parser = CommandParser(__doc__)
    parser.add_argument("model", help="folder or Hub id of a model or of an adapter")
    parser.add_argument("repo_id", help="where it goes on the Hub: user/name")
    run_push(push_model, vars(parser.parse_args()))


if __name__ == "__main__":
    main()
