"""What a catalog says at one generation, and what a generation changes. Knows nothing of where it is kept."""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from cluster.errors import InvalidInput, UnknownDomain
from cluster.messages import AdapterRef, check_domain_name

_TAG = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_NAMED_IN_ERRORS = 20

_Value = TypeVar("_Value")


def check_tag(tag: str) -> str:
    """Return `tag` if it can name a version of a domain, else raise `InvalidInput`."""
    if not _TAG.fullmatch(tag):
        raise InvalidInput(f"{tag!r} cannot be a tag: use up to 63 of a-z, 0-9, '-' and '_', starting with a letter.")
    return tag


@dataclass(frozen=True, slots=True)
class CatalogState:
    """What was current at one generation; generation 0 is the empty catalog."""

    generation: int = 0
    base: int | None = None
    """Version of the base, the folder `base/<version>`."""
    adapters: Mapping[str, int] = field(default_factory=dict)
    """Domain to the version of its adapter, the folder `adapters/<domain>/<version>`."""
    router: int | None = None
    """Version of the router, the folder `router/<version>`."""
    prototypes: Mapping[str, str] = field(default_factory=dict)
    """Domain to the checksum of the prototypes in the folder of its version; domains that have none are left out."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of domains."""
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Domain to the names of versions of it, such as `stable`."""
    withdrawn: Mapping[str, int] = field(default_factory=dict)
    """Domains taken back and not published since, with the generation that did: none of their versions is served."""

    def ref(self, domain: str) -> AdapterRef:
        """The current adapter of `domain`, which may be an alias. Raises `UnknownDomain`."""
        name = self.aliases.get(domain, domain)
        if name in self.adapters:
            return AdapterRef(name, self.adapters[name])
        if name in self.withdrawn:
            raise UnknownDomain(f"The domain {name!r} was withdrawn, in generation {self.withdrawn[name]}.")
        known = sorted(self.adapters)
        more = f" and {len(known) - _NAMED_IN_ERRORS} more" if len(known) > _NAMED_IN_ERRORS else ""
        listed = ", ".join(known[:_NAMED_IN_ERRORS]) or "none yet"
        raise UnknownDomain(f"There is no domain {domain!r}; the domains are: {listed}{more}.")

    def resolve(self, name: str) -> AdapterRef:
        """What a client means by `law`, `law@3`, `law@stable` or an alias of law, with or without the version.

        A version named by its number may not exist. Raises `UnknownDomain`, or `InvalidInput` for what names nothing.
        """
        domain, at, version = name.partition("@")
        domain = self.aliases.get(domain, domain)
        if not at or domain in self.withdrawn:
            return self.ref(domain)
        if (tagged := self.tags.get(domain, {}).get(version)) is not None:
            return AdapterRef(domain, tagged)
        if _TAG.fullmatch(version):
            tags = ", ".join(sorted(self.tags.get(domain, {}))) or "none"
            raise UnknownDomain(
                f"The domain {check_domain_name(domain)!r} has no tag {version!r}; its tags are: {tags}."
            )
        return AdapterRef.parse(f"{domain}@{version}")

    def as_json(self) -> dict[str, Any]:
        """Everything but the generation, which is the file's name."""
        return {
            "base": self.base,
            "adapters": dict(self.adapters),
            "router": self.router,
            "prototypes": dict(self.prototypes),
            "aliases": dict(self.aliases),
            "tags": {domain: dict(tags) for domain, tags in self.tags.items()},
            "withdrawn": dict(self.withdrawn),
        }


@dataclass(frozen=True, slots=True)
class Change:
    """What one generation changes."""

    base: int | None = None
    adapters: Mapping[str, int] = field(default_factory=dict)
    withdrawn: tuple[str, ...] = ()
    router: int | None = None
    prototypes: Mapping[str, str] = field(default_factory=dict)
    """Of domains in `adapters`; one that is not here has none from now on."""
    aliases: Mapping[str, str | None] = field(default_factory=dict)
    """None takes an alias away."""
    tags: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)
    """None takes a tag away."""

    def check(self, state: CatalogState) -> None:
        """Raise `InvalidInput` or `UnknownDomain` unless this can be applied to `state`."""
        for domain in self.adapters:
            check_domain_name(domain)
            if domain in state.aliases and domain not in self.aliases:
                raise InvalidInput(f"{domain!r} is an alias of {state.aliases[domain]!r}; choose another name.")
        if stray := set(self.prototypes) - set(self.adapters):
            raise InvalidInput(f"There are prototypes of {min(stray)!r} and no version of it; publish both at once.")
        for domain in self.withdrawn:
            if domain not in state.adapters:
                state.ref(domain)
                raise InvalidInput(f"{domain!r} is an alias of {state.aliases[domain]!r}; withdraw that, or the alias.")
        present = (set(state.adapters) - set(self.withdrawn)) | set(self.adapters)
        for alias, target in self.aliases.items():
            check_domain_name(alias)
            if target is None and alias not in state.aliases:
                raise UnknownDomain(
                    f"There is no alias {alias!r}; the aliases are: {', '.join(sorted(state.aliases))}."
                )
            if target is not None and alias in present:
                raise InvalidInput(f"{alias!r} is a domain; an alias needs a name of its own.")
            if target is not None and target not in present:
                raise UnknownDomain(f"There is no domain {target!r} for the alias {alias!r} to name.")
        for domain, tags in self.tags.items():
            if domain not in present:
                raise UnknownDomain(f"There is no domain {domain!r} to tag a version of.")
            for tag, version in tags.items():
                check_tag(tag)
                if version is None and tag not in state.tags.get(domain, {}):
                    known = ", ".join(sorted(state.tags.get(domain, {}))) or "none"
                    raise UnknownDomain(f"{domain!r} has no tag {tag!r} to take away; its tags are: {known}.")

    def apply(self, state: CatalogState) -> CatalogState:
        """The state after this change; a new base withdraws the adapters and the router, which belong to the old.

        What is withdrawn takes its tags and aliases along.
        """
        generation = state.generation + 1
        gone = set(self.withdrawn)
        if self.base is not None:
            gone |= set(state.adapters)
            state = replace(state, base=self.base, router=None)
        tombstones = {**state.withdrawn, **dict.fromkeys(gone, generation)} if gone else state.withdrawn
        adapters = {**_without(state.adapters, gone), **self.adapters}
        prototypes = {**_without(state.prototypes, gone | set(self.adapters)), **self.prototypes}
        aliases = {**{a: d for a, d in state.aliases.items() if d not in gone}, **self.aliases}
        tags = {**_without(state.tags, gone)}
        for domain, changed in self.tags.items():
            tags[domain] = {t: v for t, v in {**tags.get(domain, {}), **changed}.items() if v is not None}
        return CatalogState(
            generation,
            state.base,
            adapters,
            self.router if self.router is not None else state.router,
            prototypes,
            {alias: domain for alias, domain in aliases.items() if domain is not None},
            {domain: of_domain for domain, of_domain in tags.items() if of_domain},
            _without(tombstones, self.adapters.keys()),
        )

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "base": self.base,
            "adapters": dict(self.adapters),
            "withdrawn": list(self.withdrawn),
            "router": self.router,
            "prototypes": dict(self.prototypes),
            "aliases": dict(self.aliases),
            "tags": {domain: dict(tags) for domain, tags in self.tags.items()},
        }


def _without(mapping: Mapping[str, _Value], names: Container[str]) -> dict[str, _Value]:
    return {name: value for name, value in mapping.items() if name not in names}
