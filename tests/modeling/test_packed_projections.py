"""Packed projections: the same parameters, the same products, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from dparallel.modeling.packed_projections import pack_projections, project
from tests.families import FAMILIES


class Block(nn.Module):
    packed_projections = (("a", "b"),)

    def __init__(self, bias=True):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6, bias), nn.Linear(8, 4, bias)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_one_product_of_the_same_parameters(bias, monkeypatch):
    block, x, shapes = Block(bias), torch.randn(2, 3, 8), []
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, w, b=None: (shapes.append(tuple(w.shape)), linear(x, w, b))[1]
    )
    parameters, expected = list(block.parameters()), (block.a(x), block.b(x))
    pack_projections(block)
    assert all(now is before for now, before in zip(block.parameters(), parameters, strict=True))
    shapes.clear()
    for found, wanted in zip(project(x, (block.a, block.b)), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert shapes == [(10, 8)]
    block.b.weight += 1  # an optimizer's step
    torch.testing.assert_close(project(x, (block.a, block.b))[1], block.b(x))


def test_what_is_not_plain_goes_one_by_one():
    calls, x = [], torch.randn(2, 8)
    with torch.no_grad():
        for change in (
            lambda block: block.b.register_forward_hook(lambda *_: calls.append("hook")),
            lambda block: setattr(block, "b", nn.Sequential(nn.Linear(8, 4))),
            lambda block: block.to(torch.float64).to(torch.float32),  # parts the weights again
        ):
            block = Block()
            pack_projections(block)
            change(block)
            found = project(x, (block.a, block.b))
            assert torch.equal(found[0], block.a(x)) and torch.equal(found[1], block.b(x))
        assert calls  # not passed over
    block = Block()
    pack_projections(block)
    sum(part.sum() for part in project(x, (block.a, block.b))).backward()
    assert block.a.weight.grad is not None and block.b.bias.grad is not None


@torch.no_grad()
def test_a_packed_model_saves_copies_and_moves(tmp_path):
    model = FAMILIES["llada"].load()
    ids = torch.randint(0, 317, (2, 9), generator=torch.Generator().manual_seed(0))
    expected, before = model(ids).logits, {name: p.clone() for name, p in model.named_parameters()}
    pack_projections(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())  # no second copy
    model.save_pretrained(tmp_path)
    loaded = FAMILIES["llada"].model.from_pretrained(tmp_path)
    for other in (loaded, copy.deepcopy(model), model.to(torch.float64).to(torch.float32)):
        torch.testing.assert_close(other(ids).logits, expected, atol=1e-5, rtol=1e-5)
