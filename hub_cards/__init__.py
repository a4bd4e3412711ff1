"""From a trained model to one that is shared."""

from .dataset_card import dataset_card
from .measurements import Measurement, load_measurements
from .merge import merge_adapter
from .model_card import model_card
from .pushing import push_dataset, push_model

__all__ = [
    "Measurement",
    "dataset_card",
    "load_measurements",
    "merge_adapter",
    "model_card",
    "push_dataset",
    "push_model",
]
