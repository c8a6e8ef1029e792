"""Where things lie by default, and how a path that a user wrote is read.

Knows no settings, and does not look whether anything is there.
"""

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that holds `cluster/`: relative paths in settings are taken from here, in whatever process."""

ARTIFACTS = "artifacts"
DEFAULT_ROOT = f"{ARTIFACTS}/starter"
DEFAULT_KEYS_FILE = "keys/keys.json"

Root = Path | str
"""Where artifacts lie: a local folder as a path, or the URI of a bucket: s3://..., gs://..., az://..., file://..."""


def is_hub_id(text: str) -> bool:
    """Whether `text` reads as an id on the Hugging Face hub, `org/name`, and not as a place below artifacts/."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None and Path(text).parts[0] != ARTIFACTS


def absolute(path: str | Path) -> Path:
    """`path`, taken from the checkout when it is relative."""
    return (CHECKOUT / path).resolve()


def root_from(text: str) -> Root:
    """The root that a user wrote: a URI as it is, a path taken from the checkout when it is relative."""
    return text if "://" in text else absolute(text)
