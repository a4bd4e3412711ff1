"""The checkpoints of a run: which is the last complete one, and how one goes on under another layout.

Trainer saves weights as safetensors under every layout, but optimizers as each layout has them: by number on one
device and under DDP, by name under FSDP, in DeepSpeed's own files under ZeRO. What one of the first two saved goes on
under the other here, by PyTorch's distributed state dictionaries.
"""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import distributed, nn
from torch._dynamo import OptimizedModule
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import TrainerState

PLAIN, FSDP, DEEPSPEED = "one device or DDP", "FSDP", "DeepSpeed"


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The last checkpoint in a folder that was written to its end: a kill while it was saved leaves a part of one."""
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        try:
            state = TrainerState.load_from_json(str(path / "trainer_state.json"))  # what Trainer writes last
        except (OSError, ValueError):
            continue
        steps[state.global_step] = str(path)
    return steps[max(steps)] if steps else None


def layout_of(checkpoint: str | Path) -> str:
    """Under which layout a checkpoint was saved."""
    names = [path.name for path in Path(checkpoint).glob("*")]
    if any(name.startswith("global_step") for name in names):
        return DEEPSPEED
    is_fsdp = any(name.startswith(("pytorch_model_fsdp", "optimizer.bin", "optimizer_")) for name in names)
    return FSDP if is_fsdp else PLAIN


def load_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Load the safetensors of a checkpoint into a model, or into its adapter, sharded or not, on all processes.

    Raises:
        ValueError: if there are none, for weights that the model does not have, and for trained ones that are missing.
    """
    model = model._orig_mod if isinstance(model, OptimizedModule) else model
    name, folder = "model", Path(checkpoint)
    if isinstance(model, PeftModel):
        name = "adapter_model"
        folder = folder if model.active_adapter == "default" else folder / model.active_adapter  # as peft saves it
    files = sorted(folder.glob(f"{name}*.safetensors"))
    if not files:
        raise ValueError(
            f"`resume_from_checkpoint={str(checkpoint)!r}` is not allowed under another layout: it has no "
            f"{name}.safetensors, as FSDP writes them with `fsdp_state_dict_type: FULL_STATE_DICT` only."
        )
    known = {name: name for name in map(plain_name, model.state_dict())}  # by the name that it is saved under
    if isinstance(model, PeftModel):
        known = get_peft_model_state_dict(model, known, model.active_adapter, save_embedding_layers=True)
    state = {}
    for file in files if _is_first() else []:
        state |= load_file(file)
    if unknown := sorted(set(state) - set(known)):
        raise ValueError(f"`resume_from_checkpoint={str(checkpoint)!r}` has weights that the model lacks: {unknown}.")
    state = {known[name]: tensor for name, tensor in state.items()}
    if _is_first():
        # A tied weight is saved by one of its names.
        parameters = {plain_name(name): each for name, each in model.named_parameters(remove_duplicate=False)}
        loaded = {id(parameters[name]) for name in state if name in parameters}
        missing = [name for name, each in parameters.items() if each.requires_grad and id(each) not in loaded]
        if missing:
            raise ValueError(
                f"`resume_from_checkpoint={str(checkpoint)!r}` lacks weights that the model trains: {missing}."
            )
    set_model_state_dict(model, state, options=_options(strict=False))  # tied and frozen weights are not saved


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: str | Path) -> None:
    """Load the optimizer's state of a checkpoint, by number or by name, on all processes.

    Raises:
        ValueError: if it has none, or one for other parameters.
    """
    files = [path for name in ("optimizer.pt", "optimizer.bin") if (path := Path(checkpoint) / name).exists()]
    if not files:
        raise ValueError(
            f"`resume_from_checkpoint={str(checkpoint)!r}` is not allowed under another layout: it has no "
            f"optimizer.pt and no optimizer.bin."
        )
    state = torch.load(files[0], map_location="cpu", mmap=True, weights_only=True)
    groups = state["param_groups"]
    trained, saved = (
        [each for group in part for each in group["params"]] for part in (optimizer.param_groups, groups)
    )
    if len(trained) != len(saved):
        raise ValueError(
            f"`resume_from_checkpoint={str(checkpoint)!r}` has an optimizer of {len(saved)} parameters: the model "
            f"trains {len(trained)}."
        )
    if not any(isinstance(value, torch.Tensor) for moments in state["state"].values() for value in moments.values()):
        # Plain SGD has no moments, which PyTorch's function does not expect.
        for group, other in zip(optimizer.param_groups, groups, strict=True):
            if unknown := sorted(set(other) - set(group)):
                raise ValueError(
                    f"`resume_from_checkpoint={str(checkpoint)!r}` has another kind of optimizer, with {unknown}."
                )
            group.update({name: value for name, value in other.items() if name != "params"})
        return
    state = state if _is_first() else {}
    if state and files[0].name == "optimizer.pt":
        name_of = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
        name_of = {number: name_of[parameter] for number, parameter in zip(saved, trained, strict=True)}
        groups = [{**group, "params": [name_of[n] for n in group["params"]]} for group in groups]
        state = {"state": {name_of[n]: moments for n, moments in state["state"].items()}, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, state, options=_options())


def plain_name(name: str) -> str:
    """A weight's name without what compiling, checkpointing and wrapping a module put into it, as it is saved."""
    for added in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(added, "")
    return name


def _is_first():
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _options(strict=True):
    """For whole tensors, that the first process reads and shares."""
    is_shared = distributed.is_initialized() and distributed.get_world_size() > 1
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_shared, strict=strict)
