"""Train the plan's model.

Built-in workloads bring data that every machine has; every workload of tokens or of images trains on folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli import arguments, ranks

if TYPE_CHECKING:
    from executor import TrainingReport
    from planner.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="a file made by planner optimize")
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        help="a folder or file of text or images: text files, CIFAR-10, parquet, JSON, CSV (default: data at hand)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        metavar="N",
        type=arguments.count,
        help="optimizer steps (default: 20, and with --until at most 1000)",
    )
    length.add_argument("--epochs", metavar="N", type=arguments.count, help="passes over the data")
    parser.add_argument(
        "--until",
        metavar="METRIC=VALUE",
        type=arguments.reached,
        help="stop when data held out says so: accuracy=0.85, perplexity=45, loss=3.2",
    )
    parser.add_argument(
        "--evaluate-every",
        metavar="N",
        type=arguments.count,
        help="steps between looks at data held out (default: 20 looks with --until, else none)",
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=arguments.output_folder,
        help="for weights, metrics, checkpoints and the report (default: none kept)",
    )
    parser.add_argument(
        "--save-every",
        metavar="N",
        type=arguments.count,
        help="steps between checkpoints (default: 10 minutes)",
    )
    parser.add_argument(
        "--keep", metavar="N", type=arguments.count, default=2, help="checkpoints to keep (default: 2)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoint, or begin if there is none",
    )
    parser.add_argument(
        "--nproc",
        metavar="N",
        type=arguments.count,
        help="processes to start on this machine (default: the plan's; under torchrun, none)",
    )
    parser.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=arguments.positive,
        default=1e-4,
        help="at the top of its course: 5%% of the run up, then down as a cosine (default: 1e-4)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=arguments.count_or_none,
        default=0,
        help="of weights and order (default: 0)",
    )
    parser.add_argument(
        "--adaptive",
        metavar="RULE",
        choices=("relative", "absolute"),
        help="let gradient accumulation follow the gradient's noise: relative to the gradient, or the variance itself",
    )
    parser.add_argument(
        "--noise-target",
        metavar="X",
        type=arguments.positive,
        help="the variance that a step's gradient may have, in the terms of --adaptive (default: 1, relative)",
    )
    parser.add_argument(
        "--most-accumulation",
        metavar="K",
        type=arguments.count,
        help="micro-batches in a step at most, with --adaptive (default: four times the plan's)",
    )


def run(args: argparse.Namespace) -> int:
    from planner.plan import load_plan

    _check_adaptive(args)
    plan = load_plan(args.plan)
    from executor.launch import as_rank, is_rank

    if is_rank():
        return as_rank(lambda hand_over: _train_as_rank(args, plan, hand_over))
    if args.nproc is not None and args.nproc != plan.world_size:
        from executor.errors import PlanDoesNotFit

        raise PlanDoesNotFit(
            f"--nproc must be the plan's world_size, {plan.world_size}, got {args.nproc}: memory and global batch are "
            f"for as many processes. Optimise with --world-size {args.nproc}."
        )
    if plan.world_size > 1:
        return _start(args, plan)
    report = _trained(args, plan)
    _say(args, plan, report)
    return 0


def _start(args: argparse.Namespace, plan: Plan) -> int:
    """Start the plan's processes on this machine, and say what they came to."""
    from executor.training import TrainingReport
    from profiler import records

    ended = ranks.start(args, plan)
    if ended.document is not None and ended.status == 0:
        _say(args, plan, records.decode(ended.document, TrainingReport))
    return ended.status


def _train_as_rank(args: argparse.Namespace, plan: Plan, hand_over: Callable[[bytes], None]) -> int:
    """One of several processes, of whoever started it."""
    from executor import distributed
    from executor.errors import Interrupted
    from profiler import records

    rank = distributed.join(plan.device.kind, plan.device.threads)
    distributed.check_same_plan(plan)
    try:
        hand_over(records.encode(_trained(args, plan)))
    except Interrupted as stopped:
        if rank == 0:
            print(f"planner: {stopped}", file=sys.stderr)
        distributed.leave()
        return 128 + stopped.signal_number
    distributed.leave()
    return 0


def _say(args: argparse.Namespace, plan: Plan, report: TrainingReport) -> None:
    from profiler import records

    if args.json:
        sys.stdout.write(records.encode(report).decode())
    else:
        show(plan, report, args.output_dir)


