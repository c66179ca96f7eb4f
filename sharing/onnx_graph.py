"""A JAX function as an ONNX model: JAX traces it, and each primitive of the trace becomes a few ONNX operators.

    to_onnx(function, weights, inputs) -> the bytes of a model that computes function(weights, *inputs)

So a network may change and needs no change here, unless it brings a primitive that has no rule: UnsupportedError names
it, and RULES, below, is where to add one. What depends on neither weights nor inputs is computed while tracing, loops
are written out, shapes are fixed. Of a `jax.lax.platform_dependent` the default is taken, as a browser is no platform
of JAX.

A weight is given as the arrays that it is stored in, float16, or whole numbers and their scales. It is their product in
float32, which the program that runs the model computes once, when it loads it.

ONNX needs no `broadcast_in_dim` before an elementwise operator. So an array may be smaller here than in the trace, 1
along an axis where the trace repeats it, until an operator needs all of it.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET, IR = 21, 10  # the versions of ONNX's operators and of its file format

Value = str | np.ndarray  # the name of an array that the model computes, or one that is known already


class UnsupportedError(ValueError):
    """A function cannot be exported; the message names the primitive that has no rule."""


class Graph:
    """The operators and constants so far, and the shape of each array that has a name."""

    def __init__(self):
        self.nodes, self.constants, self.shapes = [], {}, {}

    def constant(self, array: np.ndarray) -> str:
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self.constants:
            name = f"constant{len(self.constants)}"
            self.constants[key], self.shapes[name] = numpy_helper.from_array(array, name), array.shape
        return self.constants[key].name

    def shape(self, x: Value) -> tuple[int, ...]:
        return self.shapes[x] if isinstance(x, str) else np.shape(x)

    def add(self, operator: str, *inputs: Value, shapes: Sequence[Sequence[int]], **attributes) -> list[str]:
        """An operator with results of these shapes; their names."""
        names = [f"{operator}{len(self.nodes)}.{number}" for number in range(len(shapes))]
        inputs = [x if isinstance(x, str) else self.constant(np.asarray(x)) for x in inputs]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        self.shapes.update(zip(names, map(tuple, shapes), strict=True))
        return names

    def one(self, operator: str, *inputs: Value, shape: Sequence[int], **attributes) -> str:
        return self.add(operator, *inputs, shapes=[shape], **attributes)[0]

    def elementwise(self, operator: str, *inputs: Value, **attributes) -> str:
        shape = np.broadcast_shapes(*map(self.shape, inputs))
        return self.one(operator, *inputs, shape=shape, **attributes)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        return x if self.shape(x) == tuple(shape) else self.one("Reshape", x, np.array(shape, np.int64), shape=shape)

    def transpose(self, x: Value, axes: Sequence[int]) -> Value:
        shape = [self.shape(x)[axis] for axis in axes]
        return x if [*axes] == sorted(axes) else self.one("Transpose", x, shape=shape, perm=[*axes])

    def expand(self, x: Value, shape: Sequence[int]) -> Value:
        return x if self.shape(x) == tuple(shape) else self.one("Expand", x, np.array(shape, np.int64), shape=shape)

    def weight(self, parts: Sequence[np.ndarray]) -> Value:
        """The product of the arrays that a weight is stored in, in float32."""
        floats = [self.elementwise("Cast", self.constant(part), to=onnx.TensorProto.FLOAT) for part in parts]
        return reduce(lambda a, b: self.elementwise("Mul", a, b), floats)

    def trace(self, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        """Add what a trace does to its inputs; its results."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(atom) -> Value:
            return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            given, name = [*map(read, equation.invars)], equation.primitive.name
            inner = next((equation.params[key] for key in ("jaxpr", "call_jaxpr") if key in equation.params), None)
            if name in CONTROL:
                results = CONTROL[name](self, given, **equation.params)
            elif inner is not None:  # jit, checkpoint, custom gradients
                results = self.trace(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), given)
            elif not any(isinstance(x, str) for x in given):
                results = equation.primitive.bind(*given, **equation.params)
                results = [*map(np.asarray, results if equation.primitive.multiple_results else [results])]
            elif name in ELEMENTWISE:
                results = [self.elementwise(ELEMENTWISE[name], *given)]
            elif name in RULES:
                if name not in BROADCASTING:
                    given = [self.expand(x, atom.aval.shape) for x, atom in zip(given, equation.invars, strict=True)]
                results = RULES[name](self, *given, **equation.params | {"shape": equation.outvars[0].aval.shape})
                results = results if isinstance(results, list) else [results]
            else:
                raise UnsupportedError(f"onnx_graph.py has no rule for the primitive {name}: {str(equation)[:200]}")
            values.update(zip(equation.outvars, results, strict=True))
        return [*map(read, jaxpr.outvars)]


