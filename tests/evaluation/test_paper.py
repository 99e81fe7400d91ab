"""The paper's figures as stored: consistent, and doubtful ones marked."""

import pytest

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.evaluation.paper import FILE, Cells, load_paper
from sbora_diffusion.evaluation.protocols import PROTOCOLS


@pytest.fixture(scope="module")
def paper():
    return load_paper()


def test_means_are_those_of_the_categories_up_to_rounding_except_where_a_reason_is_given(paper):
    for row in paper.single:
        for name, cells in (("text", row.text), ("image", row.image)):
            mean = (cells.character + cells.object) / 2
            explained = f"{name}.mean" in row.suspect
            assert abs(cells.mean - mean) <= 0.5001e-4 or explained, (row.method, name)


def test_the_tables_have_the_differences_that_are_to_be_reproduced(paper):
    rows = {row.method: row for row in paper.single}
    names = ["Custom Diffusion", "Mix-of-Show", "Orthogonal Adaptation", "SBoRA-FA", "SBoRA-FB"]
    assert list(rows) == names
    oa, fa, fb = (rows[name] for name in names[2:])
    changes = [after.text.mean - before.text.mean for before, after in ((oa, fa), (fa, fb))]
    assert changes == pytest.approx([0.017, 0.007], abs=5e-4)
    changes = [after.image.mean - before.image.mean for before, after in ((oa, fa), (fa, fb))]
    assert changes == pytest.approx([-0.006, -0.016], abs=5e-4)


def test_the_suspect_cells_are_those_beyond_the_bounds_of_the_class_word(paper):
    bounds = {b.category: b for b in paper.bounds if b.category != "scene"}
    text = {name: b.text for name, b in bounds.items()}
    image = {name: b.image for name, b in bounds.items()}
    text["mean"], image["mean"] = (sum(t.values()) / 2 for t in (text, image))
    for row in paper.single:
        beyond = [f"text.{n}" for n in Cells.model_fields if getattr(row.text, n) > text[n]]
        beyond += [f"image.{n}" for n in Cells.model_fields if getattr(row.image, n) < image[n]]
        assert sorted(row.suspect) == sorted(beyond), row.method


def test_published_figures_name_a_protocol_of_this_package_and_their_source(paper):
    assert {row.protocol for row in paper.published} <= set(PROTOCOLS)
    assert all(row.source for row in (*paper.published, *paper.bounds, *paper.merging))
    assert all(row.where and row.reason and row.printed != row.meant for row in paper.misprints)


def test_the_published_effects_of_merging_give_their_change(paper):
    rows = {(row.method, row.concepts): row for row in paper.merging}
    ours = rows["Orthogonal Adaptation", 3]
    found = [ours.change(figure) for figure in ("text", "image", "identity")]
    assert found == pytest.approx([0.020, -0.007, 0.005])
    averaged = rows["LoRA, averaged", 14]
    assert averaged.change("image") == -0.115 and averaged.change("text") is None
    assert len(rows) == 9


@pytest.mark.parametrize(
    ("old", "new", "words"),
    (
        ("[[bounds]]", "[[bound]]", "unknown key 'bound'"),
        ('suspect = ["text.character"', 'suspect = ["text.charakter"', "suspect names no cell"),
        ('suspect = ["text.character", "text.mean", "image.object"]', "", "must come together"),
        ("image_change = -0.115", "", "either image or image_change"),
        ("mean = 0.7105", "mean = inf", "finite"),
        ("mean = 0.7105", "average = 0.7105", "mean"),
    ),
)
def test_a_wrong_file_is_refused(tmp_path, old, new, words):
    content = FILE.read_text(encoding="utf-8")
    assert old in content
    file = tmp_path / "paper.toml"
    file.write_text(content.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        load_paper(file)
