"""From a trained model to one that is shared.

Names are imported when they are first asked for, so that a command which needs the flags or the names of models that
all packages share (`command_line`, `hub_ids`, `measurements`) does not need peft and datasets as well.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .command_line import needs_extra

if TYPE_CHECKING:
    from .dataset_cards import dataset_card
    from .measurements import Measurement, here_and_now, load_measurements
    from .merge import load_adapted, merge_adapter
    from .model_cards import model_card
    from .pushing import push_dataset, push_model

_MODULES = {
    "Measurement": "measurements",
    "dataset_card": "dataset_cards",
    "here_and_now": "measurements",
    "load_adapted": "merge",
    "load_measurements": "measurements",
    "merge_adapter": "merge",
    "model_card": "model_cards",
    "push_dataset": "pushing",
    "push_model": "pushing",
}
__all__ = [
    "Measurement",
    "dataset_card",
    "here_and_now",
    "load_adapted",
    "load_measurements",
    "merge_adapter",
    "model_card",
    "push_dataset",
    "push_model",
]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra("train"):
        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
