"""Diagnosis of crosstalk: what is heard where, energies against plain sums, record and plots."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from sbora_diffusion.core.concept import Concept, sealed
from sbora_diffusion.core.functional import VARIANTS
from sbora_diffusion.core.mixed import Bank, sbora_rows, stacked
from sbora_diffusion.core.updates import Update
from sbora_diffusion.diffusion.activations import watched
from sbora_diffusion.diffusion.concepts import read_subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.pipeline import ConceptPipeline
from sbora_diffusion.diffusion.targets import target_layers
from tests.conftest import CONCEPTS, TINY
from tests.diffusion.helpers import assert_untouched, snapshot, strong_concept

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
noise = importlib.import_module("diagnosis_study.noise")
parts = importlib.import_module("diagnosis_study.parts")
plan = importlib.import_module("diagnosis_study.plan")
rows = importlib.import_module("diagnosis_study.rows")
axes = importlib.import_module("diagnosis_study.axes")
groups = importlib.import_module("crosstalk_study.plan")
study = importlib.import_module("study_diagnosis")

NAMES = ("plushbear", "baseballcap")
OUT, IN, RANK = 8, 12, 2


# A layer with some concepts


def layer_bank(variant: str, count: int) -> Bank:
    generator = torch.Generator().manual_seed(count)
    shape = (OUT, RANK) if variant == "fa" else (RANK, IN)
    width = IN if variant == "fa" else OUT
    order = torch.randperm(width, generator=generator)
    updates = [
        Update(f"c{k}", variant, order[k * RANK : (k + 1) * RANK],
               torch.randn(shape, generator=generator), 0.5 + k)
        for k in range(count)
    ]  # fmt: skip
    return stacked(variant, [[u] for u in updates], (OUT, IN), torch.zeros(()))


def naive_update(bank: Bank, entry: int) -> torch.Tensor:
    found = torch.zeros(OUT, IN, dtype=torch.float64)
    for k, (index, scale) in enumerate(zip(bank.indices[entry], bank.scale[entry], strict=True)):
        factor = scale.double() * bank.factor[entry].double()
        if bank.variant == "fa":
            found[:, index] += factor[:, k]
        else:
            found[index] += factor[k]
    return found


def inputs_of(count: int) -> torch.Tensor:
    """(count, positions, IN), with a mean, and a channel that is much louder than the others."""
    x = torch.randn(count, 30, IN, generator=torch.Generator().manual_seed(7)).double() + 0.7
    x[..., 3] *= 40
    return x


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_updates_are_those_of_the_bank(variant):
    bank = layer_bank(variant, 3)
    found = parts.dense(bank, IN, OUT)
    expected = torch.stack([naive_update(bank, k) for k in range(3)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_joined_bank_sums_what_its_mask_names(variant):
    bank = layer_bank(variant, 3)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    x = inputs_of(2).float()
    found = sbora_rows(torch.zeros(2, 30, OUT), x, noise.joined(bank, mask))
    both = naive_update(bank, 0) + naive_update(bank, 2)
    torch.testing.assert_close(found[0], (x[0].double() @ both.T).float(), rtol=1e-4, atol=1e-4)
    assert not found[1].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_energy_are_those_of_plain_sums_over_positions(variant):
    bank, x = layer_bank(variant, 3), inputs_of(3)
    seen = parts.Inputs(3)
    seen("layer", x[:, :10].reshape(6, 5, IN))  # two rows of each concept, in two batches
    seen("layer", x[:, 10:])
    found = parts.layer_parts(parts.dense(bank, IN, OUT), *seen.moments("layer"))
    for i in range(3):
        own = naive_update(bank, i)
        others = sum(naive_update(bank, q) for q in range(3) if q != i)
        y = x[i] @ others.T
        total = y.square().sum(1).mean()
        centred = (x[i] - x.mean((0, 1))) @ others.T
        silent = x[i].clone()
        silent[:, naive_loudest(x[i], others)] = 0
        expected = {
            "own": (x[i] @ own.T).square().sum(1).mean(),
            "others": total,
            "constant": y.mean(0).square().sum(),
            "common": total - centred.square().sum(1).mean(),
            "outliers": total - (silent @ others.T).square().sum(1).mean(),
        }
        assert found.keys() == expected.keys()
        for part, value in expected.items():
            torch.testing.assert_close(found[part][i], value, msg=part)


def naive_loudest(x: torch.Tensor, update: torch.Tensor) -> int:
    read = [c for c in range(IN) if update[:, c].any()]
    return max(read, key=lambda c: x[:, c].square().sum().item())


def test_fa_counts_outliers_among_the_columns_that_the_others_own():
    bank = layer_bank("fa", 3)
    owner = next((k for k in range(3) if 3 in bank.indices[k]), None)
    updates = parts.dense(bank, IN, OUT)
    second = inputs_of(3).mT @ inputs_of(3)
    chosen = parts.outliers(updates.sum(0) - updates, second)
    assert chosen.sum(1).tolist() == [1, 1, 1]
    assert [bool(row[3]) for row in chosen] == [owner is not None and k != owner for k in range(3)]


def test_what_is_constant_is_all_of_it_where_inputs_never_change():
    bank, x = layer_bank("fb", 2), torch.ones(2, 4, IN)
    seen = parts.Inputs(2)
    seen("layer", x)
    found = parts.layer_parts(parts.dense(bank, IN, OUT), *seen.moments("layer"))
    torch.testing.assert_close(found["constant"], found["others"])
    torch.testing.assert_close(found["common"], found["others"])


def test_energies_are_summed_over_the_layers_of_a_group():
    names = {
        "unet.a.attn1.to_q": groups.SELF,
        "unet.a.attn1.to_k": groups.SELF,
        "unet.a.attn2.to_v": groups.KEYS_VALUES,
    }
    bank, seen = layer_bank("fa", 2), parts.Inputs(2)
    for name in names:
        seen(name, inputs_of(2))
    shapes = dict.fromkeys(names, (OUT, IN))
    found = parts.parts_by_group(dict.fromkeys(names, bank), shapes, seen)
    assert list(found) == [groups.KEYS_VALUES, groups.SELF]
    once, twice = (found[group]["others"] for group in (groups.KEYS_VALUES, groups.SELF))
    assert twice == pytest.approx([2 * value for value in once])


# A model with two concepts


@pytest.fixture(scope="module")
def seen(pocket):
    """Scenes of two subjects at one timestep, of 32 pixels for the sake of time."""
    subjects = [read_subject(CONCEPTS / name) for name in NAMES]
    found = noise.scenes(pocket, subjects, [300], 0)
    return noise.Scenes(found.prompts, found.noised[..., :8, :8], found.timesteps, found.shape)


@pytest.fixture(scope="module", params=VARIANTS)
def two(request, pocket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return [strong_concept(pocket, folder, n, request.param, k) for k, n in enumerate(NAMES)]


def only(concept: Concept, group: str) -> Concept:
    """The concept with the layers of one group, without its token."""
    layers = {k: v for k, v in concept.layers.items() if groups.layer_group(k) == group}
    meta = concept.meta.model_copy(
        update={
            "tokens": (),
            "fingerprint": {k: concept.meta.fingerprint[k] for k in layers},
            "widths": {k: concept.meta.widths[k] for k in layers},
        }
    )
    return sealed(Concept(meta, layers, {}))


@torch.no_grad()
def attached(pocket, seen, concepts, layers=(), see=None) -> torch.Tensor:
    """What the first subject's rows predict with these concepts attached, (P, T, values)."""
    count, pipeline = len(seen.prompts) // 2, ConceptPipeline(pocket)
    for concept in concepts:
        pipeline.add(concept)
    try:
        with watched({n: target_layers(pocket.pipeline)[n] for n in layers}, see):
            states, _ = pocket.pipeline.encode_prompt(seen.prompts[:count], pocket.device, 1, False)
            x, times = seen.noised[:count], seen.timesteps[:count]
            return pocket.pipeline.unet(x, times, states).sample.double().view(count, 1, -1)
    finally:
        pipeline.switch([])


