"""Accumulation that follows the noise: norms against brute force, k against known noise, decisions by hand."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from executor.accumulation import (
    AccumulationController,
    AdaptiveAccumulation,
    Decision,
    GradientSpread,
    OverheadGuard,
    Spread,
    SpreadError,
)
from executor.learning_rate import LearningRate
from executor.recompute import Checkpoints
from planner.nested import Placed, Segments
from profiler.allocator import AllocatorMeter
from profiler.chain import discover
from profiler.noise import signal_and_noise
from profiler.profile_record import Precision
from profiler.step import SILENT, Stepper
from profiler.workload import Workload
from studies.composition import stretches
from tests.models import classifier, cnn, gpt2


def stepper_of(
    workload: Workload,
    *,
    precision: Precision = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    learning_rate: float = 0.0,
    max_gradient_norm: float | None = None,
) -> Stepper:
    return Stepper(
        model=workload.model,
        loss=workload.loss,
        optimizer=torch.optim.SGD(workload.model.parameters(), lr=learning_rate),
        precision=precision,
        device_type="cpu",
        scaler=scaler,
        max_gradient_norm=max_gradient_norm,
    )


def brute_force(stepper: Stepper, micro_batches: Sequence[Any]) -> Spread:
    """Each gradient by itself, on a copy of the model, all of them kept; scaled as the step scales them."""
    k = len(micro_batches)
    model = copy.deepcopy(stepper.model)
    parameters = list(model.parameters())
    scale = 1.0 if stepper.scaler is None else stepper.scaler.get_scale()
    gradients = []
    for micro_batch in micro_batches:
        with stepper.autocast():
            loss = stepper.loss(model, micro_batch) / k
        found = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        flat = [p.new_zeros(p.shape) if g is None else g for p, g in zip(parameters, found, strict=True)]
        gradients.append(torch.cat([g.flatten().double() for g in flat]) * k / scale)
    each = torch.stack(gradients)
    return Spread(
        mean_square=float(each.square().sum(1).mean()),
        square_of_mean=float(each.mean(0).square().sum()),
        k=k,
    )


def observed(stepper: Stepper, batches: Sequence[Any]) -> Spread:
    spread = GradientSpread(stepper)
    stepper.step(batches, len(batches), spread)
    found = spread.take()
    assert found is not None
    return found


def assert_alike(found: Spread, expected: Spread, rel: float = 1e-5) -> None:
    assert found.k == expected.k
    assert found.mean_square == pytest.approx(expected.mean_square, rel=rel)
    assert found.square_of_mean == pytest.approx(expected.square_of_mean, rel=rel)
    assert expected.mean_square > 1.05 * expected.square_of_mean > 0


def with_unused_parameter(workload: Workload) -> Workload:
    workload.model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return workload


# Of a GPT-2 of three blocks: 0 embeddings, 1 drop, then 2 + 2 n attention and 3 + 2 n mlp of block n, 8 ln_f, 9 head.
SEGMENTS: dict[str, Segments] = {
    "plain": (),
    "recomputed": ((2, 4), (4, 6)),
    "nested": ((2, 8), (3, 7), (4, 6)),
}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_the_spread_of_a_model_with_tied_weights_is_that_of_gradients_taken_one_by_one(
    segments: Segments,
) -> None:
    torch.manual_seed(1)
    workload = gpt2(layers=3, dropout=0.0)
    assert workload.model.lm_head.weight is workload.model.transformer.wte.weight
    placed = stretches(discover(workload), Placed(segments=segments))
    stepper = stepper_of(with_unused_parameter(workload))
    batches = [workload.batch(2) for _ in range(3)]
    expected = brute_force(stepper, batches)
    checkpoints = Checkpoints(workload.model, placed)
    assert_alike(observed(stepper, batches), expected)
    assert all(replays == 3 for _, replays in checkpoints.counts)


class Blocks(nn.Module):
    """Three uses of one matrix, two of them in checkpoints one inside the other; one layer in every other batch.

    Reentrant checkpoints do not go into each other.
    """

    def __init__(self, *, reentrant: bool, shared: bool = True) -> None:
        super().__init__()
        self.inlet = nn.Linear(12, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        if shared:
            self.layers[1].weight = self.layers[2].weight = self.layers[0].weight
        self.sometimes = nn.Linear(16, 16)
        self.outlet = nn.Linear(16, 5)
        self.calls = 0
        self._reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.layers[1](x))

        def outer(x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.layers[0](x))
            return inner(x) if self._reentrant else checkpoint(inner, x, use_reentrant=False)

        x = self.layers[2](checkpoint(outer, self.inlet(x), use_reentrant=self._reentrant))
        self.calls += 1
        return self.outlet(self.sometimes(x) if self.calls % 2 else x)


def blocks(*, reentrant: bool, shared: bool = True) -> tuple[Stepper, list[Any]]:
    torch.manual_seed(2)
    workload = with_unused_parameter(classifier(Blocks(reentrant=reentrant, shared=shared), 12))
    return stepper_of(workload), [workload.batch(3) for _ in range(4)]


def test_checkpoints_in_checkpoints_and_parameters_without_a_part_in_some_batches_make_no_difference() -> (
    None
):
    stepper, batches = blocks(reentrant=False)
    assert_alike(observed(stepper, batches), brute_force(stepper, batches))


def test_reentrant_checkpoints_are_observed_as_long_as_no_parameter_is_in_two_backward_passes() -> None:
    stepper, batches = blocks(reentrant=True, shared=False)
    plain, same = blocks(reentrant=False, shared=False)
    assert_alike(observed(stepper, batches), brute_force(plain, same))


def test_a_gradient_that_comes_in_parts_is_refused_and_the_hooks_can_be_taken_off() -> None:
    stepper, batches = blocks(reentrant=True)
    spread = GradientSpread(stepper)
    with pytest.raises(
        SpreadError, match=r"that of layers\.0\.weight came in parts.*use_reentrant=False, or train with"
    ):
        stepper.step(batches, 4, spread)
    spread.remove()
    assert hooks_on(stepper.model) == 0
    stepper.step(batches, 4)


def hooks_on(model: nn.Module) -> int:
    return sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())


def test_hooks_are_there_during_a_backward_pass_only() -> None:
    counts: list[int] = []

    class Watch(GradientSpread):
        def forward_begins(self, micro_batch: int) -> None:
            counts.append(hooks_on(stepper.model))

        def optimizer_begins(self) -> None:
            counts.append(hooks_on(stepper.model))
            super().optimizer_begins()

    stepper, batches = blocks(reentrant=False)
    stepper.step(batches, 4, Watch(stepper))
    assert counts == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_scale_of_a_gradient_scaler_and_clipping_change_nothing(precision: Precision) -> None:
    """The norm before clipping, unscaled; in fp16 both are rounded, each alike."""
    torch.manual_seed(3)
    workload = cnn(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    stepper = stepper_of(workload, precision=precision, scaler=scaler, max_gradient_norm=0.1)
    batches = [workload.batch(2) for _ in range(3)]
    expected = brute_force(stepper, batches)
    assert expected.square_of_mean > 0.1
    assert_alike(observed(stepper, batches), expected)


def test_a_step_that_overflows_has_no_spread_and_the_next_one_has() -> None:
    torch.manual_seed(4)
    workload = classifier(nn.Linear(12, 5), 12)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-30)
    stepper = stepper_of(workload, scaler=scaler)
    batches = [(100 * x, y) for x, y in (workload.batch(2) for _ in range(2))]
    spread = GradientSpread(stepper)
    stepper.step(batches, 2, spread)
    assert spread.take() is None
    stepper.step(batches, 2, spread)
    assert spread.take() is not None


def test_only_what_the_optimizer_trains_counts() -> None:
    torch.manual_seed(5)
    workload = classifier(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5)), 12)
    batches = [workload.batch(2) for _ in range(2)]
    of_all = observed(stepper_of(workload), batches)
    trained = copy.deepcopy(workload.model)
    trained[0].requires_grad_(False)
    of_one = observed(stepper_of(Workload(model=trained, batch=workload.batch, loss=workload.loss)), batches)
    stepper = stepper_of(workload)
    del stepper.optimizer.param_groups[0]["params"][:2]
    assert observed(stepper, batches) == of_one != of_all


def test_a_spread_is_taken_once_after_a_step() -> None:
    stepper, batches = blocks(reentrant=False)
    spread = GradientSpread(stepper)
    with pytest.raises(RuntimeError, match="once after each step"):
        spread.take()
    stepper.step(batches, 4, spread)
    spread.take()
    with pytest.raises(RuntimeError, match="once after each step"):
        spread.take()


def test_observing_takes_no_memory_but_for_scalars() -> None:
    """A norm and its square for each of 8 matrices of a megabyte; a second gradient would be that much."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
    workload = Workload(
        model=model, batch=lambda size: torch.randn(size, 512), loss=lambda model, x: model(x).square().mean()
    )
    stepper = stepper_of(workload)
    batches = [workload.batch(2) for _ in range(3)]

    def peak_bytes(observer: Any) -> int:
        stepper.step(batches, 3, observer)
        gc.collect()
        with AllocatorMeter() as meter:
            stepper.step(batches, 3, observer)
        return meter.peak_bytes

    plain = peak_bytes(SILENT)
    assert plain > 8 * 2**20
    assert plain <= peak_bytes(GradientSpread(stepper)) < plain + 1024


