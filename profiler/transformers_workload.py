"""Any model of transformers, from its configuration alone: random weights, random batches, nothing downloaded.

    transformers:bert        a model type, with its default configuration
    transformers:./my/model  a folder with a config.json; its ``architectures`` decide on the head

What a model takes is read off its class, and what it is trained on off its head:

    main_input_name   input_ids ─▶ tokens   pixel_values ─▶ images   input_values, input_features ─▶ speech
    head              language model ─▶ the tokens   classification ─▶ a class   none ─▶ mean square of the output

Two settings of a configuration are overridden. ``use_cache`` is off: a cache is for generating. Whatever ends
in ``layerdrop`` is zero: where every step skips other layers at random, no two steps cost the same.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from profiler.fake import builds_without_memory
from profiler.workload import Workload
from profiler.workload_spec import FLAGS, SHORTEST_SEQUENCE, WorkloadError, WorkloadSpec, described

DEFAULT_SEQUENCE: Final = 256
DEFAULT_IMAGE: Final = 224
"""ImageNet's crop, for configurations that fix no size."""
SPEECH_SECONDS: Final = 1
TRANSCRIPT_TOKENS: Final = 16
"""About the characters in a second of speech, fewer than any model's frames for it."""

Labels = Callable[["_Task", int, torch.Generator], dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """A configuration with the sizes of its batches; ``shape`` is that of one sample's main input."""

    config: Any
    main_input: str
    shape: tuple[int, ...]
    sequence_length: int | None
    tokens: torch.Tensor

    def inputs(self, size: int, generator: torch.Generator) -> torch.Tensor:
        if self.main_input == "input_ids":
            return self.text(size, self.shape[0], generator)
        return torch.randn(size, *self.shape, generator=generator)

    def text(self, size: int, length: int, generator: torch.Generator) -> torch.Tensor:
        return self.tokens[torch.randint(len(self.tokens), (size, length), generator=generator)]

    def classes(self, generator: torch.Generator, *shape: int) -> torch.Tensor:
        count = self.config.num_labels
        if count == 1:
            return torch.randn(*shape, generator=generator)
        return torch.randint(count, shape, generator=generator)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """A kind of head: which of transformers' mappings lists its classes, and what it is trained on.

    ``labels`` None: the head returns no loss, and the mean square of its first output stands in.
    """

    auto_class: str
    labels: Labels | None
    bare: bool = True
    """Whether a model type may stand for it. Other heads are for folders whose ``architectures`` name one."""

    def knows(self, config: Any) -> bool:
        return type(config) in self.mapping

    @property
    def mapping(self) -> Any:
        return getattr(transformers, self.auto_class)._model_mapping

    def classes(self, config: Any) -> tuple[str, ...]:
        found = self.mapping[type(config)]
        return tuple(c.__name__ for c in (found if isinstance(found, tuple) else (found,)))


def _same_tokens(task: _Task, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A label at every position: leaving some out changes neither the memory nor the time of the loss."""
    return {"labels": task.inputs(size, generator)}


def _other_tokens(task: _Task, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    assert task.sequence_length is not None
    labels = task.text(size, task.sequence_length, generator)
    return {"labels": labels, "decoder_input_ids": labels.roll(1, dims=1)}


def _transcript(task: _Task, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"labels": task.text(size, TRANSCRIPT_TOKENS, generator)}


def _class(task: _Task, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"labels": task.classes(generator, size)}


def _class_per_token(task: _Task, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"labels": task.classes(generator, size, task.shape[0])}


def _class_per_pixel(task: _Task, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"labels": task.classes(generator, size, *task.shape[1:])}


def _span(task: _Task, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    first = torch.randint(task.shape[0], (size,), generator=generator)
    return {"start_positions": first, "end_positions": first}


_HEADS: Final = (
    _Head(auto_class="AutoModelForSeq2SeqLM", labels=_other_tokens),
    _Head(auto_class="AutoModelForSpeechSeq2Seq", labels=_other_tokens),
    _Head(auto_class="AutoModelForMaskedLM", labels=_same_tokens),
    _Head(auto_class="AutoModelForCausalLM", labels=_same_tokens),
    _Head(auto_class="AutoModelForImageClassification", labels=_class),
    _Head(auto_class="AutoModelForCTC", labels=_transcript),
    _Head(auto_class="AutoModelForAudioClassification", labels=_class),
    _Head(auto_class="AutoModelForSequenceClassification", labels=_class),
    _Head(auto_class="AutoModelForTokenClassification", labels=_class_per_token, bare=False),
    _Head(auto_class="AutoModelForQuestionAnswering", labels=_span, bare=False),
    _Head(auto_class="AutoModelForSemanticSegmentation", labels=_class_per_pixel, bare=False),
    _Head(auto_class="AutoModel", labels=None),
)
"""In the order in which a model type's own is looked for: a decoder alone is the last thing BERT or BART is."""


def named(name: str, spec: WorkloadSpec, seed: int) -> Workload:
    """The workload of ``transformers:name``."""
    return of_configuration(_configuration(name), spec, seed)


def of_configuration(config: Any, spec: WorkloadSpec, seed: int) -> Workload:
    """A configuration's model with random weights, and random batches of the sizes in ``spec``."""
    head = _head(config, spec.name)
    config.use_cache = False
    config.return_dict = True
    # The Auto classes choose by this where a mapping lists several.
    config.architectures = config.architectures or [head.classes(config)[0]]
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for setting in [] if part is None else list(vars(part)):
            if setting.endswith("layerdrop"):
                setattr(part, setting, 0.0)
    if spec.image_size is not None:
        _set_image_size(config, spec.image_size)
    build = functools.partial(getattr(transformers, head.auto_class).from_config, config, dtype=torch.float32)
    with _building(spec.name), torch.device("meta"):
        skeleton = build()
    _check_size(skeleton, spec.name)
    task = _task(config, skeleton, head, spec)
    takes_mask = "attention_mask" in inspect.signature(skeleton.forward).parameters
    with _building(spec.name):
        model = build().train()
    # The loss that transformers falls back on for such a class anyway, but with a warning at the first step.
    model.loss_type = model.loss_type or "ForCausalLM"

    def batch(size: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = {task.main_input: task.inputs(size, generator)}
        if task.main_input == "input_ids" and takes_mask:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
        if head.labels is not None:
            # Drawn anew from the same seed: a language model's labels are its inputs.
            made |= head.labels(task, size, torch.Generator().manual_seed(seed))
        return made

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = model(**batch)
        value: torch.Tensor = output[0].float().square().mean() if head.labels is None else output.get("loss")
        return value

    return Workload(
        model=model, batch=batch, loss=loss, name=Path(spec.name.partition(":")[2]).resolve().name
    )


@contextlib.contextmanager
def _building(name: str) -> Iterator[None]:
    """What transformers raises at a configuration: a package that it wants, settings that contradict each other."""
    try:
        yield
    except Exception as error:
        raise WorkloadError(
            f"{name} cannot be built by transformers {transformers.__version__}: {described(error)}."
        ) from error


def _configuration(name: str) -> Any:
    known = sorted(transformers.CONFIG_MAPPING)
    if name in known:
        with _building(name):
            return transformers.CONFIG_MAPPING[name]()
    if (Path(name) / "config.json").is_file():
        try:
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise WorkloadError(
                f"{Path(name) / 'config.json'} must be a configuration of a model type that transformers "
                f"{transformers.__version__} has: {described(error)}."
            ) from error
    close = difflib.get_close_matches(name, known, n=3)
    suggestion = f" Did you mean {' or '.join(close)}?" if close else ""
    raise WorkloadError(
        f"transformers:NAME must name one of the {len(known)} model types of transformers "
        f"{transformers.__version__}, such as bert, llama, t5 or vit, or a folder with a config.json, "
        f"got {name!r}.{suggestion}"
    )


def _head(config: Any, name: str) -> _Head:
    architectures = tuple(config.architectures or ())
    fitting = [
        head
        for head in _HEADS
        if head.knows(config)
        and (set(architectures) & set(head.classes(config)) if architectures else head.bare)
    ]
    if fitting:
        return fitting[0]
    if architectures:
        known = sorted({c for head in _HEADS if head.knows(config) for c in head.classes(config)})
        raise WorkloadError(
            f"architectures of {name} must name a class that can be trained on random batches, got "
            f"{', '.join(architectures)}. Of this model type: {', '.join(known) or 'none'}. {_WRITE_ONE}"
        )
    raise WorkloadError(
        f"{name} is no model by itself: transformers lists no class with a head or an output for the type "
        f"{config.model_type!r}. {_WRITE_ONE}"
    )


_WRITE_ONE: Final = "Or write a function that returns a profiler.Workload (package.module:function)."


def _task(config: Any, skeleton: Any, head: _Head, spec: WorkloadSpec) -> _Task:
    main_input = skeleton.main_input_name
    reads = main_input == "input_ids"
    writes = head.labels is _other_tokens
    if main_input not in ("input_ids", "pixel_values", "input_values", "input_features"):
        raise WorkloadError(
            f"{spec.name} must take text, images or speech, but {type(skeleton).__name__} takes {main_input}. "
            f"{_WRITE_ONE}"
        )
    _refuse("sequence_length", spec, reads or writes, "image_size" if main_input == "pixel_values" else None)
    _refuse("image_size", spec, main_input == "pixel_values", "sequence_length" if reads or writes else None)
    length = _sequence_length(config, spec) if reads or writes else None
    if length is not None and reads:
        shape: tuple[int, ...] = (length,)
    elif main_input == "pixel_values":
        shape = (_setting(config, "num_channels", 3), *_image_size(config, spec))
    else:
        shape = _speech_shape(config, spec.name)
    return _Task(
        config=config, main_input=main_input, shape=shape, sequence_length=length, tokens=_tokens(config)
    )


def _refuse(size: str, spec: WorkloadSpec, has_use: bool, other: str | None) -> None:
    value = getattr(spec, size)
    if value is not None and not has_use:
        way_out = f"Leave it out, or give {FLAGS[other]}." if other else "Leave it out."
        raise WorkloadError(f"{spec.name} takes no {size} ({FLAGS[size]}), got {value}. {way_out}")


def _sequence_length(config: Any, spec: WorkloadSpec) -> int:
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    limit = next((value for value in limits if isinstance(value, int) and value > 0), None)
    length = spec.sequence_length or min(DEFAULT_SEQUENCE, limit or DEFAULT_SEQUENCE)
    if length < SHORTEST_SEQUENCE or (limit is not None and length > limit):
        range_text = f"from {SHORTEST_SEQUENCE}" + ("" if limit is None else f" to {limit}")
        raise WorkloadError(
            f"sequence_length ({FLAGS['sequence_length']}) of {spec.name} must be {range_text}, got {length}."
        )
    return length


def _setting(config: Any, name: str, default: Any) -> Any:
    """A setting of the configuration or of its vision part."""
    for part in (config, getattr(config, "vision_config", None)):
        if (value := getattr(part, name, None)) is not None:
            return value
    return default


def _image_size(config: Any, spec: WorkloadSpec) -> tuple[int, int]:
    size = spec.image_size or _setting(config, "image_size", DEFAULT_IMAGE)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return height, width


def _set_image_size(config: Any, image_size: int) -> None:
    """Where a configuration fixes the size of its images, it is the size asked for."""
    for part in (config, getattr(config, "vision_config", None)):
        value = getattr(part, "image_size", None)
        if part is not None and value is not None:
            part.image_size = image_size if isinstance(value, int) else [image_size, image_size]


def _speech_shape(config: Any, name: str) -> tuple[int, ...]:
    """What the model type's own feature extractor makes of a second of sound."""
    if type(config) not in transformers.FEATURE_EXTRACTOR_MAPPING:
        raise WorkloadError(
            f"transformers has no feature extractor that tells what {name} hears. {_WRITE_ONE}"
        )
    extractor: Any = transformers.FEATURE_EXTRACTOR_MAPPING[type(config)]
    extractor = extractor()
    rate = extractor.sampling_rate
    sound = torch.randn(SPEECH_SECONDS * rate, generator=torch.Generator().manual_seed(0)).numpy()
    features = extractor(sound, sampling_rate=rate, return_tensors="pt")
    return tuple(features[extractor.model_input_names[0]].shape[1:])


def _tokens(config: Any) -> torch.Tensor:
    """The vocabulary without its special tokens: padding, begin and end of a text are no words."""
    text = config.get_text_config()
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        return torch.empty(0, dtype=torch.int64)
    special = {
        value
        for part in (config, text)
        for name, value in part.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    return torch.tensor([token for token in range(size) if token not in special])


def _check_size(skeleton: torch.nn.Module, name: str) -> None:
    """Before a machine is brought down: on a CPU the gradients lie beside the weights, whatever the optimizer."""
    weights_bytes = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    what, needed_bytes = "weights and gradients", 2 * weights_bytes
    if torch.cuda.is_available():
        what, needed_bytes = "weights", weights_bytes
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed_bytes > memory_bytes and not builds_without_memory():
        raise WorkloadError(
            f"The {what} of {name} must fit in this machine's memory, got {needed_bytes / 2**30:.1f} GiB in "
            f"fp32 and {memory_bytes / 2**30:.1f} GiB of memory. Give a folder with the config.json of a smaller one."
        )
