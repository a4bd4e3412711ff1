"""LoRA goes to what was named, and to nothing else."""

import re

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model

from dparallel.trainer.lora import complete_lora_config
from tests.families import FAMILIES
from tests.modeling.test_generation import ShiftedConfig, ShiftedModel


def adapted(model, target_modules, **changes):
    config = complete_lora_config(model, LoraConfig(r=2, target_modules=target_modules, **changes))
    model = get_peft_model(model, config)
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


def in_blocks(family, names):
    return {f"{family.blocks}.{i}.{name}" for i in (0, 1) for name in names}


@pytest.mark.parametrize("target", [None, "all", "all-linear"])
def test_all_projections_and_not_the_head(family, small_model, target):
    assert adapted(small_model(), target) == in_blocks(family, family.projections)


def test_targets_by_name_and_by_pattern(family, small_model):
    query, out, up, down = (family.projections[i] for i in (0, 3, 5, 6))
    assert adapted(small_model(), [query, out, down]) == in_blocks(family, (query, out, down))
    ends = rf".*\.({up.rpartition('.')[2]}|{down.rpartition('.')[2]})"
    # A pattern may mean the head as well: LLaDA's bears the name of a projection.
    assert adapted(small_model(), ends) == in_blocks(family, (up, down))


def test_published_targets_and_the_head(family, small_model):
    if family.published:
        assert adapted(small_model(), "published") == in_blocks(family, family.published)
    else:
        with pytest.raises(ValueError, match=f"'published'` is known for .*, not for '{family.name}'"):
            adapted(small_model(), "published")
    head = family.head.rpartition(".")[2]
    assert family.head in adapted(small_model(), [head], exclude_modules=["wte"])


def test_families_that_are_not_known():
    model = ShiftedModel(ShiftedConfig(vocab_size=40, mask_token_id=1))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert adapted(model, "all") == linear
    with pytest.raises(
        ValueError, match="'published'` is known for the model types 'llada', 'Dream', not for 'shifted'"
    ):
        adapted(ShiftedModel(ShiftedConfig(vocab_size=40, mask_token_id=1)), "published")


def test_names_that_match_nothing_are_an_error(family, small_model):
    others = [name.rpartition(".")[2] for name in FAMILIES["dream" if family.name == "llada" else "llada"].projections]
    missing = sorted(set(others) - {name.rpartition(".")[2] for name in family.projections})
    with pytest.raises(ValueError, match=re.escape(f"names {missing}, which no module of {family.model.__name__}")):
        adapted(small_model(), others)
    pattern = rf".*\.{missing[0]}"
    with pytest.raises(ValueError, match=re.escape(f"names {[pattern]}")):
        adapted(small_model(), pattern)


def test_the_given_config_stays_as_it_was(small_model):
    config = LoraConfig(r=2)
    complete_lora_config(small_model(), config)
    assert config.target_modules is None and config.exclude_modules is None
    assert issubclass(LoraModel, torch.nn.Module)
