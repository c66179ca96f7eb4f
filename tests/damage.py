"""What may stand in a JSON file that somebody edited, or that another program wrote."""

import copy

ODD = [None, True, "", "x", -1, 0.5, 10**400, float("nan"), float("inf"), [], [[]], ["x", None], {}, {"x": 1}]
UNREADABLE = ["", "{", "[" * 100_000, '{"step": ' * 100_000, "9" * 5000, "\xff", "null", "[]", "7", '"text"']


def damaged(whole):
    """Copies of a JSON value in which one part, at any depth, is odd or left out."""
    yield from ODD
    for key, part in whole.items() if isinstance(whole, dict) else enumerate(whole) if isinstance(whole, list) else ():
        without = copy.copy(whole)
        del without[key]
        yield without
        for other in damaged(part):
            changed = copy.copy(whole)
            changed[key] = other
            yield changed
