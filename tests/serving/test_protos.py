"""The generated gRPC files are what protoc makes of the proto."""

import shutil
import subprocess
import sys

import pytest

from cluster.config.places import CHECKOUT

GENERATED = ("zephyra_pb2.py", "zephyra_pb2.pyi", "zephyra_pb2_grpc.py")


def test_generated_files_are_current(tmp_path):
    pytest.importorskip("grpc_tools")
    source = "deployments/protos/zephyra.proto"
    (tmp_path / "deployments/protos").mkdir(parents=True)
    shutil.copy(CHECKOUT / source, tmp_path / source)
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I."]
    command += ["--python_out=.", "--pyi_out=.", "--grpc_python_out=.", source]
    subprocess.run(command, cwd=tmp_path, check=True)
    for name in GENERATED:
        made, kept = (folder / "deployments/protos" / name for folder in (tmp_path, CHECKOUT))
        assert made.read_text() == kept.read_text(), f"{name} is not current: run `make protos`."
