"""HDF5 files with D4RL's key names.

A file can come from anybody, so one that refers to other files is refused: it could read any of
them into the data."""

import contextlib
import json
from pathlib import Path

import h5py
from h5py import h5d, h5l, h5o

from common import require
from readers.tasks import near

COLUMNS = (
    "observations actions rewards terminals timeouts next_observations final_observations step "
    "episode"
).split()
TEXT = 1 << 20  # bytes of metadata
FAILS = (OSError, RuntimeError, KeyError, ValueError, TypeError)  # h5py's for damaged files


@contextlib.contextmanager
def open_hdf5(path: Path):
    """An open HDF5 file. Raises InputError where there is none, or where it cannot be read."""

    def outside(name, link):
        return None if link.type in (h5l.TYPE_HARD, h5l.TYPE_SOFT) else name

    def stored_outside(name):
        item = h5o.open(file.id, name)
        if not isinstance(item, h5d.DatasetID):
            return None
        how = item.get_create_plist()
        return name if how.get_external_count() or how.get_layout() == h5d.VIRTUAL else None

    names = [x.name for x in path.parent.glob("*")]
    require(path.is_file(), f"no file {path!s:.300}; correct the path{near(path.name, names)}")
    try:
        with h5py.File(path, "r") as file:
            name = file.id.links.visit(outside, info=True) or h5o.visit(file.id, stored_outside)
            require(
                name is None,
                f"{path}: {(name or b'').decode(errors='replace'):.60} refers to another file, "
                "which is not followed; copy the values into this file",
            )
            yield file
    except FAILS as error:
        require(False, f"{path} cannot be read ({error!s:.200}): close other programs that use it; "
                "if it is damaged, delete it and download or write it again")  # fmt: skip


def read(path: Path) -> tuple[dict, dict]:
    """(columns, metadata) of an HDF5 file: the arrays under D4RL's keys as they are stored.
    Raises InputError."""
    with open_hdf5(path) as file:
        require("episode_0" not in file, f"{path} is a Minari file: use its Minari id")
        found = {key: x for key, x in file.items() if isinstance(x, h5py.Dataset)}
        missing = [key for key in COLUMNS[:4] if key not in found]
        line = f"{path}: no {', '.join(missing)} (found: {', '.join(found):.200})"
        require(not missing, f"{line}; use D4RL's key names")
        columns = {key: found[key][()] for key in COLUMNS if key in found}
        return columns, metadata(path, file, found.get("metadata"))


def metadata(path, file, stored) -> dict:
    """The JSON text in the array, or attribute, `metadata`."""
    large = f"{path}: metadata takes more than {TEXT} bytes; store less"
    require(not stored or stored.nbytes <= TEXT, large)
    try:
        text = stored[()] if stored else file.attrs.get("metadata", "{}")
        require(len(text) <= TEXT, large)
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        require(False, f"{path}: metadata is not a JSON object; write it with json.dumps")
