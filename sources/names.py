"""The English name of each emoji, for captions and for the text encoder, which has no emoji in its vocabulary."""

import re

import emoji


def name_of(text: str) -> str:
    """The CLDR short name; the `emoji` package's ":man_red_hair:" has lost the colons, commas and quotation marks."""
    name = emoji.EMOJI_DATA[text]["en"].strip(":").replace("_", " ")
    if "\U0001f1e6" <= text[0] <= "\U0001f1ff" or text[-1] == "\U000e007f":  # regional indicators, a tag sequence
        return "flag: " + name.replace("Congo-", "Congo - ")
    name = re.sub(r"^keycap (.+)$", r"keycap: \1", name)
    name = re.sub(r"^(person|man|woman) ((?:red|curly|white|blond) hair|bald|beard)$", r"\1: \2", name)
    name = re.sub(r"^Japanese (.+) button$", r"Japanese “\1” button", name)
    people = re.match(r"^(family|kiss|couple with heart) ((?:(?:man|woman|adult|boy|girl|child) ?)+)$", name)
    return f"{people[1]}: {people[2].replace(' ', ', ')}" if people else name
