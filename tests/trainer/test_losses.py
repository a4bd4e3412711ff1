"""The certainty-forcing loss against the published code's numbers, and against itself row by row."""

import pytest
import torch

from dparallel.hub_cards.model_families import family_of
from dparallel.trainer.losses import certainty_forcing_loss, certainty_forcing_losses
from tests.families import FAMILIES
from tests.golden import FIXTURES, load_cases

MODELS = ("llada_tiny", "llada_tiny_gqa", "dream_tiny")
CASES = [(name, i) for name in MODELS for i in range(len(load_cases(f"loss_{name}")[0]))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_loss_and_gradients_of_the_published_code(name, number):
    cases, tensors = load_cases(f"loss_{name}")
    case, family = cases[number], FAMILIES[name.partition("_")[0]]
    model = family.model.from_pretrained(FIXTURES / name)
    weight = family_of(model.config.model_type).distillation["certainty_weight"]
    saved = {key.partition(".")[2]: value for key, value in tensors.items() if key.partition(".")[0] == case["id"]}
    total = 0
    for view in ("", "_rev"):
        logits = model(saved[f"noisy_batch{view}"]).logits.roll(model.logits_shift, dims=1)
        masked = saved[f"masked_indices{view}"].bool()
        masked[:, : model.logits_shift] = False  # nothing predicts these
        trajectory, certainty = certainty_forcing_loss(logits, saved["input_ids"], masked, temperature=0.5)
        torch.testing.assert_close(trajectory, saved[f"ce{view}"], atol=1e-3, rtol=0)
        torch.testing.assert_close(certainty, saved[f"entropy{view}"], atol=1e-3, rtol=0)
        total = total + trajectory + weight * certainty
    assert total.item() == pytest.approx(case["total_loss"], abs=1e-3)
    total.backward()
    query = model.get_submodule(f"{family.blocks}.0.{family.projections[0]}")
    for module, key in ((query, "grad_q_proj_0"), (model.get_output_embeddings(), "grad_head")):
        torch.testing.assert_close(module.weight.grad, saved[key], atol=1e-3, rtol=1e-4)


def random_batch(rows=5, length=9, vocabulary=11):
    torch.manual_seed(0)
    labels = torch.randint(0, vocabulary, (rows, length))
    logits = torch.randn(rows, length, vocabulary, dtype=torch.double)
    right = torch.rand(rows, length) < 0.5
    logits = logits + 4 * torch.nn.functional.one_hot(labels, vocabulary) * right[..., None]
    masked = torch.rand(rows, length) < 0.6
    masked[1] = False  # nothing to score
    logits[2] = logits[2].scatter(1, labels[2, :, None], -9.0)  # nothing right
    return logits, labels, masked


def test_rows_are_averaged_over_their_own_tokens():
    """By plain loops."""
    logits, labels, masked = random_batch()
    for row in range(5):
        cross_entropies, entropies = [0.0], [0.0]
        for i in masked[row].nonzero().flatten().tolist():
            p = logits[row, i].softmax(dim=-1)
            cross_entropies.append(-p[labels[row, i]].log().item())
            if p.argmax() == labels[row, i]:
                sharp = (p**2) / (p**2).sum()  # temperature 1/2
                entropies.append(-(sharp * sharp.log()).sum().item())
        trajectory, certainty = certainty_forcing_losses(logits, labels, masked)
        assert trajectory[row].item() == pytest.approx(sum(cross_entropies) / max(len(cross_entropies) - 1, 1))
        assert certainty[row].item() == pytest.approx(sum(entropies) / max(len(entropies) - 1, 1))
    assert certainty[2] == 0 and trajectory[1] == 0 and trajectory[2] > 0
    batch = certainty_forcing_loss(logits, labels, masked)
    assert batch[0].item() == pytest.approx(trajectory.mean().item())
    assert batch[1].item() == pytest.approx(certainty.mean().item())


def test_gradients():
    logits, labels, masked = random_batch(rows=3, length=4, vocabulary=5)
    logits.requires_grad_()
    for index in (0, 1):
        assert torch.autograd.gradcheck(
            lambda x, i=index: certainty_forcing_loss(x, labels, masked, 0.7)[i], (logits,)
        )