class Waits(TorchDispatchMode):
    """Counts how often a number is asked of a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        return self.count[torch.ops.aten._local_scalar_dense.default]


def test_nothing_in_an_observed_step_waits_for_the_device() -> None:
    stepper, batches = blocks(reentrant=False)
    counts = []
    for observer in (SILENT, GradientSpread(stepper)):
        with Waits() as mode:
            stepper.step(batches, 4, observer)
        counts.append((mode.waits, mode.count[torch.ops.aten.linalg_vector_norm.default]))
    (plain, few), (watched, many) = counts
    assert watched == plain
    assert many > few


# Gradients (3, 0) and (1, 2) of 5 samples each: the mean is (2, 1). sigma^2 = |(1, -1)|^2 + |(-1, 1)|^2 = 4, |G|^2 = 3
# is their inner product, and tr(Sigma) = 5 sigma^2.
BY_HAND: dict[str, Any] = {"mean_square": (9 + 5) / 2, "square_of_mean": 5.0, "k": 2, "micro_batch_size": 5}


def settings(**changed: Any) -> AdaptiveAccumulation:
    return AdaptiveAccumulation(**{"k_max": 16, "smoothing": 0.0, "patience": 1, **changed})


@pytest.mark.parametrize(
    ("rule", "target", "k_max", "wanted"),
    [
        ("absolute", 1.0, 16, 4),
        ("absolute", 0.5, 16, 8),
        ("absolute", 1.5, 16, 3),
        ("absolute", 0.25, 12, 12),
        ("absolute", 100.0, 16, 2),
        ("relative", 0.5, 16, 3),
        ("relative", 0.25, 16, 6),
        ("relative", 0.1, 16, 14),
        ("relative", 0.1, 12, 12),
        ("relative", 1.0, 16, 2),
    ],
)
def test_the_rules_by_hand(rule: Any, target: float, k_max: int, wanted: int) -> None:
    controller = AccumulationController(settings(rule=rule, target=target, k_max=k_max), 2)
    decision = controller.observe(**BY_HAND)
    assert decision.wanted == wanted
    assert decision.noise_scale_samples == pytest.approx(20 / 3)


squares = st.floats(1e-6, 1e6)


@given(st.integers(2, 9), squares, st.floats(0, 1), squares, st.integers(2, 40))
def test_the_absolute_rule_is_the_formula(
    k: int, mean_square: float, share: float, target: float, k_max: int
) -> None:
    square_of_mean = share * mean_square
    variance = (mean_square - square_of_mean) * k / (k - 1)
    controller = AccumulationController(settings(rule="absolute", target=target, k_max=k_max), 2)
    found = controller.observe(mean_square, square_of_mean, k, 7).wanted
    expected = min(k_max, math.ceil(variance / (target + 1e-12)))
    near = abs(variance / target - round(variance / target)) < 1e-9 * max(1.0, variance / target)
    assert found == max(2, expected) or (near and abs(found - expected) <= 1)


def told(controller: AccumulationController, signal: float, variance: float, k: int = 4) -> Decision:
    """A step whose unbiased estimates are these, of micro-batches of one sample."""
    return controller.observe(signal + variance, signal + variance / k, k, 1)


def test_k_moves_one_at_a_time_after_as_many_observations_in_a_row_as_patience_says() -> None:
    controller = AccumulationController(settings(patience=3), 4)
    assert [told(controller, 1.0, 12.0).k for _ in range(7)] == [4, 4, 5, 5, 5, 6, 6]
    assert [told(controller, 1.0, 1.0).k for _ in range(7)] == [6, 6, 5, 5, 5, 4, 4]
    assert controller.k == 4


def test_what_it_wants_on_the_other_side_or_nowhere_begins_the_count_anew() -> None:
    controller = AccumulationController(settings(patience=3), 4)
    for variance in (12.0, 12.0, 4.0, 12.0, 12.0, 3.0, 3.0, 12.0, 12.0):
        decision = told(controller, 1.0, variance)
        assert (decision.k, decision.changed) == (4, False)
        assert decision.wanted == variance
    decision = told(controller, 1.0, 12.0)
    assert (decision.k, decision.changed) == (5, True)


def test_at_its_bounds_it_stays() -> None:
    controller = AccumulationController(settings(k_min=3, k_max=5), 4)
    assert [told(controller, 1.0, 1e9).k for _ in range(3)] == [5, 5, 5]
    assert [told(controller, 1.0, 1e-9).k for _ in range(4)] == [4, 3, 3, 3]


def test_signal_and_noise_are_averaged_apart_from_the_first_observation_on() -> None:
    """Of 3/4 of the past: the weights are 3/16 and 1/4, divided by their sum. A mean of ratios would be above 400."""
    controller = AccumulationController(settings(smoothing=0.75, rule="absolute", k_max=100), 2)
    first = told(controller, 0.01, 10.0)
    assert first.noise_scale_samples == pytest.approx(1000.0)
    assert first.wanted == 10
    second = told(controller, 3.0, 24.0)
    assert second.noise_scale_samples == pytest.approx((3 * 10 + 4 * 24) / (3 * 0.01 + 4 * 3))
    assert second.wanted == math.ceil((3 * 10 + 4 * 24) / 7)


def test_a_gradient_lost_in_noise_wants_all_there_are_and_one_without_noise_the_fewest() -> None:
    controller = AccumulationController(settings(), 4)
    lost = told(controller, -0.5, 6.0)
    assert (lost.wanted, lost.noise_scale_samples) == (16, None)
    found = told(controller, 2.0, 6.0)
    assert (found.wanted, found.noise_scale_samples) == (3, pytest.approx(3.0))
    assert told(controller, 2.0, 0.0).wanted == 2
    assert told(controller, 0.0, 0.0).wanted == 2


def test_settled_at_one_micro_batch_every_nth_step_is_a_probing_step_of_two() -> None:
    controller = AccumulationController(settings(k_min=1, probe_every=4, patience=2), 1)
    ran: list[int] = []
    for variance in [0.5] * 9 + [1.5] * 8:
        ran.append(controller.k)
        if controller.k == 1:
            controller.skip()
        else:
            told(controller, 1.0, variance, k=2)
    assert ran == [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2, 2]


def test_a_probing_step_that_overflowed_is_run_again() -> None:
    controller = AccumulationController(settings(k_min=1, probe_every=3), 1)
    ran = []
    for _ in range(5):
        ran.append(controller.k)
        controller.skip()
    assert ran == [1, 1, 2, 2, 2]


def test_before_the_first_observation_nothing_is_known_and_skipping_changes_nothing() -> None:
    controller = AccumulationController(settings(), 4)
    for _ in range(30):
        controller.skip()
    assert (controller.k, controller.noise_scale_samples) == (4, None)


observations = st.lists(
    st.one_of(st.none(), st.tuples(st.floats(0, 1e3), st.floats(0, 1), st.integers(2, 8))), max_size=40
)
any_settings = st.builds(
    settings,
    k_max=st.integers(6, 9),
    k_min=st.integers(1, 4),
    rule=st.sampled_from(["relative", "absolute"]),
    smoothing=st.floats(0, 0.99),
    patience=st.integers(1, 4),
    probe_every=st.integers(2, 5),
)


def follow(controller: AccumulationController, steps: Iterable[Any]) -> list[Any]:
    decisions: list[Any] = []
    for step in steps:
        if step is None:
            decisions.append(controller.skip())
        else:
            mean_square, share, k = step
            decisions.append(controller.observe(mean_square, share * mean_square, k, 3))
    return decisions


def test_patience_and_the_wait_for_a_probing_step_go_on_where_they_were() -> None:
    def resumed(controller: AccumulationController, how: AdaptiveAccumulation) -> AccumulationController:
        again = AccumulationController(how, how.k_max)
        again.restore(json.loads(json.dumps(controller.state())))
        return again

    how = settings(patience=3)
    controller = AccumulationController(how, 4)
    assert [told(controller, 1.0, 12.0).k, told(controller, 1.0, 12.0).k] == [4, 4]
    assert told(resumed(controller, how), 1.0, 12.0).k == 5
    how = settings(k_min=1, probe_every=3)
    controller = AccumulationController(how, 1)
    follow(controller, [None, None])
    assert resumed(controller, how).k == 2


@given(any_settings, observations, observations)
def test_restored_from_json_half_way_it_decides_the_same_to_the_bit(
    how: AdaptiveAccumulation, before: list[Any], after: list[Any]
) -> None:
    controller = AccumulationController(how, 5)
    follow(controller, before)
    saved = json.loads(json.dumps(controller.state()))
    resumed = AccumulationController(how, how.k_max)
    resumed.restore(saved)
    assert resumed.k == controller.k
    assert follow(resumed, after) == follow(controller, after)
    assert resumed.state() == controller.state()


@given(any_settings, observations)
def test_k_stays_in_its_bounds_and_moves_by_one(how: AdaptiveAccumulation, steps: list[Any]) -> None:
    controller = AccumulationController(how, 5)
    settled = [controller.state()["k"]]
    for step in steps:
        for decision in follow(controller, [step]):
            assert decision is None or decision.changed == (controller.state()["k"] != settled[-1])
            assert decision is None or decision.k == controller.k
        settled.append(controller.state()["k"])
        assert how.k_min <= settled[-1] <= how.k_max
        assert controller.k == settled[-1] or (settled[-1], controller.k) == (1, 2)
    assert all(abs(after - before) <= 1 for before, after in itertools.pairwise(settled))


@given(squares, squares, st.floats(1, 100), st.sampled_from(["relative", "absolute"]))
def test_more_noise_never_wants_fewer_micro_batches(
    signal: float, variance: float, times: float, rule: Any
) -> None:
    wanted = [
        told(AccumulationController(settings(rule=rule, k_max=1000), 2), signal, noise).wanted
        for noise in (variance, times * variance)
    ]
    assert wanted == sorted(wanted)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": "seed"}, "rule must be one of relative, absolute, got 'seed'"),
        ({"target": 0.0}, "target must be positive and finite, got 0.0"),
        ({"target": math.inf}, "target must be positive and finite, got inf"),
        ({"k_min": 0}, "got k_min = 0 and k_max = 16"),
        ({"k_min": 1, "k_max": 1}, "k_max at least 2 and k_min, got k_min = 1 and k_max = 1"),
        ({"k_min": 9, "k_max": 8}, "got k_min = 9 and k_max = 8"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1, got 1.0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"probe_every": 1}, "probe_every must be at least 2, got 1.*set k_min to 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 1}, "at least 2 micro-batches of at least 1 sample, got 1 of 5.*call skip"),
        ({"micro_batch_size": 0}, "got 2 of 0"),
        ({"mean_square": math.nan}, "finite and not negative, got nan and 5.0.*call skip"),
        ({"square_of_mean": math.inf}, "got 7.0 and inf"),
        ({"mean_square": -1.0}, "got -1.0 and 5.0"),
    ],
)
def test_an_observation_that_cannot_be_is_refused_and_changes_nothing(
    wrong: dict[str, Any], message: str
) -> None:
    controller = AccumulationController(settings(), 2)
    before = controller.state()
    with pytest.raises(ValueError, match=message):
        controller.observe(**{**BY_HAND, **wrong})
    assert controller.state() == before


def test_a_k_out_of_bounds_and_a_state_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="from k_min = 2 to k_max = 16, got 17"):
        AccumulationController(settings(), 17)
    controller = AccumulationController(settings(), 3)
    before = controller.state()
    for wrong, message in (
        ({**before, "k": 1}, "from k_min = 2 to k_max = 16, got 1"),
        ({**before, "signal": None}, "got k: int.*signal: NoneType.*another version"),
        ({"k": 3}, "must be k: int, .*got k: int. It"),
        ({}, "got nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            controller.restore(wrong)  # type: ignore[arg-type]
        assert controller.state() == before


class Bowl(nn.Module):
    """The loss of sample z at weights w is |w|^2 / 2 + z w: its gradient is w + z, so G = w and Sigma is that of z."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.weight.square().sum() / 2 + (z @ self.weight).mean()


