"""``python -m planner.cli``: the same as ``planner``."""

import sys

from planner.cli import main

sys.exit(main())
