"""`zephyra ...`: each command checks its arguments and calls one function."""

import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.config.places import DEFAULT_ROOT, absolute
from cluster.config.serving import AppSettings
from cluster.config.settings import Device, Quantization
from cluster.errors import InvalidInput
from deployments.commands.command_line import (
    STARTER,
    console,
    errors_told,
    root_and_data,
    run_stage,
    settings_of_options,
    stage_settings,
)
from deployments.commands.domains_cli import app as domains_app
from deployments.commands.keys_cli import app as keys_app
from deployments.commands.router_cli import app as router_app

_BASE_HELP = "a folder in Hugging Face's format, or an id on the hub, org/name."

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="One base, many experts."
)
app.add_typer(router_app, name="router")
app.add_typer(domains_app, name="domains")
app.add_typer(keys_app, name="keys")


_ApiKey = Annotated[
    str | None, typer.Option(envvar="ZEPHYRA_API_KEY", help="Where callers need one; others see arguments.")
]
_Ca = Annotated[
    Path | None, typer.Option(help="PEM file of the authority, or the certificate itself, to trust over TLS.")
]


@app.command()
def serve(
    root: Annotated[str | None, typer.Option(help="Folder of a trained system; by default the starter.")] = None,
    base: Annotated[str | None, typer.Option(help="Another base: " + _BASE_HELP)] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="What `zephyra quantize` wrote; by default the base's floats.")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, max=1024)] = 2,
    replicas: Annotated[int, typer.Option(min=1, max=1024, help="Base replicas.")] = 1,
    host: Annotated[str, typer.Option(help="0.0.0.0 for all addresses of this machine; needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC without TLS.")] = 9000,
    grpc_tls_port: Annotated[int, typer.Option(help="gRPC over TLS, with --tls-cert.")] = 9443,
    dashboard_port: Annotated[int, typer.Option(help="The Ray dashboard, always on 127.0.0.1.")] = 8265,
    keys_file: Annotated[
        Path | None, typer.Option(help="What `zephyra keys` wrote; then every caller needs one.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Answer other machines without keys.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, a PEM file: HTTP and gRPC over TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, a PEM file.")] = None,
) -> None:
    """Start a local cluster and serve on it until interrupted. Trains the starter first if it is not there."""
    from cluster.training.pipeline import is_trained
    from deployments.cluster import Ports, Tls, serving, wait_forever
    from deployments.commands.invitation import print_invitation

    with errors_told():
        if (tls_cert is None) != (tls_key is None):
            raise InvalidInput("--tls-cert and --tls-key go together; give both, or neither to have no TLS.")
        tls = None if tls_cert is None or tls_key is None else Tls(tls_cert.resolve(), tls_key.resolve(), grpc_tls_port)
        ports = Ports(port, grpc_port, dashboard_port, host, tls)
        settings = settings_of_options(
            root=root,
            base=base,
            quantization=quantization,
            shards=shards,
            replicas=replicas,
            keys_file=None if keys_file is None else str(keys_file.resolve()),
            insecure=insecure,
        )
        ports.check_open_to(settings)
        ports.check_free()
        if root is None and base is None and not is_trained(absolute(DEFAULT_ROOT)):
            _train_all(STARTER, None, None, None, again=False)
        if base is not None:
            console.print("looking at the base; a root that has none yet gets a copy of it, which takes a while once")
        console.print(f"starting the cluster: 1 router, {replicas} base replica(s), {shards} adapter shards ...")
        with serving(settings, ports, quiet=True):
            print_invitation(ports, keys_file is not None, console)
            wait_forever()


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="base, adapters, router, joint, or all of them: all.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="starter, trial, open-domains, many-tasks or pretrained; with --base by default pretrained."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder of Parquet files or saved data sets, or an id on the hub; the starter's by default."),
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Where to publish; by default artifacts/RECIPE, or artifacts/NAME of the base.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Take this base over instead of training one: " + _BASE_HELP)] = None,
    again: Annotated[bool, typer.Option("--again", help="Start over where a run is finished or half done.")] = False,
    device: Annotated[Device, typer.Option(help="Where bases and adapters are trained: cpu or cuda.")] = "cpu",
) -> None:
    """Train a stage, or what is left of all four, in this process. On a cluster: python -m deployments.train."""
    from cluster.training import STAGES

    with errors_told():
        if base is not None and stage not in ("base", "all"):
            raise InvalidInput(f"Stage {stage!r} takes the root's base; give --base to stage base, or to all.")
        if stage == "all":
            if not _train_all(recipe, data, root, base, again, device):
                console.print("all four stages are done already; --again starts over")
        elif stage in STAGES:
            run_stage(stage, stage_settings(recipe, data, root, base), device)
        else:
            raise InvalidInput(f"There is no stage {stage!r}; the stages are: {', '.join(STAGES)}, all.")


