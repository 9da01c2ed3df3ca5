"""`python -m harness.readers NAME [OUT.npz]`: checks a dataset, and writes it in the README's
format."""

import json
import sys

import numpy as np

from common import InputError
from harness.readers import read


def main(words: list[str]) -> None:
    """Print what a name gives; with a second word, write it there. Raises InputError."""
    if len(words) not in (1, 2):
        raise InputError("use: python -m harness.readers NAME [OUT.npz]")
    arrays, meta = read(words[0])
    for key, x in arrays.items():
        print(f"{key:18} {x.shape!s:14} {x.dtype}")
    plain = {key: value for key, value in meta.items() if not callable(value)}
    text = json.dumps(plain, default=np.ndarray.tolist)
    print(text)
    if words[1:]:
        arrays["timeouts"] = arrays.pop("ends") & ~arrays["terminals"]
        np.savez_compressed(words[1], **arrays, metadata=np.array(text))


if __name__ == "__main__":
    main(sys.argv[1:])
