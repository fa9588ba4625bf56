"""One folder on any filesystem; what is written is whole or not there."""

import errno
import pickle
import signal
import subprocess
import sys

import pytest

from raydc.config import UsageError
from raydc.storage import Folder

FULL_DISK = """
import errno, resource, sys
from raydc.storage import Folder
folder = Folder(sys.argv[1])
folder.write("state", b"old" * 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # from here on no file grows beyond 4 KiB
try:
    folder.write("state", b"new" * 100_000)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_the_old_file_survives_a_write_that_runs_out_of_space(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == errno.errorcode[errno.EFBIG]
    assert (tmp_path / "state").read_bytes() == b"old" * 100
    assert [file.name for file in tmp_path.iterdir()] == ["state"], "nothing half-written stays"


def test_a_write_that_fails_at_its_last_step_leaves_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        Folder(tmp_path).write("a", b"a folder is in the way")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    """The name changes hands at once: who opened the old file reads the old one to its end."""
    folder = Folder(tmp_path)
    folder.write("state", b"old" * 1000)
    with open(tmp_path / "state", "rb") as reader:
        head = reader.read(10)
        folder.write("state", b"new" * 1000)
        assert head + reader.read() == b"old" * 1000
    assert folder.read("state") == b"new" * 1000


KILLED = """
import os, signal, sys
from raydc.storage import Folder
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # at the last step of the write
Folder(sys.argv[1]).write("deep/state.pt", b"x" * 1000)
"""


def test_what_a_kill_left_of_a_write_is_swept_and_nothing_else(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = (tmp_path / "deep").iterdir()
    kept = {"state.pt", "film.part", "state.pt.0123abcd", "state.pt.0123abcg.part", "other.0123abcd.part", "0123abcd.part"}
    for name in kept:
        (tmp_path / "deep" / name).write_text("mine")
    folder = Folder(tmp_path)
    folder.sweep("deep", r"state\.p")
    assert left.exists()
    folder.sweep("deep", r"state\.pt")
    assert {file.name for file in (tmp_path / "deep").iterdir()} == kept
    folder.sweep("deep")
    assert {file.name for file in (tmp_path / "deep").iterdir()} == kept - {"other.0123abcd.part"}
    folder.sweep("never there")


@pytest.mark.parametrize(
    ("uri", "child"),
    [
        ("s3://b/p?region=x", "s3://b/p/child?region=x"),
        ("s3://b/p/?region=x&scheme=http", "s3://b/p/child?region=x&scheme=http"),
        ("s3://b/p", "s3://b/p/child"),
        ("gs://b/", "gs://b/child"),
    ],
)
def test_the_options_of_a_uri_stay_at_its_end(tmp_path, uri, child):
    folder = Folder(tmp_path)
    folder.uri = uri  # opening such a place asks a server for its region
    assert folder.place("child") == child


def test_the_child_of_a_uri_with_options_is_inside_it(tmp_path):
    folder = Folder(f"file://{tmp_path}/run?option=1")
    folder.child("a").child("b").write("x", "1")
    assert folder.child("a").uri == f"file://{tmp_path}/run/a?option=1"
    assert (tmp_path / "run/a/b/x").read_text() == "1"


def test_a_question_mark_in_a_path_is_an_ordinary_letter(tmp_path):
    Folder(tmp_path / "why?").child("a").write("x", "1")
    assert (tmp_path / "why?" / "a" / "x").read_text() == "1"


@pytest.fixture(params=["path", "file URI", "not local"])
def folder(request, tmp_path) -> Folder:
    """mock:// is pyarrow's filesystem in memory: the branch of s3:// and gs:// without a network."""
    return Folder({"path": tmp_path, "file URI": f"file://{tmp_path}", "not local": "mock:///bucket/run"}[request.param])


def test_what_was_written_is_read_on_every_filesystem(folder):
    assert folder.names() == [] or not folder.is_local
    folder.write("deep/er/data", bytes(range(256)))
    folder.write("text", "käse\n")
    folder.write_json("facts.json", {"name": "käse", "values": [1, 2.5, None]})
    assert folder.read("deep/er/data") == bytes(range(256))
    assert folder.read("text") == "käse\n".encode()
    assert folder.read_json("facts.json") == {"name": "käse", "values": [1, 2.5, None]}
    assert folder.size("text") == 6
    assert folder.exists("deep") and folder.exists("text") and not folder.exists("txt")
    assert folder.names() == ["deep", "facts.json", "text"]
    folder.delete("text")
    folder.delete_folder("deep")
    assert folder.names() == ["facts.json"]
    folder.delete("never there")
    folder.delete_folder("never there")


def test_names_are_sorted_and_a_missing_folder_is_empty(folder):
    for name in ("b", "a", "c10", "c2", "B"):
        folder.write(f"inside/{name}", name)
    assert folder.names("inside") == ["B", "a", "b", "c10", "c2"]
    assert folder.names("missing") == []
    assert not folder.exists("missing")


def test_a_path_and_its_uri_are_one_place(tmp_path):
    Folder(f"file://{tmp_path}").write("x", "1")
    assert Folder(tmp_path).read("x") == b"1"
    assert Folder(f"file://{tmp_path}").is_local


def test_a_folder_travels_and_has_children(tmp_path):
    for uri in (str(tmp_path), f"file://{tmp_path}"):
        folder = Folder(uri)
        folder.child("a").write("x", uri)
        assert folder.read("a/x") == uri.encode()
        assert pickle.loads(pickle.dumps(folder)).read("a/x") == uri.encode()


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder.write("x", "1")
    assert (tmp_path / "runs" / "x").read_text() == "1"


@pytest.mark.parametrize("name", ["with space", "per%cent", "käse", "a#b"])
def test_awkward_names_are_ordinary(tmp_path, name):
    Folder(tmp_path).child(name).write("x", "1")
    assert (tmp_path / name / "x").read_text() == "1"


@pytest.mark.parametrize("uri", ["nfs4://server/run", "s4://bucket/x", "http//://x"])
def test_a_place_nobody_can_open_is_named_with_the_remedy(uri):
    with pytest.raises(UsageError, match=f"{uri}.*use a local path, s3://, gs:// or file://"):
        Folder(uri)
