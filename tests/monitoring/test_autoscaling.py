"""The policy: against the number of replicas that holds a load, found by trying; and how it reaches Serve."""

from types import SimpleNamespace

import cloudpickle
import pytest
from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig

from cluster.config.serving import AppSettings
from deployments.application import bind
from deployments.replica.autoscaling import LOAD, TARGET_LOAD, autoscaling_config, desired_replicas, load_of
from tests.serving.test_application import deployments_of


def desired(*loads, target=1):
    metrics = {LOAD: dict(enumerate(loads))} if loads else {}
    return desired_replicas(SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=target))[0]


def test_the_fewest_replicas_that_hold_the_load():
    for tenths in range(60):
        load = tenths / 10
        fewest = next(n for n in range(1, 20) if load <= n * TARGET_LOAD + 1e-9)
        assert desired(load) == desired(load / 2, load / 2, target=2) == fewest
    assert desired(target=3) == 3, "nothing was told yet"


def test_the_tighter_of_queue_and_kv_cache_counts():
    assert load_of(8, 16, 0.2) == 0.5
    assert load_of(8, 16, 0.9) == 0.9
    assert load_of(48, 16, 1.0) == 3.0


def test_serve_takes_the_policy_and_pickles_it_without_our_packages():
    config = AutoscalingConfig(**autoscaling_config(1, 3, 2.0, 4.0))
    assert (config.min_replicas, config.max_replicas, config.upscale_delay_s, config.downscale_delay_s) == (1, 3, 2, 4)
    assert cloudpickle.loads(cloudpickle.dumps(desired_replicas)) is not None


def test_replicas_are_fixed_unless_there_may_be_more():
    fixed = deployments_of(bind(AppSettings(replicas=3)))["BaseReplica"]._deployment_config
    assert (fixed.num_replicas, fixed.autoscaling_config) == (3, None)
    moving = deployments_of(bind(AppSettings(replicas=2, max_replicas=4, downscale_delay_s=9)))["BaseReplica"]
    config = moving._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.downscale_delay_s) == (2, 4, 9)
    with pytest.raises(ValidationError, match="max_replicas is 1, below replicas, 2"):
        AppSettings(replicas=2, max_replicas=1)
