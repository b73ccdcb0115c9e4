"""Where this user's state belongs: studies, and what verifications have taught."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def here() -> Path:
    """The state directory of this user on this machine; it may not exist yet."""
    return state_directory(sys.platform, os.environ, Path.home())


def state_directory(platform: str, environment: Mapping[str, str], home: Path) -> Path:
    """Where this user's state belongs: `$PLANNER_HOME` where set, else the platform's usual place.

    The XDG base directory specification has relative paths in its variables ignored.
    """
    if chosen := environment.get("PLANNER_HOME"):
        return Path(chosen).expanduser().absolute()
    if platform == "darwin":
        return home / "Library" / "Application Support" / "planner"
    if platform == "win32":
        return Path(environment.get("LOCALAPPDATA") or home / "AppData" / "Local") / "planner"
    xdg = Path(environment.get("XDG_STATE_HOME", ""))
    return (xdg if xdg.is_absolute() else home / ".local" / "state") / "planner"
