"""The model families, which run through the same tests: the fixture `family` of conftest.py."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from dparallel.modeling import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM, SDARConfig, SDARForCausalLM
from tests.golden import FIXTURES


@dataclass(frozen=True)
class Family:
    """What tests need to know of one.

    Attributes:
        name: as in the golden files' names and in those of `modeling/`.
        config, model: the classes.
        shape: of a model that is made on the spot, in the family's own keys.
        embedding, blocks, norm, head: module paths in the model.
        projections: of a block, in the order q, k, v, o, gate, up, down.
        published: those that dParallel's code adapts, if it knows the family.
        frequent: two tokens that the golden model answers the tests' prompts with often.
        loading: what the golden model is loaded with.
    """

    name: str
    config: type
    model: type
    shape: dict
    embedding: str
    blocks: str
    norm: str
    head: str
    projections: tuple
    published: tuple
    frequent: tuple
    loading: dict = field(default_factory=dict)

    @property
    def golden(self):
        return FIXTURES / f"{self.name}_tiny"

    def load(self, **kwargs):
        model = self.model.from_pretrained(self.golden, **self.loading, **kwargs).eval()
        # SDAR's official files ask for sampling.
        model.generation_config.update(do_sample=False, temperature=None, top_k=None, top_p=None)
        return model

    def make(self, seed=0, **changes):
        torch.manual_seed(seed)
        return self.model(self.config(**(self.shape | changes)))

    def small(self, seed=0, **changes):
        """A model that is made on the spot and reads the ids of the word tokenizer."""
        return self.make(seed, vocab_size=592, mask_token_id=1, eos_token_id=0, pad_token_id=0, **changes)


SPECIAL = {"vocab_size": 50, "mask_token_id": 49, "eos_token_id": 48, "pad_token_id": 48}
FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llada",
            config=LLaDAConfig,
            model=LLaDAModelLM,
            shape={"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 64, **SPECIAL},
            embedding="model.transformer.wte",
            blocks="model.transformer.blocks",
            norm="model.transformer.ln_f",
            head="model.transformer.ff_out",
            projections=("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
            published=("q_proj", "k_proj", "v_proj", "up_proj"),
            frequent=(11, 194),
        ),
        Family(
            name="dream",
            config=DreamConfig,
            model=DreamModel,
            shape={
                "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "intermediate_size": 64, "max_position_embeddings": 512, "bos_token_id": 48, **SPECIAL,
            },
            embedding="model.embed_tokens",
            blocks="model.layers",
            norm="model.norm",
            head="lm_head",
            projections=(
                "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
            ),
            published=(
                "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
            ),
            frequent=(208, 61),
        ),
    )
}  # fmt: skip
# The same tests are slow for SDAR, here without its blocks; with them, all families are in test_block_causal.py.
QWEN = FAMILIES["dream"]
SDAR = replace(
    QWEN, name="sdar", config=SDARConfig, model=SDARForCausalLM, frequent=(138, 236), loading={"block_size": None},
    published=(),
    shape=QWEN.shape | {"head_dim": 16, "block_size": None},
)  # fmt: skip
ALL_FAMILIES = FAMILIES | {"sdar": SDAR}
# For `pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)`: tests that start processes or take long.
MOSTLY_SLOW = ["llada", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dream", "sdar"))]
