"""One model of a base and one or several trained adapters (Multi-SBoRA on language).

Three results. *16 bits*: adapters folded into plain weights by the project's one expression, which
rounds once and gives the same bytes in any order; an NF4 base is dequantized first, to the very
values that it multiplied with while the adapters trained. *Overlay*: the NF4 base stays, and owned
columns or rows stand beside it in 16 bits, exactly what folding gives. *NF4*: merged and quantized
again, which loses about half of a small update; measured, for those who insist.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConfigError, FormatError
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.llm.adapters import TaskAdapter, check_disjoint, check_fits
from sbora_diffusion.core.llm.loading import DTYPES, load_model
from sbora_diffusion.core.llm.quantized import (
    Overlaid,
    dequantized,
    dequantized_weight,
    is_quantized,
    quantized_again,
)
from sbora_diffusion.core.merging import fold
from sbora_diffusion.core.updates import Update, union_of

FORMS = ("16-bit", "overlay", "nf4")
RECORD, OVERLAY = "sbora.json", "overlay.safetensors"
_REMEDY = "merge such adapters with --as 16-bit"


@dataclass(frozen=True)
class Loss:
    """What quantizing a merged weight again loses, over all layers.

    Attributes:
        lost: ‖W' − (W0 + ΔW)‖ / ‖ΔW‖ over the owned columns or rows.
        changed: share of the entries that no adapter owns and that differ from the base's.
    """

    lost: float
    changed: float


def is_nf4(adapters: Sequence[TaskAdapter]) -> bool:
    """Whether adapters were trained on an NF4 base.

    Raises:
        ConfigError: some were and some were not, or with other scales.
    """
    bases = {
        (a.training.get("quantize", "none"), a.training.get("double_quant", False))
        for a in adapters
    }
    if len(bases) > 1:
        raise ConfigError(
            "the adapters were trained on different forms of the base: "
            + ", ".join(sorted(f"{q}{' twice' if d else ''}" for q, d in bases)),
            "merge adapters of one form",
        )
    return bases.pop()[0] == "nf4"


def merged_model(
    base: str, adapters: Sequence[TaskAdapter], dtype: str = "bf16", allow_overlap: bool = False
) -> Any:
    """A plain model with all adapters folded in.

    Args:
        base: a folder or a hub id; quantized first where the adapters were trained on NF4.
        dtype: of the result, in which the fold is exact.

    Raises:
        ConfigError, BaseMismatch, ConflictError: the adapters do not fit the base or each other.
    """
    if is_nf4(adapters):
        model = dequantized(_nf4_base(base, adapters), DTYPES[dtype])
    else:
        model = load_model(base, dtype)
    return folded_into(model, adapters, allow_overlap)


def folded_into(model: Any, adapters: Sequence[TaskAdapter], allow_overlap: bool = False) -> Any:
    """Fold adapters into a loaded plain model; SBoRA's together, others one after another."""
    ours = [adapter for adapter in adapters if adapter.is_sbora]
    if not allow_overlap:
        check_disjoint(ours)
    for adapter in ours:
        check_fits(adapter, model)
    for layer, updates in _by_layer(ours).items():
        fold(model.get_submodule(layer).weight, updates)
    for adapter in adapters:
        if not adapter.is_sbora:
            model = _merged_by_peft(model, adapter)
    return model


def overlaid_model(base: str, adapters: Sequence[TaskAdapter], allow_overlap: bool = False) -> Any:
    """The NF4 base with owned columns or rows beside it, in the dtype that it was quantized from.

    Raises:
        ConfigError: an adapter is not SBoRA, or they mix columns and rows.
    """
    model = _nf4_base(base, adapters)
    _check_ours(adapters)
    if not allow_overlap:
        check_disjoint(adapters)
    for adapter in adapters:
        check_fits(adapter, model)
    for layer, updates in _by_layer(adapters).items():
        module = model.get_submodule(layer)
        at = union_of(updates).to(module.weight.device)
        whole = dequantized_weight(module)
        fold(whole, updates)
        block = whole.index_select(updates[0].dim, at)
        _replace(model, layer, Overlaid(module, updates[0].dim, at, block))
    return model


def nf4_model(
    base: str, adapters: Sequence[TaskAdapter], allow_overlap: bool = False
) -> tuple[Any, Loss]:
    """Adapters merged into NF4, against advice, and what that lost."""
    model = _nf4_base(base, adapters)
    _check_ours(adapters)
    if not allow_overlap:
        check_disjoint(adapters)
    for adapter in adapters:
        check_fits(adapter, model)
    sums = torch.zeros(4, dtype=torch.float64)
    for layer, updates in _by_layer(adapters).items():
        sums += _merged_into_nf4(model.get_submodule(layer), updates)
    error, size, changed, others = sums.tolist()
    return model, Loss((error / size) ** 0.5 if size else 0.0, changed / max(others, 1.0))


