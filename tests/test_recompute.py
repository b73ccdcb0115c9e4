"""Real steps with and without recomputed segments: the same bits, less memory, nothing left behind."""

from __future__ import annotations

import copy
import gc
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode

from executor.recompute import Checkpoints, SegmentError, Stretch
from planner.nested import Placed, Segments
from profiler.chain import Call, discover
from profiler.freed_memory import let_go_of_a_failed_backward
from profiler.live import LiveStorages
from profiler.profile_record import KEEPINGS, Keeping, Precision
from profiler.step import Stepper, build_optimizer
from profiler.workload import Workload
from studies.composition import stretches
from tests.models import Chained, cnn, dropout_net, gpt2, mlp


def stretch(enter: str, leave: str | None) -> Stretch:
    return Stretch(Call.parse(enter), Call.parse(leave) if leave else None)


def apply(workload: Workload, segments: Segments) -> Checkpoints:
    return Checkpoints(workload.model, stretches(discover(workload), Placed(segments=segments)))


def levels(segments: Segments) -> list[int]:
    """How many segments each lies in, itself included: so often it runs without being kept."""
    return [sum(a <= start and stop <= b for a, b in segments) for start, stop in segments]


def trained(
    workload: Workload, segments: Segments, *, precision: Precision = "fp32", steps: int = 3, k: int = 2
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, the last step's gradients and the state after some optimizer steps on a copy of the model."""
    workload = Workload(model=copy.deepcopy(workload.model), batch=workload.batch, loss=workload.loss)
    checkpoints = apply(workload, segments)
    gradients: list[torch.Tensor] = []
    optimizer = build_optimizer("adamw", workload.model, learning_rate=1e-2)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.__setitem__(
            slice(None), [p.grad.clone() for p in workload.model.parameters() if p.grad is not None]
        )
    )
    stepper = Stepper(
        model=workload.model, loss=workload.loss, optimizer=optimizer, precision=precision, device_type="cpu"
    )
    torch.manual_seed(7)
    batches = [workload.batch(3) for _ in range(k)]
    losses = [stepper.step(batches, k) for _ in range(steps)]
    assert checkpoints.counts == [[steps * k * dropped, steps * k] for dropped in levels(segments)]
    checkpoints.remove()
    return losses, gradients, workload.model.state_dict()


def assert_same_bits(workload: Workload, segments: Segments, precision: Precision = "fp32") -> None:
    losses, gradients, state = trained(workload, (), precision=precision)
    same_losses, same_gradients, same_state = trained(workload, segments, precision=precision)
    assert all(map(torch.equal, losses, same_losses))
    assert len(gradients) == len(same_gradients) > 0
    assert all(map(torch.equal, gradients, same_gradients))
    assert list(state) == list(same_state)
    assert all(torch.equal(state[name], same_state[name]) for name in state)


# A GPT-2 of three blocks: 0 embeddings, 1 drop, then 2 + 2 n attention and 3 + 2 n mlp of block n, 8 ln_f, 9 head.
SHAPES: dict[str, Segments] = {
    "one block": ((4, 6),),
    "every block": ((2, 4), (4, 6), (6, 8)),
    "half blocks": ((2, 3), (5, 6), (7, 8)),
    "from the middle of one block to the middle of another": ((3, 7),),
    "two that meet in the middle of a block": ((1, 5), (5, 9)),
    "the whole inside": ((1, 9),),
}


@pytest.mark.parametrize("segments", SHAPES.values(), ids=SHAPES.keys())
def test_losses_gradients_and_weights_are_equal_to_the_bit_with_dropout(segments: Segments) -> None:
    assert_same_bits(gpt2(layers=3), segments)


@pytest.mark.parametrize("segments", [((4, 6),), ((3, 7),), ((1, 9),)])
def test_under_bf16_autocast_too(segments: Segments) -> None:
    assert_same_bits(gpt2(layers=3), segments, "bf16")


@pytest.mark.parametrize("segments", [((1, 2),), ((2, 4),), ((1, 3), (3, 5))])
def test_dropout_in_the_glue_drops_the_same_numbers_again(segments: Segments) -> None:
    assert_same_bits(dropout_net(), segments)


@pytest.mark.parametrize("segments", [((1, 2),), ((2, 5),), ((1, 5),)])
def test_batch_norm_updates_its_running_statistics_once(segments: Segments) -> None:
    assert_same_bits(cnn(), segments)