def to_onnx(function: Callable, weights: Any, inputs: dict[str, jax.ShapeDtypeStruct]) -> bytes:
    """The model of function(weights, *inputs), whose one result is named "output".

    weights: a tree with a tuple of arrays in the place of each weight. UnsupportedError: see above.
    """

    def is_weight(node) -> bool:
        return isinstance(node, tuple)

    stored, structure = jax.tree.flatten(weights, is_leaf=is_weight)
    like = [jax.ShapeDtypeStruct(np.broadcast_shapes(*map(np.shape, parts)), np.float32) for parts in stored]
    closed = jax.make_jaxpr(function)(jax.tree.unflatten(structure, like), *inputs.values())
    graph = Graph()
    graph.shapes |= {name: it.shape for name, it in inputs.items()}
    results = graph.trace(closed.jaxpr, [*map(np.asarray, closed.consts)], [*map(graph.weight, stored), *inputs])
    (result,), (out,) = results, closed.out_avals
    graph.nodes.append(helper.make_node("Identity", [graph.expand(result, out.shape)], ["output"]))

    def described(name: str, it: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(it.dtype)), it.shape)

    ends = [[described(name, it) for name, it in inputs.items()], [described("output", out)]]
    body = helper.make_graph(graph.nodes, "function", *ends, [*graph.constants.values()])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


# Control: rule(graph, inputs, **parameters of the primitive)


def platform_index(graph: Graph, inputs: list, *, platforms: Sequence) -> list[Value]:
    return [np.int32(platforms.index(None))]


def cond(graph: Graph, inputs: list, *, branches: Sequence, **_) -> list[Value]:
    index, *operands = inputs
    if isinstance(index, str):
        raise UnsupportedError("which branch jax.lax.cond takes must not depend on the inputs of an exported function")
    branch = branches[int(index)]
    return graph.trace(branch.jaxpr, branch.consts, operands)


def scan(graph: Graph, inputs: list, *, jaxpr: Any, length: int, num_consts: int, num_carry: int, **_) -> list[Value]:
    """Its rounds one after another, for a body that returns nothing but the carry."""
    first = num_consts + num_carry
    consts, carry, xs = inputs[:num_consts], inputs[num_consts:first], inputs[first:]
    if len(jaxpr.out_avals) > num_carry:
        raise UnsupportedError("onnx_graph.py has no rule for a jax.lax.scan that stacks results")
    for i in range(length):
        each = [graph.one("Gather", x, np.array(i), shape=graph.shape(x)[1:], axis=0) for x in xs]
        carry = graph.trace(jaxpr.jaxpr, jaxpr.consts, [*consts, *carry, *each])
    return carry


CONTROL = {"platform_index": platform_index, "cond": cond, "scan": scan}

# Rules: rule(graph, *inputs, shape of the result, **parameters of the primitive)


def unchanged(graph: Graph, x: Value, **_) -> Value:
    return x


def reshape(graph: Graph, x: Value, *, shape: Sequence[int], **_) -> Value:
    return graph.reshape(x, shape)


def squeeze(graph: Graph, x: Value, *, dimensions: Sequence[int], **_) -> Value:
    return graph.reshape(x, [size for axis, size in enumerate(graph.shape(x)) if axis not in dimensions])


def broadcast_in_dim(
    graph: Graph, x: Value, *, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_
) -> Value:
    sizes = dict(zip(broadcast_dimensions, graph.shape(x), strict=True))
    return graph.reshape(x, [sizes.get(axis, 1) for axis in range(len(shape))])


def transpose(graph: Graph, x: Value, *, permutation: Sequence[int], **_) -> Value:
    return graph.transpose(x, permutation)


