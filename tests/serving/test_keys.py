"""The file of keys: what is kept, who changes it, and how a running system follows."""

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.config.serving import AppSettings
from cluster.errors import InvalidInput, KeysUnavailable
from deployments.api.keys import CHECK_S, MAX_FILE_BYTES, Keys, Role, add_key, read_keys, remove_key
from deployments.application import build
from deployments.cli import app


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "keys.json"


class Clock:
    """Seconds, as a test says."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_check(self) -> None:
        self.now_s += CHECK_S


def keys_command(file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments, "--file", str(file)])


def test_the_commands_make_list_and_revoke_and_keep_the_hash_alone(file: Path) -> None:
    made = {name: keys_command(file, "add", name, "--role", role) for name, role in (("a.b", "infer"), ("c", "admin"))}
    printed = {name: result.stdout.strip() for name, result in made.items()}
    content = json.loads(file.read_text())
    assert content == {
        "keys": [
            {"name": name, "role": role, "sha256": hashlib.sha256(printed[name].encode()).hexdigest()}
            for name, role in (("a.b", "infer"), ("c", "admin"))
        ]
    }
    assert all(key.startswith("zk-") and len(key) == 46 and key not in file.read_text() for key in printed.values())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    listed = keys_command(file, "list").stdout
    assert [line.split() for line in listed.splitlines()] == [["name", "role"], ["a.b", "infer"], ["c", "admin"]]
    assert keys_command(file, "remove", "a.b").exit_code == 0
    assert [entry.name for entry in read_keys(file)] == ["c"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["keys.json"]


def test_what_a_link_names_is_changed_and_no_two_keys_are_alike(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(file)
    assert len({add_key(link, f"k{index}", Role.INFER) for index in range(5)}) == 5
    assert (link.is_symlink(), len(read_keys(file))) == (True, 5)


def test_changes_at_the_same_time_are_all_made(file: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: add_key(file, f"k{index}", Role.INFER), range(24)))
    assert {entry.name for entry in read_keys(file)} == {f"k{index}" for index in range(24)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "taken"], "There is a key 'taken' already"),
        (["add", "a b"], "'a b' is no name for a key"),
        (["add", "../x"], "is no name for a key"),
        (["add", "x", "--role", "root"], "There is no role 'root'; the roles are: infer, admin."),
        (["remove", "nobody"], "There is no key 'nobody' in"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(file: Path, arguments: list[str], said: str) -> None:
    add_key(file, "taken", Role.ADMIN)
    before = file.read_bytes()
    done = keys_command(file, *arguments)
    assert (done.exit_code, said in " ".join(done.stderr.split())) == (1, True), done.stderr
    assert file.read_bytes() == before


ENTRY = {"name": "a", "role": "infer", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "wrong at the file"),
        ("{", "wrong at the file"),
        ("[]", "wrong at the file"),
        ("{}", "wrong at keys"),
        ('{"keys": [], "more": 1}', "wrong at more"),
        (json.dumps({"keys": [{**ENTRY, "role": "root"}]}), "wrong at keys.0.role"),
        (json.dumps({"keys": [{**ENTRY, "sha256": "00"}]}), "wrong at keys.0.sha256"),
        (json.dumps({"keys": [{**ENTRY, "key": "zk-plain"}]}), "wrong at keys.0.key"),
        (json.dumps({"keys": [{**ENTRY, "name": ""}]}), "wrong at keys.0.name"),
        (json.dumps({"keys": [ENTRY, {**ENTRY, "sha256": "1" * 64}]}), "the name 'a' is there twice"),
        (json.dumps({"keys": [ENTRY, {**ENTRY, "name": "b", "role": "admin"}]}), "is there twice"),
        (" " * (MAX_FILE_BYTES + 1), "is larger than 1048576 bytes"),
        (b"\xff\xfe".decode("latin-1"), "wrong at the file"),
        (None, "No such file"),
        (Path("folder"), "is no regular file"),
    ],
)
def test_a_file_that_is_none_is_told_before_anything_starts(
    root: Path, tmp_path: Path, content: str | Path | None, said: str
) -> None:
    file = tmp_path / "keys.json"
    if isinstance(content, Path):
        file.mkdir()
    elif content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InvalidInput) as caught:
        build(AppSettings(root=str(root), keys_file=str(file)))
    assert said in str(caught.value)
    assert str(caught.value).endswith("expected a file that `zephyra keys add` wrote.")
    assert "zk-plain" not in str(caught.value)


def test_a_key_is_its_owners_and_nothing_like_it_is(file: Path) -> None:
    key, other = add_key(file, "a", Role.INFER), add_key(file, "b", Role.ADMIN)
    keys = Keys(file)
    owners = [keys.owner(one) for one in (key, other)]
    assert [(owner.name, owner.role) for owner in owners if owner] == [("a", Role.INFER), ("b", Role.ADMIN)]
    last = "A" if key[-1] != "A" else "B"
    for wrong in ("", key[:-1], key + "A", key[:-1] + last, key.upper(), key.removeprefix("zk-"), f" {key}", "é", "a"):
        assert keys.owner(wrong) is None
    assert keys.owner(hashlib.sha256(key.encode()).hexdigest()) is None, "who reads the file has no key"


def test_a_running_system_follows_the_file(file: Path) -> None:
    clock = Clock()
    key = add_key(file, "a", Role.INFER)
    keys = Keys(file, clock)
    assert keys.owner(key) is not None
    new = add_key(file, "b", Role.INFER)
    remove_key(file, "a")
    assert (keys.owner(key) is not None, keys.owner(new)) == (True, None), "looked at no more often than it must"
    clock.pass_check()
    assert (keys.owner(key), keys.owner(new) is not None) == (None, True)


def test_while_the_file_cannot_be_read_nobody_is_let_in(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    key = add_key(file, "a", Role.INFER)
    keys, content = Keys(file, clock), file.read_bytes()
    assert keys.owner(key) is not None
    for spoil in (file.unlink, lambda: file.write_text("half a file")):
        spoil()
        clock.pass_check()
        for _ in range(2):
            with pytest.raises(KeysUnavailable):
                keys.owner(key)
            clock.pass_check()
        file.write_bytes(content)
        clock.pass_check()
        assert keys.owner(key) is not None
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
