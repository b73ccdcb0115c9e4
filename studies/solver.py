"""How long the placement solver takes for all budgets at once.

    frontier(chain)                 one level of recomputation
    frontier(chain, nested=True)    any depth

The chains are those of tests/data/chains.json, whose frontiers must come out as published, and one of 340 random
stages. "First" is the first call in a fresh process, after the import: compiled loops are read from the disk then, or
compiled where they never ran before.

    python -m studies.solver
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from planner.placement import Chain, frontier

CHAINS = Path(__file__).parent.parent / "tests" / "data" / "chains.json"
REPEATS = 5
LONG = 340


def published() -> dict[str, tuple[Chain, dict[str, list[list[int]]]]]:
    """Chains by name, each with its published frontiers."""
    return {
        entry["name"]: (
            chain_of(entry), {"single": entry["single_frontier"], "nested": entry["nested_frontier"]}
        )
        for entry in json.loads(CHAINS.read_text())["chains"]
    }  # fmt: skip


def chain_of(entry: dict[str, Any]) -> Chain:
    """A chain as the published ones are written."""
    return Chain(
        forward=tuple(entry["f"]),
        backward=tuple(entry["b"]),
        input=tuple(entry["x"]),
        kept=tuple(entry["xb"]),
        forward_transient=tuple(entry["tf"]),
        backward_transient=tuple(entry["tb"]),
    )


def long_chain(length: int = LONG, seed: int = 7) -> Chain:
    """Stages like those of the published random chain of 200."""
    generator = random.Random(seed)

    def numbers(low: int, high: int, count: int = length) -> tuple[int, ...]:
        return tuple(generator.randint(low, high) for _ in range(count))

    return Chain(
        forward=numbers(5, 160),
        backward=numbers(10, 320),
        input=numbers(1, 3, length + 1),
        kept=numbers(1, 6),
        forward_transient=numbers(0, 2),
        backward_transient=numbers(0, 2),
    )


def chains() -> dict[str, tuple[Chain, dict[str, list[list[int]]]]]:
    return published() | {f"random, L = {LONG}": (long_chain(), {})}


def seconds(chain: Chain, nested: bool) -> tuple[float, float]:
    """Of the first call and the fastest."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        frontier(chain, nested=nested)
        taken.append(time.perf_counter() - began)
    return taken[0], min(taken)


def first_call(name: str, nested: bool) -> float:
    """Of a call in a process that has imported the solver and done nothing else."""
    code = (
        "import sys, time; from planner.placement import frontier; from studies.solver import chains; "
        f"chain = chains()[{name!r}][0]; began = time.perf_counter(); frontier(chain, nested={nested}); "
        "print(time.perf_counter() - began)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of the placement solver, all budgets at once.")
    parser.add_argument("--no-first", action="store_true", help="leave out the fresh processes")
    options = parser.parse_args()
    right = True
    for name, (chain, expected) in chains().items():
        for levels in ("single", "nested"):
            _, best = seconds(chain, levels == "nested")
            points = frontier(chain, nested=levels == "nested")
            same = levels not in expected or [list(point) for point in points] == expected[levels]
            right &= same
            first = (
                "" if options.no_first else f"first {1e3 * first_call(name, levels == 'nested'):8.1f} ms  "
            )
            print(
                f"{name:26} L={len(chain.forward):<4} {levels}  {1e3 * best:8.1f} ms  {first}{len(points):5} points  "
                + ("as published" if same and levels in expected else "" if same else "NOT AS PUBLISHED"),
                flush=True,
            )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