def bowl(weight: torch.Tensor, learning_rate: float = 0.0) -> Stepper:
    return stepper_of(
        Workload(model=Bowl(weight), batch=torch.ones, loss=lambda model, z: model(z)),
        learning_rate=learning_rate,
    )


@pytest.mark.parametrize(("k", "b"), [(2, 4), (6, 2)])
def test_known_signal_and_noise_are_found_within_their_sampling_error(k: int, b: int) -> None:
    """Noise of another size in each of 32 directions; within four standard errors of 200 steps."""
    torch.manual_seed(6)
    deviations = torch.linspace(0.1, 2.0, 32)
    weight = torch.linspace(-0.3, 0.5, 32)
    stepper, found = bowl(weight), []
    for _ in range(200):
        spread = observed(stepper, [torch.randn(b, 32) * deviations for _ in range(k)])
        found.append(
            signal_and_noise(spread.mean_square, spread.square_of_mean, micro_batch_size=b, micro_batches=k)
        )
    for estimates, truth in zip(
        zip(*found, strict=True), (weight.square().sum(), deviations.square().sum()), strict=True
    ):
        error = statistics.stdev(estimates) / math.sqrt(len(estimates))
        assert abs(statistics.fmean(estimates) - float(truth)) < 4 * error < 0.5 * float(truth)


