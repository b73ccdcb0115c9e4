"""What an engine has to remember, as a tree: nothing in it but names, numbers, words and tensors.

A tree can be written as JSON with the tensors beside it, and read again without running anything that the file says,
which a pickle cannot promise. So whatever an engine's libraries keep in objects of their own is taken apart by name on
the way out, and what nobody named is refused rather than lost.

Tensors are the engine's own on the way out, not copies: write them before the next step. On the way in they are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Tree = dict[str, "Tree"] | list["Tree"] | tuple["Tree", ...] | str | int | float | bool | None | torch.Tensor

_LEAVES = (str, int, float, bool, type(None))


def plain(value: object, name: str) -> Tree:
    """A value as a tree, tensors detached. ValueError names what is neither."""
    if type(value) in _LEAVES:
        return value  # type: ignore[return-value]
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: plain(each, f"{name}.{key}") for key, each in value.items()}
    if type(value) is list:
        return [plain(each, f"{name}[{index}]") for index, each in enumerate(value)]
    if type(value) is tuple:
        return tuple(plain(each, f"{name}[{index}]") for index, each in enumerate(value))
    raise ValueError(
        f"What an engine keeps must be names, numbers, words and tensors to be saved, and {name} is "
        f"{type(value).__module__}.{type(value).__qualname__}."
    )


def optimizer_tree(state_dict: Mapping[str, Any]) -> Tree:
    """The state dict of one of torch's optimizers. It numbers its parameters, and a tree has names: "0", "1", ..."""
    states = {str(index): each for index, each in state_dict["state"].items()}
    return {
        "state": plain(states, "optimizer.state"),
        "param_groups": plain(state_dict["param_groups"], "optimizer.param_groups"),
    }


def optimizer_state_dict(tree: Any) -> dict[str, Any]:
    """The state dict again, its tensors copied: an optimizer keeps what it is given."""
    states = {
        int(index): {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in each.items()
        }
        for index, each in tree["state"].items()
    }
    return {"state": states, "param_groups": [dict(group) for group in tree["param_groups"]]}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and persistent buffers, each once, under the first of its names."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"What a model keeps must be tensors to be saved, and {name} is {type(tensor).__name__}."
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def detached(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, apart from autograd."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


@torch.no_grad()
def fill(tensors: Mapping[str, torch.Tensor], saved: Mapping[str, Any]) -> None:
    """Copy saved tensors into these, bit for bit. ValueError, before anything changes, where they do not match."""
    if tensors.keys() != saved.keys():
        raise ValueError(
            f"The saved state must be of this model: {_names(saved.keys() - tensors.keys())} of it not here, "
            f"{_names(tensors.keys() - saved.keys())} of the model not in it."
        )
    for name, tensor in tensors.items():
        check_same_form(name, tensor, saved[name])
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def check_same_form(name: str, tensor: torch.Tensor, saved: torch.Tensor) -> None:
    """Raise ValueError unless one can be copied into the other as it is."""
    if (tensor.shape, tensor.dtype) != (saved.shape, saved.dtype):
        raise ValueError(
            f"The saved state must be of this model: {name} is {_form(tensor)}, and {_form(saved)} in the state."
        )


def check_names(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise ValueError unless a state has the names that are known, no more and no fewer."""
    more, fewer = set(found) - set(expected), set(expected) - set(found)
    if more or fewer:
        raise ValueError(
            f"{what} must have the names that are known: {_names(more)} unknown, {_names(fewer)} missing."
        )


def check_made_by(tree: Any, **facts: Tree) -> None:
    """Raise ValueError when a state was made by an engine of another kind than the facts of this one say."""
    others = {name: tree.get(name) for name in facts if tree.get(name) != facts[name]}
    if others:
        raise ValueError(
            f"The state must be of an engine like this one, with {_facts(facts)}, and it has {_facts(others)}. "
            "Resume with the plan that it was saved with."
        )


def _facts(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _form(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


def _names(names: Iterable[str]) -> str:
    found: Sequence[str] = sorted(names)
    if not found:
        return "none"
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
