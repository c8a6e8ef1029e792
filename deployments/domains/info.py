"""What is asked and told of domains, between processes and over the wires. The Gateway reads it without torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.messages import AdapterRef


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """One domain as it is served."""

    name: str
    version: int
    rank: int | None
    """None when the version cannot be read."""
    num_bytes: int
    """Of all the files of the version."""
    num_prototypes: int
    """0 for a domain that the router never picks: it answers by its name alone."""
    is_data_free: bool
    tags: Mapping[str, int]
    """Names of versions, such as `stable`."""
    aliases: tuple[str, ...]
    problem: str | None = None
    """Why it cannot be served or routed."""


@dataclass(frozen=True, slots=True)
class DomainHistory:
    """One domain and all that was ever written of it."""

    current: DomainInfo
    versions: tuple[int, ...]
    files: Mapping[str, int]
    """Of the current version, each with its bytes."""
    generation: int
    """Of the catalog that says so."""


@dataclass(frozen=True, slots=True)
class DomainPage:
    """Some of the domains, by name."""

    domains: tuple[DomainInfo, ...]
    generation: int
    """Of the catalog that says so; the next page may be of a later one."""
    has_more: bool
    """Whether there are domains after the last of these."""


@dataclass(frozen=True, slots=True)
class NewDomain:
    """A domain, or the next version of one, that somebody hands in over a wire."""

    name: str
    upload: str | None = None
    """Where its files were uploaded to."""
    adapter_uri: str | None = None
    """Or the folder of this machine that holds them."""
    examples: tuple[str, ...] = ()
    """Prompts, where they were not uploaded as a file."""
    is_data_free: bool = False
    expected_generation: int | None = None


@dataclass(frozen=True, slots=True)
class DomainChange:
    """What a change has made current."""

    domain: str
    version: int | None
    """None for a domain that was withdrawn."""
    generation: int
    """Of the catalog that holds the change."""

    @property
    def ref(self) -> AdapterRef:
        """The adapter that is current now; only of a domain that was not withdrawn."""
        assert self.version is not None
        return AdapterRef(self.domain, self.version)
