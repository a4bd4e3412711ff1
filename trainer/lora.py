"""Which modules an adapter goes to."""

import copy
import re

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import PreTrainedModel

from dparallel.hub_cards.model_families import FAMILIES, family_of


def complete_lora_config(model: PreTrainedModel, config: PeftConfig) -> PeftConfig:
    """A `LoraConfig` whose `target_modules` are settled and known to exist; other adapters' configs as they are.

    `target_modules` may be `"all"` or None: all projections, but not the head; in families that this package does not
    know, peft's `"all-linear"`. `"published"`: those that the published dParallel code adapts. Otherwise, as in peft,
    a list of name endings or a pattern; the head is left out unless `exclude_modules` is given.

    Raises:
        ValueError: naming the target that no module has.
    """
    if not isinstance(config, LoraConfig):
        return config
    config, family = copy.deepcopy(config), family_of(model.config.model_type)
    if config.target_modules in (None, "all"):
        config.target_modules = "all-linear" if family is None else family.projections
    elif config.target_modules == "published":
        if family is None or family.published_projections is None:
            known = ", ".join(repr(name) for name, each in FAMILIES.items() if each.published_projections)
            name = model.config.model_type
            raise ValueError(f"`target_modules='published'` is known for the model types {known}, not for {name!r}.")
        config.target_modules = family.published_projections
    elif config.target_modules != "all-linear":
        _check_targets(model, config.target_modules)
    if config.exclude_modules is None:
        head = model.get_output_embeddings()
        config.exclude_modules = [name for name, module in model.named_modules() if module is head] or None
    return config


def _check_targets(model, target_modules):
    """peft is content if one of the names matches."""
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    if isinstance(target_modules, str):
        missing = [] if any(re.fullmatch(target_modules, name) for name in names) else [target_modules]
    else:
        endings = [f".{name}" for name in names]
        missing = sorted(
            target for target in target_modules if not any(name.endswith(f".{target}") for name in endings)
        )
    if missing:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"`target_modules` names {missing}, which no module of {type(model).__name__} has: its linear modules are "
            f"{known}."
        )
