"""Nothing in the package unpickles objects, and content decides what a file is, not its name."""

import ast
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sbora_diffusion
from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.diffusion.bases import POCKET, load_base

PACKAGE = Path(sbora_diffusion.__file__).parent
MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
LOADERS = {"load", "loads", "Unpickler", "load_pickle"}
WEIGHTS_ONLY = {"core/published.py"}
"""Where `torch.load` may stand: the import of published SBoRA checkpoints and the HF Trainer's own
state, sealed by a manifest; nothing else."""


def unpicklings(source: str) -> Iterator[str]:
    """Every place where a source could load a pickle, in its own words."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        owner, _, attribute = name.rpartition(".")
        unsafe = name in ("torch.load", "torch.hub.load_state_dict_from_url")
        if unsafe and options.get("weights_only") != "True":
            yield name
        if name in ("torch.jit.load", "torch.hub.load"):
            yield name
        if owner.split(".")[0] in MODULES and attribute in LOADERS:
            yield name
        if options.get("allow_pickle", "False") != "False" or name.endswith("read_pickle"):
            yield name
        if options.get("use_safetensors") == "False" or options.get("trust_remote_code") == "True":
            yield name


def imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def test_no_module_of_the_package_loads_a_pickle(record_property):
    sources = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = {str(path): list(unpicklings(source)) for path, source in sources.items()}
    assert {path: names for path, names in found.items() if names} == {}
    with_torch = {
        path.relative_to(PACKAGE).as_posix()
        for path, source in sources.items()
        if "torch.load(" in source
    }
    assert with_torch <= WEIGHTS_ONLY
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path, source in sources.items()
        if imports(source) & MODULES
    }
    assert importing == set()
    record_property("10 modules without unpickling", len(sources))
    record_property("10 places with weights_only=True", len(with_torch))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=safe)",
        "torch.jit.load(x)",
        "pickle.loads(x)",
        "joblib.load(x)",
        "np.load(x, allow_pickle=True)",
        "pd.read_pickle(x)",
        "load(x, use_safetensors=False)",
    ],
)
def test_that_search_finds_every_way_to_load_one(source):
    assert list(unpicklings(source))
    assert not list(unpicklings("torch.load(x, weights_only=True); np.load(x); json.load(x)"))


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize("kind", ["pickle", "checkpoint", "bin"])
def test_a_model_folder_with_pickles_is_refused_and_nothing_runs(tmp_path, part, kind):
    folder, canary = tmp_path / "base", tmp_path / "canary"
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("examples", "clip"))
    weights = folder / f"{part}.safetensors"
    weights.unlink()
    if kind == "pickle":
        weights.write_bytes(pickle.dumps(Runs(canary)))
    elif kind == "checkpoint":
        torch.save({"a": Runs(canary)}, weights)
    else:
        name = "pytorch_model.bin" if "text" in part else "diffusion_pytorch_model.bin"
        torch.save({"a": torch.zeros(1)}, weights.with_name(name))
    with pytest.raises(FormatError, match="cannot be read"):
        load_base(str(folder), "cpu")
    assert not canary.exists()


def test_a_checkpoint_named_safetensors_is_refused_as_a_base(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"a": Runs(canary)}, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="cannot be read as a checkpoint"):
        load_base(str(tmp_path / "m.safetensors"), "cpu")
    assert not canary.exists()