def merge_record(
    base: str, adapters: Sequence[TaskAdapter], form: str, dtype: str
) -> dict[str, Any]:
    """What a merged model was made of; `load_merged` reads an overlay's base from it."""
    training = adapters[0].training
    kept = form != "16-bit"
    return {
        "base": base,
        "form": form,
        "dtype": training["dtype"] if kept else dtype,
        "double_quant": training.get("double_quant", False),
        "variant": getattr(adapters[0].config, "variant", None),
        "adapters": [{"digest": a.digest, "weight": a.weight, "rank": a.rank} for a in adapters],
    }


def write_model(folder: Path, model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """Write a merged model as a folder that transformers reads, and `load_merged` for an overlay.

    Raises:
        ConflictError: the folder exists and is not empty.
        ResourceError: it cannot be written.
    """
    model.config.use_cache = True
    overlays = {n: m for n, m in model.named_modules() if isinstance(m, Overlaid)}

    def fill(place: Path) -> None:
        if overlays:
            save_file(_overlay_tensors(overlays), place / OVERLAY, {"format": "pt"})
        else:
            model.save_pretrained(str(place))
        tokenizer.save_pretrained(str(place))
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (place / RECORD).write_text(text + "\n", encoding="utf-8")

    write_folder(folder, fill)


def load_merged(reference: str, dtype: str = "fp32", device: str | None = None) -> Any:
    """A model of `write_model`, or any other that `loading.load_model` knows.

    Raises:
        ConfigError: there is none.
        FormatError: the overlay does not fit its base.
    """
    file = Path(reference) / OVERLAY
    if not file.is_file():
        return load_model(reference, dtype, device=device)
    record = json.loads((Path(reference) / RECORD).read_text(encoding="utf-8"))
    model = load_model(record["base"], record["dtype"], "nf4", record["double_quant"], device)
    tensors = load_file(file)
    for key in tensors:
        layer, _, part = key.rpartition(".")
        if part != "block":
            continue
        try:
            module = model.get_submodule(layer)
        except AttributeError as error:
            raise FormatError(f"{file}: the base has no layer {layer}", "give its base") from error
        at, block = (tensors[f"{layer}.{name}"].to(model.device) for name in ("at", "block"))
        dim = 1 if record["variant"] == "fa" else 0
        _replace(model, layer, Overlaid(module, dim, at.long(), block))
    return model


def _by_layer(adapters: Sequence[TaskAdapter]) -> dict[str, list[Update]]:
    found: dict[str, list[Update]] = {}
    for adapter in adapters:
        for layer, update in adapter.updates.items():
            found.setdefault(layer, []).append(update)
    return found


def _check_ours(adapters: Sequence[TaskAdapter]) -> None:
    for adapter in adapters:
        if not adapter.is_sbora:
            raise ConfigError(f"{adapter.path} is no SBoRA adapter, it owns no columns", _REMEDY)
    if len({update.variant for a in adapters for update in a.updates.values()}) > 1:
        raise ConfigError("FA and FB adapters cannot share an overlay", _REMEDY)


def _nf4_base(base: str, adapters: Sequence[TaskAdapter]) -> Any:
    """The base as the adapters saw it in training."""
    training = adapters[0].training
    if not is_nf4(adapters):
        raise ConfigError("the adapters were not trained on an NF4 base", _REMEDY)
    return load_model(base, training["dtype"], "nf4", training.get("double_quant", False))


def _merged_by_peft(model: Any, adapter: TaskAdapter) -> Any:
    if adapter.weight != 1.0:
        raise ConfigError(f"{adapter.path} is no SBoRA adapter and has no weight", "leave it out")
    wrapped = PeftModel.from_pretrained(model, str(adapter.path))
    try:
        return wrapped.merge_and_unload()  # type: ignore[operator]
    except (AttributeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"{adapter.config.peft_type} adapters cannot be merged", "load it beside its base"
        ) from error


def _merged_into_nf4(layer: Any, updates: list[Update]) -> Tensor:
    """Merge and quantize one layer: squared error and size of ΔW, changed and all other entries."""
    assert is_quantized(layer)
    before = dequantized_weight(layer).float()
    wanted = before.clone()
    fold(wanted, updates)
    quantized_again(layer, wanted)
    after = dequantized_weight(layer).float()
    dim, at = updates[0].dim, union_of(updates).to(before.device)
    others = torch.ones(before.shape[dim], dtype=torch.bool, device=before.device)
    others[at] = False
    rest = others.nonzero().flatten()
    delta, error = (wanted - before), (after - wanted).index_select(dim, at)
    changed = (after != before).index_select(dim, rest)
    sums = (error.square().sum(), delta.square().sum(), changed.sum(), changed.numel())
    return torch.tensor([float(value) for value in sums], dtype=torch.float64)


def _overlay_tensors(overlays: dict[str, Overlaid]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor.contiguous()
        for name, overlay in overlays.items()
        for part, tensor in (("at", overlay.at.int()), ("block", overlay.block))
    }


def _replace(model: nn.Module, layer: str, new: nn.Module) -> None:
    parent, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
