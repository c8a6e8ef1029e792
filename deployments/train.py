"""Runs a training stage as a Ray Train job: `python -m deployments.train STAGE --root ABSOLUTE --data ABSOLUTE`.

Meant for `ray job submit`, whose working folder is a temporary copy of the code: paths must be absolute. One fit per
stage. A worker that dies is started again and resumes from the newest checkpoint; so does a job that is submitted
again under the same --run-name, with the same settings. Stage `domain`, with --domain NAME, adds one to a trained root.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pydantic
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.config.places import is_hub_id
from cluster.config.settings import Device
from cluster.config.training import LiveDomainSettings, StageSettings
from cluster.environment import ray_address
from cluster.errors import InvalidInput, ZephyraError
from cluster.training import DIVISIBLE, JOBS, ON_DEVICE, STAGES
from cluster.training.disk import full_disk_told
from cluster.training.hub_data import find_data
from cluster.training.pipeline import data_of, live_recipe, run_all
from cluster.training.recipes import recipe
from cluster.training.tracking import FOLDER, EventLog
from cluster.training.workers import Workers
from deployments.monitoring.metrics import TRAINING_LOSS, TRAINING_SPEED, TRAINING_STEP, RaySink, Sink
from deployments.run_names import NamedRun, named_run

_REPORT_EVERY_S = 5.0

_EXPORTED = {
    "step": TRAINING_STEP,
    "loss": TRAINING_LOSS,
    "tokens/s": TRAINING_SPEED,
    "prompts/s": TRAINING_SPEED,
}
"""What a stage reports, and what the dashboard knows it as."""


class TrainRun:
    """A stage inside a Ray Train worker: one line of progress now and then, checkpoints kept by Ray Train."""

    def __init__(self, stage: str, run_name: str, events: EventLog, workers: Workers, sink: Sink) -> None:
        self.workers = workers
        self._stage, self._run_name, self._events, self._sink = stage, run_name, events, sink
        self._title, self._num_steps = "", 0
        self._started_s = self._reported_s = time.monotonic()
        self._metrics: dict[str, float] = {}

    def start(self, title: str, num_steps: int) -> None:
        self._title, self._num_steps, self._started_s = title, num_steps, time.monotonic()
        self._events.start(title, num_steps)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics = {"step": step, **metrics}
        self._events.report(step, metrics)
        if self.workers.is_first:
            for name in self._metrics.keys() & _EXPORTED.keys():
                self._sink.record(_EXPORTED[name], self._metrics[name], stage=self._stage, run=self._run_name)
        now = time.monotonic()
        if now - self._reported_s < _REPORT_EVERY_S and step != self._num_steps:
            return
        self._reported_s = now
        left_s = (now - self._started_s) / step * max(0, self._num_steps - step)
        values = "  ".join(f"{name} {value:,.3g}" for name, value in metrics.items())
        self.say(f"{self._title}: step {step}/{self._num_steps}  {values}  {left_s:.0f} s left")
        # Several would wait here for one another, and are not at the same step: those tell theirs with a checkpoint.
        if self.workers.count == 1:
            ray.train.report(self._metrics)

    def say(self, text: str) -> None:
        who = "" if self.workers.is_first else f"worker {self.workers.rank}: "
        print(f"{who}{text}", flush=True)

    def checkpoint(self, save: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            ray.train.report(self._metrics, checkpoint=Checkpoint.from_directory(folder))

    def restore(self) -> Path | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        return Path(checkpoint.to_directory(tempfile.mkdtemp(prefix=f"zephyra-{self._stage}-")))


def _train(config: dict[str, Any]) -> str | None:
    """What the worker runs. Returns, as text, what the user did wrong if that is why it ended: trying again would not
    help. None otherwise.
    """
    try:
        settings = StageSettings.model_validate_json(config["settings"])
        stage = config["stage"]
        context = ray.train.get_context()
        device = ray.train.torch.get_device() if config["device"] == "cuda" else torch.device("cpu")
        workers = Workers(context.get_world_rank(), context.get_world_size(), config["shards_base"], device)
        curves = f"{stage}-{settings.mark}" if workers.is_first else f"{stage}-{settings.mark}-{workers.rank}"
        with closing(EventLog(settings.root / FOLDER / curves)) as events:
            run = TrainRun(stage, config["run_name"], events, workers, RaySink())
            with full_disk_told(settings.root, run):
                JOBS[stage](settings, run)
    except ZephyraError as error:
        return str(error)
    return None


def fit(
    stage: str,
    settings: StageSettings,
    run_name: str,
    num_cpus: float,
    num_workers: int = 1,
    shards_base: bool = False,
    device: Device = "cpu",
) -> None:
    """Run one stage on the cluster and wait for it. Raises `InvalidInput` with the stage's own reason if it refused.

    Each of the workers reserves so many CPUs, and on cuda a GPU; a stage that cannot be divided runs on one.
    `shards_base`: stage base keeps a part of the weights and moments on each, by FSDP.
    """
    if num_workers < 1:
        raise InvalidInput(f"--workers is {num_workers}; expected 1 or more.")
    if num_workers > 1 and stage not in DIVISIBLE:
        print(f"stage {stage} runs on one worker; only {' and '.join(DIVISIBLE)} can be divided", flush=True)
        num_workers = 1
    on_gpus = device == "cuda" and stage in ON_DEVICE
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if on_gpus and (num_gpus := cluster.get("GPU", 0)) < num_workers:
        # A cluster that grows by itself may get them; one that was started here can't.
        told = f"--device cuda asks for {num_workers} GPU(s), and the cluster has {num_gpus:.0f}"
        if ray_address() is None:
            raise InvalidInput(f"{told}; take fewer --workers, or --device cpu.")
        print(f"{told}: waiting for more", flush=True)
    train: Any = _train  # what it returns is kept in the result, though its type says that it returns nothing
    resources = {"CPU": num_cpus} | ({"GPU": 1.0} if on_gpus else {})
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "stage": stage,
            "run_name": run_name,
            "settings": settings.model_dump_json(),
            "shards_base": shards_base,
            "device": "cuda" if on_gpus else "cpu",
        },
        # Objects go over gloo also where tensors go over nccl.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=on_gpus, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"{run_name}-{stage}-{settings.mark}",
            storage_path=str(settings.root / "runs"),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    # Typed as the older Result, which has no such field.
    result: Any = trainer.fit()
    if result.return_value is not None:
        raise InvalidInput(result.return_value)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        settings = settings_of(options)
        with named_run(options.run_name, settings) as run:
            _refuse_finished(options.stage, options.run_name, run)
            ray.init(address=ray_address() or "local", ignore_reinit_error=True)

            def run_stage(stage: str) -> None:
                if stage in run.done:
                    print(f"stage {stage} of the run {options.run_name!r} is done already", flush=True)
                    return
                fit(
                    stage,
                    settings,
                    options.run_name,
                    options.cpus,
                    options.workers,
                    options.shard_base,
                    options.device,
                )
                run.add(stage)

            if options.stage == "all":
                run_all(settings, run_stage, again=True)
            else:
                run_stage(options.stage)
    except ZephyraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _refuse_finished(stage: str, run_name: str, run: NamedRun) -> None:
    """Raise `InvalidInput` if all that is asked for was done under this name."""
    if set(STAGES if stage == "all" else (stage,)) <= set(run.done):
        raise InvalidInput(f"The run {run_name!r} of {stage!r} is finished; give another --run-name to train again.")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    command = argparse.ArgumentParser(prog="python -m deployments.train", description=__doc__)
    command.add_argument("stage", choices=[*JOBS, "all"])
    command.add_argument("--root", required=True, help="absolute folder or mount that holds the artifacts")
    command.add_argument(
        "--data",
        required=True,
        help="absolute folder of tables, or a data set's id on the hub; a Parquet file will do for a domain",
    )
    command.add_argument("--recipe", help="by default the starter's, and for stage domain the one of the root")
    command.add_argument("--domain", help="the name of the domain that stage domain trains")
    command.add_argument(
        "--base", help="absolute folder or hub id of a base: stage base takes it over, and trains none"
    )
    command.add_argument("--run-name", default=time.strftime("%Y%m%d-%H%M%S"), help="the same name resumes a run")
    command.add_argument("--cpus", type=float, default=1.0, help="CPUs that each worker reserves, and its threads")
    command.add_argument("--workers", type=int, default=1, help="workers of stages base and adapters")
    command.add_argument(
        "--shard-base", action="store_true", help="with --workers: base's weights and moments in parts, by FSDP"
    )
    command.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="with cuda each worker has a GPU, but for the router's"
    )
    return command


def settings_of(options: argparse.Namespace) -> StageSettings:
    """What the stages are run with. Raises `InvalidInput`, and `InvalidData` for data that cannot be had."""
    if (options.domain is None) == (options.stage == "domain"):
        raise InvalidInput("--domain and stage 'domain' go together; give both or neither.")
    root = Path(options.root)
    name = options.recipe or (live_recipe(root) if options.domain else "starter")
    live = None if options.domain is None else LiveDomainSettings(domain=options.domain, others=data_of(root))
    # Where the working folder is a temporary copy, a relative path means nothing, but for an id on the hub.
    data = find_data(options.data) if is_hub_id(options.data) else options.data
    try:
        return StageSettings(root=options.root, data=data, recipe=recipe(name), name=name, base=options.base, live=live)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"--{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}.") from None


if __name__ == "__main__":
    sys.exit(main())
