"""Show the recorded searches in the browser, with Optuna's dashboard.

It serves from this machine to this machine until it is interrupted.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="journal:FILE or sqlite:///FILE (default: where planner optimize records)",
    )
    parser.add_argument(
        "--port", metavar="N", type=int, default=8080, help="0 is any free one (default: 8080)"
    )


def run(args: argparse.Namespace) -> int:
    from planner.dashboard import serve
    from planner.storage import default_storage_url

    def announce(address: str) -> None:
        line = json.dumps({"address": address}) if args.json else f"{address}   Ctrl-C stops it."
        print(line, flush=True)

    serve(args.storage or default_storage_url(), args.port, on_ready=announce)
    return 0
