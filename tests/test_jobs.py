import copy
import json

import pytest
from PIL import Image

from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.errors import ConfigError, NonFiniteError
from sbora_diffusion.diffusion import pipeline, training
from sbora_diffusion.jobs import index_widths, train_concept
from sbora_diffusion.library import Library
from sbora_diffusion.lookup import load_concepts
from sbora_diffusion.pictures import save_png, words_cut_off
from tests.conftest import CONCEPTS, TINY

ONE_STEP = TINY.model_copy(update={"steps": 1})


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library.sqlite3")


def learn(base, library, output, name="plushbear", config=ONE_STEP, **options):
    return train_concept(base, CONCEPTS / name, config, library=library, output=output, **options)


def test_an_example_is_found_by_name_unless_the_library_has_one(library, tiny_concepts):
    ((example, weight),) = load_concepts(["plushbear:0.5"], library)
    assert (example.meta.name, weight) == ("plushbear", 0.5)
    library.reserve("pocket-x", "fa", "plushbear", 8, {"unet.to_k": 160})
    library.record("pocket-x", "fa", "plushbear", tiny_concepts["plushbear"], "0" * 64, None)
    ((own, _),) = load_concepts(["plushbear"], library)
    assert own.meta.digest != example.meta.digest
    with pytest.raises(ConfigError, match="did you mean 'trex'"):
        load_concepts(["trexx"], library)


def test_training_writes_and_records_one_file(pocket, library, tmp_path):
    output, records = tmp_path / "new" / "folder" / "bear.safetensors", []
    result = learn(pocket, library, output, config=TINY, on_record=records.append)
    (entry,) = library.concepts(pocket.key)
    assert (entry.path, entry.digest, entry.token) == (str(output), result.digest, "<plushbear>")
    assert read_concept(output).meta.digest == result.digest
    assert [record.loss for record in records] == [result.loss_first, result.loss_last]
    assert [path.name for path in output.parent.iterdir()] == ["bear.safetensors"]


def test_sample_pictures_do_not_change_what_is_learned(pocket, library, tmp_path, monkeypatch):
    from sbora_diffusion import jobs

    drawn = []

    def quick(base, prompts, seeds):
        drawn.append((list(prompts), seeds))
        return pipeline.draw(base, prompts, seeds, 1)

    monkeypatch.setattr(jobs, "draw", quick)
    plain = learn(pocket, library, tmp_path / "a.safetensors", config=TINY)
    watched = learn(pocket, library, tmp_path / "b.safetensors", config=TINY, sample_every=2)
    assert watched.digest == plain.digest
    assert drawn == [(["a photo of <plushbear>"], [0])] * 2
    assert sorted(path.name for path in (tmp_path / "b.samples").iterdir()) == [
        "step_00000.png",
        "step_00002.png",
    ]


def test_a_failure_leaves_the_library_as_it_was(pocket, library, tmp_path, monkeypatch):
    kept = learn(pocket, library, tmp_path / "a.safetensors")
    before = library.concepts()

    def fail(*_):
        raise NonFiniteError("the loss became nan")

    monkeypatch.setattr(training.ConceptTraining, "_finite", fail)
    wider = ONE_STEP.model_copy(update={"rank": 16})
    for name, config in (("baseballcap", ONE_STEP), ("plushbear", ONE_STEP), ("plushbear", wider)):
        with pytest.raises(NonFiniteError):
            learn(pocket, library, tmp_path / "b.safetensors", name, config)
        assert library.concepts() == before
    assert before[0].digest == kept.digest
    assert not (tmp_path / "b.safetensors").exists()


def test_the_widths_of_the_adapted_layers_set_the_capacity(pocket):
    assert min(index_widths(pocket, TINY).values()) == 160
    text = TINY.model_copy(update={"targets": "text-encoder"})
    assert set(index_widths(pocket, text).values()) == {192}
    assert all(name.startswith("text_encoder.") for name in index_widths(pocket, text))


def test_weights_follow_the_last_colon(tiny_concepts, tmp_path, library):
    bear = tiny_concepts["plushbear"]
    odd = tmp_path / "C:bear.safetensors"
    odd.write_bytes(bear.read_bytes())
    specs = [str(bear), f"{bear}:-0.5", str(odd), f"{odd}:2"]
    assert [weight for _, weight in load_concepts(specs)] == [1.0, -0.5, 1.0, 2.0]
    for wrong in (f"{bear}:nan", f"{bear}:inf", f"{bear}:", "", ":1", "nobody"):
        with pytest.raises(ConfigError):
            load_concepts([wrong], library)


def test_equal_pictures_with_equal_parameters_are_equal_files(tmp_path):
    picture = Image.new("RGB", (8, 6), "red")
    parameters = {"prompt": "été 猫 \0 <x>", "steps": 3, "negative_prompt": "blur"}
    for name in ("a.png", "b.png"):
        save_png(picture, tmp_path / name, copy.deepcopy(parameters))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as read:
        read.load()
        assert read.text["parameters"] == (
            "été 猫   <x>\nNegative prompt: blur\nSteps: 3, Size: 8x6"
        )
        assert json.loads(read.text["sbora"]).items() >= parameters.items()


def test_the_words_beyond_the_text_encoders_limit_are_named(pocket):
    assert words_cut_off(pocket, "") == words_cut_off(pocket, "a bear " * 37) == ""
    assert words_cut_off(pocket, "cat " * 75 + "dog cat") == "dog cat"
