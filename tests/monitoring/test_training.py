"""What a training job shows on the dashboard: the newest step, loss and speed, of its first worker."""

from contextlib import closing
from pathlib import Path

from cluster.training.tracking import EventLog
from cluster.training.workers import Workers
from deployments.monitoring.metrics import TRAINING_LOSS, TRAINING_SPEED, TRAINING_STEP
from deployments.train import TrainRun
from tests.monitoring.ledger import Ledger


def test_the_first_worker_tells_its_newest_values(tmp_path: Path) -> None:
    ledger = Ledger()
    with closing(EventLog(tmp_path)) as events:
        for rank, loss in ((0, 1.5), (1, 7.5)):
            run = TrainRun("router", "one", events, Workers(rank, 2), ledger)
            run.start("3/4 router", 10)
            run.report(1, {"loss": 2.5, "prompts/s": 40.0})
            run.report(2, {"loss": loss, "prompts/s": 60.0})
    assert ledger.values == {
        (metric.name, "router", "one"): [value]
        for metric, value in ((TRAINING_STEP, 2), (TRAINING_LOSS, 1.5), (TRAINING_SPEED, 60.0))
    }
