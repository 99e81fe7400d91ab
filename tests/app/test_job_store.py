"""Jobs on disk, and the processes that run them."""

import json
import sys
import time

import pytest

from sbora_diffusion.app import runner as running
from sbora_diffusion.app.job_store import MAX_WAITING, JobStore
from sbora_diffusion.app.job_view import job_detail, job_list, losses, remaining
from sbora_diffusion.app.runner import CLOSED, Runner
from sbora_diffusion.core.errors import ConfigError, ResourceError

SECONDS = 60


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "jobs")


@pytest.fixture
def runner(store, tmp_path, monkeypatch):
    """A runner of quick commands: workers are plain Python programs instead of `sbora`."""
    monkeypatch.setattr(running, "TICK_SECONDS", 0.02)
    begin = running.subprocess.Popen

    def program(command, **options):
        assert command[1:3] == ["-m", "sbora_diffusion.app.worker"]
        return begin([sys.executable, "-c", command[4]], **options)

    monkeypatch.setattr(running.subprocess, "Popen", program)
    started = Runner([store], tmp_path)
    started.start()
    yield started
    started.close()


def submit(store, program, kind="train"):
    return store.submit(kind, "cat", [kind, program])


def wait_for(store, job, *states):
    end = time.monotonic() + SECONDS
    while (now := store.get(job.id)).standing.state not in states:
        assert time.monotonic() < end, now.standing
        time.sleep(0.02)
    return now


def test_jobs_are_what_the_disk_says_whoever_asks(store):
    first, second = submit(store, "one"), submit(store, "two")
    again = JobStore(store.folder)
    assert [job.id for job in again.jobs()] == [second.id, first.id]
    assert again.get(first.id).command == "sbora train one"
    again.stop(first.id)
    assert (store.get(first.id).folder / "stop").exists()


def test_a_full_queue_is_one_clear_line(store):
    for _ in range(MAX_WAITING):
        submit(store, "wait")
    with pytest.raises(ResourceError, match=f"{MAX_WAITING} jobs are waiting"):
        submit(store, "one too many")
    assert len(store.jobs()) == MAX_WAITING


@pytest.mark.parametrize("name", ["", "..", "../jobs", "0" * 16, None, "1" * 16 + "-zzzzzzzz"])
def test_what_is_no_id_of_a_job_leads_nowhere(store, name):
    submit(store, "one")
    with pytest.raises(ConfigError, match="not here any more"):
        store.get(name)


def test_a_damaged_job_is_left_out_and_the_others_stay(store):
    job, other = submit(store, "one"), submit(store, "two")
    (job.folder / "state.json").write_text("{")
    assert [j.id for j in store.jobs()] == [other.id]


def test_a_job_runs_and_its_result_and_progress_are_kept(store, runner):
    job = submit(
        store,
        "import os, json; print(json.dumps({'file': 'x'}));"
        "open(os.environ['SBORA_PROGRESS'], 'w').write(json.dumps("
        "{'what': 'training', 'done': 3, 'total': 4, 'note': 'loss 0.5', 'time': 1.0}) + '\\n{')",
    )
    done = wait_for(store, job, "done")
    assert done.result() == {"file": "x"}
    assert [report["done"] for report in done.progress()] == [3]
    assert "The training of <b>cat</b> is done" in job_detail(done, "")


def test_a_failed_job_says_what_the_command_said(store, runner):
    program = "import sys; print('error: no <b>pictures</b>', file=sys.stderr); sys.exit(2)"
    failed = wait_for(store, submit(store, program), "failed")
    assert failed.standing.message == "no <b>pictures</b>"
    assert "no &lt;b&gt;pictures&lt;/b&gt;" in job_detail(failed, "")


def test_a_job_that_is_killed_says_so(store, runner):
    failed = wait_for(store, submit(store, "import os; os.kill(os.getpid(), 9)"), "failed")
    assert "unexpectedly" in failed.standing.message


def test_trainings_run_one_after_the_other_and_a_check_beside_them(store, runner):
    long, next_, check = (
        submit(store, "import time; time.sleep(60)"),
        submit(store, "pass"),
        submit(store, "pass", kind="check"),
    )
    wait_for(store, check, "done")
    wait_for(store, long, "running")
    assert store.get(next_.id).standing.state == "queued"
    store.stop(long.id)
    wait_for(store, long, "stopped")
    wait_for(store, next_, "done")


def test_a_stopped_training_goes_on_with_resume_and_an_ended_one_does_not(store, runner):
    job = submit(store, "import time; time.sleep(60)")
    wait_for(store, job, "running")
    store.stop(job.id)
    wait_for(store, job, "stopped")
    (job.folder / "job.json").write_text(
        (job.folder / "job.json").read_text().replace("time.sleep(60)", "print(1)")
    )
    again = store.resume(job.id)
    assert again.arguments[-2:] == ["--resume", "--json"]
    wait_for(store, job, "done")
    with pytest.raises(ConfigError, match="is done"):
        store.resume(job.id)


def test_a_queued_job_that_is_stopped_never_begins(store, tmp_path, runner):
    first = submit(store, "import time; time.sleep(60)")
    waiting = submit(store, f"open({str(tmp_path / 'ran')!r}, 'w')")
    store.stop(waiting.id)
    wait_for(store, waiting, "stopped")
    store.stop(first.id)
    wait_for(store, first, "stopped")
    assert not (tmp_path / "ran").exists()


def test_closing_the_app_stops_what_runs_and_the_next_app_can_go_on(store, tmp_path, runner):
    job = submit(store, "import time; time.sleep(60)")
    wait_for(store, job, "running")
    runner.close()
    assert store.get(job.id).standing.state == "stopped"
    assert store.get(job.id).standing.message == CLOSED


def test_what_ran_under_an_app_that_was_killed_is_stopped(store, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "TICK_SECONDS", 0.02)
    job = submit(store, "x").move(state="running", began=1.0)
    following = Runner([store], tmp_path)
    following.start()
    wait_for(store, job, "stopped")
    following.close()


def test_of_two_apps_one_runs_the_jobs(store, tmp_path, runner):
    job = submit(store, "import time; time.sleep(60)")
    wait_for(store, job, "running")
    other = Runner([store], tmp_path)
    other.start()
    time.sleep(0.3)
    assert store.get(job.id).standing.state == "running"
    other.close()
    assert store.get(job.id).standing.state == "running"


def test_a_loss_that_was_computed_again_counts_once():
    reports = [
        {"what": "training", "done": step, "total": 4, "note": f"loss {loss}", "time": time_}
        for step, loss, time_ in ((1, 0.5, 0.0), (2, 0.4, 1.0), (2, 0.3, 2.0), (3, 0.2, 3.0))
    ]
    assert losses(reports) == {1: 0.5, 2: 0.3, 3: 0.2}
    assert remaining(reports) == pytest.approx(1.5)
    assert remaining(reports[:1]) is None and remaining([]) is None


def test_titles_cannot_bring_markup_into_the_page(store):
    store.submit("merge", "<img src=x>", ["merge"])
    assert "<img" not in job_list(store.jobs(), None)


def test_an_ended_job_leaves_the_list_and_an_open_one_does_not(store):
    job = submit(store, "x")
    store.forget(job.id)
    assert [j.id for j in store.jobs()] == [job.id]
    job.move(state="done")
    store.forget(job.id)
    assert store.jobs() == []


def test_states_are_json_for_other_programs(store):
    job = submit(store, "x")
    assert json.loads((job.folder / "state.json").read_text())["state"] == "queued"