def test_rows_hear_what_is_attached_one_by_one(pocket, seen, two):
    before, crowd = snapshot(pocket), noise.Crowd(pocket, two)
    cases = {plan.ALONE: two[:1], plan.ALL: two}
    cases |= {group: [two[0], only(two[1], group)] for group in groups.EVERY}
    for condition, concepts in cases.items():
        found = noise.predictions(crowd, seen, condition)[0]
        expected = attached(pocket, seen, concepts)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=condition)
    assert_untouched(pocket, before)


def test_layers_read_what_they_do_with_the_concept_attached(pocket, seen, two):
    crowd, both, first = noise.Crowd(pocket, two), parts.Inputs(2), parts.Inputs(1)
    noise.predictions(crowd, seen, plan.ALONE, both)
    attached(pocket, seen, two[:1], crowd.banks, first)
    assert both.seen == first.seen and len(first.seen) == len(crowd.banks)
    for name in crowd.banks:
        for mine, plain in zip(both.moments(name), first.moments(name), strict=True):
            torch.testing.assert_close(mine[0], plain[0], rtol=1e-3, atol=1e-3, msg=name)


def test_a_concept_alone_in_the_model_has_no_crosstalk(pocket, seen, two):
    half = len(seen.prompts) // 2
    rest = seen.noised[:half], seen.timesteps[:half], (1, *seen.shape[1:])
    one = noise.Scenes(seen.prompts[:half], *rest)
    found = noise.crosstalk(noise.Crowd(pocket, two[:1]), one)
    assert found[plan.ALONE][0][0] > 0
    assert all(found[condition] == [[0.0]] for condition in plan.OTHERS)