class Products(TorchDispatchMode):
    """Counts matrix products by the number of columns of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default:
            self.count[output.shape[1]] += 1
        return output


def test_a_module_in_a_segment_runs_forward_twice_and_any_other_once() -> None:
    """Widths tell the layers apart. The segment's last product is not needed again: what it makes is not saved."""
    widths = (10, 11, 12, 13, 14)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
    model = nn.Sequential(*layers)
    calls: Counter[str] = Counter()
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    Checkpoints(model, [stretch("2", "6")])
    with Products() as products:
        model(torch.randn(3, 10)).sum().backward()
    assert products.count == {11: 1, 12: 2, 13: 2, 14: 1}
    assert calls["0"] == calls["1"] == calls["6"] == calls["7"] == 1
    assert calls["2"] == calls["3"] == calls["4"] == 2


def test_a_replay_stops_at_the_last_tensor_that_is_needed() -> None:
    """A segment that ends with a Linear: its own product is not saved, so the replay does not make it."""
    model = nn.Sequential(nn.Linear(10, 11), nn.GELU(), nn.Linear(11, 12), nn.Linear(12, 13), nn.Tanh())
    Checkpoints(model, [stretch("1", "3")])
    with Products() as products:
        model(torch.randn(3, 10)).sum().backward()
    assert products.count == {11: 1, 12: 1, 13: 1}


def test_a_segment_may_last_to_the_end_of_the_forward_pass() -> None:
    plain = mlp()
    segmented = copy.deepcopy(plain.model)
    checkpoints = Checkpoints(segmented, [stretch("4", None)])
    batch = plain.batch(3)
    plain.loss(plain.model, batch).backward()
    plain.loss(segmented, batch).backward()
    assert checkpoints.counts == [[1, 1]]
    assert_same_gradients(plain.model, segmented)


def test_a_call_of_a_shared_module_can_begin_a_segment() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Chained(
            lambda m, x: m.out(m.act(m.shared(m.act(m.shared(m.act(m.shared(x))))))),
            shared=nn.Linear(4, 4), act=nn.Tanh(), out=nn.Linear(4, 4),
        )  # fmt: skip

    plain, segmented = build(), build()
    checkpoints = Checkpoints(segmented, [stretch("shared#1", "shared#2")])
    x = torch.randn(3, 4)
    for model in (plain, segmented):
        model(x).sum().backward()
    assert checkpoints.counts == [[1, 1]]
    assert_same_gradients(plain, segmented)


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_removing_leaves_no_hook_and_the_state_dict_never_changes() -> None:
    workload = gpt2()
    keys = list(workload.model.state_dict())
    checkpoints = apply(workload, ((2, 4), (4, 6)))
    assert list(workload.model.state_dict()) == keys
    workload.loss(workload.model, workload.batch(2)).backward()
    assert list(workload.model.state_dict()) == keys
    checkpoints.remove()
    assert list(workload.model.state_dict()) == keys
    assert hooks(workload.model) == 0


def test_an_unknown_module_is_refused_before_anything_changes() -> None:
    model = mlp().model
    with pytest.raises(ValueError, match="'99', which this model has not"):
        Checkpoints(model, [stretch("2", "99")])
    assert hooks(model) == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_forward_pass_that_fails_inside_a_segment_leaves_the_next_one_working(
    error: type[BaseException],
) -> None:
    """Of hooks after a module none is called where it was interrupted."""

    class Fails(nn.Module):
        fail = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fail:
                raise error
            return x * 2

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Fails(), nn.Tanh(), nn.Linear(4, 4))
    plain = copy.deepcopy(model)
    checkpoints = Checkpoints(model, [stretch("1", "4")])
    x = torch.randn(3, 4)
    with pytest.raises(error):
        model(x)
    for each in (model, plain):
        each[2].fail = False
        each(x).sum().backward()
    assert checkpoints.counts[0][1] == 1
    assert _get_current_function_mode() is None
    assert_same_gradients(plain, model)