def convert(graph: Graph, x: Value, *, new_dtype: Any, **_) -> Value:
    return graph.elementwise("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(new_dtype)))


def select(graph: Graph, which: Value, if_false: Value, if_true: Value, **_) -> Value:
    return graph.elementwise("Where", which, if_true, if_false)


def power(graph: Graph, x: Value, *, y: int = 2, **_) -> Value:
    return graph.elementwise("Mul", x, x) if y == 2 else graph.elementwise("Pow", x, np.float32(y))


def rsqrt(graph: Graph, x: Value, **_) -> Value:
    return graph.elementwise("Reciprocal", graph.elementwise("Sqrt", x))


def erfc(graph: Graph, x: Value, **_) -> Value:
    return graph.elementwise("Sub", np.float32(1), graph.elementwise("Erf", x))


def concatenate(graph: Graph, *xs: Value, shape: Sequence[int], dimension: int) -> Value:
    return graph.one("Concat", *xs, shape=shape, axis=dimension)


def split(graph: Graph, x: Value, *, sizes: Sequence[int], axis: int, **_) -> list[Value]:
    whole = graph.shape(x)
    shapes = [(*whole[:axis], size, *whole[axis + 1 :]) for size in sizes]
    return graph.add("Split", x, np.array(sizes, np.int64), shapes=shapes, axis=axis)


def cut(
    graph: Graph, x: Value, *, shape: Sequence[int], start_indices: Sequence[int], limit_indices: Sequence[int],
    strides: Sequence[int] | None,
) -> Value:  # fmt: skip
    axes = range(len(shape))
    bounds = (np.array(them, np.int64) for them in (start_indices, limit_indices, axes, strides or [1] * len(shape)))
    return graph.one("Slice", x, *bounds, shape=shape)


def reducing(operator: str) -> Callable:
    def reduced(graph: Graph, x: Value, *, shape: Sequence[int], axes: Sequence[int], **_) -> Value:
        return graph.one(operator, x, np.array(axes, np.int64), shape=shape, keepdims=0)

    return reduced


def gather(
    graph: Graph, table: Value, rows: Value, *, shape: Sequence[int], dimension_numbers: Any, **parameters
) -> Value:
    """table[rows], and nothing more general."""
    whole = (1, *graph.shape(table)[1:])
    if dimension_numbers.start_index_map != (0,) or tuple(parameters["slice_sizes"]) != whole:
        raise UnsupportedError(f"onnx_graph.py has no rule for a gather with {dimension_numbers}")
    rows = graph.reshape(rows, graph.shape(rows)[:-1])
    return graph.one("Gather", table, rows, shape=shape, axis=0)


def dot_general(graph: Graph, x: Value, y: Value, *, shape: Sequence[int], dimension_numbers: Any, **_) -> Value:
    """As a product of matrices [batch, rows, k] and [batch, k, columns], or of one matrix without a batch."""
    (summed_x, summed_y), (batch_x, batch_y) = dimension_numbers

    def free(a: Value, taken: Sequence[int]) -> list[int]:
        return [axis for axis in range(len(graph.shape(a))) if axis not in taken]

    def size(a: Value, axes: Sequence[int]) -> int:
        return math.prod(graph.shape(a)[axis] for axis in axes)

    rows, columns = free(x, [*summed_x, *batch_x]), free(y, [*summed_y, *batch_y])
    batch, k = [size(x, batch_x)] * bool(batch_x), size(x, summed_x)
    left = graph.reshape(graph.transpose(x, [*batch_x, *rows, *summed_x]), [*batch, size(x, rows), k])
    right = graph.reshape(graph.transpose(y, [*batch_y, *summed_y, *columns]), [*batch, k, size(y, columns)])
    product = graph.one("MatMul", left, right, shape=[*batch, size(x, rows), size(y, columns)])
    return graph.reshape(product, shape)


def convolution(
    graph: Graph, x: Value, kernel: Value, *, shape: Sequence[int], dimension_numbers: Any,
    window_strides: Sequence[int], padding: Sequence[tuple[int, int]], lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int], feature_group_count: int, **_,
) -> Value:  # fmt: skip
    if set(lhs_dilation) != {1}:
        raise UnsupportedError("onnx_graph.py has no rule for a transposed convolution")
    of_x, of_kernel, of_result = dimension_numbers  # where batch and channels, or out and in, stand; then the others
    pads = [low for low, _ in padding] + [high for _, high in padding]
    first = [shape[axis] for axis in of_result]
    result = graph.one(
        "Conv", graph.transpose(x, of_x), graph.transpose(kernel, of_kernel), shape=first, pads=pads,
        strides=[*window_strides], dilations=[*rhs_dilation], group=feature_group_count,
    )  # fmt: skip
    return graph.transpose(result, np.argsort(of_result).tolist())


ELEMENTWISE = {
    "abs": "Abs", "add": "Add", "and": "And", "cos": "Cos", "div": "Div", "eq": "Equal", "erf": "Erf", "exp": "Exp",
    "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less",
    "max": "Max", "min": "Min", "mul": "Mul", "neg": "Neg", "not": "Not", "or": "Or", "pow": "Pow", "sin": "Sin",
    "sqrt": "Sqrt", "sub": "Sub", "tanh": "Tanh",
}  # fmt: skip
BROADCASTING = {  # rules whose inputs may be smaller than in the trace
    "broadcast_in_dim": broadcast_in_dim, "convert_element_type": convert, "copy": unchanged, "erfc": erfc,
    "integer_pow": power, "rsqrt": rsqrt, "select_n": select, "square": power, "squeeze": squeeze,
    "stop_gradient": unchanged, "transpose": transpose,
}  # fmt: skip
RULES = BROADCASTING | {
    "concatenate": concatenate, "conv_general_dilated": convolution, "dot_general": dot_general, "gather": gather,
    "reduce_max": reducing("ReduceMax"), "reduce_sum": reducing("ReduceSum"), "reshape": reshape, "slice": cut,
    "split": split,
}  # fmt: skip
