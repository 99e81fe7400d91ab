"""Twenty prompts per concept: the benchmark's own, and those in the pocket world's words."""

import re
import sys
import tomllib

import pytest

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.generic import MANNERS, PLACES
from sbora_diffusion.diffusion.moments import CalibrateConfig
from sbora_diffusion.evaluation.prompt_sets import (
    GROUPS,
    WORDINGS,
    filled,
    load_prompts,
    read_prompt_file,
)
from tests.conftest import CONCEPTS

sys.path.append(str(CONCEPTS.parent / "scripts"))
from world.captions import DRAWN, RELATIONS, SIZES, STYLES
from world.captions import PLACES as SCENES
from world.plans import reserved
from world.sprites import COLOURS
from world_nouns import ACCESSORIES

SUBJECTS = sorted(place.parent for place in CONCEPTS.glob("*/concept.toml"))
POCKET = [*load_prompts("pocket").sets.values()]


@pytest.mark.parametrize("wording", WORDINGS)
def test_every_set_has_twenty_different_prompts_five_in_each_group(wording):
    stored = load_prompts(wording)
    assert stored.licence == "Apache-2.0" and "2305.18292" in stored.source
    for prompts in stored.sets.values():
        assert tuple(prompts.groups()) == GROUPS
        assert [len(group) for group in prompts.groups().values()] == [5] * 4
        assert len(set(prompts.templates())) == 20
        assert all("<x>" in text and "{" not in text for text in prompts.about("<x>"))


def test_the_benchmark_has_its_seven_lists_in_its_own_words():
    sets = load_prompts("benchmark").sets
    assert set(sets) == {"character", "pet", "plushy", "chair", "table", "vase", "scene"}
    assert sets["character"].interaction[1] == "A {} ride a horse"
    assert sets["vase"].interaction[3] == "Milk poured into a {}"
    assert sets["scene"].recontextualisation[4] == "A {}, in thunder and lightning"
    assert len({prompts.restylisation for prompts in sets.values()}) == 1


def test_a_subject_gets_the_set_of_its_noun_else_of_its_category():
    benchmark, pocket = load_prompts("benchmark"), load_prompts("pocket")
    assert benchmark.for_subject("character", "dog") is benchmark.sets["pet"]
    assert benchmark.for_subject("object", "vase") is benchmark.sets["vase"]
    assert benchmark.for_subject("object", "teapot") is benchmark.sets["plushy"]
    assert benchmark.for_subject("character", "man") is benchmark.sets["character"]
    for place in SUBJECTS:
        settings = read_subject(place).settings
        found = pocket.for_subject(settings.category, settings.class_noun)
        assert found is pocket.sets[settings.category]
    with pytest.raises(ConfigError, match=r"category 'scene'.*character, object"):
        pocket.for_subject("scene", "castle")


def test_articles_fit_what_they_stand_before():
    assert filled("A {} on a table", "armchair") == "An armchair on a table"
    assert filled("a photo of a big {}", "apple") == "a photo of a big apple"
    assert filled("a photo of a {}", "<apple>") == "a photo of a <apple>"
    assert filled("Camera {}", "apple") == "Camera apple"


def test_pocket_prompts_keep_to_the_words_that_the_base_was_trained_on():
    openings = [words for group in (STYLES, DRAWN) for form in group.values() for words in form]
    places = [words for forms in SCENES.values() for words in forms]
    places += [f"on a {colour} background" for colour in COLOURS]
    for template in {t for prompts in POCKET for t in prompts.templates()}:
        opening = max((o for o in openings if template.startswith(f"{o} a ")), key=len)
        place = max((p for p in places if template.endswith(f" {p}")), key=len)
        middle = template[len(opening) : -len(place)].strip()
        relation = "|".join(form for forms in RELATIONS.values() for form in forms)
        extra = "|".join([*(size for forms in SIZES.values() for size in forms), *COLOURS])
        worn = "|".join({"headphones", *(f"a {noun}" for noun in ACCESSORIES.values())})
        form = rf"a (({extra}) )?\{{\}}( wearing ({worn})| ({relation}) (a|an) [a-z ]+)?"
        assert re.fullmatch(form, middle), template


def test_second_subjects_were_never_seen_in_their_scene():
    pairs = []
    for template in {t for prompts in POCKET for t in prompts.interaction if "wearing" not in t}:
        match = re.search(r"\{\} (?:next to|on top of|under) an? (.+?) ((?:on|in) .+)$", template)
        assert match, template
        (scene,) = (name for name, forms in SCENES.items() if match[2] in forms)
        pairs.append((match[1], scene))
    assert len(pairs) >= 6
    assert [pair for pair in pairs if not reserved(*pair)] == []


def test_pocket_prompts_share_no_place_or_manner_with_what_merging_and_training_look_at():
    nouns = {read_subject(place).settings.class_noun for place in SUBJECTS}
    for template in {t for prompts in POCKET for t in prompts.templates()}:
        assert not any(place and place in template for place in PLACES), template
        assert not template.startswith(tuple(set(MANNERS) - {"a photo of"})), template
        assert template not in CalibrateConfig().prompts
        assert not nouns & set(re.findall(r"[a-z]+", template)), template


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"interaction": ["a {}"] * 4}, "at least 5"),
        ({"interaction": ["a {}"] * 6}, "at most 5"),
        ({"interaction": ["a cat"] * 5}, "must have one {}"),
        ({"interaction": ["{} and {}"] * 5}, "must have one {}"),
        ({"interaction": ["a {} {0}"] * 5}, "must have one {}"),
        ({"kategory": "object"}, "unknown key"),
        ({"category": "animal"}, "category"),
    ),
)
def test_wrong_prompt_files_are_refused_in_one_line(tmp_path, change, words):
    content = tomllib.loads(WORDINGS["pocket"].read_text(encoding="utf-8"))
    group = {key: list(value) for key, value in content["common"].items()}
    entry = {**group, **content["sets"]["object"], **change}
    lines = ['source = "x"', 'licence = "x"', "[sets.object]"]
    lines += [f"{key} = {value!r}" for key, value in entry.items()]
    file = tmp_path / "own.toml"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=words) as caught:
        read_prompt_file(file)
    assert "own.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_wordings_and_tables_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'pockt'.*benchmark, pocket"):
        load_prompts("pockt")
    file = tmp_path / "own.toml"
    file.write_text('source = "x"\nlicence = "x"\nsets = 3')
    with pytest.raises(ConfigError, match="must be tables"):
        read_prompt_file(file)
