"""Tables and plots: from lines alone, against naive means."""

import json
from statistics import fmean

import pytest
from PIL import Image

from sbora_diffusion.comparison.merge_tables import change, merge_tables
from sbora_diffusion.comparison.page import blank, render, render_tuning
from sbora_diffusion.comparison.plot import merge_picture, single_picture
from sbora_diffusion.comparison.statistics import by_category, by_concept, paired
from sbora_diffusion.comparison.tables import TEXT, read_figure, single_tables
from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.evaluation.intervals import bootstrap
from sbora_diffusion.evaluation.paper import load_paper

SETTING = {
    "base": "b", "judges": ["judge"], "protocols": ["raw-cosine", "mix-of-show"],
    "drawing": {"num": 2},
}  # fmt: skip
RUN = {"device": "gpu", "commit": "abc", "date": "2026-01-01", "seconds": 3.0, "command": "c"}
CONCEPTS = {"one": "character", "two": "character", "three": "object"}


def means(text, image):
    own = {"pictures": 40, "text_alignment": text, "image_alignment": {"judge": image}}
    scaled = {"judge": image, "judge, first-reference": image}
    return {
        "raw-cosine": own,
        "mix-of-show": {"text_alignment": 2.5 * text, "image_alignment": scaled},
    }


def line(method, concept, seed, **more):
    return {
        "preset": "small", "method": method, "title": method, "concept": concept, "seed": seed,
        "category": CONCEPTS[concept], "setting": SETTING, "run": RUN, **more,
    }  # fmt: skip


@pytest.fixture
def alone():
    """Three concepts, two seeds, three methods, in no order."""
    return [
        line(
            method, concept, seed, tuned=True, trainable={"weights": 7, "tokens": 1},
            alone=means(0.1 * k + 0.01 * seed + 0.02 * len(concept), 0.2 * k + 0.03 * seed),
        )
        for k, method in enumerate(("sbora-fa", "class-word", "lora"), 1)
        for concept in CONCEPTS
        for seed in (1, 0)
    ]  # fmt: skip


@pytest.fixture
def merged():
    return [
        line(
            method, concept, 0, merge=way, merge_title=f"by {way}", before=means(0.5, 0.6),
            after={
                "2": {"with": [], "seconds": 1.0, "figures": means(0.45, 0.5)},
                "3": {"with": [], "seconds": 2.0, "figures": means(0.4, 0.3)},
            },
        )
        for method, way in (("lora", "mean"), ("sbora-fa", "sum"), ("lora", "sum"))
        for concept in CONCEPTS
    ]  # fmt: skip


def rows(lines, title=None):
    """Cells of a table's rows, the first below a heading if one is named."""
    start = lines.index(f"### {title}") + 2 if title else 0
    found = []
    for text in lines[start + 2 :]:
        if not text.startswith("|"):
            break
        found.append([cell.strip() for cell in text.strip("|").split("|")])
    return found


def test_rows_come_in_the_order_of_the_preset_and_hold_the_means(preset, alone):
    table = single_tables(preset, alone, load_paper())["single equal-rank"]
    found = rows(table, "Text alignment, judge, cosine")
    assert [row[0] for row in found] == ["class word", "LoRA", "SBoRA-FA"]
    values = {
        concept: fmean(x["alone"]["raw-cosine"]["text_alignment"] for x in alone
                       if (x["method"], x["concept"]) == ("lora", concept))
        for concept in CONCEPTS
    }  # fmt: skip
    character = fmean([values["one"], values["two"]])
    means = (character, values["three"], (character + values["three"]) / 2)
    assert [cell.split()[0] for cell in found[1][1:]] == [f"{mean:.3f}" for mean in means]


def test_the_papers_figures_stand_beside_with_doubtful_cells_marked(preset_file, preset, alone):
    table = single_tables(preset, alone, load_paper())["single equal-rank"]
    found = rows(table, "Image alignment, judge, all pairs")
    assert found[2][-3:] == ["0.7058", "0.7851", "0.7454"] and found[0][-3:] == ["–"] * 3
    entries = {**preset.methods, "sbora-fa": preset.methods["sbora-fa"].model_copy(
        update={"method": "custom-diffusion"})}  # fmt: skip
    other = preset.model_copy(update={"methods": entries})
    found = rows(
        single_tables(other, alone, load_paper())["single equal-rank"],
        "Text alignment, judge, mix-of-show",
    )
    assert found[2][-3:] == ["0.7893?", "0.7892", "0.7893?"]


def test_differences_are_paired_and_stand_beside_the_papers(preset, alone):
    entries = {**preset.methods, "sbora-fb": preset.methods["lora"].model_copy(
        update={"method": "sbora-fb"})}  # fmt: skip
    renamed = [{**x, "method": "sbora-fb"} if x["method"] == "lora" else x for x in alone]
    preset = preset.model_copy(update={"methods": entries})
    (row,) = rows(single_tables(preset, renamed, load_paper())["differences"])
    assert row[0] == "SBoRA-FB − SBoRA-FA" and row[-2:] == ["+0.0071", "-0.0161"]
    assert row[2].split()[0] == "+0.400"


def test_intervals_are_those_of_the_concepts_means(alone):
    lines = [x for x in alone if x["method"] == "lora" and x["category"] == "character"]
    value = read_figure("raw-cosine", TEXT)
    found = by_category(lines, value)
    values = [mean for _, mean in by_concept(lines, value).values()]
    expected = bootstrap(values, lambda drawn: drawn.mean(1))
    assert list(found["character"].interval) == expected
    assert found["mean"].value == found["character"].value and "object" not in found


def test_broken_lines_are_counted_and_do_not_count(alone):
    lines = [x for x in alone if x["method"] == "lora"]
    rest = by_category(lines[1:], read_figure("raw-cosine", TEXT))
    lines[0].pop("alone")
    found = by_category(lines, read_figure("raw-cosine", TEXT))
    assert found["mean"].value == rest["mean"].value
    assert (found["mean"].broken, rest["mean"].broken) == (1, 0)
    assert paired({}, by_concept(lines, read_figure("raw-cosine", TEXT))) is None


def test_merging_has_a_table_for_each_number_of_concepts(preset, merged):
    table = merge_tables(preset, merged, load_paper())["merge"]
    for size, text, image, seconds in (
        ("2", "-0.050", "-0.100", "1.00"),
        ("3", "-0.100", "-0.300", "2.00"),
    ):
        found = rows(table, f"{size} concepts in one model")
        assert [row[:2] for row in found] == [
            ["SBoRA-FA", "by sum"], ["LoRA", "by sum"], ["LoRA", "by mean"],
        ]  # fmt: skip
        for row in found:
            assert row[2:4] == ["0.500", "0.600"] and row[-1] == seconds
            assert [cell.split()[0] for cell in row[4:6]] == [text, image]


def test_a_broken_merge_says_so(preset, merged):
    for one in merged:
        if one["merge"] == "mean":
            one["after"]["3"] = {"with": [], "broken": "NaN"}
    found = rows(merge_tables(preset, merged, load_paper())["merge"], "3 concepts in one model")
    assert found[2][4:] == ["broken", "broken", "–"] and "broken" not in found[1]
    assert change(3, TEXT, merged[0]) is None


def test_published_changes_are_the_papers_record(preset, merged):
    found = rows(merge_tables(preset, merged, load_paper())["published"])
    assert ["Orthogonal Adaptation", "3", "+0.020", "-0.007"] in [row[:4] for row in found]


def test_lines_of_different_settings_are_not_put_into_one_table(preset, alone):
    alone[0]["setting"] = {**SETTING, "drawing": {"num": 1}}
    with pytest.raises(FormatError, match="differ in drawing"):
        single_tables(preset, alone, load_paper())
    with pytest.raises(FormatError, match="no line of preset small"):
        single_tables(preset, [], load_paper())


def test_repeated_lines_count_once(preset, alone):
    once = single_tables(preset, alone, load_paper())
    assert single_tables(preset, [*alone, *alone[:3]], load_paper()) == once


def test_pictures_show_every_judge(preset, alone, merged):
    for picture in (single_picture(preset, alone), merge_picture(preset, merged)):
        assert isinstance(picture, Image.Image) and picture.width > 400
        assert len(picture.getcolors(maxcolors=1 << 20)) > 10


def test_a_page_changes_between_its_marks_alone(preset, alone, tmp_path):
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in alone))
    preset.page.write_text(f"before\n{blank(preset)}after\n")
    files = render(preset, "single", folder, preset.page)
    text = preset.page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "18 lines, device gpu; commit abc" in text and all(f.exists() for f in files)
    assert render(preset, "single", folder, preset.page) and preset.page.read_text() == text
    preset.page.write_text("no marks")
    with pytest.raises(FormatError, match="no place for the table 'single equal-rank'"):
        render(preset, "single", folder, preset.page)


def test_the_table_of_tuning_shows_what_won(preset, tmp_path):
    trials = [
        {"changes": {"rate_unet": 1e-3}, "worth": 0.5, "text_alignment": 0.2,
         "image_alignment": {"judge": 0.3}},
        {"changes": {"rate_unet": 1e-2}, "worth": 0.9, "text_alignment": 0.4,
         "image_alignment": {"judge": 0.5}},
    ]  # fmt: skip
    found = {"lora": {"settings": {"rate_unet": 1e-2}, "worth": 0.9, "trials": trials}}
    render_tuning(preset, {"setting": SETTING, "methods": found}, preset.page)
    assert "| LoRA | 2 | rate_unet 0.01 | 0.400 | 0.500 |" in preset.page.read_text()
