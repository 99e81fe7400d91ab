"""Do real models fit, and does everything hold in their sizes?

    python scripts/study_families.py --device cuda
    python scripts/study_families.py --tiny --device cpu -o /tmp/families.json      # a rehearsal

Stable Diffusion 1.5 at 512 pixels with batches of four, and XL at 1024 pixels with batches of one,
with random weights: twenty steps in bf16 with gradient checkpointing and latents that are kept, on
a GPU whose memory is limited to what the goal leaves beside the driver's share; and a refined merge
in fp32 with bf16 products and gradient checkpointing. Then, in fp32, the concept is written, read,
attached, folded, taken out, exported as a LoRA that stock diffusers loads, and for 1.5 saved as a
model and read again; what the UNet draws with must agree. That is about arithmetic: a GPU computes
it without TF32, whose products have ten bits. Writes results/families.json.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from study_options import command

from sbora_diffusion.bench.pipelines import random_base
from sbora_diffusion.console import quiet_libraries
from sbora_diffusion.core.concept import Concept, read_concept, write_concept
from sbora_diffusion.diffusion.bases import Base, load_base
from sbora_diffusion.diffusion.calibrated import Calibrated
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.formats import LORA_FILE, write_lora
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, draw_latents
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import PlaceholderTokens
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.records import at_most, run_of

ROOT = Path(__file__).parents[1]
SUBJECT = ROOT / "concepts" / "plushbear"
GIB, DRIVER = 1 << 30, 0.5
"""The driver's and the libraries' share of a GPU's memory, in GiB, which PyTorch does not count."""
CASES = {"sd1": (4, 6.0), "sdxl": (1, 16.0)}
"""Family → batch size, GiB."""
MERGE = 24.0
"""GiB for a refined merge of either."""
PROMPT = "a photo of <plushbear> on the beach"
CLOSE = 1000.0
"""In millionths of the largest latent."""


