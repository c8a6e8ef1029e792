"""Which folder holds the base to serve: the root's own or another, its floats or a quantized form; and writing that.

A quantized form lies beside its base, `base/3-int8` beside `base/3`, and is no version of its own: the catalog names 3.
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.config.places import DEFAULT_ROOT, absolute, is_hub_id
from cluster.config.serving import AppSettings
from cluster.config.settings import Quantization
from cluster.errors import InvalidInput, NotTrained
from cluster.lora.artifacts import Store
from cluster.lora.catalog import Catalog
from cluster.lora.store import write_folder
from cluster.model.base import fingerprint, quantize_base
from cluster.model.hub import find_base
from cluster.model.quantized_artifact import is_quantized, quantized_folder, read_manifest


def base_folder(settings: AppSettings) -> Path:
    """The base to serve, as these settings want it.

    Raises `NotTrained` when it is not there, `InvalidInput` when it is not what was asked for or when its quantized
    form was made of other weights: for that it reads the floats once.
    """
    folder = _unquantized(settings)
    if (wanted := settings.quantization) is None:
        return folder
    _check_has_a_place(settings)
    if is_quantized(folder):
        if (found := read_manifest(folder).quantization) != wanted:
            raise InvalidInput(f"The base {folder.name!r} is {found}, not {wanted}; name the one it was made of.")
        return folder
    quantized = quantized_folder(folder, wanted)
    if not is_quantized(quantized):
        raise NotTrained(f"There is no {wanted} form of this base; write it with `{_command(settings, wanted)}`.")
    if not _is_made_of(quantized, folder):
        raise InvalidInput(
            f"{quantized.name!r} was made of other weights than {folder.name!r} holds now; remove it and write it anew "
            f"with `{_command(settings, wanted)}`."
        )
    return quantized


def _unquantized(settings: AppSettings) -> Path:
    """The base as the root or the settings name it."""
    if settings.resolved_base() is not None:
        folder = find_base(str(settings.base))
    else:
        store = Store(settings.resolved_root())
        if (version := Catalog(store).load().base) is None:
            raise NotTrained(
                f"The root {settings.root or settings.base or DEFAULT_ROOT!r} holds no base; train one with "
                "`zephyra train all`, or name another with root=... or base=...."
            )
        folder = store.folder(f"base/{version}")
    if not (folder / "config.json").is_file():
        raise NotTrained(f"There is no model in {settings.base or folder.name!r}; name a folder with a config.json.")
    return folder


def _check_has_a_place(settings: AppSettings) -> None:
    """A quantized form lies beside its base, and not in the hub's cache. Raises `InvalidInput`."""
    named = settings.base
    if named is not None and is_hub_id(named) and not absolute(named).is_dir():
        raise InvalidInput(
            f"{named!r} is an id on the hub, whose cache holds no quantized forms; take it over first by "
            f"`zephyra train base --base {named}`, then give --root instead of --base."
        )


def _command(settings: AppSettings, quantization: Quantization) -> str:
    named = [("--root", settings.root), ("--base", settings.base)]
    options = [f"{option} {value}" for option, value in named if value is not None]
    return " ".join(["zephyra quantize --bits", quantization.removeprefix("int"), *options])


def _is_made_of(quantized: Path, folder: Path) -> bool:
    return read_manifest(quantized).base_fingerprint == fingerprint(folder)


@dataclass(frozen=True, slots=True)
class QuantizedForm:
    """A quantized form of a base on disk."""

    folder: Path
    is_new: bool
    """False where it was there already."""

    @property
    def num_bytes(self) -> int:
        """All of its files."""
        return sum(file.stat().st_size for file in self.folder.iterdir())


def write_quantized(settings: AppSettings, quantization: Quantization, output: Path | None) -> QuantizedForm:
    """Write the quantized form of the base that `settings` name into `output`, by default where serving looks for it.

    One that is there and was made of the same weights stays; raises `InvalidInput` if anything else is there.
    """
    if output is None:
        _check_has_a_place(settings)
    source = _unquantized(settings)
    folder = output or quantized_folder(source, quantization)
    if not folder.exists():
        write_folder(folder, lambda draft: quantize_base(source, draft, quantization))
        return QuantizedForm(folder, is_new=True)
    if is_quantized(folder) and read_manifest(folder).quantization == quantization and _is_made_of(folder, source):
        return QuantizedForm(folder, is_new=False)
    raise InvalidInput(
        f"{folder} is there and holds something else than this base as {quantization}; remove it, or name another "
        "place with --output."
    )