def _trained(args: argparse.Namespace, plan: Plan) -> TrainingReport:
    with ranks.speaking() as tell:
        tell("loading torch")
        import executor
        from executor.training import Progress

        class Told(Progress):
            def begins(self, data: str, steps: int) -> None:
                tell(f"{steps} steps on {data}")

            def stepped(self, step: int, steps: int, loss: float, samples_per_second: float) -> None:
                tell(f"step {step} of {steps}  loss {loss:.4f}  {samples_per_second:.2f} samples/s")

            def announced(self, message: str) -> None:
                print(f"planner: {message}", file=sys.stderr, flush=True)

        adaptive = None
        if args.adaptive is not None:
            from executor.accumulation import AdaptiveAccumulation

            most = args.most_accumulation or max(2, 4 * plan.gradient_accumulation_steps)
            adaptive = AdaptiveAccumulation(rule=args.adaptive, target=args.noise_target or 1.0, k_max=most)
        return executor.train(
            plan,
            args.data,
            args.output_dir,
            steps=args.steps,
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            seed=args.seed,
            save_every=args.save_every,
            keep=args.keep,
            resume=args.resume,
            until=args.until,
            evaluate_every=args.evaluate_every,
            adaptive=adaptive,
            progress=Told(),
        )


def _check_adaptive(args: argparse.Namespace) -> None:
    if args.adaptive is None:
        for flag, value in (
            ("--noise-target", args.noise_target),
            ("--most-accumulation", args.most_accumulation),
        ):
            if value is not None:
                raise ValueError(f"{flag} is about accumulation that follows the noise. Give --adaptive too.")
    if args.adaptive == "absolute" and args.noise_target is None:
        raise ValueError(
            "--adaptive absolute needs the variance that a step's gradient may have, and there is no natural one. "
            "Give --noise-target, or take --adaptive relative."
        )


def show(plan: Plan, report: TrainingReport, output_dir: Path | None) -> None:
    """What the run came to."""
    from planner.cli.output import console, facts, heading, of_bytes, of_duration, of_joules, of_seconds

    out = console()
    predicted, measured = report.predicted, report.measured
    out.print(heading(f"{plan.model}: {report.steps} steps, {report.samples} samples"))
    out.print()
    time = f"{of_seconds(measured.step_seconds)}, predicted {of_seconds(predicted.step_seconds)}"
    peak = f"{of_bytes(measured.peak_memory_bytes)}, predicted {of_bytes(predicted.peak_memory_bytes)}"
    rows = [
        ("data", report.data),
        ("loss", f"{report.first_loss:.4f} at first, {report.final_loss:.4f} at last"),
        ("step time", time),
        ("peak memory", peak),
    ]
    if measured.step_joules is not None:
        rows.append(("energy", f"{of_joules(measured.step_joules)} a step"))
    if report.model_flops_per_second is not None:
        rate = f"{report.model_flops_per_second / 1e9:.1f} GFLOP/s of the model's"
        if report.model_flops_utilisation is not None:
            rate += f", {report.model_flops_utilisation:.1%} of the device's"
        rows.append(("rate", f"{report.samples_per_second:.2f} samples/s, {rate}"))
    if report.waiting_share is not None:
        rows.append(("for data", f"waited {report.waiting_share:.1%} of the time"))
    if report.reached is not None:
        rows.append(("target", _target(report)))
    if report.skipped_steps:
        rows.append(
            ("no update", f"{report.skipped_steps} steps, whose gradients overflowed or were not finite")
        )
    if report.gradient_accumulation_steps != plan.gradient_accumulation_steps and not report.fallbacks:
        rows.append(
            ("micro-batches", f"{report.gradient_accumulation_steps} a step at last, by the gradient's noise")
        )
    rows += [("fell back", each) for each in report.fallbacks]
    if report.resumed_after_steps:
        rows.append(("resumed", f"after step {', '.join(map(str, report.resumed_after_steps))}"))
    rows.append(("in all", of_duration(report.seconds)))
    if output_dir is not None:
        rows.append(("written to", str(output_dir)))
    out.print(facts(rows))


def _target(report: TrainingReport) -> str:
    from planner.cli.output import of_duration

    reached = report.reached
    assert reached is not None
    if reached.seconds is None:
        last = "" if reached.value is None else f"; it came to {reached.value:.4g}"
        return f"{reached.target} was not reached{last}"
    return (
        f"{reached.target} reached with {reached.value:.4g} after {reached.step} steps, {reached.samples} samples, "
        f"{of_duration(reached.seconds)}"
    )
