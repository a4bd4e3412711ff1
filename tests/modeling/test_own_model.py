"""A model of a user's own, shared with its code."""

import subprocess
import sys

import pytest

OWN = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dparallel.modeling import DiffusionGenerationMixin


class OwnConfig(PreTrainedConfig):
    model_type = "own"
    vocab_size: int = 20
    hidden_size: int = 8
    mask_token_id: int = 19
    eos_token_id: int = 18
    pad_token_id: int = 18


class OwnModel(PreTrainedModel, DiffusionGenerationMixin):
    config_class = OwnConfig
    logits_shift = 0

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        x = self.embed(input_ids)
        x = x + x.mean(dim=1, keepdim=True)
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        return CausalLMOutputWithPast(logits=self.head(x))


OwnConfig.register_for_auto_class()
OwnModel.register_for_auto_class("AutoModelForCausalLM")
"""
SAVE = """
import sys
import torch
from own_model import OwnConfig, OwnModel
torch.manual_seed(0)
model = OwnModel(OwnConfig()).eval()
model.save_pretrained(sys.argv[1])
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, block_length=4).tolist())
"""
LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, block_length=4).tolist())
"""


@pytest.mark.journey
def test_it_travels_with_its_code(tmp_path):
    """As the README says; somebody else's process knows nothing of the file."""
    (tmp_path / "own_model.py").write_text(OWN)

    def run(code):
        command = [sys.executable, "-c", code, str(tmp_path / "saved")]
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()[-1]

    folder = tmp_path
    saved = run(SAVE)
    assert (tmp_path / "saved" / "own_model.py").read_text() == OWN
    folder = tmp_path / "saved"
    assert run(LOAD) == saved