def test_nothing_watches_within_a_module_that_a_replay_calls_as_a_whole() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            watching.append(_get_current_function_mode())
            return torch.tanh(self.linear(x))

    watching: list[object] = []

    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        x = model.one(x)
        watching.append(_get_current_function_mode())
        return torch.tanh(model.end(model.two(x * 2)))

    model = Chained(forward, one=Asks(), two=Asks(), end=nn.Linear(4, 4))
    Checkpoints(model, [stretch("one", "end")])
    model(torch.randn(3, 4)).sum().backward()
    between = watching.pop(1)
    assert between is not None
    assert watching == [None] * 4  # Both modules, twice each.


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_forward_pass_without_gradients_records_nothing(evaluates: bool) -> None:
    workload = mlp()
    checkpoints = apply(workload, ((1, 5),))
    workload.model.train(not evaluates)
    with torch.no_grad():
        workload.loss(workload.model, workload.batch(2))
    assert checkpoints.counts == [[0, 0]]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(x)


def test_a_custom_function_in_the_glue_of_a_segment_is_refused_and_says_what_to_do() -> None:
    model = Chained(
        lambda m, x: m.c(m.b(Doubled.apply(m.a(x)))), a=nn.Linear(4, 4), b=nn.Tanh(), c=nn.Linear(4, 4)
    )
    Checkpoints(model, [stretch("a", "c")])
    with pytest.raises(
        SegmentError, match=r"DoubledBackward outside of any module.*Put that call into a module"
    ):
        model(torch.randn(2, 4, requires_grad=True) * 1)


def test_a_custom_function_inside_a_module_is_replayed_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Doubling(), nn.Tanh(), nn.Linear(4, 4))
    plain = copy.deepcopy(model)
    Checkpoints(model, [stretch("1", "4")])
    x = torch.randn(3, 4)
    for each in (model, plain):
        each(x).sum().backward()
    assert_same_gradients(plain, model)


def test_an_input_that_was_changed_in_place_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    seen: list[torch.Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    Checkpoints(model, [stretch("1", "3")])
    loss = model(torch.randn(3, 4)).sum()
    with torch.no_grad():
        seen[0].add_(1)
    with pytest.raises(SegmentError, match="changed in place"):
        loss.backward()


class Fickle(nn.Module):
    """Saves more, or fewer, tensors the second time."""

    def __init__(self, *powers: int) -> None:
        super().__init__()
        self.powers = list(powers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.powers.pop(0)):
            x = x.sin()
        return x


def test_a_segment_that_saves_fewer_tensors_the_second_time_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Fickle(3, 1), nn.Linear(4, 4))
    Checkpoints(model, [stretch("1", "2")])
    with pytest.raises(SegmentError, match="fewer tensors than the first time"):
        model(torch.randn(3, 4)).sum().backward()


def peak_bytes(workload: Workload, segments: Segments) -> int:
    checkpoints = apply(workload, segments)
    batch = workload.batch(8)
    with LiveStorages() as live:
        workload.loss(workload.model, batch).backward()
        workload.model.zero_grad(set_to_none=True)
    checkpoints.remove()
    return live.peak_bytes


def test_memory_really_falls() -> None:
    workload = gpt2(layers=3)
    plain = peak_bytes(workload, ())
    assert peak_bytes(workload, ((2, 4), (4, 6), (6, 8))) < 0.55 * plain


def test_a_segment_holds_its_input_and_nothing_else_until_its_backward() -> None:
    """Tanh saves its output, 64 KiB, and the Linear its transposed weight: plain, five outputs are held. Of the
    segment's three the first two were the others' inputs, the last is nobody's: its input and the last output stay."""
    layers = [nn.Linear(64, 64, bias=False), *(nn.Tanh() for _ in range(5))]
    model = nn.Sequential(*layers)
    x = torch.randn(256, 64)
    size = 256 * 64 * 4
    held: list[int] = []
    for segment in ([], [stretch("2", "5")]):
        checkpoints = Checkpoints(model, segment)
        with LiveStorages() as live:
            live.track(model.parameters())
            before = live.live_bytes + 4
            loss = model(x).sum()
            held.append(live.live_bytes - before)
            del loss
        checkpoints.remove()
    assert held == [5 * size, 2 * size]


def test_a_selective_segment_holds_its_input_and_the_products_that_are_needed_again() -> None:
    """Of Tanh, Linear, Tanh, Linear the second product is nobody's input: the input and the first product stay, and
    the last output, which the loss holds; Tanh before keeps its own output, which is the segment's input."""
    model = nn.Sequential(
        nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Tanh(),
        nn.Linear(64, 64, bias=False), nn.Flatten(),
    )  # fmt: skip
    x, size = torch.randn(256, 64), 256 * 64 * 4
    entries = [Call.parse(name) for name in ("2", "6")]
    Checkpoints(model, [Stretch(*entries, keeping="selective")])
    with LiveStorages() as live:
        live.track(model.parameters())
        before = live.live_bytes
        output = model(x)
        assert live.live_bytes - before == 3 * size
        del output


