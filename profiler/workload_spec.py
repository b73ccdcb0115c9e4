"""Which workload: the words a user types, checked and kept in profiles and plans.

A ``WorkloadSpec`` names a workload without holding one, so it can be written to a file and built again on
another machine, and it needs no torch. ``resolve`` checks it and fills in the defaults:

    WorkloadSpec(name="gpt2") ──resolve──▶ WorkloadSpec(name="gpt2", sequence_length=256)

A library's model (``transformers:bert``) takes what its configuration says, which only the library can read:
``profiler.registry.build``, which makes the model, checks its sizes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final

import msgspec

from profiler.records import Record

SHORTEST_SEQUENCE: Final = 2
"""A language model predicts the next token, so a sequence of one token has no loss."""


LIBRARIES: Final = ("transformers", "torchvision")
"""Before a colon these are no packages of the user's: ``transformers:NAME_OR_DIR``, ``torchvision:NAME``."""


class WorkloadError(ValueError):
    """The named workload cannot be had or does not work: unknown, not importable, not what it has to be."""


class WorkloadSpec(Record, kw_only=True):
    """``name`` is ``gpt2``, ``resnet50``, a library's model (``torchvision:vgg11``) or ``package.module:function``.

    A function takes no size; ``transformers:NAME`` may be a folder in place of a name.
    """

    name: str
    sequence_length: int | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        for size, flag in FLAGS.items():
            value = getattr(self, size)
            if value is not None and value < 1:
                raise ValueError(f"{size} ({flag}) must be at least 1, got {value}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sized:
    """The one size that a built-in workload has, with its default and its range."""

    size: str
    default: int
    smallest: int
    largest: int | None


FLAGS: Final = {"sequence_length": "--seq-len", "image_size": "--image-size"}
_BUILTIN: Final = {
    "gpt2": _Sized(size="sequence_length", default=256, smallest=SHORTEST_SEQUENCE, largest=1_024),
    "resnet50": _Sized(size="image_size", default=32, smallest=1, largest=None),
}


def is_import_path(name: str) -> bool:
    """Whether a name has the form ``package.module:function``."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def library_model(name: str) -> tuple[str, str] | None:
    """``("transformers", "bert")`` of ``transformers:bert``; None for what names no library's model."""
    library, _, model = name.partition(":")
    return (library, model) if library in LIBRARIES and model else None


def resolve(spec: WorkloadSpec) -> WorkloadSpec:
    """The same workload with its defaults filled in, or ``WorkloadError`` where the words make no sense."""
    if library_model(spec.name):
        return spec
    builtin = _BUILTIN.get(spec.name)
    if builtin is None and not is_import_path(spec.name):
        raise WorkloadError(_unknown(spec.name))

    for size, flag in FLAGS.items():
        if getattr(spec, size) is not None and (builtin is None or builtin.size != size):
            way_out = (
                "Leave it out; the function itself decides on its sizes."
                if builtin is None
                else f"Leave it out, or give {FLAGS[builtin.size]}."
            )
            raise WorkloadError(f"{spec.name} takes no {size} ({flag}), got {getattr(spec, size)}. {way_out}")
    if builtin is None:
        return spec

    value = getattr(spec, builtin.size) or builtin.default
    too_large = builtin.largest is not None and value > builtin.largest
    if value < builtin.smallest or too_large:
        limits = f"from {builtin.smallest}" + ("" if builtin.largest is None else f" to {builtin.largest}")
        raise WorkloadError(
            f"{builtin.size} ({FLAGS[builtin.size]}) of {spec.name} must be {limits}, got {value}."
        )
    return msgspec.structs.replace(spec, **{builtin.size: value})


def _unknown(name: str) -> str:
    libraries = ", ".join(f"{library}:NAME" for library in LIBRARIES)
    choices = f"{', '.join(_BUILTIN)}, {libraries}, or package.module:function"
    module, colon, function = name.rpartition(":")
    if colon and (module.endswith(".py") or "/" in module or "\\" in module):
        dotted = module.removesuffix(".py").replace("\\", "/").strip("./").replace("/", ".")
        return (
            f"The module of a workload is written as in an import statement, got {name}. "
            f"Try {dotted}:{function} from the folder that {dotted.split('.')[0]} lies in."
        )
    close = difflib.get_close_matches(name.lower(), _BUILTIN, n=1)
    suggestion = f" Did you mean {close[0]}?" if close else ""
    return f"A workload must be {choices}, got {name!r}.{suggestion}"


def described(error: BaseException) -> str:
    """An exception's type and the text of it, on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
