"""Every cell of trained parameters in the paper's language tables, and the two tables of costs."""

from collections import Counter

import pytest
from torch import nn

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.llm import counting, shapes
from sbora_diffusion.core.llm.complexity import TABLE, measure, value
from sbora_diffusion.core.llm.counting import Cell, cells, judge
from tests.core.llm.tiny import save_base


def by_formula(cell: Cell) -> int:
    targets = shapes.LINEARS if cell.quantized else shapes.FIVE
    named = counting.MODELS[cell.model], counting.METHODS[cell.method]
    return counting.formula(*named, cell.rank, targets)


def test_every_printed_cell_matches_or_is_a_misprint_with_a_reason():
    judged = [judge(cell, by_formula(cell)) for cell in cells()]
    verdicts = Counter((j.cell.table, j.cell.source, j.verdict) for j in judged)
    assert verdicts == {
        ("commonsense", "paper", "match"): 16,
        ("commonsense", "README", "match"): 16,
        ("arithmetic", "paper", "match"): 16,
        ("arithmetic", "README", "match"): 15,
        ("arithmetic", "README", "misprint"): 1,
        ("mmlu", "paper", "misprint"): 12,
        ("mmlu", "README", "misprint"): 12,
    }
    assert all(bool(j.why) == (j.verdict == "misprint") for j in judged)
    assert len({by_formula(cell) for cell in cells()}) > 20


@pytest.mark.parametrize(
    "table, model, method",
    [
        ("arithmetic", "LLaMA-7B", "DoRA"),
        ("commonsense", "LLaMA3-8B", "SBoRA-FA"),
        ("mmlu", "LLaMA3-8B", "SBoRA-FB"),
        ("mmlu", "LLaMA3-8B", "LoRA"),
    ],
)
def test_the_formula_is_what_an_optimizer_would_change(table, model, method):
    found = (c for c in cells() if (c.table, c.model, c.method) == (table, model, method))
    cell = next(found)
    assert counting.count_cell(cell) == by_formula(cell)


def test_a_wrong_cell_is_a_mismatch():
    cell = Cell("arithmetic", "paper", "LLaMA-7B", "LoRA", 32, "56.3M", "56.3M")
    assert judge(cell, 56_098_816).verdict == "mismatch"
    assert judge(cell, 56_310_000).verdict == "match"


def test_one_average_of_the_tables_is_wrong():
    (wrong,) = counting.wrong_averages()
    assert (wrong.printed, wrong.average) == (64.9, 69.05)
    assert "LLaMA-7B SBoRA-FB, rank 32" in wrong.place


@pytest.mark.parametrize("cost", TABLE, ids=lambda cost: cost.method)
@pytest.mark.parametrize("size", [(48, 32, 4), (24, 64, 8)])
def test_tables_of_costs_are_those_of_the_layers_that_run_here(cost, size):
    measured = measure(cost.method, *size)
    for column in ("trained", "stored", "multiplications"):
        assert value(getattr(cost, column), *size) == getattr(measured, column), column


def test_the_papers_total_of_parameters_has_the_variants_swapped():
    _, fa, fb = TABLE
    assert fa.printed == fb.stored and fb.printed == fa.stored and fa.printed != fa.stored


def test_any_model_is_counted(tmp_path, sbora):
    base = save_base(tmp_path / "base")
    status, out, _ = sbora("llm", "count", base, "--rank", "4", "--targets", "q_proj,down_proj")
    assert status == 0 and "1,024 trained of" in out


def test_what_cannot_be_counted_is_said_in_one_line(tmp_path, sbora):
    base = save_base(tmp_path / "base")
    for arguments, told in (
        ((base, "--targets", "to_q"), "target 'to_q' is no linear layer of this llama model"),
        ((base, "--method", "loraa"), "did you mean 'lora'?"),
        ((tmp_path,), "is no language model"),
        (("--complexity", "--rank", "9000"), "rank 9000 is more than the layer has"),
    ):
        status, _, error = sbora("llm", "count", *arguments)
        assert status == 2 and told in error and error.count("\n") == 1


def test_complexity_is_printed_with_the_corrected_column(sbora):
    status, out, _ = sbora("llm", "count", "--complexity", "--rank", "8")
    assert status == 0 and "DIFFERS" not in out and out.count("agrees") == 3
    assert "out*r + r = 32,776" in out


def test_models_without_causal_language_heads_are_refused():
    from transformers import CLIPConfig

    with pytest.raises(ConfigError, match="no causal language model"):
        shapes.meta_model(CLIPConfig())


def test_targets_follow_the_family():
    model = nn.Module()
    model.config = type("C", (), {"model_type": "gpt_neox"})()
    assert shapes.default_targets(model)[0] == "query_key_value"
