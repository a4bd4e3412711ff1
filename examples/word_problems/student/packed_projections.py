# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Projections of the same input as one matrix product.

Three narrow products leave more of a GPU idle than a wide one. `pack_projections` moves the weights of such
projections behind one another in memory, where they stay the parameters that they were; `project` sees that they lie
so. There is no second copy of the weights.
"""

from collections.abc import Sequence

import torch
from torch import nn


def project(x: torch.Tensor, projections: Sequence[nn.Linear]) -> tuple[torch.Tensor, ...]:
    """What each of some linear modules makes of `x`, as a tuple."""
    weight = bias = None
    is_seen_through = torch.is_grad_enabled() or torch.compiler.is_compiling()  # by autograd, by the compiler
    if not is_seen_through and all(map(_is_plain, projections)):
        weight = _joined([projection.weight for projection in projections])
        bias = _joined([projection.bias for projection in projections])
    if weight is None or (bias is None and projections[0].bias is not None):
        return tuple(projection(x) for projection in projections)
    sizes = [projection.out_features for projection in projections]
    return nn.functional.linear(x, weight, bias).split(sizes, dim=-1)


def pack_projections(model: nn.Module) -> None:
    """Move weights behind one another where a module names projections of the same input (`packed_projections`, tuples
    of names). Only modules whose weights are their own: plain, and not tied to others."""
    with torch.inference_mode(False), torch.no_grad():  # else the weights could never be trained again
        for module in model.modules():
            for names in getattr(module, "packed_projections", ()):
                projections = [getattr(module, name) for name in names]
                if not all(map(_is_plain, projections)):
                    continue
                for tensors in ([each.weight for each in projections], [each.bias for each in projections]):
                    if tensors[0] is None or _joined(tensors) is not None:
                        continue
                    joined = torch.cat([tensor.data for tensor in tensors])
                    for tensor, part in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
                        tensor.data = part


def _is_plain(module) -> bool:
    return type(module) is nn.Linear and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    )


def _joined(tensors):
    """Tensors as one if they lie behind one another in the same storage, else None."""
    first, place = tensors[0], 0
    if any(tensor is None for tensor in tensors):
        return None
    for tensor in tensors:
        lies_behind = tensor.data_ptr() == first.data_ptr() + place * first.element_size()
        if not (lies_behind and tensor.is_contiguous() and tensor.dtype == first.dtype):
            return None
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        place += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
