"""The paper's protocol: problems made by rule, answers read, marks of contamination."""

import json
import re

import pytest

from sbora_diffusion.core.errors import ConfigError, DataError
from sbora_diffusion.core.llm import harness
from sbora_diffusion.core.llm.data import Example
from sbora_diffusion.core.llm.evaluation import Writing, evaluate, write
from sbora_diffusion.core.llm.prompts import Encoder
from sbora_diffusion.core.llm.tasks import TASKS, find_task, overlap, read_test
from sbora_diffusion.core.llm.word_problems import PLOTS, normalized, word_problems
from tests.core.llm.tiny import save_base, tiny_llama, tokenizer


def test_problems_are_right_different_and_the_same_for_a_seed():
    problems = word_problems(3, 400)
    assert problems == word_problems(3, 400) != word_problems(4, 400)
    assert len({normalized(p.instruction) for p in problems}) == 400
    for problem in problems:
        steps = re.findall(r"([\d+\-*/ ]+) = (\d+)", problem.output)
        assert steps and all(eval(left) == int(right) for left, right in steps)
        assert steps[-1][1] == problem.answer
        assert problem.output.endswith(f"The answer is {problem.answer}.")
        assert int(problem.answer) > 0
        assert TASKS["gsm8k"].is_right(problem.output, problem.answer)


def test_every_plot_takes_part_and_test_questions_are_left_out():
    problems = word_problems(0, 5 * len(PLOTS))
    known = [p.instruction.upper() + "!" for p in problems[:7]]
    others = word_problems(0, 5 * len(PLOTS), without=known)
    assert overlap([Example(q, "x") for q in known], problems) == 7
    assert overlap([Example(q, "x") for q in known], others) == 0
    assert len(others) == len(problems)


@pytest.mark.parametrize(
    "task, text, answer, right",
    [
        ("gsm8k", "He has 3 + 4 = 7. The answer is 7.", "7.0", True),
        ("gsm8k", "That makes 1,234 dollars", "1234", True),
        ("gsm8k", "7 it is, of 8", "7", False),  # the last number counts
        ("gsm8k", "I do not know", "7", False),
        ("SVAMP", "It is -3.5", "-3.5", True),
        ("AQuA", "The answer is (D).", "D", True),
        ("AQuA", "Because of B, D", "D", False),  # the first letter counts
        ("boolq", " the correct answer is true", "true", True),
        ("boolq", "true or false?", "false", False),
        ("ARC-Easy", "the correct answer is answer3", "answer3", True),
        ("winogrande", "option2", "option1", False),
        ("piqa", "", "solution1", False),
        ("mmlu_val", " C", "C", True),
    ],
)
def test_answers_are_read_as_the_published_scripts_read_them(task, text, answer, right):
    assert find_task(task).is_right(text, answer) is right


def test_tasks_are_the_papers_and_say_what_is_contaminated():
    groups = [task.group for task in TASKS.values()]
    assert groups.count("commonsense") == 8 and groups.count("arithmetic") == 6
    marked = [task.name for task in TASKS.values() if task.contaminated]
    assert marked == ["MultiArith", "AddSub", "SingleEq"]
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        find_task("gsm8")


def test_answers_do_not_depend_on_the_batch():
    model, encoder = tiny_llama(), Encoder(tokenizer(), "plain", 64)
    prompts = [encoder.prompt_ids(text) for text in ("a", "some words", "and more of them", "b c")]
    one = write(model, tokenizer(), prompts, Writing(1, 6, 1))
    assert write(model, tokenizer(), prompts, Writing(1, 6, 3)) == one
    beams = write(model, tokenizer(), prompts, Writing(4, 6, 1))
    assert write(model, tokenizer(), prompts, Writing(4, 6, 4)) == beams
    assert any(one)


def test_scores_count_what_is_right_and_what_is_an_answer():
    model, encoder = tiny_llama(), Encoder(tokenizer(), "plain", 64)
    texts = write(model, tokenizer(), [encoder.prompt_ids("q")], Writing(1, 12))
    read = find_task("SVAMP").read(texts[0])
    examples = [Example("q", "", read or "1"), Example("q", "", "123456789")]
    score = evaluate(model, encoder, find_task("SVAMP"), examples, Writing(1, 12))
    assert score.total == 2 and score.right == bool(read) and score.answered == 2 * bool(read)
    assert score.accuracy == score.right / 2 and score.texts == (texts[0],) * 2


def test_wrong_test_sets_are_refused(tmp_path):
    place = tmp_path / "SVAMP"
    with pytest.raises(DataError, match="cannot be read"):
        read_test(find_task("SVAMP"), tmp_path)
    place.mkdir()
    for answer in ("many", ""):
        item = {"instruction": "q", "input": "", "output": "o", "answer": answer}
        (place / "test.json").write_text(json.dumps([item]))
        with pytest.raises(DataError, match="is no answer of SVAMP"):
            read_test(find_task("SVAMP"), tmp_path)


def test_the_command_evaluates_local_tasks(tmp_path, sbora):
    base = save_base(tmp_path / "base")
    items = [{"instruction": f"q {n}", "output": "x", "answer": "2"} for n in range(3)]
    for name in ("MultiArith", "boolq"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps(items))
    arguments = ["llm", "eval", base, "--data", tmp_path, "--template", "plain", "--device", "cpu"]
    arguments += ["--new-tokens", 2, "--texts", tmp_path / "texts.jsonl", "--json"]
    trained = ["--trained-on", tmp_path / "boolq" / "test.json"]
    status, out, error = sbora(*arguments, "--tasks", "MultiArith,boolq", *trained)
    assert status == 0, error
    found = json.loads(out)
    assert [task["total"] for task in found["tasks"]] == [3, 3]
    assert [task["trained_questions"] for task in found["tasks"]] == [3, 3]
    assert found["protocol"]["beams"] == 1 and len((tmp_path / "texts.jsonl").read_text()) > 10
    for wrong, told in (
        (["--tasks", "MultiArit"], "did you mean 'MultiArith'"),
        ([], "no task is named"),
        (["--tasks", "SVAMP"], "cannot be read"),
    ):
        status, _, error = sbora(*arguments, *wrong)
        assert status == 2 and told in error and error.count("\n") == 1


@pytest.mark.slow
def test_lm_eval_runs_a_local_task_on_an_adapted_model(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is the extra 'llm', too large for a set-up")
    (tmp_path / "items.json").write_text(json.dumps([{"q": "one", "c": ["a", "b"], "y": 0}] * 3))
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'items.json'}\n"
        "test_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: y\n"
        "metric_list:\n  - metric: acc\n"
    )
    model = tiny_llama()
    found = harness.evaluate_tasks(
        model, tokenizer(), ["tiny_choice"], 0, None, 2, tasks_folder=tmp_path
    )
    assert found["tiny_choice"]["acc"] in (0.0, 1.0)
    with pytest.raises(ConfigError, match="knows no task 'no_such_task'"):
        harness.evaluate_tasks(model, tokenizer(), ["no_such_task"])
