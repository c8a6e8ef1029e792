"""What ten thousand domains cost the catalog and the router: reading it, one more domain, the bytes of a publish."""

import hashlib
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.adapters_publishing import made_up_router
from benchmarks.figures import Measurement, Measurements
from cluster.lora.catalog import Catalog, CatalogState, Change
from cluster.lora.store import write_version
from cluster.router.assembly import RouterAssembly
from cluster.router.domain_prototypes import PROTOTYPES_FILE, DomainPrototypes
from cluster.router.tiny_ada import TinyAda

FEW, MANY = 10, 10_000
_ONE_BY_ONE = 62
"""Publishes of one domain each: then a reader has a whole state and the most changes after it to read."""
_LOADS = 5
_BASE_PARAMETERS, _WIDTH = 1_000_000, 128
_ROWS = 8
"""Prototypes of a domain."""


def catalog_size(many: int = MANY) -> Measurements:
    """Seconds to load the catalog and to assemble the router anew and for one more domain; bytes of a publish."""
    figures: Measurements = {}
    ada = made_up_router(_BASE_PARAMETERS, _WIDTH)
    for num_domains in (FEW, many):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            figures |= _measure(root, ada, num_domains)
    return figures


def _measure(root: Path, ada: TinyAda, num_domains: int) -> Measurements:
    catalog = Catalog(root)
    router = write_version(root / "router", ada.save)
    random = torch.Generator().manual_seed(0)
    first = [f"domain{number:06}" for number in range(num_domains)]
    prototypes = {name: _write_prototypes(root, name, ada, router, random) for name in first}
    state = catalog.publish(Change(adapters=dict.fromkeys(first, 1), router=router, prototypes=prototypes))
    assembly = RouterAssembly(catalog.store)
    first_s = _assembled_s(assembly, state)
    next_s = []
    for number in range(_ONE_BY_ONE):
        name = f"more{number:06}"
        sha256 = _write_prototypes(root, name, ada, router, random)
        state = catalog.publish(Change(adapters={name: 1}, prototypes={name: sha256}))
        next_s.append(_assembled_s(assembly, state))
    loads_s = []
    for _ in range(_LOADS):
        start_s = time.perf_counter()
        assert Catalog(root).load() == state
        loads_s.append(time.perf_counter() - start_s)
    publish_bytes, snapshot_bytes = (
        (root / "catalog" / f"{generation}.json").stat().st_size for generation in (state.generation, 32)
    )
    one_size = {
        f"publish_bytes_{num_domains}": Measurement((publish_bytes,)),
        f"snapshot_bytes_{num_domains}": Measurement((snapshot_bytes,)),
    }
    if num_domains == FEW:
        return one_size
    return {
        **one_size,
        "catalog_load_s": Measurement(tuple(loads_s)),
        "router_assembly_s": Measurement((first_s,)),
        "router_assembly_one_more_s": Measurement(tuple(next_s)),
    }


def _write_prototypes(root: Path, name: str, ada: TinyAda, router: int, random: torch.Generator) -> str:
    """Of random numbers, beside no adapter, which the router does not read; their checksum."""
    rows_PV = torch.randn(_ROWS, ada.head.prototypes_DPV.shape[2], generator=random)
    content = DomainPrototypes(nn.functional.normalize(rows_PV, dim=1), 0.0, router, is_data_free=False).to_bytes()
    # Written in place: to sync each of thousands would take minutes.
    folder = root / "adapters" / name / "1"
    folder.mkdir(parents=True)
    (folder / PROTOTYPES_FILE).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _assembled_s(assembly: RouterAssembly, state: CatalogState) -> float:
    """Until the router of `state` has answered for the first time."""
    start_s = time.perf_counter()
    ada = assembly.assemble(state)
    assert ada is not None
    assert len(ada.domains) == len(state.prototypes)
    ada.route([""])
    return time.perf_counter() - start_s
