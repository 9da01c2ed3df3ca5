"""Downloads: whole or not at all, once however many processes ask."""

import contextlib
import errno
import hashlib
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import filelock
from tqdm import tqdm

from common import InputError
from harness.tasks import require

ANSWER, PATIENCE = 8, 10  # seconds: until a server answers, and while it sends nothing
SLOWEST = 10_000  # bytes a second, on average
LARGEST = 16 << 30  # bytes of a file whose size no table knows
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without them says
UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


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


def ask(url):
    """The open answer of a server. Raises URLError in time, whatever keeps it waiting: neither a
    name server nor a header that drips heeds the time limit of a socket."""
    answers = queue.SimpleQueue()

    def work():
        try:
            answers.put(urllib.request.urlopen(url, timeout=PATIENCE))
        except Exception as error:  # noqa: BLE001 (raised below)
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    with contextlib.suppress(queue.Empty):
        answer = answers.get(timeout=ANSWER)
        if isinstance(answer, Exception):
            raise answer
        return answer
    raise urllib.error.URLError(TimeoutError(f"no answer within {ANSWER} s"))


def is_no_network(error) -> bool:
    """Whether nobody answered at all."""
    cause = getattr(error, "reason", None)
    silent = (TimeoutError, ConnectionRefusedError, socket.gaierror)
    return isinstance(cause, silent) or getattr(cause, "errno", 0) in UNREACHABLE


def download(name, owner, default, path, mirrors, known) -> Path:
    """The file of a public dataset in `default`, the folder of its own package; downloaded whole
    where it is absent, and once however many processes ask for it.

    path: of the file on the mirrors, which are urls with {path} and {file}, its last part; known:
    its row of a table, with "bytes" and "sha256", or "". The variables {owner}_DATASET_DIR and
    {owner}_MIRRORS are respected. Raises InputError."""
    target = Path(os.path.expanduser(os.environ.get(f"{owner}_DATASET_DIR") or default))
    target /= path.split("/")[-1]
    if target.is_file():
        return target
    own = [mirror.rstrip("/") for mirror in os.environ.get(f"{owner}_MIRRORS", "").split()]
    own = [mirror + end for mirror in own for end in ("/{path}", "/{file}")]
    urls = [url.format(path=path, file=target.name) for url in (*own, *mirrors)]
    partial, failures = target.with_name(f"{target.name}.part"), {}
    with lock(target.with_name(f".{target.name}.lock")):
        for url in dict.fromkeys(urls):
            if target.is_file():  # another process was faster
                return target
            print(f"downloading {name} from {url}", flush=True)
            try:
                transfer(url, partial, known["bytes"], known["sha256"])
                try_open(partial, target.suffix)  # not an error page, nor a file cut short
                os.replace(partial, target)
                return target
            except (Exception, InputError) as e:  # noqa: BLE001 (whatever a network does)
                failures[url] = e
            finally:
                partial.unlink(missing_ok=True)
    own = f"or set {owner}_MIRRORS to a server or file:///folder that has it"
    nobody = all(map(is_no_network, failures.values()))
    require(not nobody, f"no network: put the file at {target} (it is at {urls[0]}), {own}")
    causes = "; ".join(f"{url} ({e!s:.150})" for url, e in failures.items())
    raise InputError(f"cannot download {name}: {causes}. Put the file at {target}, {own}")


def transfer(url, path, size, sha256):
    """Download a file of a known size and sum, or "". Raises what a network or a disk raises, and
    InputError for a file that cannot be the right one, or that would take days."""
    digest, begun, count = hashlib.sha256(), time.monotonic(), 0
    with ask(url) as source, open(path, "wb") as out:
        safe = source.url.startswith("https:") or not url.startswith("https:")
        require(safe, f"it leads to {source.url:.90}, without encryption")
        due = int(source.headers.get("Content-Length") or size or 0)
        require(size in ("", str(due)), f"it has {due} bytes, not {size}")
        require(due <= LARGEST, f"it has {due} bytes, more than {LARGEST}")
        with tqdm(total=due or None, unit="B", unit_scale=True, disable=None) as bar:
            while block := source.read1(1 << 20):
                out.write(block)
                digest.update(block)
                bar.update(len(block))
                count += len(block)
                require(count <= (due or LARGEST), f"more than {due or LARGEST} bytes arrived")
                seconds = time.monotonic() - begun
                fast = seconds < PATIENCE or count > SLOWEST * seconds
                require(fast, f"only {count} bytes arrived in {seconds:.0f} s")
    require(count == (due or count), f"{count} of {due} bytes arrived")
    found = digest.hexdigest()
    require(sha256 in ("", found), f"its sha256 is {found}, not {sha256}")


def try_open(path, suffix):
    """Raises what the library raises for a file that is not whole."""
    import h5py

    (zipfile.ZipFile(path) if suffix == ".npz" else h5py.File(path, "r")).close()
