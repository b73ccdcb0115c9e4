"""A script without a main guard: importing it ends the process."""

import sys

sys.exit("usage: runs_at_once FILE")
