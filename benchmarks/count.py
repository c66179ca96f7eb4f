"""What a program computes and moves: the matrix products and convolutions of its jaxpr, counted one by one.

A multiply-add is two FLOPs. A tap on the padding counts, as torch counts it; the zeros that the gradient of a strided
convolution puts between its pixels do not. Bytes are those of the operands, each read once, and of the result, written
once. A loop of known length counts as often as it runs. Of the branches of a condition counts the one with most FLOPs:
where the platform decides how to convolve (kernels.py), the plain convolution. `choose=min` counts the cheapest branch:
for pictures of even sides, what a CPU does.

Imports no JAX: peer.py also runs where there is none.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class Operation(NamedTuple):
    """A matrix product or a convolution."""

    flops: int
    bytes: int
    dtype: str  # of its narrower operand: products of two kinds ask for an algorithm on the narrower


def operations(jaxpr, choose: Callable = max) -> Iterator[Operation]:
    """The matrix products and convolutions of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
            narrow = min(arrays[:2], key=lambda array: array.dtype.itemsize)
            moved = sum(array.size * array.dtype.itemsize for array in arrays)
            yield Operation(_flops(equation, *arrays), moved, narrow.dtype.name)
        if equation.primitive.name == "cond":
            branches = (list(operations(branch.jaxpr, choose)) for branch in equation.params["branches"])
            yield from choose(branches, key=_total)
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for each in (part for part in inner if hasattr(part, "eqns")):
            yield from (operation for operation in operations(each, choose) for _ in range(times))


def _total(each: Iterable[Operation]) -> int:
    return sum(operation.flops for operation in each)


def _flops(equation, left, right, result) -> int:
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = numbers
        return 2 * result.size * math.prod(left.shape[axis] for axis in contracted)
    taps = right.size // right.shape[numbers.rhs_spec[0]]
    return 2 * result.size * taps // math.prod(equation.params["lhs_dilation"])


def count_flops(jaxpr, choose: Callable = max) -> int:
    """FLOPs of the matrix products and convolutions of a jaxpr and of those inside it."""
    return _total(operations(jaxpr, choose))
