"""What training costs over the frozen model: one layer, and a step on the pocket base.

    OMP_NUM_THREADS=2 python scripts/benchmark_training.py       # → results/training_speed.json
    python scripts/benchmark_training.py --device cuda --out results/training_speed_gpu.json

All contestants take turns, in another order each round, and a figure is the median over rounds of
the ratio to the frozen model *in the same round*: what slows the machine down slows all of them.
The frozen model passes gradients to its inputs. A step of the base includes AdamW and the folded
form's write-back; one layer is forward and backward pass alone, its write-back a row of its own.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from sbora_diffusion.core.tuner import SboraConfig, SboraLinear
from sbora_diffusion.core.tuner.folded_training import FoldedTraining, folded_training
from sbora_diffusion.diffusion.adapters import adapter_name, inject
from sbora_diffusion.diffusion.bases import DTYPES, Base, load_base
from sbora_diffusion.diffusion.targets import by_component, target_layers
from scripts.pocket_evaluation.record import at_least, at_most, run_of

WHAT = "training time over the frozen model, of SBoRA in the folded and the two-path form and LoRA"
WIDTH, TOKENS, LAYER_RANK = 320, 4096, 16
POCKET_RANK, BATCH = 8, 4
LAYER_LIMITS = {"sbora_fa_folded": 1.10, "sbora_fb_folded": 1.25}  # times the frozen layer
SPEED_GOAL = 1.15  # times the speed of PEFT's LoRA, pocket step
WAYS = [(variant, way) for variant in ("fa", "fb") for way in ("folded", "two_paths")]

Step = Callable[[], None]
Times = dict[str, list[float]]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    device, dtype = options.device, DTYPES[options.dtype]
    with ExitStack() as stack:
        layer_steps = stack.enter_context(layer_contestants(device, dtype))
        layer = interleaved(layer_steps, options.layer_rounds, device)
    with ExitStack() as stack:
        pocket_steps = stack.enter_context(pocket_contestants(device, options.dtype))
        pocket = interleaved(pocket_steps, options.rounds, device)
    figures = {"layer": layer_figures(layer), "pocket_step": pocket_figures(pocket)}
    command = "python scripts/benchmark_training.py"
    run = run_of(command, device, time.perf_counter() - began, options.commit)
    run["versions"]["peft"] = version("peft")
    sizes = {
        "layer": {"width": WIDTH, "tokens": TOKENS, "rank": LAYER_RANK},
        "pocket_step": {"batch": BATCH, "rank": POCKET_RANK, "layers": 72},
    }
    about = {"unit": "seconds", "dtype": options.dtype, "sizes": sizes, "threads": options.threads}
    options.out.write_text(json.dumps({"what": WHAT, **run, **about, **figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/training_speed.json"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--layer-rounds", type=int, default=41)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--commit", help="of the code, where there is no checkout")
    return parser.parse_args()


def interleaved(steps: dict[str, Step], rounds: int, device: str, warm_up: int = 2) -> Times:
    """Seconds of each contestant in each round."""
    names = list(steps)
    times: Times = {name: [] for name in names}
    for number in range(warm_up + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = timed(steps[name], device)
            if number >= warm_up:
                times[name].append(seconds)
    return times


def timed(step: Step, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def layer_contestants(device: str, dtype: torch.dtype) -> Iterator[dict[str, Step]]:
    """Forward and backward pass of one layer whose input asks for a gradient."""
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
    x, target = (t.to(device, dtype) for t in (x, target))

    def step(layer: nn.Module) -> Step:
        def run() -> None:
            layer(x.detach().requires_grad_()).backward(target)
            layer.zero_grad()

        return run

    steps = {"frozen": step(_linear(device, dtype))}
    with ExitStack() as stack:
        for variant, way in WAYS:
            config = SboraConfig(r=LAYER_RANK, variant=variant)
            layer = SboraLinear(_linear(device, dtype), "a", config, "unet.layer")
            steps[f"sbora_{variant}_{way}"] = step(layer)
            if way == "folded":
                training = stack.enter_context(_all_folded({"layer": layer}, "a"))
                steps[f"sbora_{variant}_write_back"] = training.write_back
        lora = LoraConfig(r=LAYER_RANK, lora_alpha=LAYER_RANK, target_modules=["0"])
        model = get_peft_model(nn.Sequential(_linear(device, dtype)), lora)
        steps["peft_lora"] = step(model.base_model.model[0])
        yield steps


@contextmanager
def _all_folded(layers: Mapping[str, nn.Module], adapter: str) -> Iterator[FoldedTraining]:
    with folded_training(layers, adapter) as training:
        assert not training.obstacles, training.obstacles
        yield training


def _linear(device: str, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH, bias=False, device=device, dtype=dtype)
    nn.init.normal_(layer.weight, std=WIDTH**-0.5)
    return layer.requires_grad_(False)


@contextmanager
def pocket_contestants(device: str, dtype: str) -> Iterator[dict[str, Step]]:
    """Forward pass, backward pass and AdamW on pocket bases of their own."""
    with ExitStack() as stack:
        base = frozen_base(device, dtype)
        steps = {"frozen": denoising_step(base, [])}
        for variant, way in WAYS:
            base = frozen_base(device, dtype)
            layers = inject(
                base.pipeline, "it", list(target_layers(base.pipeline)), variant, POCKET_RANK,
                float(POCKET_RANK), 0, 0,
            )  # fmt: skip
            name, after = adapter_name("it"), None
            if way == "folded":
                after = stack.enter_context(_all_folded(layers, name)).write_back
            factors = [layer.sbora_factor[name] for layer in layers.values()]
            steps[f"sbora_{variant}_{way}"] = denoising_step(base, factors, after)
        base = frozen_base(device, dtype)
        steps["peft_lora"] = denoising_step(base, add_lora(base))
        yield steps


def frozen_base(device: str, dtype: str) -> Base:
    base = load_base("pocket", device, dtype)
    for model in (base.pipeline.unet, base.pipeline.text_encoder):
        model.requires_grad_(False)
    return base


def add_lora(base: Base) -> list[nn.Parameter]:
    """PEFT's LoRA on the layers that SBoRA adapts; its parameters."""
    parameters: list[nn.Parameter] = []
    for component, paths in by_component(base.pipeline, list(target_layers(base.pipeline))).items():
        model = getattr(base.pipeline, component)
        targets = list(paths.values())
        model.add_adapter(LoraConfig(r=POCKET_RANK, lora_alpha=POCKET_RANK, target_modules=targets))
        parameters += [p for p in model.parameters() if p.requires_grad]
    return parameters