def study(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """All that is measured with one family."""
    batch, limit = CASES[family]
    base = random_base(family, args.device, torch.bfloat16, args.tiny)
    concept, training = trained(base, batch, limit, args)
    told(family, training)
    base.pipeline.to(torch.float32)
    refinement = refined(base, concept, args)
    told(family, refinement)
    # PyTorch's products have no TF32 unless asked for, its convolutions have.
    plain = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with tempfile.TemporaryDirectory() as folder, plain:
        held = agreement(base, concept, Path(folder))
    return {
        "layers": len(concept.layers),
        "training": training,
        "refinement": refinement,
        "agreement": held,
    }


def told(family: str, found: dict[str, Any]) -> None:
    """Show what is there already: a run may be stopped before its end."""
    print(family, json.dumps(found), flush=True)


def trained(
    base: Base, batch: int, limit: float, args: argparse.Namespace
) -> tuple[Concept, dict[str, Any]]:
    """The concept, and what its training took."""
    config = TrainConfig(
        steps=2 if args.tiny else 20, batch_size=batch, gradient_checkpointing=True,
        copies=2 if args.tiny else 8,
    )  # fmt: skip
    began, peaks = time.monotonic(), {}
    with memory(args.device, limit - DRIVER, peaks):
        training = ConceptTraining(base, read_subject(SUBJECT), config, 0)
        try:
            ready = time.monotonic()
            records = list(training.steps())
            folded = len(training.folded.layers)
            concept = training.concept()
        finally:
            training.close()
    seconds = sorted(record.seconds for record in records)
    return concept, {
        "pixels": base.resolution,
        "batch": batch,
        "steps": config.steps,
        "folded_layers": folded,
        "seconds_before_the_first_step": round(ready - began, 2),
        "median_step_seconds": round(seconds[len(seconds) // 2], 4),
        "loss": [round(records[0].loss, 4), round(records[-1].loss, 4)],
        **peaks,
    }


def refined(base: Base, concept: Concept, args: argparse.Namespace) -> dict[str, Any]:
    """What a refined merge takes, in fp32 with bf16 products and gradient checkpointing; batches
    are those of `sbora merge`."""
    config = CalibrateConfig(
        generic=8, steps=1, refine=3, refine_timesteps=1, refine_gradient_checkpointing=True,
        refine_mixed_precision="bf16",
    )  # fmt: skip
    times, peaks = [time.monotonic()], {}
    with memory(args.device, MERGE - DRIVER, peaks):
        Calibrated(
            base, [(concept, 1.0)], config, on_step=lambda *_: times.append(time.monotonic())
        ).restore()
    took = [round(after - before, 2) for before, after in itertools.pairwise(times)]
    return {
        "pixels": base.resolution, "rows": config.refine_rows, "step_seconds": took[-1],
        "seconds_before": round(times[-1 - config.refine] - times[0], 2), **peaks,
    }  # fmt: skip


@contextmanager
def memory(device: str, limit: float, found: dict[str, Any]) -> Iterator[None]:
    """Within, PyTorch has so many GiB of a GPU; afterwards `found` has the peaks."""
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GIB / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    found["allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    taken = torch.cuda.max_memory_reserved() / GIB
    found["memory_gib"] = at_most(taken + DRIVER, limit + DRIVER)
    torch.cuda.empty_cache()


def agreement(base: Base, concept: Concept, folder: Path) -> dict[str, Any]:
    """How far pictures of the concept in its several forms are from each other, in millionths of
    the largest latent; 0 where the arithmetic is the same."""
    before, weights = drawn(base, "a photo of a bear"), bytes_of(base)
    write_concept(folder / "concept.safetensors", concept)
    concept = read_concept(folder / "concept.safetensors")
    live = ConceptPipeline(base)
    live.add(concept)
    attached = drawn(base)
    live.remove("plushbear")
    merged = Merged(base, [(concept, 1.0)])
    folded = drawn(base)
    if base.family == "sd1":
        merged.save(folder / "merged")
    merged.restore()
    millionth = folded.abs().max().item() / 1e6
    found = {
        "live_and_folded": at_most(apart(attached, folded) / millionth, CLOSE),
        "folded_and_exported": at_most(
            apart(exported(base, concept, folder), folded) / millionth, CLOSE
        ),
        "concept_and_base": round(apart(folded, before) / millionth),
        "after_removal": at_most(apart(drawn(base, "a photo of a bear"), before), 0.0),
        "weights_after_removal": at_most(
            sum(not torch.equal(weights[name], now) for name, now in bytes_of(base).items()), 0
        ),
    }
    if base.family == "sd1":
        again = load_base(str(folder / "merged"), str(base.device))
        found["folded_and_read_again"] = at_most(apart(drawn(again), folded), 0.0)
    return found


def exported(base: Base, concept: Concept, folder: Path) -> torch.Tensor:
    """What stock diffusers draws with the exported LoRA."""
    write_lora(folder / "lora", [(concept, 1.0)], form="diffusers")
    tokens = PlaceholderTokens(base.pipeline)
    tokens.set(concept.embeddings)
    base.pipeline.load_lora_weights(folder / "lora", weight_name=LORA_FILE)
    try:
        return drawn(base)
    finally:
        base.pipeline.unload_lora_weights()
        tokens.set({})


def drawn(base: Base, prompt: str = PROMPT) -> torch.Tensor:
    """Latents after two steps."""
    return draw_latents(base, [prompt], [0], steps=2)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def bytes_of(base: Base) -> dict[str, torch.Tensor]:
    """The weights that concepts change, copied to the CPU."""
    return {
        name: layer.weight.cpu().clone() for name, layer in target_layers(base.pipeline).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--families", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with narrow layers")
    parser.add_argument("--commit", help="of the code, where there is no checkout")
    parser.add_argument("-o", "--record", type=Path, default=ROOT / "results" / "families.json")
    args = parser.parse_args()
    began, families = time.monotonic(), {}
    for family in args.families:
        families[family] = study(family, args)
        told(family, families[family])
    record = {
        "what": "training and use in the sizes of real models, with random weights",
        "agreement_in": "fp32, TF32 off",
        **run_of(command(), args.device, time.monotonic() - began, args.commit),
        "families": families,
    }
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    quiet_libraries()
    main()
