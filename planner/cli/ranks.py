"""Commands whose plan takes several processes: the first one starts them, and says what they came to.

    planner COMMAND PLAN ...                             not one of several: ``start``
      planner COMMAND PLAN ...   in each                 one of them: executor.launch.as_rank
      the document of rank 0 ◀──────────────────────     said by the first, as that of a plan of one process is

Under a torchrun of the user's the first line falls away, and rank 0 prints its document.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from executor.launch import Ended
    from planner.plan import Plan


def speaking() -> contextlib.AbstractContextManager[Callable[[str], None]]:
    """The progress line; of several processes the first speaks for all."""
    from planner.cli.output import progress

    if int(os.environ.get("RANK", "0")) == 0:
        return progress()
    return contextlib.nullcontext(lambda message: None)


def start(args: argparse.Namespace, plan: Plan) -> Ended:
    """Start the plan's processes on this machine with the command's own words; what failed is said."""
    from executor.launch import crowded, launch

    if (warning := crowded(plan, plan.world_size)) is not None:
        print(f"planner: {warning}", file=sys.stderr, flush=True)
    ended = launch(plan.world_size, ["-m", "planner.cli", *args.words], threads=plan.device.threads)
    if ended.message is not None:
        print(f"planner: {ended.message}", file=sys.stderr)
    return ended
