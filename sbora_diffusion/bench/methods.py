"""The contestants, each put on the same layers by its own library's mechanism."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, OFTConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sbora_diffusion.bench.settings import FLOOR
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.functional import Variant
from sbora_diffusion.core.recalled import plain_norms, recalled_norms
from sbora_diffusion.core.tuner import SboraConfig
from sbora_diffusion.core.tuner.folded_training import folded_training

RATE = 1e-4
OFT_BLOCK = 32


@dataclass(frozen=True)
class Site:
    """Where a method is put.

    Attributes:
        model: frozen; changed in place.
        layers: names of the linear layers that are adapted.
        rank: of methods that have one.
        stack: takes what has to be undone.
        capturable: whether AdamW's step must be able to go into a CUDA graph.
    """

    model: nn.Module
    layers: list[str]
    rank: int
    stack: ExitStack
    capturable: bool = False


@dataclass(frozen=True)
class Adapter:
    """A method in place.

    Attributes:
        parameters: name → what is trained.
        optimizer: None where nothing is trained.
        file: () → the tensors that its file holds.
        after: called after each optimizer step; None: nothing is.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer | None
    file: Callable[[], dict[str, Tensor]]
    after: Callable[[], None] | None = None


@dataclass(frozen=True)
class Method:
    """One contestant.

    Attributes:
        title: for people.
        attach: put on a model.
        writes_weights: whether it needs weights of its own, because it writes into them.
        needs: the package without which it is not available.
        no_graph: why its step cannot be a CUDA graph; empty where it can.
    """

    title: str
    attach: Callable[[Site], Adapter]
    writes_weights: bool = False
    needs: str = "peft"
    no_graph: str = ""

    @property
    def missing(self) -> str | None:
        """Why the method is not available; None if it is."""
        found = importlib.util.find_spec(self.needs)
        return None if found else f"the package {self.needs!r} is not installed"


def _frozen(_site: Site) -> Adapter:
    return Adapter({}, None, dict)


def _peft(site: Site, config: PeftConfig) -> tuple[PeftModel, Adapter]:
    wrapped: Any = get_peft_model(site.model, config)  # type: ignore[arg-type]
    trained = _trained(site.model)
    return wrapped, Adapter(trained, _adamw(site, trained), lambda: _peft_file(wrapped))


def _peft_file(model: PeftModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _adamw(site: Site, trained: Mapping[str, nn.Parameter]) -> Optimizer:
    fused = any(parameter.is_cuda for parameter in trained.values()) or None
    return AdamW(trained.values(), lr=RATE, capturable=site.capturable, fused=fused)


def _lora(site: Site, **options: Any) -> tuple[PeftModel, Adapter]:
    config = LoraConfig(r=site.rank, lora_alpha=site.rank, target_modules=site.layers, **options)
    return _peft(site, config)


def _lora_fa(site: Site) -> Adapter:
    """LoRA with its down factor frozen and plain AdamW: LoRA-FA at its cheapest."""
    wrapped, _ = _lora(site)
    for name, parameter in wrapped.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    trained = _trained(site.model)
    return Adapter(trained, _adamw(site, trained), lambda: _peft_file(wrapped))


def _lora_fa_projected(site: Site) -> Adapter:
    """LoRA-FA as PEFT offers it: its optimizer projects each gradient (arXiv 2308.03303)."""
    wrapped, _ = _lora(site)
    optimizer = create_lorafa_optimizer(wrapped, site.rank, site.rank, RATE)
    return Adapter(_trained(site.model), optimizer, lambda: _peft_file(wrapped))


def _oft(site: Site) -> Adapter:
    return _peft(site, OFTConfig(oft_block_size=OFT_BLOCK, target_modules=site.layers))[1]


def _shira(site: Site) -> Adapter:
    config = ShiraConfig(r=site.rank, random_seed=0, target_modules=site.layers)
    return _peft(site, config)[1]


def _locon(site: Site) -> Adapter:
    """LyCORIS' LoCon; its adapters are kept outside of the model."""
    from lycoris import LycorisNetwork, create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    LycorisNetwork.apply_preset(
        {"enable_conv": False, "target_module": [], "target_name": site.layers}
    )
    network = create_lycoris(
        site.model, 1.0, linear_dim=site.rank, linear_alpha=site.rank, algo="locon"
    )
    assert len(network.loras) == len(site.layers), len(network.loras)
    network.apply_to()
    site.stack.callback(network.restore)
    network.to(next(site.model.parameters()).device, torch.float32)
    trained = _trained(network)
    return Adapter(trained, _adamw(site, trained), lambda: dict(network.state_dict()))


def _sbora(variant: Variant, folded: bool) -> Callable[[Site], Adapter]:
    def attach(site: Site) -> Adapter:
        config = SboraConfig(r=site.rank, variant=variant, target_modules=site.layers)
        wrapped, adapter = _peft(site, config)
        if not folded:
            return adapter
        layers = {name: site.model.get_submodule(name) for name in site.layers}
        training = site.stack.enter_context(folded_training(layers, wrapped.active_adapter))
        assert not training.obstacles, training.obstacles
        if variant == "fb":
            site.stack.enter_context(recalled_norms(plain_norms(site.model)))
        return Adapter(adapter.parameters, adapter.optimizer, adapter.file, training.write_back)

    return attach


METHODS = {
    FLOOR: Method("frozen model", _frozen),
    "sbora_fa_folded": Method("SBoRA-FA, folded", _sbora("fa", True), writes_weights=True),
    "sbora_fb_folded": Method("SBoRA-FB, folded", _sbora("fb", True), writes_weights=True),
    "sbora_fa_two_paths": Method("SBoRA-FA, two paths", _sbora("fa", False)),
    "sbora_fb_two_paths": Method("SBoRA-FB, two paths", _sbora("fb", False)),
    "lora": Method("LoRA (PEFT)", lambda site: _lora(site)[1]),
    "dora": Method("DoRA (PEFT)", lambda site: _lora(site, use_dora=True)[1]),
    "oft": Method(f"OFT, blocks of {OFT_BLOCK} (PEFT)", _oft),
    "shira": Method("SHiRA (PEFT)", _shira, no_graph="sparse tensors are not made for it"),
    "lora_fa": Method("LoRA-FA, AdamW (PEFT)", _lora_fa),
    "lora_fa_projected": Method(
        "LoRA-FA, its optimizer (PEFT)", _lora_fa_projected,
        no_graph="its optimizer counts steps on the host",
    ),
    "locon": Method("LoCon (LyCORIS)", _locon, needs="lycoris"),
}  # fmt: skip
"""Name → method."""


def attach(name: str, site: Site) -> Adapter:
    """Put a method on a model.

    Raises:
        ConfigError: the package that it needs is not installed.
    """
    method = METHODS[name]
    if method.missing:
        raise ConfigError(f"{method.title}: {method.missing}", f"pip install {method.needs}")
    return method.attach(site)
