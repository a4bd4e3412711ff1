"""Share a model: merged if it is an adapter, with its code, its card and what it was measured to do.

    hf auth login
    python examples/push_to_hub.py examples/word_problems/student user/my-model

`python -m dparallel.hub_cards.push_model --help` has what more one can want.
"""

import sys

from dparallel.hub_cards import push_model
from dparallel.hub_cards.push_command import run_push

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run_push(push_model, dict(zip(("model", "repo_id"), sys.argv[1:], strict=True)))
