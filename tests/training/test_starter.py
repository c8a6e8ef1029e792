"""The starter's data: every answer is right by another way of computing it, and nothing held out is ever trained on."""

import ast
import inspect
import os
import re
import sqlite3
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest

from cluster.training.data import DataSet, Row, read_data
from cluster.training.starter import facts
from cluster.training.starter.domains import DOMAINS, FactDomain, roman
from cluster.training.starter.generate import generate_starter

_FACTS = {
    "capitals": facts.CAPITALS,
    "chemistry": facts.ELEMENTS,
    "spanish": facts.SPANISH,
    "opposites": facts.OPPOSITES,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("starter")
    generate_starter(made, seed=0)
    return made


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSet:
    return read_data(folder)


def _rows(data: DataSet, domain: str) -> list[Row]:
    return [row for split in data.splits for row in data.rows(split, domain)]


def test_the_same_seed_gives_the_same_bytes_also_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom cluster.training.starter.generate import generate_starter\n"
        "for seed in (0, 1):\n    generate_starter(pathlib.Path(sys.argv[1]) / str(seed), seed)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    for file in folder.iterdir():
        assert (tmp_path / "0" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "1" / file.name).read_bytes() != file.read_bytes()


def test_there_are_enough_domains_with_rows_in_every_split(data: DataSet) -> None:
    assert set(data.domains) == set(DOMAINS)
    assert len(data.domains) >= 8
    for domain in (*data.domains, "none"):
        assert all(len(data.rows(split, domain)) >= 100 for split in data.splits)


def test_no_held_out_prompt_is_trained_on(data: DataSet) -> None:
    trained = {row.prompt for row in data.rows("train")}
    for split in ("val", "test"):
        assert not {row.prompt for row in data.rows(split)} & trained
    assert not {row.prompt for row in data.rows("val")} & {row.prompt for row in data.rows("test")}


def test_a_prompt_has_one_answer_and_one_domain(data: DataSet) -> None:
    meant: dict[str, tuple[str, str]] = {}
    for domain in (*data.domains, "none"):
        for row in _rows(data, domain):
            assert meant.setdefault(row.prompt, (domain, row.response)) == (domain, row.response)


@pytest.mark.parametrize("name", _FACTS)
def test_held_out_phrasings_never_occur_in_training(data: DataSet, name: str) -> None:
    domain = DOMAINS[name]
    assert isinstance(domain, FactDomain)
    trained = [row.prompt.casefold() for row in data.rows("train", name)]
    for split, other in (("val", "test"), ("test", "val")):
        assert domain.phrasings[split]
        assert not set(domain.phrasings[split]) & {*domain.phrasings["train"], *domain.phrasings[other]}
        for phrasing in domain.phrasings[split]:
            # Not with another case either, and not by combining a noun with a frame.
            asked = {phrasing.format(x=key).casefold() for key in _FACTS[name]}
            assert not asked & set(trained), phrasing


def test_no_key_stands_twice_in_a_table_and_every_entry_is_trained_on(data: DataSet) -> None:
    tree = ast.parse(inspect.getsource(facts))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "_table"]
    assert len(calls) == len(_FACTS)
    for call, (name, table) in zip(calls, _FACTS.items(), strict=True):
        entries = ast.literal_eval(call.args[0]).split(";")
        keys = [entry.partition("=")[0].strip() for entry in entries]
        assert len(set(keys)) == len(keys) == len(table), name
        assert all(key and value for key, value in table.items())
        assert {row.response for row in data.rows("train", name)} == set(table.values())


@pytest.mark.parametrize("name", _FACTS)
def test_facts_are_answered_from_the_table(data: DataSet, name: str) -> None:
    for row in _rows(data, name):
        named = [key for key in _FACTS[name] if re.search(rf"\b{re.escape(key)}\b", row.prompt)]
        assert row.response in {_FACTS[name][key] for key in named}, row


def _roman_by_digits(number: int) -> str:
    """Digit by digit from a table of tens: no greedy subtraction."""
    ones, fives, tens = "IXCM", "VLD", "XCM"
    out = ""
    for place, digit in enumerate(reversed(str(number))):
        one = ones[place]
        five, ten = (fives[place], tens[place]) if place < 3 else ("", "")
        shapes = ("", one, one * 2, one * 3, one + five, five, five + one, five + one * 2, five + one * 3, one + ten)
        out = shapes[int(digit)] + out
    return out


