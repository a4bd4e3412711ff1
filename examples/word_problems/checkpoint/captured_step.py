# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Replaying a decoding step as a CUDA graph.

A step of decoding is some hundred small launches, which a host issues more slowly than a GPU works them off. The step
reads and writes the tensors of a canvas and nothing else, so it can be recorded once and replayed: a graph serves all
blocks of an answer, and, since a canvas goes back into a pool, later calls of `generate()` with the same shapes.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .canvas import Canvas, Layout
from .layers import BLOCK_SDPA
from .packed_projections import pack_projections

logger = logging.get_logger(__name__)

MAX_GRAPHS = 64  # of a canvas
MAX_CANVASES = 16  # kept between calls, as long as they take
MAX_MEMORY_SHARE = 0.125  # of the device, all together; the last one is kept whatever it takes
# Attention whose launches do not depend on what the tensors hold.
CAPTURABLE_ATTENTION = (BLOCK_SDPA, "sdpa", "eager")

_steps_of_models = weakref.WeakKeyDictionary()


def prepare_captured_steps(model: PreTrainedModel) -> "CapturedSteps | None":
    """The `CapturedSteps` of a model, whose projections are packed for them (`pack_projections`), or None where its
    steps cannot be captured."""
    steps = captured_steps(model)
    if steps is None and model not in _steps_of_models and _can_capture(model):
        pack_projections(model)
        steps = _steps_of_models[model] = CapturedSteps(_origin(model))
    return steps


def captured_steps(model: PreTrainedModel) -> "CapturedSteps | None":
    """The `CapturedSteps` of a model, or None where there are none: not prepared, or where steps cannot be captured,
    which is off CUDA, where transformers would not compile the class either (`_can_compile_fullgraph`), compiled,
    quantised, spread over devices, under autocast, and with hooks or adapters, which may do something else the next
    time. Steps of weights that have moved are forgotten."""
    steps = _steps_of_models.get(model)
    if steps is not None and (not _can_capture(model) or steps.origin != _origin(model)):
        steps = _steps_of_models.pop(model, None) and None
    return None if steps is None or steps.failed else steps


def _can_capture(model) -> bool:
    parameters = list(model.parameters())
    return (
        bool(parameters)
        and parameters[0].device.type == "cuda"
        and all(parameter.device == parameters[0].device for parameter in parameters)
        and model._can_compile_fullgraph
        and model.config._attn_implementation in CAPTURABLE_ATTENTION
        and getattr(model, "hf_quantizer", None) is None
        and not torch.is_autocast_enabled("cuda")
        and not any(map(_is_changeable, model.modules()))
    )


def _origin(model):
    """Graphs hold addresses: weights that moved, or another kind of attention, need new ones."""
    addresses = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    config = model.config
    settings = (config._attn_implementation, getattr(config, "rope_theta", None), model.dtype)
    return *addresses, *settings, torch.is_inference_mode_enabled()


def _is_changeable(module: nn.Module) -> bool:
    """Does calling it do more than its class says?"""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return bool(
        # transformers leaves its own behind, which are idle unless hidden states are asked for.
        any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)
        or "forward" in module.__dict__  # accelerate's hooks
        or module._compiled_call_impl is not None
        or type(module).__module__.startswith("peft.")
    )


class CapturedSteps:
    """Of one model: its graphs, and the canvases that they read and write.

    Memory of canvases is bounded by the constants above. All graphs share one pool for what is computed on the way,
    since only one of them runs at a time and what they leave is in the canvas; it is as large as the largest step
    needs. Threads that decode with one model take turns, a pass each (`decoding_loop.py`).
    """

    def __init__(self, origin: tuple):
        self.origin, self.failed = origin, False
        self.canvases = OrderedDict()  # the least recently used first
        self.graphs = weakref.WeakSet()  # those that canvases still hold
        self.stream = None

    def borrow(self, layout: Layout) -> Canvas:
        """A canvas that nobody else uses, with the graphs that were captured on it."""
        canvas = self.canvases.pop(layout, None)
        if canvas is None:
            self._make_room(layout.device)
            canvas = Canvas(layout)
        return canvas

    def give_back(self, canvas: Canvas) -> None:
        self._make_room(canvas.ids.device, canvas.nbytes)
        self.canvases[canvas.layout] = canvas

    def _make_room(self, device, nbytes=0):
        """Forget the least recently used, so that one of this size may join the rest, as long as there is any."""
        allowed = MAX_MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory - nbytes
        while self.canvases and (
            len(self.canvases) >= MAX_CANVASES or sum(each.nbytes for each in self.canvases.values()) > allowed
        ):
            self.canvases.popitem(last=False)

    def run(self, canvas: Canvas, key: tuple, step: Callable[[], None]) -> None:
        """Make a step that depends on the canvas and on what is in `key`. The first time runs as it is, which also
        readies libraries and allocators; the second is captured."""
        graphs = canvas.graphs
        if self.failed or key not in graphs:
            step()
            if len(graphs) == MAX_GRAPHS:
                graphs.pop(next(iter(graphs)))
            graphs[key] = None
            return
        graphs[key] = graph = graphs.pop(key)  # the most recently used is last
        if graph is None:
            try:
                graphs[key] = self._capture(canvas.ids.device, step)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                return step()
            except RuntimeError as error:
                logger.warning(f"Steps are not captured as CUDA graphs, since that failed: {error}")
                self.failed = True
                return step()
        graphs[key].replay()

    def _capture(self, device, step):
        with torch.cuda.device(device):
            self.stream = self.stream or torch.cuda.Stream()
            # The pool of the others. Not one that is remembered: a pool ends with its last graph.
            pool = next((graph.pool() for graph in self.graphs), None)
            graph = torch.cuda.CUDAGraph()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                # Other threads may go on using the device.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(self.stream)
        self.graphs.add(graph)
        return graph
