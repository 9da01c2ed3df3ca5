"""Downloads: whole or not at all, once however many processes ask."""

import contextlib
import errno
import hashlib
import os
import urllib.request
import zipfile
from pathlib import Path

import filelock
import h5py
from tqdm import tqdm

from common import require

PATIENCE = 20  # seconds in which a server must answer, or go on
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without them


@contextlib.contextmanager
def lock(path: Path):
    """One process at a time, until the end of the block or of the process. Raises InputError for a
    folder that cannot be written."""
    held = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except (OSError, NotImplementedError) as error:
        require(
            getattr(error, "errno", errno.ENOSYS) in NO_LOCKS,
            f"cannot write to {path.parent} ({error}); set D4RL_DATASET_DIR, OGBENCH_DATASET_DIR "
            "or MINARI_DATASETS_PATH to a writable folder",
        )
        print(f"note: {path.parent} has no locks ({error}): start no second download")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes it itself
            path.unlink()
        held.release()


def download(name: str, owner: str, folder: Path, path: str, mirrors, known: dict) -> Path:
    """The file of a public dataset in `folder`; downloaded whole where it is absent.

    path: of the file on the mirrors, which are urls with {path} and {file}, its last part. The
    variable {owner}_MIRRORS names servers or file:/// folders that are asked first. known: bytes
    and sha256 of the file, or "". Raises InputError, also where the file that lies there has
    another size."""
    target = folder / path.split("/")[-1]
    own = os.environ.get(f"{owner}_MIRRORS", "").split()
    own = [mirror.rstrip("/") + end for mirror in own for end in ("/{path}", "/{file}")]
    urls = [url.format(path=path, file=target.name) for url in (*own, *mirrors)]
    partial, failures = target.with_name(f"{target.name}.part"), []
    if not target.is_file():
        with lock(target.with_name(f".{target.name}.lock")):
            for url in urls:
                if target.is_file():  # another process was faster
                    break
                print(f"downloading {name} from {url}", flush=True)
                try:
                    transfer(url, partial, known)
                    try_open(partial, target.suffix)  # not an error page
                    os.replace(partial, target)
                except Exception as error:  # noqa: BLE001 (whatever a network does)
                    failures.append(f"{url} ({error!s:.150})")
                finally:
                    partial.unlink(missing_ok=True)
    require(
        target.is_file(),
        f"cannot download {name}: {'; '.join(failures)}. Put the file at {target}, or set "
        f"{owner}_MIRRORS to a server or file:///folder that has it",
    )
    size = str(target.stat().st_size)
    require(
        known["bytes"] in ("", size),
        f"{target} has {size} bytes, but the published file of {name} has {known['bytes']}: remove "
        "it, so that it is downloaded, or use its path with --env",
    )
    if not known["bytes"]:
        print(f"note: {target} was not compared with the published file, whose size is not known")
    return target


def transfer(url: str, path: Path, known: dict) -> None:
    """Download a file. Raises what a network or a disk raises, and ValueError for a file that is
    not whole or not the right one."""
    digest, count = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=PATIENCE) as source, open(path, "wb") as out:
        due = int(known["bytes"] or source.headers.get("Content-Length") or 0)
        with tqdm(total=due or None, unit="B", unit_scale=True, disable=None) as bar:
            while block := source.read(1 << 20):
                out.write(block)
                digest.update(block)
                bar.update(len(block))
                count += len(block)
    if count != (due or count):
        raise ValueError(f"{count} of {due} bytes arrived")
    if known["sha256"] not in ("", digest.hexdigest()):
        raise ValueError(f"its sha256 is {digest.hexdigest()}, not {known['sha256']}")


def try_open(path: Path, suffix: str) -> None:
    """Raises what the library raises for a file that is not whole."""
    (zipfile.ZipFile(path) if suffix == ".npz" else h5py.File(path, "r")).close()
