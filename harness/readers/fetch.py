"""Downloads: whole or not at all, once however many processes ask."""

import contextlib
import errno
import hashlib
import os
import urllib.request
import zipfile
from pathlib import Path

import filelock

from common import InputError
from harness.tasks import require

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without them says


@contextlib.contextmanager
def lock(path: Path):
    """One process at a time, until the end of the block or of the process. The lock's file is gone
    afterwards; whoever waits for it begins again with a new one. Raises InputError for a folder
    that cannot be written."""
    held = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except (OSError, NotImplementedError) as e:
        require(
            getattr(e, "errno", errno.ENOSYS) in NO_LOCKS,
            f"cannot write to {path.parent} ({e}); set D4RL_DATASET_DIR, OGBENCH_DATASET_DIR or "
            "MINARI_DATASETS_PATH to a writable folder",
        )
        print(f"note: {path.parent} has no locks ({e}): start no second download")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes it itself
            path.unlink()
        held.release()


def download(name, owner, default, path, mirrors, sha256="") -> Path:
    """The file of a public dataset in `default`, the folder of its own package; downloaded whole
    where it is absent, and once however many processes ask for it.

    path: of the file on the mirrors, which are urls with {path} and {file}, its last part. The
    variables {owner}_DATASET_DIR and {owner}_MIRRORS are respected. Raises InputError."""
    target = Path(os.path.expanduser(os.environ.get(f"{owner}_DATASET_DIR") or default))
    target /= path.split("/")[-1]
    if target.is_file():
        return target
    own = [mirror.rstrip("/") for mirror in os.environ.get(f"{owner}_MIRRORS", "").split()]
    own = [mirror + end for mirror in own for end in ("/{path}", "/{file}")]
    urls = [url.format(path=path, file=target.name) for url in (*own, *mirrors)]
    partial, failures = target.with_name(f"{target.name}.part"), []
    with lock(target.with_name(f".{target.name}.lock")):
        for url in dict.fromkeys(urls):
            if target.is_file():  # another process was faster
                return target
            digest = hashlib.sha256()
            print(f"downloading {name} from {url}", flush=True)
            try:
                with urllib.request.urlopen(url, timeout=30) as source, open(partial, "wb") as out:
                    while block := source.read(1 << 20):
                        out.write(block)
                        digest.update(block)
                    size, due = out.tell(), source.headers.get("Content-Length") or out.tell()
                require(size == int(due), f"{size} of {due} bytes arrived")
                found = digest.hexdigest()
                require(sha256 in ("", found), f"its sha256 is {found}, not {sha256}")
                try_open(partial, target.suffix)  # not an error page, nor a file cut short
                os.replace(partial, target)
                return target
            except (Exception, InputError) as e:  # noqa: BLE001 (whatever a network does)
                failures.append(f"{url} ({e})")
            finally:
                partial.unlink(missing_ok=True)
    raise InputError(
        f"cannot download {name}: {'; '.join(failures)}. Put the file at {target}, or set "
        f"{owner}_MIRRORS to a server or file:///folder that has it"
    )


def try_open(path, suffix):
    """Raises what the library raises for a file that is not whole."""
    import h5py

    (zipfile.ZipFile(path) if suffix == ".npz" else h5py.File(path, "r")).close()
