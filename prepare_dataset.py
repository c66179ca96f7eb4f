"""Fill a folder with emoji, icons or your own pictures and their captions, or check any folder in that layout.

    python prepare_dataset.py                                Google's emoji, or what else this machine can get
    python prepare_dataset.py --vendor OpenMoji              another vendor's beside them, sharing the captions
    python prepare_dataset.py --from photos --data mine      pictures with metadata.csv, or with a .txt beside each
    python prepare_dataset.py --iconify tabler --data icons  a set of icons from npm
    python prepare_dataset.py --check --data mine            every faulty row and picture; changes nothing

The layout is full_emoji.csv with the columns `#` and `name`, and image/<vendor>/<#>.png: the Kaggle dataset
subinium/emojiimage-dataset has it, and so can your own pictures.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH=1 Python does not

import files
from params import PRESETS, Params


@dataclass(frozen=True)
class Options:
    vendor: Literal["any", "Google", "Twitter", "OpenMoji"] = "any"  # whose pictures; any: the first to be had
    data: Path = Path("emojiimage-dataset")  # the folder to fill or to check
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None  # a folder of captioned pictures, made a dataset
    caption_column: str = "text"  # with --from: which column of the metadata has the captions
    iconify: str = ""  # the name of an icon set that npm carries as @iconify-json/<name>, made a dataset
    check: tyro.conf.FlagCreatePairsOff[bool] = False  # only list what is faulty in an existing dataset
    encoder: str = PRESETS["quick"].encoder  # with --check: the text encoder that should know the captions' words


def contradiction(options: Options) -> str:
    """What the options leave open or say twice, or ""."""
    sources = {"--from": options.from_, "--iconify": options.iconify, "--check": options.check}
    given = [name for name, value in {**sources, "--vendor": options.vendor != "any"}.items() if value]
    if len(given) > 1:
        return f"{' and '.join(given)} exclude each other"
    if options.caption_column != Options.caption_column and not options.from_:
        return "--caption_column needs --from"
    if (options.from_ or options.iconify) and options.data == Options.data:
        return f"{given[0]} needs --data with the folder to make; {options.data} is that of the emoji"
    return ""


def unknown_words(root: Path, encoder: str) -> list:
    """A fault for each caption with words that the text encoder does not know; none where it cannot be had."""
    import dataset
    import text_encoder

    try:
        tokenizer = text_encoder.read_tokenizer(text_encoder.locate(encoder))
    except (text_encoder.EncoderError, OSError) as error:
        print(f"note: the words of the captions were not checked: {error}", file=sys.stderr)
        return []
    rows = [row for row in dataset.read_rows(root) if not row.fault]
    texts = [text_encoder.spelled(" ".join([row.name, *row.others]), tokenizer) for row in rows]
    found = zip(rows, text_encoder.unknown_words(texts, tokenizer), strict=True)
    what = "the text encoder does not know {}: to it all such words are one and the same"
    return [
        dataset.Fault(f"{dataset.CSV} row {row.number}, column name", what.format(", ".join(map(repr, words))))
        for row, words in found
        if words
    ]


def main(options: Options) -> int:
    """Prepare, unless only asked to check, then check; returns the exit status: 0 if all is well."""
    import dataset  # tyro answers --help before any of the heavy imports
    from files import printable
    from sources import emojis, folders, iconify
    from sources.packages import PackageError

    root, vendor = files.from_home(options.data), ""
    try:
        if wrong := contradiction(options):
            raise dataset.DatasetError(wrong)
        if options.from_:
            vendor = folders.prepare(root, files.from_home(options.from_), options.caption_column)
        elif options.iconify:
            vendor = iconify.prepare(root, options.iconify)
        elif not options.check:
            vendor = emojis.prepare(root, "" if options.vendor == "any" else options.vendor)
        faults = [] if options.from_ else dataset.check(root)  # which would read each of the pictures once more
        faults += unknown_words(root, options.encoder) if options.check else []
        for where, what in faults:
            print(printable(f"{where}: {what}"))
        pictures = {vendor: root / "image" / vendor for vendor in dataset.vendors(root)}
        counts = [f"{len([*folder.glob('[!.]*.png')])} {vendor}" for vendor, folder in pictures.items()]
        further = sum(len(row.others) for row in dataset.read_rows(root))
        verdict = f"{len(faults)} faulty rows and pictures" if faults else "no faults"
        verdict += f"; {further} further captions of rows with the same #" if further else ""
        print(printable(f"{root}: {verdict}; pictures: {', '.join(counts) or 'none'}"))
        if options.check:
            return 1 if faults else 0
        elsewhere = "" if root == Options.data else f" --data {shlex.quote(str(root))}"
        whose = "" if vendor == Params.vendor else f" --vendor {vendor}"
        preset, output = ("cpu", f" --output models_{vendor}") if options.from_ or options.iconify else ("quick", "")
        print(f"Next: python train.py {preset}{elsewhere}{whose}{output}")
        return 0
    except (dataset.DatasetError, PackageError, OSError) as error:
        print(f"prepare_dataset.py: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted; nothing is half written. Run the same command again.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    files.secure_streams()
    sys.exit(main(tyro.cli(Options, description=__doc__)))
