import os
import pickle
import resource
import stat
import zipfile
from pathlib import Path

import pytest
import torch

from sbora_diffusion.core.concept import (
    read_concept,
    write_concept,
)
from sbora_diffusion.core.errors import (
    ConfigError,
    FormatError,
    ResourceError,
    SboraError,
)
from tests.core.concept_examples import make_concept


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "robot.safetensors"
    write_concept(path, make_concept())
    return path


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_concept(tmp_path / "c.safetensors", make_concept())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "c.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize("limit", [0, 1, 7, 100, 1000, 2500])
def test_a_full_disk_leaves_the_older_file_and_nothing_else(written, limit):
    before = written.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ResourceError, match=r"robot\.safetensors cannot be written"):
            write_concept(written, make_concept(slot=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_fsync_or_rename_leaves_no_half_written_file(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"sbora_diffusion.core.storage.os.{call}", fail)
    with pytest.raises(ResourceError, match="No space left"):
        write_concept(tmp_path / "c.safetensors", make_concept())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["missing/c.safetensors", "file/c.safetensors", ".", "a\0b"])
def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as caught:
        write_concept(tmp_path / place, make_concept())
    assert "\n" not in str(caught.value) and "writable" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_existing_file_is_kept_when_overwriting_is_refused(written):
    before = written.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        write_concept(written, make_concept(slot=1), overwrite=False)
    assert written.read_bytes() == before


def test_a_checkpoint_or_pickle_renamed_to_safetensors_is_named_and_not_opened(tmp_path):
    path = tmp_path / "c.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(FormatError, match="PyTorch checkpoint"):
        read_concept(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FormatError, match="pickle"):
        read_concept(path)


def test_a_zip_behind_a_valid_file_is_refused(written):
    with zipfile.ZipFile(written, "a") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(FormatError, match="its header says"):
        read_concept(written)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in ("pipe", ".", "missing"):
        with pytest.raises(FormatError):
            read_concept(tmp_path / place)


def test_a_file_beyond_the_size_limit_is_refused_before_reading(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate((2 << 30) + 1)
    with pytest.raises(FormatError, match="at most"):
        read_concept(path)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"hello world",
        (1 << 40).to_bytes(8, "little") + b"{}",
        with_header(b"{}"),
        with_header(b'{"a":1}'),
        with_header(b"{" * 5000),
        with_header(b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"),
        with_header(b'{"a":NaN}'),
        with_header(b'{"__metadata__":{"sbora":1}}'),
        with_header(b'{"__metadata__":{"sbora":"{}"}}'),
        with_header(b'{"__metadata__":{"sbora":"[1]"}}'),
        with_header(b'{"__metadata__":{"sbora":"{\\"digest\\":\\"\\",\\"a\\":1e999}"}}'),
        with_header(b'{"__metadata__":{"sbora":"' + b"[" * 99999 + b'"}}'),
        with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 3),
        with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 5),
        with_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        with_header(b'{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}', b"\0" * 8),
        with_header(b'{"a":{"dtype":"F32","shape":[999999999,999999999],"data_offsets":[0,4]}}'),
        with_header(b'{"\xff":1}'),
        with_header('{"a":1}'.encode("utf-16-le")),
    ],
)
def test_nonsense_is_a_format_error(tmp_path, content):
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        read_concept(path)


def test_a_key_given_twice_in_the_header_is_refused(written):
    good = written.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + length].rstrip()
    entry = header[header.rindex(b',"') : -1]
    written.write_bytes(with_header(header[:-1] + entry + b"}", good[8 + length :]))
    with pytest.raises(FormatError, match="twice"):
        read_concept(written)


def test_a_name_that_is_no_text_is_a_typed_error(written):
    good = written.read_bytes()
    bad = good.replace(b'"text_encoder.<robot>"', b'"text_encoder.\\ud800>"')
    assert len(bad) == len(good)
    written.write_bytes(bad)
    with pytest.raises(SboraError):
        read_concept(written)
