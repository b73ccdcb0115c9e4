"""The command line: ``planner profile | optimize | explain | export | report | verify | train | dashboard | devices``.

A command parses its flags, calls the library, and prints; it imports what it needs when it runs, so that help
comes at once. What was asked for goes to stdout, everything else to stderr, and the exit code says how it
ended:

    0    done
    1    a bug: its traceback is shown
    2    bad usage or bad input: one line names the flag or file, the rule, the facts and the way out
    3    no plan fits the memory budget
    4    the profile or plan is for something else: another device or model, a precision not profiled
    5    verification failed
    6    out of memory, in training with no plan left that needs less; or training diverged
    130  interrupted; 143 where it was asked to end (SIGTERM)

Our own refusals are ValueErrors, and a bug may end in a ValueError too. What tells them apart is where it
comes from: a refusal is a ``raise`` statement in a module of ours, while a bug's comes out of a call, an
unpacking or a conversion. So one line and exit code 2 are for ValueErrors that our own code says in so many
words; any other shows its traceback. What a workload of the user's raises is a refusal too: profiling tries every
call of it first, and says in one line which call, which module and which line of the user's it was.
"""

from __future__ import annotations

import argparse
import linecache
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from planner.cli import dashboard, devices, explain, export, optimize, profile, report, train, verify

COMMANDS = (profile, optimize, explain, export, report, verify, train, dashboard, devices)
OURS = {"planner", "profiler", "executor"}

BROKEN_PIPE = 141
"""128 + SIGPIPE: how a shell reports a program whose reader went away."""


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaint in one line."""

    def error(self, message: str) -> NoReturn:
        message = message.rstrip(".")
        self.exit(2, f"planner: {message[0].lower()}{message[1:]}. See {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    arguments.words = list(sys.argv[1:] if argv is None else argv)  # For the processes that a command starts.
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("planner: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        outcome = _outcome(error)
        if outcome is None:
            raise
        print(f"planner: {' '.join(str(error).split())}", file=sys.stderr)
        return outcome
    return code


def _parser() -> argparse.ArgumentParser:
    names = [module.__name__.rpartition(".")[2] for module in COMMANDS]
    summaries = [(module.__doc__ or "").partition("\n")[0] for module in COMMANDS]
    listed = "\n".join(f"  {name:11}{summary}" for name, summary in zip(names, summaries, strict=True))
    parser = _Parser(
        prog="planner",
        description=f"Profiles a PyTorch model, finds the cheapest plan that fits, trains with it.\n\n{listed}",
        epilog="Start with: planner profile gpt2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        metavar="COMMAND", required=True, help="planner COMMAND --help tells what it takes"
    )
    for name, summary, module in zip(names, summaries, COMMANDS, strict=True):
        command = commands.add_parser(name, description=summary)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        command.set_defaults(run=module.run)
    return parser


def _outcome(error: Exception) -> int | None:
    """The exit code of an error of ours; None for a bug."""
    from planner.plan import NoFeasiblePlan
    from planner.search import PrecisionNotProfiled
    from planner.what_if import OtherProfile

    if isinstance(error, NoFeasiblePlan):
        return 3
    mismatches: tuple[type[Exception], ...] = (PrecisionNotProfiled, OtherProfile)
    if "executor.errors" in sys.modules:
        from executor.errors import Interrupted, NotFinite, OutOfMemory, PlanDoesNotFit

        if isinstance(error, Interrupted):
            return 128 + error.signal_number
        if isinstance(error, NotFinite | OutOfMemory):
            return 6
        mismatches += (PlanDoesNotFit,)
    if isinstance(error, mismatches):
        return 4
    if isinstance(error, ValueError | TypeError) and _is_refusal(error):
        return 2
    if "torch" in sys.modules:
        from profiler.device import is_out_of_memory

        if is_out_of_memory(error):
            return 6
    return None


def _is_refusal(error: Exception) -> bool:
    """Whether a ``raise`` statement in a module of ours made it."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    statement = linecache.getline(frame.f_code.co_filename, line, frame.f_globals)
    return package in OURS and statement.lstrip().startswith("raise ")