def test_layers_are_seen_while_each_concept_is_alone(monkeypatch):
    asked = []

    def predicted(_crowd, _scenes, condition, see=None):
        asked.append((condition, see))
        return torch.zeros(1, 1, 1, 1)

    monkeypatch.setattr(noise, "predictions", predicted)
    noise.crosstalk(None, None, print)
    assert dict(asked) == {**dict.fromkeys((plan.BASE, *plan.OTHERS)), plan.ALONE: print}
    assert len(asked) == 7


def test_squares_are_means_over_prompts_and_values():
    change = torch.arange(12.0, dtype=torch.float64).view(1, 3, 2, 2)
    (found,) = noise.by_timestep(change)
    assert found == pytest.approx([187 / 6, 319 / 6])


def test_snapshots_are_what_trainings_of_so_many_steps_end_with(pocket):
    subjects = [read_subject(CONCEPTS / name) for name in NAMES]
    changes = plan.settings("fa", 2.0, 2) | TINY.model_dump(include={"copies", "resolution"})
    config = TrainConfig(**{**changes, "batch_size": 1})
    both = study.snapshots(pocket, subjects, config, [1, 2])
    short = study.snapshots(pocket, subjects, config.model_copy(update={"steps": 1}), [1])
    for early, alone, late in zip(both[1], short[1], both[2], strict=True):
        name = next(iter(early.layers))
        assert torch.equal(early.layers[name].factor, alone.layers[name].factor)
        assert not torch.equal(early.layers[name].factor, late.layers[name].factor)


def test_rates_are_multiples_of_the_plain_recipes_and_constant():
    found, plain = TrainConfig(**plan.settings("fb", 0.5, 300)), TrainConfig(**plan.PLAIN)
    assert found.rate_unet == plain.rate_unet / 2
    assert found.rate_text_encoder == plain.rate_text_encoder / 2
    assert (found.schedule, found.preservation, found.variant) == ("constant", 0.0, "fb")


# The record


