"""Which stages use which parameters: what has to be known to deal a model out to several processes.

One forward pass under fake tensors; a module's own parameters are used in the stage in which the module is called:

    wte.weight     stages 0 (embedding) and 26 (head, tied)      its gradient is whole when stage 0 ran backward
    h.0.mlp.c_fc   stage 3
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from profiler.absent import AbsentCuda
from profiler.chain import Call, Stage, watch_calls
from profiler.pretend import pretending
from profiler.profile_record import ParameterRecord
from profiler.workload import Workload


def parameter_records(
    workload: Workload, stages: Sequence[Stage], batch_size: int, absent: AbsentCuda | None = None
) -> tuple[ParameterRecord, ...]:
    """The model's parameters in its own order. One that no module call is seen to use is counted with stage 0."""
    model = workload.model
    entries = {Call.parse(stage.entry): i for i, stage in enumerate(stages) if stage.entry}
    position = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    own: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own.setdefault(name.rpartition(".")[0], []).append(position[id(parameter)])
    shared_modules: dict[int, str] = {}
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = shared_modules.setdefault(id(module), name)
        own.setdefault(first, []).extend(own.get(name, ()))
        for index in own[first]:
            owner.setdefault(index, first)
    records = [
        (owner[i], parameter.numel(), parameter.requires_grad)
        for i, parameter in enumerate(model.parameters())
    ]
    used: list[set[int]] = [set() for _ in records]
    current = 0

    def entering(call: Call, inputs: list[torch.Tensor]) -> None:
        nonlocal current
        current = entries.get(call, current)
        for index in own[call.module]:
            used[index].add(current)

    with (
        pretending(model, [workload.batch(batch_size)], absent=absent) as (batch,),
        watch_calls(model, entering),
    ):
        workload.loss(model, batch)
    return tuple(
        ParameterRecord(module=module, count=count, stages=tuple(sorted(uses or {0})), trainable=trainable)
        for (module, count, trainable), uses in zip(records, used, strict=True)
    )