def test_a_segment_that_keeps_narrow_products_runs_the_widening_ones_again() -> None:
    """Of Linear(65, 256), Tanh, Linear(256, 64), Tanh, Tanh the first product is wide and is made again."""
    model = nn.Sequential(
        nn.Linear(64, 65), nn.Tanh(), nn.Linear(65, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Tanh(),
        nn.Linear(64, 63), nn.Flatten(),
    )  # fmt: skip
    entries = [Call.parse(name) for name in ("2", "7")]
    held, made = {}, {}
    for keeping in KEEPINGS:
        checkpoints = Checkpoints(model, [Stretch(*entries, keeping=keeping)])
        with LiveStorages() as live, Products() as products:
            live.track(model.parameters())
            before = live.live_bytes
            output = model(torch.randn(16, 64))
            held[keeping] = live.live_bytes - before
            output.sum().backward()
        made[keeping] = products.count
        checkpoints.remove()
        del output
    assert held["selective"] - held["selective_narrow"] == 16 * 256 * 4
    assert made["selective_narrow"] - made["selective"] == Counter({256: 1})


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1.0)


def test_a_product_that_is_changed_in_place_is_not_kept_in_silence() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), InPlace(), nn.Tanh(), nn.Linear(8, 8))
    Checkpoints(model, [Stretch(Call.parse("1"), Call.parse("5"), keeping="selective")])
    loss = model(torch.randn(4, 8)).sum()
    with pytest.raises(
        SegmentError, match=r"addmm.* was changed in place, so a selective segment cannot keep it"
    ):
        loss.backward()


class Cached(nn.Module):
    """Blocks that leave something in an object that is handed through, and take another way when it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Caching() for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = Cache()
        x = self.first(x)
        for block in self.blocks:
            x = block(x, cache=cache)
        return self.last(x)


class Cache:
    def __init__(self) -> None:
        self.seen: dict[int, list[torch.Tensor]] = {}


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, *, cache: Cache) -> torch.Tensor:
        known = cache.seen.setdefault(id(self), [])
        known.append(torch.tanh(self.linear(x)))
        return x + sum(known)


@pytest.mark.parametrize("nested", [False, True])
def test_a_cache_is_as_it_was_when_the_segment_runs_again(nested: bool) -> None:
    torch.manual_seed(2)
    model, x = Cached(), torch.randn(4, 8)
    gradients = []
    inside = (stretch("blocks.0", "blocks.1"),) if nested else ()
    for segments in ([], [Stretch(Call.parse("blocks.0"), Call.parse("last"), inside=inside)]):
        checkpoints = Checkpoints(model, segments)
        model.zero_grad()
        model(x).sum().backward()
        checkpoints.remove()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


def test_nothing_waits_for_the_garbage_collector() -> None:
    """A forward pass that is never differentiated, and a segment that saves nothing, let go of their inputs."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.AdaptiveAvgPool1d(1), nn.Linear(1, 8))
    Checkpoints(model, [stretch("2", "3")])
    gc.collect()
    gc.disable()
    try:
        with LiveStorages() as live:
            live.track(model.parameters())
            before = live.live_bytes
            for _ in range(3):
                model(torch.randn(4, 8))
            assert live.live_bytes == before
    finally:
        gc.enable()


def test_a_graph_can_be_walked_twice_when_it_is_retained() -> None:
    workload = dropout_net()
    segmented = copy.deepcopy(workload.model)
    Checkpoints(segmented, stretches(discover(workload), Placed(segments=((1, 4),))))
    batch = workload.batch(3)
    for model in (workload.model, segmented):
        torch.manual_seed(3)
        loss = workload.loss(model, batch)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(workload.model, segmented)


def test_two_forward_passes_may_be_open_at_once() -> None:
    workload = dropout_net()
    segmented = copy.deepcopy(workload.model)
    Checkpoints(segmented, stretches(discover(workload), Placed(segments=((1, 3), (3, 5)))))
    batches = [workload.batch(3), workload.batch(2)]
    for model in (workload.model, segmented):
        torch.manual_seed(3)
        sum(workload.loss(model, batch) for batch in batches).backward()
    assert_same_gradients(workload.model, segmented)