def test_k_follows_the_noise_scale_while_training_converges_and_the_learning_rate_follows_k() -> None:
    """4,096 directions of noise 0.1; |w|^2 begins where 2 micro-batches of 3 are the noise scale and falls to a fifth.

    So k has to go from 2 to 10, and is never more than one off. All the while the rate for a sample is what it would be
    with a fixed batch of 12, and the run ends with the same sample.
    """
    torch.manual_seed(7)
    b, deviation, dimensions = 3, 0.1, 4096
    rate = LearningRate(peak=0.002, total_samples=9000, reference_batch_size=12, warm_up_share=0.02)
    stepper = bowl(torch.full((dimensions,), deviation / math.sqrt(2 * b)))
    controller = AccumulationController(settings(k_max=64, smoothing=0.7), 2)
    spread, seen, ks, in_theory, per_sample = GradientSpread(stepper), 0, [], [], {}
    while seen < rate.total_samples:
        k = min(controller.k, (rate.total_samples - seen) // b)
        signal = float(stepper.model.weight.detach().square().sum())
        ks.append(k)
        in_theory.append(math.ceil(dimensions * deviation**2 / signal / b))
        stepper.optimizer.param_groups[0]["lr"] = rate.at(seen, k * b)
        per_sample[seen] = stepper.optimizer.param_groups[0]["lr"] / (k * b)
        stepper.step([deviation * torch.randn(b, dimensions) for _ in range(k)], k, spread)
        found = spread.take()
        assert found is not None
        seen += k * b
        if k > 1:
            controller.observe(found.mean_square, found.square_of_mean, k, b)
    assert seen == rate.total_samples
    assert max(ks) >= 10 > 2 == ks[0]
    assert all(abs(k - theory) <= 1 for k, theory in zip(ks[:-1], in_theory, strict=False))
    risen = rate.warm_up_share * rate.total_samples
    assert all(each == pytest.approx(rate.at(at, 12) / 12) for at, each in per_sample.items() if at >= risen)


def alternate(guard: OverheadGuard, seconds: Callable[[bool], float], steps: int, k: int = 4) -> list[bool]:
    observed = []
    for _ in range(steps):
        observed.append(guard.observes_next)
        guard.stepped(seconds(observed[-1]), k=k, observed=observed[-1])
    return observed


def test_what_costs_twice_its_share_is_observed_every_other_step() -> None:
    guard = OverheadGuard(share=0.125, steps=3)
    assert guard.every is None
    assert alternate(guard, lambda watched: 1.25 if watched else 1.0, 6) == [True, False] * 3
    assert guard.every == 2
    assert alternate(guard, lambda watched: 9.0, 5) == [True, False, True, False, True]


def test_what_costs_no_more_than_its_share_is_observed_in_every_step() -> None:
    guard = OverheadGuard(share=0.125, steps=3)
    alternate(guard, lambda watched: 1.125 if watched else 1.0, 6)
    assert guard.every == 1
    assert alternate(guard, lambda watched: 1.0, 3) == [True] * 3
    faster = OverheadGuard(share=0.125, steps=3)
    alternate(faster, lambda watched: 0.5 if watched else 1.0, 6)
    assert faster.every == 1


def test_one_slow_step_does_not_decide() -> None:
    guard, slow = OverheadGuard(share=0.125, steps=3), iter([99.0])
    alternate(guard, lambda watched: next(slow, 1.25) if watched else 1.0, 6)
    assert guard.every == 2


def test_only_steps_of_as_many_micro_batches_are_compared() -> None:
    guard = OverheadGuard(share=0.125, steps=2)
    alternate(guard, lambda watched: 7.0 if watched else 1.0, 3, k=3)
    alternate(guard, lambda watched: 0.1, 5, k=1)
    alternate(guard, lambda watched: 1.25 if watched else 1.0, 3)
    assert guard.every is None
    alternate(guard, lambda watched: 1.25 if watched else 1.0, 1)
    assert guard.every == 2


def test_what_was_decided_outlives_the_process() -> None:
    guard = OverheadGuard(share=0.125, steps=2)
    alternate(guard, lambda watched: 1.375 if watched else 1.0, 4)
    alternate(guard, lambda watched: 1.0, 1)
    resumed = OverheadGuard(share=0.125, steps=2)
    resumed.restore(json.loads(json.dumps(guard.state())))
    assert resumed.every == guard.every == 3
    expected = [True, False, False, True, False, False, True]
    assert alternate(guard, lambda watched: 1.0, 7) == expected
    assert alternate(resumed, lambda watched: 1.0, 7) == expected
    with pytest.raises(ValueError, match="must be every: int, since: int, got nothing"):
        resumed.restore({})


@pytest.mark.parametrize(("share", "steps"), [(0.0, 3), (0.02, 0)])
def test_a_guard_that_cannot_decide_is_refused(share: float, steps: int) -> None:
    with pytest.raises(ValueError, match=f"got {share} and {steps}"):
        OverheadGuard(share=share, steps=steps)
