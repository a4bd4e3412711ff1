"""LoRA goes to what was named, and to nothing else."""

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from test_generation import ShiftedConfig, ShiftedModel
from test_masked_diffusion_trainer import small_model

from dparallel.trainer.lora import complete_lora_config


def adapted(target_modules, model=None, **changes):
    model = small_model() if model is None else model
    config = complete_lora_config(model, LoraConfig(r=2, target_modules=target_modules, **changes))
    model = get_peft_model(model, config)
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


def in_blocks(*names):
    return {f"model.transformer.blocks.{i}.{name}" for i in (0, 1) for name in names}


SEVEN = in_blocks("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


@pytest.mark.parametrize("target", [None, "all", "all-linear", ["q_proj", "attn_out", "ff_out"], r".*\.ff_(proj|out)"])
def test_targets(target):
    expected = {
        '["q_proj", "attn_out", "ff_out"]': in_blocks("q_proj", "attn_out", "ff_out"),
        r".*\.ff_(proj|out)": in_blocks("ff_proj", "ff_out"),
    }
    key = '["q_proj", "attn_out", "ff_out"]' if isinstance(target, list) else target
    assert adapted(target) == expected.get(key, SEVEN)


def test_published_targets_and_the_head():
    assert adapted("published") == in_blocks("q_proj", "k_proj", "v_proj", "up_proj")
    assert "model.transformer.ff_out" in adapted(["ff_out"], exclude_modules=["wte"])


def test_families_that_are_not_known():
    model = ShiftedModel(ShiftedConfig(vocab_size=40, mask_token_id=1))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert adapted("all", model) == linear
    with pytest.raises(ValueError, match="'published'` is known for the model types 'llada'"):
        adapted("published", ShiftedModel(ShiftedConfig(vocab_size=40, mask_token_id=1)))


def test_names_that_match_nothing_are_an_error():
    with pytest.raises(ValueError, match=r"names \['down_proj', 'gate_proj', 'o_proj'\], which no module of LLaDA"):
        adapted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"names \['\.\*\\\\.o_proj'\]"):
        adapted(r".*\.o_proj")


def test_the_given_config_stays_as_it_was():
    config = LoraConfig(r=2)
    complete_lora_config(small_model(), config)
    assert config.target_modules is None and config.exclude_modules is None
    assert issubclass(LoraModel, torch.nn.Module)
