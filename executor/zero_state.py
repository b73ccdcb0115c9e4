"""What DeepSpeed's optimizers keep, taken apart by name and put together again.

    stage      an optimizer's state_dict() besides torch's own state
    0          nothing: it is torch's own
    1 and 2    this process's stretch of the flat fp32 parameters, clipping, a loss scaler (an object), paddings
    3          this process's part of every parameter, the same loss scaler

The names are those of DeepSpeed 0.19. One that is not here would be a thing to remember that nobody saves, so it is
refused. A loss scaler is left out when it is the one that does not scale, and refused otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from executor.state import Tree, check_names, check_same_form, optimizer_state_dict, optimizer_tree, plain

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

_SCALER = "loss_scaler"
_FLAGS: tuple[str, ...] = ("dynamic_loss_scale", "overflow")

_FLAT_INNER = "base_optimizer_state"
_FLAT_PARTITIONS = "single_partition_of_fp32_groups"
_FLAT_SETTINGS: tuple[str, ...] = (
    *_FLAGS,
    "clip_grad",
    "group_paddings",
    "param_alignment_paddings",
    "ds_version",
)
_FLAT_DERIVED: tuple[str, ...] = ("zero_stage", "partition_count", "param_slice_mappings")
"""Follow from the plan and the model."""

_SCATTERED_INNER = "optimizer_state_dict"
_SCATTERED_PARTITIONS = "fp32_flat_groups"
_SCATTERED_DERIVED: tuple[str, ...] = ("zero_stage", "partition_count")


def take(engine: DeepSpeedEngine) -> Tree:
    """The state of an engine's optimizer in this process. ValueError when it has something that is not known."""
    stage = engine.zero_optimization_stage()
    found = engine.optimizer.state_dict()
    if stage == 0:
        return optimizer_tree(found)
    inner, partitions = _FLAT_INNER, _FLAT_PARTITIONS
    settings: tuple[str, ...] = _FLAT_SETTINGS
    derived: tuple[str, ...] = _FLAT_DERIVED
    if stage == 3:
        inner, partitions, settings = _SCATTERED_INNER, _SCATTERED_PARTITIONS, _FLAGS
        derived = _SCATTERED_DERIVED
    check_names(
        f"DeepSpeed's optimizer state of ZeRO stage {stage}",
        found,
        (_SCALER, inner, partitions, *settings, *derived),
    )
    _check_scales_nothing(found[_SCALER])
    return {
        "inner": optimizer_tree(found[inner]),
        "partitions": plain(found[partitions], "optimizer.partitions"),
        "settings": {name: plain(found[name], f"optimizer.{name}") for name in settings},
    }


def give(engine: DeepSpeedEngine, tree: Any) -> None:
    """Put ``take``'s state into the optimizer of a fresh engine, and the parameters that it updates with it.

    All processes at once: each gets its part, and the whole parameters are gathered from the parts.
    """
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage == 0:
        optimizer.load_state_dict(optimizer_state_dict(tree))
        return
    inner, partitions = optimizer_state_dict(tree["inner"]), tree["partitions"]
    common = {_SCALER: optimizer.loss_scaler, **tree["settings"]}
    if stage == 3:
        _check_partitions(optimizer.fp32_partitioned_groups_flat, partitions)
        optimizer.checkpoint_event_prologue()
        state = common | {_SCATTERED_INNER: inner, _SCATTERED_PARTITIONS: partitions}
    else:
        own = optimizer._get_groups_without_padding(optimizer.single_partition_of_fp32_groups)
        _check_partitions(own, partitions)
        state = common | {_FLAT_INNER: inner, _FLAT_PARTITIONS: partitions}
    rank = torch.distributed.get_rank()
    optimizer.load_state_dict(
        [None] * rank + [state], load_optimizer_states=True, load_from_fp32_weights=True
    )
    if stage == 3:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


def _check_scales_nothing(scaler: Any) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    if type(scaler) is not LossScaler or vars(scaler) != vars(LossScaler(scale=1.0)):
        raise ValueError(
            f"A loss scaler must be DeepSpeed's LossScaler with a scale of 1 to be saved, got {scaler!r}. "
            "Plans for several processes keep fp32 weights, which need no other."
        )


def _check_partitions(own: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
    if len(own) != len(saved):
        raise ValueError(
            f"The saved state must be of this model: its optimizer has {len(own)} partitions here, {len(saved)} in "
            "the state."
        )
    for index, (tensor, other) in enumerate(zip(own, saved, strict=True)):
        check_same_form(f"partition {index}", tensor, other)
