"""Fixtures that several tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined

from tests.families import ALL_FAMILIES, FAMILIES
from tests.golden import CHECKPOINT, FIXTURES

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers that each use every core wait for each other


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", params=[*FAMILIES, pytest.param("sdar", marks=pytest.mark.slow)])
def family(request):
    """Each model family in turn."""
    return ALL_FAMILIES[request.param]


@pytest.fixture(scope="session")
def model(family):
    """The golden model of the family in float32: vocabulary 320, [MASK] 319, end-of-text and padding 318."""
    return family.load()


@pytest.fixture(scope="session")
def small_model(family):
    """Makes models of the family that read the ids of the word tokenizer."""
    return family.small


@pytest.fixture(scope="session")
def llada_gqa():
    """A second LLaDA, with grouped-query attention, as Dream has it."""
    from dparallel.modeling import LLaDAModelLM

    return LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny_gqa").eval()


@pytest.fixture(scope="session")
def models(llada_gqa):
    """The golden models by the names of their files."""
    return {"llada_tiny_gqa": llada_gqa, **{f"{name}_tiny": family.load() for name, family in FAMILIES.items()}}


@pytest.fixture
def prompt():
    return torch.randint(0, 317, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def word_model():
    """The example model of word problems, the teacher."""
    from dparallel.modeling import LLaDAModelLM

    return LLaDAModelLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def word_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="session")
def reader(family, word_model, word_tokenizer):
    """A model of the family that says words of the word tokenizer: the example model, or one of random weights."""
    if type(word_model) is family.model:
        return word_model
    model = family.small(hidden_size=64).eval()
    tokens = [word_tokenizer.decode([i]) for i in range(len(word_tokenizer))]
    spoken = [i for i, token in enumerate(tokens) if token.strip().isalpha() and token.isascii()]
    model.generation_config.suppress_tokens = sorted(set(range(592)) - {0, *spoken})
    model.generation_config.update(max_new_tokens=128, do_sample=False)  # else a pipeline samples
    return model