def file(variant: str, rate: float, seed: int = 0, others: float = 2.0) -> dict:
    """Of two subjects, snapshots and timesteps; the concepts' own squares are 1 and 3."""
    own = [[1.0, 1.0], [3.0, 3.0]]
    heard = [[others * value for value in row] for row in own]
    squares = {plan.ALONE: own, **dict.fromkeys(plan.OTHERS, heard)}
    figures = {"text_alignment": 0.5, "pocket-clip": 0.6 + 0.01 * rate, "efficientnet-lite2": 0.7}
    energies = {k: [1.0, 2.0] for k in parts.PARTS} | {"others": [4.0, 8.0]}
    shot = {"alone": dict.fromkeys(NAMES, figures), "squares": squares}
    inside = {**shot, "parts": dict.fromkeys(groups.EVERY, energies)}
    return {
        "variant": variant, "rate": rate, "seed": seed, "training_seconds": 1.0, "parameters": 9,
        "rate_unet": rate, "rate_text_encoder": rate, "snapshots": {"1": shot, "2": inside},
        "run": about(),
    }  # fmt: skip


def about() -> dict:
    facts = {"date": "2026-01-01", "commit": "c", "device": "d", "versions": {}, "command": "x"}
    return facts | {"seconds": 1.0}


def class_word() -> dict:
    figures = {"text_alignment": 0.6, "pocket-clip": 0.4, "efficientnet-lite2": 0.4}
    return {
        "timesteps": [300, 700], "prompts": ["a {}"], "alone": dict.fromkeys(NAMES, figures),
        "run": about(),
    }  # fmt: skip


def test_crosstalk_is_a_ratio_of_means_over_subjects_and_seeds():
    files = [file("fa", 1.0, 0, others=1.0), file("fa", 1.0, 1, others=5.0)]
    first, second = rows.rows(files, class_word()["alone"])
    assert (first["steps"], second["steps"], first["seeds"]) == (1, 2, [0, 1])
    assert first["crosstalk"][plan.ALL]["value"] == 3.0
    assert first["crosstalk"][plan.ALL]["by_timestep"] == [3.0, 3.0]
    assert first["gain"]["pocket-clip"]["value"] == pytest.approx(0.21)
    shares = second["parts"][groups.SELF]
    assert shares["others_over_own"]["value"] == 4.0
    assert shares["constant"] == {"share": 0.25, "interval": [0.25, 0.25]}
    assert "parts" not in first


def test_an_interval_of_small_ratios_keeps_its_digits():
    found = rows.ratio(
        torch.tensor([1e-6, 3e-6]).double().numpy(), torch.tensor([1.0, 1.0]).double().numpy()
    )
    assert found["value"] == pytest.approx(2e-6)
    assert found["interval"] == pytest.approx([1e-6, 3e-6], rel=1e-3)


def test_report_joins_files_and_draws_again_from_the_record_alone(tmp_path, capsys):
    files = tmp_path / "files"
    files.mkdir()
    (files / "class_word.json").write_text(json.dumps(class_word()))
    for variant in VARIANTS:
        for rate in (0.5, 1.0):
            made = file(variant, rate, others=10 * rate)
            (files / f"{variant}_{rate}.json").write_text(json.dumps(made))
    args = argparse.Namespace(files=files, record=tmp_path / "r.json", plots=tmp_path / "docs")
    study.report(args)
    record = json.loads(args.record.read_text())
    assert [(r["variant"], r["rate"], r["steps"]) for r in record["rows"]] == [
        (v, rate, steps) for v in VARIANTS for rate in (0.5, 1.0) for steps in (1, 2)
    ]
    assert record["subjects"] == list(NAMES) and len(record["runs"]) == 5
    assert "fb x1" in capsys.readouterr().out
    drawn = {path.name: path.read_bytes() for path in args.plots.iterdir()}
    assert drawn.keys() == {"diagnosis_groups.png", "diagnosis_gain.png"}
    args.files = tmp_path / "none"
    study.report(args)
    assert {path.name: path.read_bytes() for path in args.plots.iterdir()} == drawn


def test_axes_place_decades_evenly():
    ruled = axes.Axes((10, 20, 110, 220), (0.0, 2.0), (-1, 1))
    assert ruled.place((1.0, 1.0)) == (axes.FINE * 60, axes.FINE * 120)
    assert ruled.place((5.0, 1e9)) == (axes.FINE * 110, axes.FINE * 20)
    assert axes.decades([0.02, 3.0, 0.0]) == (-2, 1) and axes.decades([1.0]) == (0, 1)
    assert axes.round_ticks(0.03, 0.31) == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
