"""A new dataset that is whole or not there, and a word on what was left out of it.

It is made in a hidden folder within its own, and takes its place when all of it is there. ABOUT.txt says what it was
made of. Only a dataset that was made of the same, and whose CSV nobody has changed since, gives way to a new one.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from dataset import CSV, DatasetError
from files import printable, sha256, writable

ABOUT = "ABOUT.txt"
NAMED = 3  # of what was left out, as many are named


@contextmanager
def making(root: Path, vendor: str, about: Sequence[str]) -> Iterator[tuple[Path, list[dict[str, str]]]]:
    """Yields a folder for the vendor's pictures and a list for the rows of the CSV; if nothing is raised, both move in.

    `about` are the lines of ABOUT.txt; the first one tells one source from another. Raises DatasetError where `root`
    holds what is not to be replaced.
    """
    _refuse_others(root, about[0])
    new = not root.exists()
    writable(root)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".new.") as name:
            scratch, rows, place = Path(name), [], root / "image" / vendor
            (scratch / "pictures").mkdir()
            yield scratch / "pictures", rows
            pd.DataFrame(rows).to_csv(scratch / CSV, index=False, encoding="utf-8")
            (scratch / ABOUT).write_text("\n".join([*about, _seal(scratch / CSV), ""]), encoding="utf-8")
            place.parent.mkdir(exist_ok=True)
            if place.exists():
                place.rename(scratch / "old pictures")
            (scratch / "pictures").rename(place)
            for file in (CSV, ABOUT):
                (scratch / file).replace(root / file)
    except BaseException:
        if new:
            with suppress(OSError):
                root.rmdir()
        raise


def _seal(csv: Path) -> str:
    return f"SHA-256 of {CSV}: {sha256(csv)}"


def _refuse_others(root: Path, source: str) -> None:
    if not (root / CSV).exists() and not (root / "image").exists():
        return
    said = (root / ABOUT).read_text(encoding="utf-8", errors="replace").splitlines() if (root / ABOUT).exists() else []
    if said[:1] != [source]:
        what = "another dataset"
    elif not (root / CSV).exists() or said[-1] != _seal(root / CSV):
        what = f"this dataset, with a {CSV} that was changed since it was made"
    else:
        return
    raise DatasetError(f"{root} holds {what}. Choose another folder with --data, or move that one away")


def report(left_out: Mapping[str, Sequence[str]]) -> None:
    """Print, for each reason, how many were left out and the first of them."""
    for reason, names in left_out.items():
        more = f"; and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        print(printable(f"left out, {len(names):,} × {reason}: {'; '.join(names[:NAMED])}{more}"))
