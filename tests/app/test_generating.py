"""The app, asked through its HTTP interface by gradio's own client."""

import asyncio
import re
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the app needs the extra `ui`")
pytest.importorskip("gradio_client")

import httpx
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from sbora_diffusion.app.drawing import Request, Stopped, Studio, restored
from sbora_diffusion.app.engine import Engine, Gate
from sbora_diffusion.app.server import main
from sbora_diffusion.app.workspace import Handout, Workspaces
from sbora_diffusion.core.concept import read_concept, write_concept
from sbora_diffusion.core.concept_set import read_concept_set, write_concept_set
from sbora_diffusion.core.errors import ConfigError, ConflictError, ResourceError
from sbora_diffusion.jobs import add_to_library
from sbora_diffusion.library import Library
from sbora_diffusion.pictures import read_parameters

PROMPT = "a photo of <plushbear> next to <baseballcap> on the beach"
BOTH = {"plushbear": 1.0, "baseballcap": 1.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def studio_of(library, examples):
    return Studio(Workspaces(library, examples).of(None), Engine(), Handout())


def with_other_name(source, path, name):
    """A copy of a concept, in the same slot, under another name and token."""
    concept = read_concept(source)
    token = concept.meta.tokens[0]
    meta = concept.meta.model_copy(
        update={"name": name, "tokens": (token.model_copy(update={"token": f"<{name}>"}),)}
    )
    renamed = {
        key.replace(token.token, f"<{name}>"): value for key, value in concept.embeddings.items()
    }
    write_concept(path, type(concept)(meta, concept.layers, renamed))


@pytest.fixture(scope="module")
def served(tiny_concepts, tmp_path_factory):
    """A running app: two examples, and one concept of the library that overlaps the first."""
    folder = tmp_path_factory.mktemp("app")
    examples = folder / "examples"
    examples.mkdir()
    for file in tiny_concepts.values():
        shutil.copy(file, examples)
    Image.new("RGBA", (300, 200), (200, 120, 40, 128)).save(examples / "plushbear.png")
    (examples / "damaged.safetensors").write_bytes(b"not a concept")
    twin = folder / "twin.safetensors"
    with_other_name(tiny_concepts["plushbear"], twin, "twin")
    library = Library(folder / "library.sqlite3")
    library.reserve("pocket-x", "fa", "twin", 8, {"unet.to_k": 160})
    library.record("pocket-x", "fa", "twin", twin, "0" * 64, "<twin>")
    port = free_port()
    page = main(port=port, library=library.path, block=False, examples=examples)
    yield SimpleNamespace(
        url=f"http://127.0.0.1:{port}", port=port, page=page, examples=examples, library=library
    )
    page.close()


@pytest.fixture(scope="module")
def draw(served):
    """Pictures as arrays, the line of parameters, and the command."""
    client = Client(served.url, verbose=False)

    def ask(
        prompt=PROMPT,
        selection=None,
        seed=7,
        num=1,
        steps=2,
        guidance=4,
        negative="",
        regions="",
        size="",
    ):
        chosen = BOTH if selection is None else selection
        gallery, used, command = client.predict(
            prompt,
            chosen,
            seed,
            num,
            steps,
            guidance,
            negative,
            regions,
            size,
            api_name="/generate",
        )
        files = [item["image"] for item in gallery]
        return SimpleNamespace(
            files=files,
            captions=[item["caption"] for item in gallery],
            pixels=[np.asarray(Image.open(file)) for file in files],
            used=used,
            command=command,
        )

    return ask


def test_the_page_loads_and_names_no_other_host_to_fetch_from(served):
    page = httpx.get(served.url)
    assert page.status_code == 200
    fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', page.text)
    assert [url for url in fetched if not url.startswith(served.url)] == []


def test_the_names_of_the_interface_are_stable(served):
    endpoints = Client(served.url, verbose=False).view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/generate", "/stop"}
    parameters = [entry["parameter_name"] for entry in endpoints["/generate"]["parameters"]]
    assert parameters == [
        "prompt", "selection", "seed", "num", "steps", "guidance", "negative_prompt", "regions",
        "size",
    ]  # fmt: skip


def test_two_concepts_give_as_many_pictures_as_asked_each_with_its_parameters(draw):
    drawn = draw(num=3, seed=11)
    assert drawn.captions == ["seed 11", "seed 12", "seed 13"]
    assert len({pixels.tobytes() for pixels in drawn.pixels}) == 3
    text = Image.open(drawn.files[1]).text["parameters"]
    assert text.startswith(PROMPT) and "Seed: 12" in text and "plushbear:1" in text
    assert "plushbear × 1" in drawn.used and "11 to 13" in drawn.used


def test_the_same_request_gives_the_same_pixels_whatever_ran_before(draw):
    first = draw()
    draw(selection={"baseballcap": 0.4}, prompt="a photo of <baseballcap>", seed=1)
    draw(selection={"baseballcap": 1.0, "plushbear": 0.2})
    draw(selection={}, prompt="a photo of a dog")
    assert np.array_equal(first.pixels[0], draw().pixels[0])


def test_weight_zero_draws_what_the_base_draws_and_weight_one_does_not(draw):
    prompt = "a photo of a dog on the beach"
    base = draw(prompt, {}).pixels[0]
    assert np.array_equal(base, draw(prompt, {"plushbear": 0.0, "baseballcap": 0.0}).pixels[0])
    assert not np.array_equal(draw().pixels[0], draw(selection={}).pixels[0])


def test_seed_minus_one_draws_another_picture_each_time_and_says_the_seed(draw):
    once, again = draw(seed=-1), draw(seed=-1)
    assert once.captions != again.captions
    seed = int(once.captions[0].removeprefix("seed "))
    assert f"--seed {seed} " in once.command
    assert np.array_equal(draw(seed=seed).pixels[0], once.pixels[0])


def test_the_command_line_names_prompt_files_weights_and_changed_settings(draw, served):
    command = draw(selection={"plushbear": 0.75}, num=2, guidance=3.5, negative="fog").command
    assert command.startswith(f"sbora generate '{PROMPT}'")
    assert f"--concept {served.examples / 'plushbear.safetensors'}:0.75" in command
    assert "--seed 7 --num 2 --steps 2 --guidance 3.5 --negative fog" in command


def test_a_picture_may_have_another_size_which_it_tells(draw):
    drawn = draw(size="96 × 64", steps=1)
    assert drawn.pixels[0].shape == (64, 96, 3)
    assert "--width 96 --height 64" in drawn.command and "96 × 64" in drawn.used
    told = read_parameters(Path(drawn.files[0]))
    assert restored(told, [])[0].size == "96 × 64"
    assert "--width" not in draw(size="128 × 128", steps=1).command
    placed = draw(regions="plushbear=0,0,0.5,1\nbaseballcap=0.5,0,1,1", size="96 × 64", steps=1)
    assert placed.pixels[0].shape == (64, 96, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": {"plushbear": 1.0, "twin": 1.0}}, "'plushbear' and 'twin' share"),
        ({"selection": {"nobody": 1.0}}, "no concept 'nobody'"),
        (
            {"selection": {"plushbear": float("1e9")}},
            "weight of plushbear must be a number",
        ),
        ({"prompt": "  "}, "prompt is empty"),
        ({"num": 9}, "9"),
        ({"num": 1.5}, "must be a whole number"),
        ({"steps": 0}, "0"),
        ({"size": "huge"}, "'huge' is none"),
        ({"size": "100 x 128"}, "multiple of 8"),
        ({"size": "1024 x 128"}, "width must be a whole number between 8 and 512"),
    ],
)
def test_a_wrong_request_gives_one_readable_line_and_the_next_one_works(draw, change, message):
    with pytest.raises(AppError, match=re.escape(message)) as caught:
        draw(**change)
    assert "Traceback" not in str(caught.value)
    assert len(draw().pixels) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "\U0001f9f8 \U0001f468\u200d\U0001f469",
        "\u05d3\u05d5\u05d1 \u202e<plushbear>\u202c",
        "a\0b <plushbear>\0",
        "<plushbear> " * 80,
        "a photo of <nobody>",
        "<plushbear <<plushbear>>",
        "<script>alert(1)</script>",
    ],
    ids=ascii,
)
def test_prompts_that_nobody_expects_are_drawn(draw, prompt):
    assert len(draw(prompt, steps=1).pixels) == 1


