"""Share a model: merged if it is an adapter, with its code, its card and what it was measured to do.

    hf auth login
    python examples/push_to_hub.py examples/word_problems/student user/my-model

`python -m dparallel.hub_cards.push_model --help` has what more one can want.
"""

import sys

from dparallel.hub_cards import push_model

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, repo_id = sys.argv[1:]
    print(push_model(source, repo_id).commit_url)