def denoising_step(base: Base, factors: list[nn.Parameter], after: Step | None = None) -> Step:
    """One step; the gradient reaches the latents and a word's embedding, whatever else trains."""
    pipeline = base.pipeline
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    generator, device = torch.Generator().manual_seed(0), base.device
    side, channels = unet.config.sample_size, unet.config.in_channels
    shape = (BATCH, channels, side, side)
    latents, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    ids = torch.randint(1000, (BATCH, pipeline.tokenizer.model_max_length), generator=generator)
    ids, times = ids.to(device), torch.tensor([10, 300, 600, 900], device=device)[:BATCH]
    embedding = text_encoder.get_input_embeddings()
    word = nn.Parameter(torch.zeros(embedding.embedding_dim, device=device))
    embedding.register_forward_hook(lambda _, __, rows: rows + word.to(rows.dtype))
    optimizer = torch.optim.AdamW([word, *factors], lr=1e-4)

    def run() -> None:
        noised = latents.to(unet.dtype).requires_grad_()
        states: Tensor = text_encoder(ids)[0]
        predicted = unet(noised, times, states).sample
        F.mse_loss(predicted.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after()

    return run


def layer_figures(times: Times) -> dict[str, Any]:
    """Times and, for the folded forms, the goal of times the frozen layer."""
    figures = summary(times)
    for name, limit in LAYER_LIMITS.items():
        figures[name]["goal"] = at_most(figures[name]["over_frozen"], limit)
    return figures


def pocket_figures(times: Times) -> dict[str, Any]:
    """Times and the goal: the speed of the folded forms, in that of PEFT's LoRA."""
    figures = summary(times)
    for name in LAYER_LIMITS:
        speed = median_ratio(times["peft_lora"], times[name])
        figures[name]["speed_in_loras"] = at_least(speed, SPEED_GOAL)
    return figures


def summary(times: Times) -> dict[str, Any]:
    """Name → median and quartiles in seconds, and the median ratio to the frozen model."""
    figures: dict[str, Any] = {}
    for name, seconds in times.items():
        quartiles = statistics.quantiles(seconds, n=4)
        figures[name] = {
            "median": round(quartiles[1], 6),
            "quartiles": [round(quartiles[0], 6), round(quartiles[2], 6)],
            "over_frozen": round(median_ratio(seconds, times["frozen"]), 4),
            "rounds": len(seconds),
        }
    return figures


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """Median over rounds of one contestant's time in the other's."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


if __name__ == "__main__":
    main()
