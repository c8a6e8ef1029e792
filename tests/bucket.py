"""An S3 that runs in this process, for tests of buckets: moto behind a real HTTP port."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "zephyra"
_KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}


@contextmanager
def emulated_s3() -> Iterator[dict[str, str]]:
    """Serve an empty bucket; yields the environment under which `s3://zephyra/...` is found there."""
    server = make_server("127.0.0.1", 0, _OneAtATime(), threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.port}"
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="tests", aws_secret_access_key="tests", region_name="us-east-1"
    )
    client.create_bucket(Bucket=BUCKET)
    try:
        yield {**_KEYS, "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _OneAtATime:
    """moto looks whether an object is there and then writes it; S3 does both at once, and so must this."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            return list(self._application(environ, start_response))


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass
