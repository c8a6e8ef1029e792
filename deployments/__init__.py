"""Where Zephyra runs: Ray Serve deployments, Ray Train jobs, the command line. What is computed is in `cluster`.

`serve run deployments:app root=... shards=4` takes the builder, `serve build deployments:default_app` the application
with default settings. Both are made on demand: a proxy that imports only the gRPC service must not pay for torch.
"""

from typing import TYPE_CHECKING

from cluster.config.serving import AppSettings

if TYPE_CHECKING:
    from ray.serve import Application

    default_app: Application


def app(args: AppSettings) -> "Application":
    """The application for these settings. Raises `NotTrained` when the root holds no base."""
    from deployments.application import build

    return build(args)


def __getattr__(name: str) -> object:
    if name == "default_app":
        from deployments.application import bind

        return bind(AppSettings())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