def test_a_prompt_of_a_megabyte_is_one_clear_line(draw):
    with pytest.raises(AppError, match="longer than 1000 characters"):
        draw("bear " * 200_000)


def test_after_full_memory_the_next_request_succeeds(served, draw, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("sbora_diffusion.diffusion.pipeline.ConceptPipeline.generate", full)
        with pytest.raises(AppError, match="Not enough memory"):
            draw()
    assert len(draw().pixels) == 1


def test_a_prompt_without_a_token_only_warns(served):
    studio = studio_of(served.library.path, served.examples)
    asked = Request("a photo of <plushbear>", BOTH, seed=3, steps=1)
    outcome = studio.draw(asked, lambda done, total: None, threading.Event())
    assert len(outcome.files) == 1
    assert [line for line in outcome.warnings if "<baseballcap>" in line] == outcome.warnings != []


def test_a_prompt_with_the_token_of_a_concept_that_is_off_warns(served):
    studio = studio_of(served.library.path, served.examples)
    asked = Request("a photo of <plushbear>", {}, seed=3, steps=1)
    outcome = studio.draw(asked, lambda done, total: None, threading.Event())
    assert [line for line in outcome.warnings if "plushbear is off" in line] == outcome.warnings
    assert outcome.warnings


def test_a_token_of_a_concept_that_is_off_is_found_in_whatever_case(served):
    studio = studio_of(served.library.path, served.examples)

    def warnings(prompt, concepts):
        asked = Request(prompt, concepts, seed=3, steps=1)
        return studio.draw(asked, lambda done, total: None, threading.Event()).warnings

    (warning,) = warnings("a photo of <PlushBear>", {})
    assert "plushbear is off" in warning
    assert warnings("a photo of <PlushBear>", {"plushbear": 1.0}) == []
    assert warnings("a photo of <plushbear2>", {}) == []  # another token, though it looks alike


def test_what_stays_chosen_stays_attached_and_what_goes_leaves_no_trace(served):
    studio = studio_of(served.library.path, served.examples)

    def attached(concepts):
        studio.draw(Request("a photo", concepts, seed=3, steps=1), lambda *_: None, event)
        with studio.engine.pipeline() as pipeline:
            return dict(pipeline.concepts)

    event = threading.Event()
    both = attached(BOTH)
    assert attached({"baseballcap": 0.5}) == {"baseballcap": both["baseballcap"]}
    assert attached({}) == {}
    with pytest.raises(ConflictError, match="share"):
        attached({"plushbear": 1.0, "twin": 1.0})
    assert attached(BOTH) == both


@pytest.fixture(scope="module")
def concept_set(tiny_concepts, tmp_path_factory):
    """Both concepts in one file, with a picture of one of them."""
    folder = tmp_path_factory.mktemp("set")
    concepts = [(read_concept(file), 0.5) for file in tiny_concepts.values()]
    write_concept_set(folder / "both.safetensors", concepts)
    Image.new("RGB", (8, 8)).save(folder / "plushbear.png")
    return folder / "both.safetensors"


def test_each_concept_of_a_set_in_the_library_can_be_chosen_by_itself(
    served, concept_set, pocket, tmp_path
):
    library = Library(tmp_path / "my library.sqlite3")
    members = [concept for concept, _ in read_concept_set(concept_set).concepts]
    add_to_library(concept_set, members, pocket, library)
    studio, alone = (
        studio_of(library.path, tmp_path),
        studio_of(served.library.path, served.examples),
    )
    cards, problems = studio.workspace.cards()
    assert problems == [] and sorted(card.key for card in cards) == sorted(BOTH)
    assert {card.name: card.thumbnail for card in cards} == {
        "baseballcap": None, "plushbear": concept_set.parent / "plushbear.png",
    }  # fmt: skip
    asked = Request("a photo of <plushbear>", {"plushbear": 0.75}, seed=3, steps=1)
    drawn = [s.draw(asked, lambda *_: None, threading.Event()) for s in (studio, alone)]
    assert [outcome.warnings for outcome in drawn] == [[], []]
    pixels = [np.asarray(Image.open(outcome.files[0])) for outcome in drawn]
    assert np.array_equal(*pixels)
    # The file would call both concepts: the command names the one, and who knows it.
    assert f"--concept plushbear:0.75 --library '{library.path}'" in drawn[0].command
    assert "--library" not in drawn[1].command


def test_a_set_among_the_examples_says_how_to_use_it(concept_set, tmp_path):
    cards, problems = studio_of(tmp_path / "none.sqlite3", concept_set.parent).workspace.cards()
    assert cards == []
    (problem,) = problems
    assert f"{concept_set} holds several concepts" in problem and "sbora library add" in problem


def test_a_stopped_request_ends_at_the_next_step(served):
    studio, stop, done_steps = (
        studio_of(served.library.path, served.examples),
        threading.Event(),
        [],
    )

    def on_step(done, total):
        done_steps.append(done)
        stop.set()

    with pytest.raises(Stopped):
        studio.draw(Request("a dog", {}, seed=1, steps=50), on_step, stop)
    assert done_steps == [1]


def test_a_damaged_file_and_an_empty_folder_leave_a_usable_page(served, tmp_path):
    cards, problems = studio_of(served.library.path, served.examples).workspace.cards()
    assert [card.key for card in cards] == ["baseballcap", "plushbear", "twin"]
    assert [problem for problem in problems if "damaged.safetensors" in problem] == problems != []
    assert studio_of(tmp_path / "none.sqlite3", tmp_path / "missing").workspace.cards() == ([], [])


def test_listening_beyond_this_machine_needs_a_login(tmp_path):
    with pytest.raises(ConfigError, match="without a login"):
        main(listen="0.0.0.0", library=tmp_path / "library.sqlite3")
    with pytest.raises(ConfigError, match="NAME:PASSWORD"):
        main(auth=["ada:"], library=tmp_path / "library.sqlite3")


def test_who_logs_in_sees_the_page_and_others_see_nothing(tmp_path):
    port = free_port()
    page = main(
        port=port, auth=["ada:one", "bob:two"], library=tmp_path / "library.sqlite3", block=False
    )
    try:
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/config").status_code == 401
        assert httpx.get(f"{url}/gradio_api/file={tmp_path}").status_code == 401
        with httpx.Client() as bob:
            wrong = bob.post(f"{url}/login", data={"username": "bob", "password": "one"})
            assert wrong.status_code == 400
            bob.post(f"{url}/login", data={"username": "bob", "password": "two"})
            assert bob.get(f"{url}/config").status_code == 200
    finally:
        page.close()


@pytest.mark.parametrize("where", ["library.sqlite3", "examples/plushbear.safetensors", "../.."])
def test_no_file_of_this_machine_can_be_fetched(served, where):
    for place in (served.library.path.parent / where, "/etc/passwd", "//etc/passwd"):
        answer = httpx.get(f"{served.url}/gradio_api/file={place}")
        assert answer.status_code == 403


def test_a_full_gate_says_at_once_that_it_is_busy_and_lets_others_in_afterwards():
    async def three() -> list[str]:
        gate, release = Gate(waiting=1), asyncio.Event()

        async def draw() -> str:
            try:
                async with gate.turn(lambda place: None):
                    await release.wait()
                    return "drawn"
            except ResourceError as error:
                return str(error)

        first, second = asyncio.create_task(draw()), asyncio.create_task(draw())
        await asyncio.sleep(0)
        busy = await draw()
        second.cancel()  # somebody who does not wait any longer makes room
        await asyncio.sleep(0)
        third = asyncio.create_task(draw())
        await asyncio.sleep(0)
        release.set()
        return [busy, await first, await third]

    busy, *others = asyncio.run(three())
    assert busy.startswith("Busy: 1 drawings are waiting already") and others == ["drawn"] * 2


def test_a_port_in_use_is_one_clear_line(served):
    with pytest.raises(ResourceError, match="is in use"):
        main(port=served.port, library=served.library.path, block=False)
