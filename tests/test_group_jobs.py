"""Many subjects in one call: slots come at once, and a failure leaves nothing half-written."""

import pytest

from sbora_diffusion.core import storage
from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.errors import ConfigError, ConflictError, NonFiniteError, ResourceError
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.group_training import GroupTraining
from sbora_diffusion.diffusion.training import ConceptTraining
from sbora_diffusion.group_jobs import group_size, train_concepts
from sbora_diffusion.library import Library
from tests.conftest import CONCEPTS, TINY

NAMES = ("plushbear", "baseballcap", "toytrain")
ONE_STEP = TINY.model_copy(update={"steps": 1, "targets": "text-encoder"})


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library.sqlite3")


def learn(base, library, folder, names=NAMES, at_once=2, **options):
    subjects = [read_subject(CONCEPTS / name) for name in names]
    return train_concepts(
        base, subjects, ONE_STEP, library=library, folder=folder, at_once=at_once, **options
    )


def test_each_concept_is_written_and_recorded_in_a_slot_of_its_own(pocket, library, tmp_path):
    steps = []
    results = learn(pocket, library, tmp_path / "new", on_step=lambda *s: steps.append(s[:2]))
    assert steps == [(1, 2), (2, 2)]
    assert [r.path.name for r in results] == [f"{name}.safetensors" for name in NAMES]
    assert [r.reservation.slot for r in results] == [0, 1, 2]
    entries = {entry.name: entry for entry in library.concepts(pocket.key)}
    for name, result in zip(NAMES, results, strict=True):
        meta = read_concept(result.path).meta
        assert (meta.name, meta.start) == (name, entries[name].start)
        assert meta.digest == result.digest == entries[name].digest
        assert entries[name].path == str(result.path) and entries[name].token == f"<{name}>"
        assert result.loss_first == result.loss_last > 0
    assert len(list((tmp_path / "new").iterdir())) == 3


def fail(*_):
    raise NonFiniteError("the loss became nan")


def test_a_failing_group_leaves_no_file_and_no_slot(pocket, library, tmp_path, monkeypatch):
    monkeypatch.setattr(GroupTraining, "_finite", fail)
    with pytest.raises(NonFiniteError):
        learn(pocket, library, tmp_path / "out")
    assert library.concepts() == [] and not (tmp_path / "out").exists()


def test_a_later_failure_keeps_what_was_finished(pocket, library, tmp_path, monkeypatch):
    monkeypatch.setattr(ConceptTraining, "_finite", fail)  # the third trains alone
    with pytest.raises(NonFiniteError):
        learn(pocket, library, tmp_path)
    assert [entry.name for entry in library.concepts()] == ["plushbear", "baseballcap"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_file_that_cannot_be_written_takes_the_others_with_it(
    pocket, library, tmp_path, monkeypatch
):
    write, staged = storage.write_durably, []

    def second_fails(path, data):
        if staged:
            raise OSError(28, "No space left on device")
        staged.append(path)
        write(path, data)

    monkeypatch.setattr(storage, "write_durably", second_fails)
    with pytest.raises(ResourceError, match=r"baseballcap.safetensors cannot be written: No space"):
        learn(pocket, library, tmp_path / "out", NAMES[:2])
    assert staged
    assert library.concepts() == [] and list((tmp_path / "out").iterdir()) == []


def test_what_cannot_train_is_refused_before_a_slot_is_taken(pocket, library, tmp_path):
    with pytest.raises(ConflictError, match="two subjects are called 'plushbear'"):
        learn(pocket, library, tmp_path, ["plushbear", "plushbear"])
    (tmp_path / "plushbear.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="not a concept file"):
        learn(pocket, library, tmp_path)
    assert library.concepts() == []


def test_the_size_of_a_group_follows_device_and_recipe(pocket):
    dropout = ONE_STEP.model_copy(update={"dropout": 0.5})
    assert group_size(pocket, ONE_STEP, 14, None) == group_size(pocket, dropout, 14, None) == 1
    assert group_size(pocket, ONE_STEP, 14, 3) == 3
    for config, at_once in ((dropout, 2), (ONE_STEP, 0)):
        with pytest.raises(ConfigError, match="--at-once"):
            group_size(pocket, config, 14, at_once)


def test_explicit_slots_are_taken_and_one_that_is_owned_is_not_registered(
    pocket, library, tmp_path
):
    learn(pocket, library, tmp_path / "first", names=NAMES[:1], slots={"plushbear": 1})
    results = learn(
        pocket, library, tmp_path / "new", names=NAMES[1:], slots={"baseballcap": 1, "toytrain": 5}
    )
    assert [r.reservation.slot for r in results] == [1, 5]
    assert [r.reservation.registered for r in results] == [False, True]
    assert results[0].warnings and results[0].path.exists()
    assert {e.name for e in library.concepts(pocket.key)} == {"plushbear", "toytrain"}
