"""What the README shows works: its Python runs, its files exist."""

import re
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_draws_a_picture(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (128, 128)
        assert len(picture.getcolors(maxcolors=128 * 128)) > 100  # not one flat colour


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_file_tree_names_what_is_there():
    (tree,) = re.findall(r"```\n(sbora_diffusion/\n.*?)```", README, re.DOTALL)
    package = re.findall(r"^  (\w+(?:\.py|/))", tree, re.MULTILINE)
    top = re.findall(r"^(\w+(?:\.py|/))", tree, re.MULTILINE)
    assert len(package) >= 5
    assert [name for name in package if not (ROOT / "sbora_diffusion" / name).exists()] == []
    assert [name for name in top if not (ROOT / name).exists()] == []
