"""What an application is served with: one replica's engine, fetching adapters, and the application as a whole."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config.places import ARTIFACTS, DEFAULT_ROOT, Root, absolute, root_from
from cluster.config.settings import Device, Quantization, Settings


class EngineSettings(Settings):
    """Limits of one base replica."""

    max_batch_size: int = Field(default=16, ge=1, le=1024)
    """Sequences decoded together."""
    max_waiting: int = Field(default=256, ge=1)
    """Sequences queued beyond that; one more is refused with Overloaded."""
    max_context_tokens: int | None = Field(default=None, ge=8)
    """Prompt and answer together; by default what the model was made for."""
    max_step_tokens: int = Field(default=256, ge=1, le=65_536)
    """Tokens of one step: one of each sequence that is generating, the rest from prompts, which are read in pieces."""
    kv_cache_bytes: int = Field(default=2**30, ge=1)
    """Budget of the keys and values of all sequences; at least what one of the longest takes."""
    reuse_prefixes: bool = True
    """Keep the keys and values of ended sequences for others that begin alike, while nothing else needs the room."""
    adapter_bytes: int = Field(default=2**30, ge=1)
    """Budget of the slot bank: adapters resident beside the base."""

    @model_validator(mode="after")
    def _steps_hold_a_batch(self) -> Self:
        if self.max_step_tokens < self.max_batch_size:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens}, below max_batch_size, {self.max_batch_size}; expected at "
                "least one token for every sequence of a batch"
            )
        return self


class FetchSettings(Settings):
    """How the coordinator fetches adapters; the one part that changes on a running system, as its `user_config`."""

    copies: int = Field(default=2, ge=1, le=1024)
    """Shards that hold each adapter, or all if there are fewer: the next is asked where one is slow or gone."""
    hedge_ms: float | None = Field(default=None, gt=0, le=60_000)
    """A shard that takes longer has the next one asked as well; by default half as much again as 95 % of answers."""


class AppSettings(Settings):
    """What `serve run deployments:app key=value ...` takes, and `args` in ray_config.yaml."""

    root: str | None = None
    """Folder or bucket (s3://, gs://, az://) of a trained system; by default artifacts/starter, or the root that `base`
    lies in."""
    base: str | None = None
    """Another causal language model in Hugging Face's format, a folder or an id on the hub; by default the root's
    own."""
    quantization: Quantization | None = None
    """Serve the base's int8 or int4 form, which `zephyra quantize` wrote; by default its floats."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Numbers that the base computes with; by default those it was saved in."""
    device: Device = "cpu"
    """Where base replicas run; each takes a GPU of its own."""
    shards: int = Field(default=2, ge=1, le=1024)
    """Adapter shards."""
    copies: int = Field(default=2, ge=1, le=1024)
    """Shards that hold each adapter, or all if there are fewer; also `copies` in the Coordinator's `user_config`."""
    hedge_ms: float | None = Field(default=None, gt=0, le=60_000)
    """A shard that takes longer has the next one asked as well; by default as `FetchSettings.hedge_ms` says."""
    replicas: int = Field(default=1, ge=1, le=1024)
    """Base replicas; with `max_replicas`, the fewest."""
    max_replicas: int | None = Field(default=None, ge=1, le=1024)
    """Add base replicas while those there are busy, up to so many, and take them away again; by default never."""
    upscale_delay_s: float = Field(default=10.0, ge=0, le=86_400)
    """So many seconds must the replicas have been too few before one is added."""
    downscale_delay_s: float = Field(default=120.0, ge=0, le=86_400)
    """So many seconds must they have been too many before one is taken away."""
    merge_rank: int = Field(default=64, ge=1, le=1024)
    """Rank of the one adapter that a mixture of more than eight is merged to."""
    affinity_slack: int | None = Field(default=8, ge=0, le=1_000_000)
    """A request goes to a replica that holds its adapters unless that one has more than so many requests beyond the
    idlest one's; None for whichever of two is idler, whatever they hold."""
    host_adapter_bytes: int = Field(default=2**30, ge=0)
    """Adapters that a base replica keeps in memory behind its slot bank, as their files' bytes."""
    drain_s: float = Field(default=60.0, ge=0, le=86_400)
    """A process that is replaced or stopped may take so long to end the answers it has begun."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of a base replica's products; 0 for all cores but one, which the other processes need."""
    domain_changes: bool = True
    """Domains may be added, withdrawn and rolled back over HTTP and gRPC, by whom `keys_file` says."""
    upload_bytes: int = Field(default=2**28, ge=1)
    """Of one adapter that is uploaded, all its files and examples together."""
    adapter_folder: str | None = None
    """Callers may name a folder below this one instead of uploading an adapter; by default none may."""
    keys_file: str | None = None
    """JSON file of API keys, which `zephyra keys` writes: every caller needs one, and an admin's to change domains. By
    default there are none, and only callers on this machine are served."""
    insecure: bool = False
    """Without keys, answer callers on other machines as well; domains are still changed from this one only."""
    plain_grpc_local: bool = False
    """Serve callers on other machines over gRPC with TLS only: Ray opens the plain port on all interfaces."""
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _callers_are_known_or_not(self) -> Self:
        if self.insecure and self.keys_file is not None:
            raise ValueError("insecure is set beside keys_file; expected one or the other: keys let nobody else in")
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, below replicas, {self.replicas}; expected at least as many"
            )
        return self

    def resolved_root(self) -> Root:
        """The root as an absolute path or a URI. A base inside a root (`R/base/1`) stands for that root."""
        if self.root is not None:
            return root_from(self.root)
        if self.base is None:
            return absolute(DEFAULT_ROOT)
        base = absolute(self.base)
        for folder in (base, *list(base.parents)[:2]):
            if (folder / "catalog").is_dir():
                return folder
        return absolute(ARTIFACTS) / base.name

    def resolved_base(self) -> Path | None:
        """The folder of the base to serve, or None for the root's own."""
        if self.base is None or (absolute(self.base) / "catalog").is_dir():
            return None
        return absolute(self.base)

    def resolved_keys_file(self) -> Path | None:
        """The file of API keys as an absolute path."""
        return None if self.keys_file is None else absolute(self.keys_file)
