"""Which models profile, and is their memory predicted as well as that of the studied ones?

Model types of transformers with small configurations (two layers, 64 wide: the architecture is what is tested, not
its size) and networks of torchvision, each built by name as ``planner profile`` builds it. A fake step is traced at
two micro-batch sizes for the curves and at a third, and there the plain plan's peak is compared:

    trace at 2 and 6 ──▶ curves ──▶ composed peak at 3 ─┐
                                                        ├──▶ relative error
    trace at 3 ───────────────────▶ peak read directly ─┘

Nothing runs for real, so this says whether a model can be profiled; what its kernels take for themselves is in
``studies.composition``.

    python -m studies.zoo
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import transformers

from planner.memory import peak_window, timeline
from planner.nested import PLAIN
from profiler import registry
from profiler.chain import discover
from profiler.memory import MemoryTracer
from profiler.rehearsal import rehearse
from profiler.transformers_workload import of_configuration
from profiler.workload import Workload
from profiler.workload_spec import WorkloadError, WorkloadSpec
from studies.runs import provenance, write

TRACED, COMPARED = (2, 6), 3
ACCUMULATION = 2
SEQUENCE = 8

SMALL: Mapping[str, Any] = {
    "hidden_size": 64, "d_model": 64, "embedding_size": 64, "intermediate_size": 128, "vocab_size": 512,
    "num_hidden_layers": 2, "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "d_ff": 128, "d_kv": 16, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "ffn_dim": 128,
    "max_position_embeddings": 128,
}  # fmt: skip
"""Taken over where a configuration has a setting of the name; experts and state sizes stay as they are."""

TEXT: dict[str, Mapping[str, Any]] = {
    # decoders
    "gpt2": {}, "gpt_neox": {}, "opt": {}, "bloom": {}, "falcon": {}, "llama": {}, "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16}, "phi3": {"pad_token_id": 0},
    # mixtures of experts
    "mixtral": {"num_local_experts": 4}, "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 64},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4}, "jetmoe": {},
    # state spaces and recurrences
    "mamba": {"state_size": 8}, "rwkv": {"attention_hidden_size": 64},
    # encoders
    "bert": {}, "roberta": {}, "albert": {}, "distilbert": {}, "electra": {}, "deberta-v2": {},
    "modernbert": {"pad_token_id": 0}, "fnet": {}, "ibert": {}, "longformer": {},
    # encoder-decoders
    "t5": {}, "bart": {}, "pegasus": {}, "switch_transformers": {},
}  # fmt: skip
OTHER: dict[str, Mapping[str, Any]] = {
    # images
    "vit": {}, "deit": {}, "beit": {}, "dinov2": {}, "swin": {"depths": [1, 1, 1, 1]}, "segformer": {},
    "convnext": {"num_stages": 4, "depths": [1, 1, 1, 1]}, "resnet": {"depths": [1, 1, 1, 1]},
    # speech
    "wav2vec2": {}, "whisper": {"vocab_size": 51_865}, "audio-spectrogram-transformer": {}, "speech_to_text": {},
    # more than one kind of input
    "git": {}, "detr": {"use_timm_backbone": False}, "layoutlmv2": {},
}  # fmt: skip

TORCHVISION: Mapping[str, int | None] = {
    "alexnet": 64, "vgg11_bn": 32, "resnet18": 64, "densenet121": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64,
    "efficientnet_b0": 64, "squeezenet1_1": 64, "googlenet": 64, "convnext_tiny": 64, "vit_b_32": 64,
    "fcn_resnet50": 64, "lraspp_mobilenet_v3_large": 64, "r3d_18": 32, "fasterrcnn_resnet50_fpn": None,
    "raft_small": None, "quantized_resnet18": None,
}  # fmt: skip


def small_configuration(model_type: str, changes: Mapping[str, Any]) -> Any:
    """The model type's configuration, small where its settings go by the usual names."""
    kind = transformers.CONFIG_MAPPING[model_type]
    settings = kind().to_dict()
    usual = {kind.attribute_map.get(name, name): value for name, value in SMALL.items()}
    taken = {name: value for name, value in usual.items() if isinstance(settings.get(name), int)}
    return kind(**(taken | dict(changes)))


def workloads() -> Iterator[tuple[str, Workload | WorkloadError]]:
    """Every model under the name that the command line takes; an error where it cannot be built."""
    for model_type, changes in (TEXT | OTHER).items():
        length = SEQUENCE if model_type in TEXT else None
        spec = WorkloadSpec(name=f"transformers:{model_type}", sequence_length=length)
        try:
            yield spec.name, of_configuration(small_configuration(model_type, changes), spec, 0)
        except WorkloadError as error:
            yield spec.name, error
    for model, image_size in TORCHVISION.items():
        spec = WorkloadSpec(name=f"torchvision:{model}", image_size=image_size)
        try:
            yield spec.name, registry.build(spec)
        except WorkloadError as error:
            yield spec.name, error


def examined(workload: Workload) -> dict[str, Any]:
    """Stages and peaks of one workload; raises WorkloadError where it does not profile."""
    began = time.process_time()
    rehearse(workload, TRACED[0], (COMPARED,))
    stages = discover(workload)
    tracer = MemoryTracer(workload, stages, "adamw")
    composed = peak_window(
        timeline(
            tracer.memory("fp32", TRACED),
            PLAIN,
            micro_batch_size=COMPARED,
            gradient_accumulation_steps=ACCUMULATION,
            resident_batches=ACCUMULATION,
        )
    ).total_bytes
    direct = tracer.plain_peak_bytes("fp32", COMPARED)
    return {
        "parameters": sum(parameter.numel() for parameter in workload.model.parameters()),
        "stages": len(stages),
        "composed_peak_bytes": composed,
        "direct_peak_bytes": direct,
        "relative_error": composed / direct - 1,
        "cpu_seconds": time.process_time() - began,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    began, cpu = time.perf_counter(), time.process_time()
    found: dict[str, dict[str, Any]] = {}
    for name, workload in workloads():
        try:
            if isinstance(workload, WorkloadError):
                raise workload
            found[name] = examined(workload)
        except WorkloadError as error:
            found[name] = {"reason": " ".join(str(error).split())}
            print(f"{name:42} does not profile: {found[name]['reason']}", flush=True)
            continue
        values = found[name]
        print(
            f"{name:42} {values['stages']:4} stages  composed {values['composed_peak_bytes'] / 2**20:8.1f} MiB  "
            f"direct {values['direct_peak_bytes'] / 2**20:8.1f} MiB  "
            f"{values['relative_error']:+.3%}  {values['cpu_seconds']:.1f} s",
            flush=True,
        )
    errors = [abs(values["relative_error"]) for values in found.values() if "stages" in values]
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    print(
        f"{len(errors)} of {len(found)} profile; largest error {max(errors):.3%}, exact in {errors.count(0.0)}, "
        f"{seconds:.0f} s, {cpu_seconds:.0f} s of CPU time"
    )
    write(
        "zoo",
        provenance("python -m studies.zoo")
        | {"seconds": seconds, "cpu_seconds": cpu_seconds, "models": found},
    )


if __name__ == "__main__":
    main()