def _train_all(
    recipe: str | None, data: str | None, root: str | None, base: str | None, again: bool, device: Device = "cpu"
) -> bool:
    from cluster.training.pipeline import run_all

    settings = stage_settings(recipe, data, root, base)
    since = time.monotonic()
    left = run_all(settings, lambda stage: run_stage(stage, settings, device), again)
    if left:
        console.print(f"trained '{settings.name}' in {time.monotonic() - since:.0f} s: {settings.root}")
    return left


@app.command()
def evaluate(
    data: Annotated[str | None, typer.Option(help="Folder of Parquet files; by default what was trained on.")] = None,
    root: Annotated[str | None, typer.Option(help="The system; by default the one trained on --data last.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each domain to measure.")] = 100,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    out: Annotated[
        str | None, typer.Option(help="A folder for the report; by default the next of the root's evaluations.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where it is measured: cpu or cuda.")] = "cpu",
) -> None:
    """Per domain: loss of base, routed, oracle and worst adapter, exact answers, routing; what became worse."""
    from cluster.training.compute import device_of
    from cluster.training.evaluation import EvaluationSettings
    from cluster.training.evaluation import evaluate as measure
    from cluster.training.evaluation_history import became_worse, last_like, publish_report, write_report
    from cluster.training.run import LocalRun
    from deployments.commands.report import print_changes, print_report

    with errors_told():
        place, folder = root_and_data(root, data)
        with LocalRun("evaluation", place / "runs" / "evaluation", console, device=device_of(device)) as run:
            report = measure(EvaluationSettings(root=place, data=folder, split=split, rows_per_domain=rows), run)
        before = last_like(place, report)
        changes = became_worse(before.report, report) if before is not None else []
        if out is None:
            target = publish_report(place, report, changes)
        else:
            target = Path(out).resolve()
            target.mkdir(parents=True, exist_ok=True)
            write_report(report, changes, target)
        print_report(report, console)
        print_changes(changes, before.name if before is not None else None, console)
        console.print(f"written to {target}: report.html to look at, report.json, report.parquet", highlight=False)


@app.command()
def quantize(
    bits: Annotated[int, typer.Option(help="8 or 4 per weight.")],
    root: Annotated[str | None, typer.Option(help="The system whose base it is; by default the starter.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder of another base, in Hugging Face's format.")] = None,
    output: Annotated[
        str | None, typer.Option(help="Where to write; by default beside the base, where it is looked for.")
    ] = None,
) -> None:
    """Write the base with 8 or 4 bits per weight, for `zephyra serve --quantization`. The same adapters fit."""
    from deployments.replica.base_folder import write_quantized

    with errors_told():
        by_bits: dict[int, Quantization] = {8: "int8", 4: "int4"}
        if (quantization := by_bits.get(bits)) is None:
            raise InvalidInput(f"--bits is {bits}; expected 8 or 4.")
        form = write_quantized(
            AppSettings(root=root, base=base), quantization, Path(output).resolve() if output else None
        )
        done = "written to" if form.is_new else "it is there already:"
        print(f"{done} {form.folder} ({form.num_bytes / 1e6:.1f} MB)")


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    model: Annotated[str, typer.Option(help="zephyra, zephyra:DOMAIN or base.")] = "zephyra",
    url: Annotated[str, typer.Option(help="Where HTTP is served.")] = "http://127.0.0.1:8000",
    grpc: Annotated[bool, typer.Option("--grpc", help="Ask over gRPC instead of HTTP.")] = False,
    grpc_target: Annotated[
        str, typer.Option(help="Where gRPC is served; https://HOST:PORT for TLS.")
    ] = "127.0.0.1:9000",
    api_key: _ApiKey = None,
    ca: _Ca = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    remember: Annotated[
        bool, typer.Option("--remember", help="Send earlier turns along; the starter learned single questions only.")
    ] = False,
) -> None:
    """Ask, and see which domains answered."""
    from deployments.commands.chat import GrpcClient, HttpClient, converse

    with errors_told():
        client = (
            GrpcClient(grpc_target, model, max_tokens, api_key, ca)
            if grpc
            else HttpClient(url, model, max_tokens, api_key, ca)
        )
        converse(client, prompt, console, remember)


@app.command()
def classify(
    prompt: Annotated[str, typer.Argument(help="What is asked.")],
    labels: Annotated[str, typer.Option(help="Possible answers, separated by commas; spaces around them are cut.")],
    model: Annotated[str, typer.Option(help="zephyra, zephyra:DOMAIN or base.")] = "zephyra",
    normalize: Annotated[str, typer.Option(help="sum, or length: the mean per token.")] = "sum",
    url: Annotated[str, typer.Option(help="Where HTTP is served.")] = "http://127.0.0.1:8000",
    api_key: _ApiKey = None,
    ca: _Ca = None,
) -> None:
    """Choose among answers: how likely each is, and which domains judged."""
    from deployments.commands.classify import classify as ask

    with errors_told():
        each = [label.strip() for label in labels.split(",")]
        ask(url, {"model": model, "prompt": prompt, "labels": each, "normalize": normalize}, console, api_key, ca)


def main() -> None:
    """The entry point of `zephyra`."""
    app()


if __name__ == "__main__":
    main()
