"""Fill a folder with emoji pictures and their captions, or check any folder in that layout.

    python prepare_dataset.py                      Google's pictures, or what else this machine can get
    python prepare_dataset.py --vendor OpenMoji    another vendor's beside them, sharing the captions
    python prepare_dataset.py --check --data mine  every faulty row and picture of a dataset; changes nothing

The layout is full_emoji.csv with the columns `#` and `name`, and image/<vendor>/<#>.png: the Kaggle dataset
subinium/emojiimage-dataset has it, and so can your own pictures.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Options:
    vendor: Literal["any", "Google", "Twitter", "OpenMoji"] = "any"
    """Whose pictures; any: Google's by npm, Google's from this machine's font, or OpenMoji's, the first to be had."""
    data: Path = Path("emojiimage-dataset")
    """The folder to fill or to check."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """List every faulty row and picture of an existing dataset, and change nothing."""


def main(options: Options) -> int:
    """Returns the exit status: 0 if all is well."""
    from dataset import DatasetError  # tyro answers --help before any of the heavy imports
    from sources.packages import PackageError

    try:
        return check(options.data) if options.check else prepare(options.data, options.vendor)
    except (DatasetError, PackageError, OSError) as error:
        print(f"prepare_dataset.py: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again: it goes on where it stopped.", file=sys.stderr)
    return 1


def prepare(root: Path, vendor: str) -> int:
    import numpy as np

    import dataset
    from images import captioned_grid, save_png
    from sources import emojis

    vendor = emojis.prepare(root, "" if vendor == "any" else vendor)
    pictures = dataset.load(root, vendor=vendor, limit=0, height=64, width=64, channels=4)
    some = np.unique(np.linspace(0, len(pictures.names) - 1, 144).round().astype(int))
    grid = captioned_grid(pictures.images[some], [pictures.names[i] for i in some], columns=16, cell=96)
    sheet = root / f"contact_sheet_{vendor}.png"
    save_png(grid, sheet)
    print(
        f"{len(pictures.names)} pictures with captions ({pictures.heldout.sum()} of them held out) are in "
        f"{root / 'image' / vendor} and {root / dataset.CSV}; {sheet} shows some of them. Next: python train.py quick"
    )
    return 0


def check(root: Path) -> int:
    import dataset

    faults = dataset.check(root)
    for where, what in faults:
        print(f"{where}: {what}")
    counts = [f"{len([*(root / 'image' / vendor).glob('*.png')])} {vendor}" for vendor in dataset.vendors(root)]
    verdict = f"{len(faults)} faulty rows and pictures" if faults else "no faults"
    print(f"{root}: {verdict}; pictures: {', '.join(counts) or 'none'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