def test_the_random_state_after_a_step_is_that_of_a_plain_step() -> None:
    workload = dropout_net()
    after: list[torch.Tensor] = []
    for segments in ((), ((1, 2),)):
        checkpoints = apply(workload, segments)
        torch.manual_seed(5)
        workload.loss(workload.model, workload.batch(3)).backward()
        after.append(torch.get_rng_state())
        checkpoints.remove()
    assert torch.equal(*after)


@pytest.mark.parametrize("build", [mlp, lambda: gpt2(dropout=0.0)])
def test_micro_batches_agree_with_one_large_batch(build: Callable[[], Workload]) -> None:
    """Four micro-batches of two against one batch of eight: mean loss and gradients, to rounding."""
    workload = build()
    stepper = Stepper(
        model=workload.model,
        loss=workload.loss,
        optimizer=torch.optim.SGD(workload.model.parameters(), lr=0.0),
        precision="fp32",
        device_type="cpu",
        max_gradient_norm=None,
    )
    seen: list[list[torch.Tensor]] = []
    stepper.optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad.clone() for p in workload.model.parameters() if p.grad is not None])
    )
    whole = workload.batch(8)
    parts = [
        {name: value[i : i + 2] for name, value in whole.items()}
        if isinstance(whole, dict)
        else tuple(value[i : i + 2] for value in whole)
        for i in range(0, 8, 2)
    ]
    losses = [stepper.step([whole], 1), stepper.step(parts, 4)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for one, many in zip(*seen, strict=True):
        assert torch.linalg.vector_norm(one - many) <= 1e-5 * torch.linalg.vector_norm(one) + 1e-9


@pytest.mark.parametrize(("given", "found"), [(1, "got 1"), (3, "got more")])
def test_a_step_wants_exactly_its_micro_batches(given: int, found: str) -> None:
    workload = mlp()
    stepper = Stepper(
        model=workload.model, loss=workload.loss, optimizer=build_optimizer("sgd", workload.model),
        precision="fp32", device_type="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"gradient_accumulation_steps = 2 micro-batches, {found}"):
        stepper.step([workload.batch(2) for _ in range(given)], 2)


def test_functional_dropout_between_modules_is_part_of_the_recording() -> None:
    model = Chained(lambda m, x: m.b(F.dropout(m.a(x), 0.5)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    Checkpoints(model, [stretch("a", "b")])
    x = torch.randn(4, 8)
    for each in (plain, model):
        torch.manual_seed(1)
        each(x).sum().backward()
    assert_same_gradients(plain, model)


# Deeper and deeper segments of the GPT-2 of three blocks, each before those inside of it.
NESTED: dict[str, Segments] = {
    "the first half again in two": ((1, 9), (1, 5), (5, 7)),
    "three levels from one start": ((1, 9), (1, 6), (1, 3)),
    "three levels with gaps": ((2, 8), (3, 7), (4, 6)),
    "beside each other": ((1, 5), (2, 4), (5, 8), (6, 7)),
}


def runs_forward(length: int, segments: Segments) -> list[int]:
    """How often each stage runs forward: once, and once more for each segment around it."""
    return [1 + sum(start <= stage < stop for start, stop in segments) for stage in range(length)]


@pytest.mark.parametrize("segments", NESTED.values(), ids=NESTED.keys())
def test_segments_inside_segments_leave_losses_gradients_and_weights_equal_to_the_bit(
    segments: Segments,
) -> None:
    assert_same_bits(gpt2(layers=3), segments)


def test_nested_segments_in_a_cnn_update_batch_norms_statistics_once() -> None:
    assert_same_bits(cnn(), ((1, 5), (1, 3)))


@pytest.mark.parametrize("segments", NESTED.values(), ids=NESTED.keys())
def test_every_stage_runs_forward_once_for_each_segment_around_it_and_once_more(segments: Segments) -> None:
    """What a replay calls anew is the modules within a block: a segment may begin or end in its middle."""
    workload = gpt2(layers=3)
    checkpoints = apply(workload, segments)
    entered = [0] * 6
    halves = [half for block in workload.model.transformer.h for half in (block.attn, block.mlp)]
    for i, half in enumerate(halves):

        def count(*_: object, i: int = i) -> None:
            entered[i] += 1

        half.register_forward_pre_hook(count)
    workload.loss(workload.model, workload.batch(2)).backward()
    assert entered == runs_forward(10, segments)[2:8]
    assert checkpoints.counts == [[dropped, 1] for dropped in levels(segments)]


def test_a_segment_inside_saves_memory_that_one_level_cannot() -> None:
    workload = gpt2(layers=3)
    assert peak_bytes(workload, ((1, 9), (1, 5))) < 0.8 * peak_bytes(workload, ((1, 9),))


def test_a_segment_inside_may_end_with_the_one_around_it() -> None:
    workload = gpt2(layers=3)
    torch.manual_seed(5)
    batch = workload.batch(2)
    gradients = []
    for segments in ((), ((2, 8), (5, 8))):
        checkpoints = apply(workload, segments)
        torch.manual_seed(6)
        workload.model.zero_grad()
        workload.loss(workload.model, batch).backward()
        checkpoints.remove()
        gradients.append([p.grad.clone() for p in workload.model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("stages", [(4,), (2, 3, 4, 5, 6, 7), (5, 6)])
@pytest.mark.parametrize("keeping", KEEPINGS)
def test_a_selective_segment_is_equal_to_the_bit_and_keeps_its_products(
    keeping: Keeping, stages: tuple[int, ...]
) -> None:
    workload = gpt2(layers=3)
    model = workload.model
    batch = workload.batch(3)
    entries = [Call.parse(stage.entry) for stage in discover(workload)]

    def gradients() -> tuple[list[torch.Tensor], Counter[int]]:
        torch.manual_seed(3)
        model.zero_grad()
        with Products() as forward:
            loss = workload.loss(model, batch)
        with Products() as backward:
            loss.backward()
        return [
            p.grad.clone() for p in model.parameters() if p.grad is not None
        ], forward.count + backward.count

    plain, products = gradients()
    checkpoints = Checkpoints(
        model, [Stretch(entries[stage], entries[stage + 1], keeping=keeping) for stage in stages]
    )
    same, same_products = gradients()
    assert all(map(torch.equal, plain, same))
    assert len(plain) == len(same) > 0
    # Every half block has one product that widens: to queries, keys and values, or to four times the width.
    again = same_products - products
    assert set(again) <= {3 * 32, 4 * 32}
    assert again.total() == (len(stages) if keeping == "selective_narrow" else 0)
    assert checkpoints.counts == [[1, 1]] * len(stages)


class Refuses(TorchDispatchMode):
    """Refuses memory to one operation of a step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._left == 0:
            raise MemoryError
        self._left -= 1
        return func(*args, **(kwargs or {}))


EVERY = 17
"""Of the some 800 operations of a step; a number that shares no factor with those of a layer."""


@pytest.mark.parametrize(
    ("segments", "keeping"),
    [((), None), (((1, 5), (5, 9)), None), (((1, 5), (5, 9)), "selective"), (((1, 9), (1, 6), (1, 3)), None)],
    ids=["plain", "two segments", "selective", "nested"],
)
def test_a_step_that_is_refused_memory_anywhere_leaves_nothing_behind(
    segments: Segments, keeping: Keeping | None, request: pytest.FixtureRequest
) -> None:
    workload = gpt2(layers=3)
    model, batch = workload.model, workload.batch(2)
    if keeping is None:
        apply(workload, segments)
    else:
        entries = [Call.parse(stage.entry) for stage in discover(workload)]
        Checkpoints(
            model, [Stretch(entries[start], entries[stop], keeping=keeping) for start, stop in segments]
        )
    refused = 0
    gc.freeze()  # So that it need not look at all that was there before.
    request.addfinalizer(gc.unfreeze)
    with LiveStorages() as live:
        live.track((*model.parameters(), *model.buffers(), *batch.values()))
        workload.loss(model, batch).backward()
        model.zero_grad()
        before = live.live_bytes
        while _was_refused(workload, batch, at=EVERY * refused):
            refused += 1
            model.zero_grad()
            gc.collect()
            assert live.live_bytes == before, f"operation {EVERY * (refused - 1)}"
    assert refused > 20


def _was_refused(workload: Workload, batch: Any, at: int) -> bool:
    try:
        with Refuses(at):
            workload.loss(workload.model, batch).backward()
    except MemoryError:
        let_go_of_a_failed_backward()
        return True
    return False
