"""Commands given wrong: one sentence that says what to do, exit status 1, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments import train
from deployments.cli import app
from tests.e2e.conftest import CHECKOUT, zephyra


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "all", "--recipe", "soup"], "There is no recipe 'soup'"),
        (["train", "dessert"], "There is no stage 'dessert'"),
        (["train", "all", "--recipe", "open-domains"], "needs --data"),
        (["train", "base", "--data", "{empty}", "--root", "{empty}/root"], "no Parquet file"),
        (["train", "router", "--root", "{empty}/root"], "holds no base yet"),
        (["train", "all", "--base", "{empty}", "--data", "{empty}", "--root", "{empty}/root"], "There is no model in"),
        (["train", "router", "--base", "a/b", "--root", "{empty}/root"], "give --base to stage base, or to all"),
        (["evaluate", "--root", "{empty}"], "holds no trained system"),
        (["router", "train", "--root", "{empty}/root"], "holds no base yet"),
        (["router", "evaluate", "--root", "{empty}"], "holds no trained system"),
        (["router", "explain", "hi", "--root", "{empty}"], "run `zephyra router train`, or `zephyra train all`"),
        (
            ["serve", "--root", "{empty}", "--port", "8123", "--grpc-port", "9123", "--dashboard-port", "8223"],
            "zephyra train",
        ),
        (["serve", "--root", "{empty}", "--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in"),
        (["serve", "--tls-cert", "{empty}/cert.pem"], "--tls-cert and --tls-key go together"),
        (["serve", "--tls-cert", "{empty}/a", "--tls-key", "{empty}/b"], "cannot be used for TLS"),
        (["serve", "--insecure", "--keys-file", "{empty}/keys.json"], "expected one or the other"),
        (["keys", "list", "--file", "{empty}/keys.json"], "expected a file that `zephyra keys add` wrote"),
        (["chat", "--url", "https://127.0.0.1:9", "--ca", "{empty}/none", "hi"], "cannot be read"),
        (["chat", "--url", "https://127.0.0.1:9", "--ca", __file__, "hi"], "holds no certificate"),
        (["chat", "--api-key", "zk-\n", "hi"], "holds characters that no key has"),
        (["chat", "--url", "http://127.0.0.1:9", "hi"], "Nothing answers at http://127.0.0.1:9"),
        (["classify", "hi", "--labels", "a,b", "--url", "http://127.0.0.1:9"], "Nothing answers at http://127.0.0.1:9"),
        (["chat", "--grpc", "--grpc-target", "127.0.0.1:9", "hi"], "Nothing answers at 127.0.0.1:9"),
    ],
)
def test_zephyra_says_what_to_do(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [argument.format(empty=tmp_path) for argument in arguments])
    assert done.exit_code == 1, done.stdout
    assert said in " ".join(done.stderr.split())
    # Anything else would be a traceback in a process of its own.
    assert isinstance(done.exception, SystemExit)


def test_a_process_of_zephyra_says_it_without_a_traceback() -> None:
    done = zephyra("train", "all", "--recipe", "soup")
    assert done.returncode == 1, done.stdout
    assert "There is no recipe 'soup'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["base", "--root", "relative", "--data", "/data"], "--root: relative is relative; give an absolute path"),
        (["base", "--root", "/root", "--data", "here"], "--data: here is relative; give an absolute path"),
        (["base", "--root", "/root", "--data", "/data", "--recipe", "soup"], "There is no recipe 'soup'"),
    ],
)
def test_a_job_refuses_relative_paths(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments) == 1
    assert said in capsys.readouterr().err


def test_a_process_of_a_job_says_it_without_a_traceback() -> None:
    command = [sys.executable, "-m", "deployments.train", "base", "--root", "relative", "--data", "/data"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "--root: relative is relative; give an absolute path" in done.stderr
    assert "Traceback" not in done.stderr
