"""A gRPC client as somebody writes it who has the published proto and nothing else of ours.

Run in a process of its own: `python grpc_client.py PROTO FOLDER TARGET QUESTION`. Prints JSON.
"""

import importlib
import json
import sys
from pathlib import Path

import grpc
from grpc_tools import protoc


def main(proto: Path, folder: Path, target: str, question: str) -> None:
    """Generate the client's code into `folder`, ask over `target`, and print what came."""
    arguments = [f"-I{proto.parent}", f"--python_out={folder}", f"--grpc_python_out={folder}", proto.name]
    assert protoc.main(["protoc", *arguments]) == 0
    sys.path.insert(0, str(folder))
    pb, stubs = (importlib.import_module(f"{proto.stem}_{kind}") for kind in ("pb2", "pb2_grpc"))
    with grpc.insecure_channel(target) as channel:
        stub = stubs.ZephyraStub(channel)
        whole = stub.Complete(pb.GenerateRequest(prompt=question), timeout=60)
        chunks = list(stub.Generate(pb.GenerateRequest(prompt=question), timeout=60))
        try:
            stub.Complete(pb.GenerateRequest(prompt=question, domain="astrology"), timeout=60)
            code, details = "OK", ""
        except grpc.RpcError as error:
            code, details = error.code().name, error.details()
    said = {
        "whole": whole.choices[0].text,
        "streamed": "".join(chunk.text for chunk in chunks),
        "mixture": [entry.domain for entry in whole.routing.mixture.entries],
        "code": code,
        "details": details,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
