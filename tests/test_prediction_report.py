"""What is said about a prediction, on made-up figures."""

import math

import pytest
import torch

from sbora_diffusion import prediction_report
from sbora_diffusion.core.crosstalk import Crosstalk
from sbora_diffusion.core.prediction import ADDED, CALIBRATED, Disturbance, Forecast
from sbora_diffusion.prediction_report import (
    Loss,
    prediction_columns,
    prediction_document,
    prediction_rows,
    verdict,
)

NAMES = ("fox", "owl", "elk")
LAYERS = ("text_encoder.layers.0.self_attn.q_proj", "unet.attentions.0.attn2.to_k")


def forecast(calibrated: list[float], added: list[float]) -> Forecast:
    """Of these disturbances, NaN for a concept that does nothing; UNet 1.2 times the text's."""
    own = torch.tensor([0.0 if math.isnan(x) else 4.0 for x in added]).double()[:, None]

    def disturbance(values: list[float]) -> Disturbance:
        share = torch.tensor([1.0, 1.44]).double() / 1.22
        left = torch.tensor(values).double().square().nan_to_num()[:, None] * own * share
        whole = torch.full((len(values), 2), 100.0).double()
        generic = torch.tensor([0.0004, 0.0004]).double() * sum(v for v in values if v == v)
        both = own.expand(-1, 2)
        return Disturbance(NAMES, LAYERS, left, both, both, whole, generic, torch.ones(2).double())

    norms = torch.arange(18.0).double().reshape(3, 3, 2) + 1
    ways = {CALIBRATED: disturbance(calibrated), ADDED: disturbance(added)}
    return Forecast(Crosstalk(NAMES, LAYERS, norms), ways)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.setattr(prediction_report, "LOSSES", {})


def test_each_concept_has_its_figures_where_it_is_disturbed_and_by_whom():
    rows = prediction_rows(forecast([0.2, 0.5, 0.3], [0.9, 2.0, 1.5]))
    assert prediction_columns() == ["concept", "calibrated", "added", "most in", "loudest other"]
    assert [row[:3] for row in rows] == [
        ["fox", "0.20", "0.90"], ["owl", "0.50", "2.00"], ["elk", "0.30", "1.50"],
    ]  # fmt: skip
    assert rows[1][3] == f"cross-attention {0.5 * 1.2 / 1.22**0.5:.2f}"
    assert [row[4].split()[0] for row in rows] == ["elk", "elk", "owl"]


def test_the_verdict_names_the_better_way_its_worst_concept_and_how_many_are_drowned():
    lines = verdict(forecast([0.2, 0.5, 0.3], [0.9, 2.0, 1.5]))
    assert lines[0] == (
        "verdict: merge them calibrated, as by default: 0.33 in the mean, 0.50 at worst (owl), "
        "for none 1 or more"
    )
    assert lines[1] == "added: 1.47 in the mean, 2.00 at worst (owl), for 2 of 3 1 or more"
    assert lines[2] == (
        "prompts without a concept: outputs of the layers change by 2.0 % calibrated, 4.2 % added"
    )
    assert len(lines) == 3
    lines = verdict(forecast([0.2, 0.5, 0.3], [0.0, 0.1, 0.0]))
    assert lines[0].startswith("verdict: merge them with --no-calibrate: 0.03 in the mean")
    assert lines[1].startswith("calibrated: 0.33 in the mean")


def test_without_measured_losses_no_alignment_is_claimed():
    found = forecast([0.2, 0.5, 0.3], [0.9, 2.0, 1.5])
    assert "alignment" not in " ".join([*prediction_columns(), *verdict(found)])
    for way in prediction_document(found).values():
        assert [one["image_alignment"] for one in way["concepts"]] == [None] * 3


def test_a_measured_loss_is_shown_as_a_change_with_its_correlation(monkeypatch):
    loss = Loss("energy", slope=0.1, intercept=-0.01, correlation=0.654, mean=0.012)
    monkeypatch.setattr(prediction_report, "LOSSES", {CALIBRATED: loss})
    found = forecast([0.2, 0.5, 0.3], [0.9, 2.0, 1.5])
    assert prediction_columns()[3] == "image alignment, calibrated"
    assert [row[3] for row in prediction_rows(found)] == ["-0.010", "-0.040", "-0.020"]
    assert "random sets on pocket lost 0.012 in the mean" in verdict(found)[3]
    assert "from 'energy': 0.65 (results" in verdict(found)[3]
    document = prediction_document(found)
    changes = [one["image_alignment"] for one in document[CALIBRATED]["concepts"]]
    assert changes == pytest.approx([-0.01, -0.04, -0.02])
    assert document[ADDED]["concepts"][0]["image_alignment"] is None


def test_a_concept_that_does_nothing_has_no_figure_and_counts_for_none(monkeypatch):
    monkeypatch.setattr(prediction_report, "LOSSES", {ADDED: Loss("rms", 0.1, 0.0, 0.5, 0.1)})
    found = forecast([0.2, math.nan, 0.4], [0.5, math.nan, 0.7])
    assert prediction_rows(found)[1][:5] == ["owl", "-", "-", "-", "-"]
    assert verdict(found)[1].startswith("added: 0.60 in the mean, 0.70 at worst (elk)")
    owl = prediction_document(found)[ADDED]["concepts"][1]
    assert owl["disturbance"] is None and owl["image_alignment"] is None
    none = verdict(forecast([math.nan] * 3, [math.nan] * 3))
    assert none[1] == "added: there is nothing to disturb"