def test_roman_numerals(data: DataSet) -> None:
    for number in range(1, 4000):
        assert roman(number) == _roman_by_digits(number)
    for row in _rows(data, "roman"):
        (number,) = re.findall(r"\d+", row.prompt)
        assert row.response == _roman_by_digits(int(number))


_SIZES = {
    unit + name: size
    for name in ("m", "g", "l")
    for unit, size in {
        "k": Fraction(1000),
        "": Fraction(1),
        "d": Fraction(1, 10),
        "c": Fraction(1, 100),
        "m": Fraction(1, 1000),
    }.items()
}
"""In metres, grams and litres."""


def test_units(data: DataSet) -> None:
    units = "|".join(_SIZES)
    for row in _rows(data, "units"):
        given = re.search(rf"\b(\d+) ({units})\b", row.prompt)
        assert given, row
        (wanted,) = {*re.findall(rf"\b({units})\b", row.prompt)} - {given[2]}
        assert row.response == f"{int(given[1]) * _SIZES[given[2]] / _SIZES[wanted]} {wanted}"


def test_sql_finds_what_was_asked_for(data: DataSet) -> None:
    database = sqlite3.connect(":memory:")
    rng = Random(0)
    contents: dict[str, list[dict[str, int]]] = {}
    for table, columns in facts.TABLES.items():
        database.execute(f"CREATE TABLE {table} ({', '.join(f'{c} INTEGER' for c in columns)})")
        contents[table] = [{c: rng.randint(1, 100) for c in columns} for _ in range(300)]
        marks = ", ".join("?" for _ in columns)
        database.executemany(f"INSERT INTO {table} VALUES ({marks})", [tuple(r.values()) for r in contents[table]])
    for row in _rows(data, "sql"):
        words = re.findall(r"\w+", row.prompt)
        (table,) = [word for word in words if word in facts.TABLES]
        shown, where = [word for word in words if word in facts.TABLES[table]]
        value = int(next(word for word in words if word.isdecimal()))
        found = [
            record[shown]
            for record in contents[table]
            if ("above" in words and record[where] > value)
            or ("below" in words and record[where] < value)
            or ("equal" in words and record[where] == value)
        ]
        assert [record[0] for record in database.execute(row.response)] == found, row


def _check_shell(task: str, command: str, folder: Path) -> None:
    """Run `command` in an empty folder that holds what `task` needs, and look at what it did."""
    names = re.fullmatch(r"(copy|rename) the file (\w+) to (\w+)|find the word (\w+) in the file (\w+)", task)
    first = names[2] if names and names[2] else task.rsplit(" ", 1)[1]
    content = "one\nthe word plum is here\nthree\n"
    if task.startswith("list the folder"):
        (folder / first).mkdir()
        (folder / first / "inside").touch()
    elif names and names[4]:
        content = f"one\na line with {names[4]} in it\nthree\n"
        (folder / names[5]).write_text(content)
    elif not task.startswith("make a folder"):
        (folder / first).write_text(content)
    before = {f.name for f in folder.iterdir()}
    out = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=True).stdout
    after = {f.name for f in folder.iterdir()}
    if names and names[1]:
        assert (folder / names[3]).read_text() == content
        assert after == ({names[2], names[3]} if names[1] == "copy" else {names[3]})
    elif names:
        assert out == f"a line with {names[4]} in it\n"
    elif task.startswith("delete"):
        assert after == before - {first}
    elif task.startswith("make a folder"):
        assert after == {first}
        assert (folder / first).is_dir()
    else:
        expected = {"list": "inside\n", "show": content, "count": f"3 {first}\n"}
        assert out.lstrip() == expected[task.split(" ", 1)[0]]


def test_shell_commands_do_what_was_asked_for(data: DataSet, tmp_path: Path) -> None:
    verbs = "copy|rename|list|delete|make|show|count|find"
    seen: dict[str, int] = {}
    for row in _rows(data, "shell"):
        found = re.search(rf"\b(({verbs}) (?:the|a) .+?)(?: in the shell)?[.?]?$", row.prompt)
        assert found, row
        seen[found[2]] = seen.get(found[2], 0) + 1
        if seen[found[2]] > 5:
            # Running five of a kind shows that the command is right; the rest must be the same but for the names.
            names = [word for word in re.findall(r"\w+", found[1]) if word in facts.FILES]
            assert [word for word in row.response.split() if word in facts.FILES] == names, row
            continue
        folder = tmp_path / f"{found[2]}-{seen[found[2]]}"
        folder.mkdir()
        _check_shell(found[1], row.response, folder)
    assert set(seen) == set(verbs.split("|"))
