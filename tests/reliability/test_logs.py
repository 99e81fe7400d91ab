"""What commands print and write names no secret, and no path but those that were given."""

import os
import shutil
from pathlib import Path

import pytest

from sbora_diffusion.diffusion import bases
from tests.conftest import CONCEPTS
from tests.diffusion.thin_pocket import thin_pocket

SECRET = "hf_canaryCanaryCanary"
QUICK = [part for pair in ("batch_size=1", "copies=1", "preservation=0", "resolution=32", "rank=2")
         for part in ("-s", pair)]  # fmt: skip
COMMANDS = {
    "train": (
        "train",
        "bear",
        "--steps",
        3,
        "--checkpoint-every",
        1,
        *QUICK,
        "-o",
        "b.safetensors",
    ),
    "resume": ("train", "bear", "--steps", 3, *QUICK, "-o", "b.safetensors", "--resume"),
    "generate": ("generate", "a <bear>", "--concept", "b.safetensors", "--steps", 1),
    "inspect": ("inspect", "b.safetensors", "--json"),
    "library": ("library", "show", "bear"),
    "merge": ("merge", "b.safetensors", "-o", "model", "--base", "pocket"),
    "check": ("check", "b.safetensors", "--base", "pocket"),
    "export": ("export", "b.safetensors", "--to", "kohya", "-o", "export", "--base", "pocket"),
    "import": ("import", "export", "-o", "back.safetensors"),
    "no such file": ("merge", "c.safetensors", "-o", "other"),
    "no subject": ("train", "nowhere"),
}


@pytest.fixture
def place(pocket, tmp_path, monkeypatch):
    """A working folder with one subject; secrets in the environment."""
    monkeypatch.setattr(bases, "load_base", lambda *_: thin_pocket(pocket))
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    work = tmp_path / "work"
    shutil.copytree(CONCEPTS / "plushbear", work / "bear")
    text = (work / "bear" / "concept.toml").read_text().replace("plushbear", "bear")
    (work / "bear" / "concept.toml").write_text(text)
    monkeypatch.chdir(work)
    monkeypatch.setenv("SBORA_LIBRARY", str(work / "library.sqlite3"))
    return work


def test_no_secret_and_no_foreign_path_is_printed_or_written(place, sbora):
    foreign = [str(Path.home()), str(CONCEPTS), "site-packages", str(place.parent)]
    for name, command in COMMANDS.items():
        status, out, err = sbora(*command)
        assert status == (2 if name.startswith("no ") else 0), (name, err)
        said = (out + err).replace(str(place), "")
        assert [part for part in (SECRET, *foreign) if part in said] == [], (name, said)
    written = [path for path in place.rglob("*") if path.is_file()]
    assert {"b.safetensors", "picture.png", "model_index.json"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes().replace(os.fsencode(place), b"")
        assert [p for p in (SECRET, *foreign) if p.encode() in content] == [], path
