"""`Recorded`: a function of tensors as the flat list of tensor operations that it comes to."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Recorded"]

Function: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]

# What is recorded once costs some tenths of a second: it must come often enough to be worth it.
_OFTEN = 40
_SHAPES = 6


class Recorded:
    """Calls a function; where the same shapes come often, replays the operations that it came to for those shapes.

    A replay costs nothing for handlers, modules, `torch.func.vmap` and the automatic differentiation inside the
    function: what is left are the tensor operations, in the same order, so that results are the same to the last bit.
    A function whose course depends on the values of its arguments, or that draws random numbers, cannot be recorded;
    it is then called as it is. Each recording is compared with the function on the two calls that follow it.

    Args:
        function: named tensors -> named tensors. Tensors that may change from call to call must be among its arguments.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.seen: dict[Any, int] = {}
        self.programs: dict[Any, Function] = {}

    def __call__(self, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        """The function's result."""
        key = tuple((value.shape, value.dtype) for value in arguments.values())
        count = self.seen[key] = self.seen.get(key, 0) + 1
        if count < _OFTEN:
            return self.function(arguments)
        if count == _OFTEN and len(self.programs) < _SHAPES:
            program = _record(self.function, arguments)
            if program is not None:
                self.programs[key] = program
        if key not in self.programs:
            return self.function(arguments)
        if count > _OFTEN + 1:
            return self.programs[key](arguments)
        result, replayed = self.function(arguments), self.programs[key](arguments)
        if not _equal(result, replayed):
            del self.programs[key]
        return result


def _record(function: Function, arguments: Mapping[str, Tensor]) -> Function | None:
    """The operations of a function as a function; None if its course depends on values."""
    from torch.fx.experimental.proxy_tensor import make_fx

    names = list(arguments)
    outputs: list[str] = []

    def flat(*values: Tensor) -> list[Tensor]:
        result = function(dict(zip(names, values, strict=True)))
        outputs[:] = list(result)
        return list(result.values())

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # fake tensors have no values: a branch that asks for one raises an error instead of being recorded
            graph = make_fx(flat, tracing_mode="fake")(*(value.detach() for value in arguments.values()))
    except Exception:  # tracing fails in as many ways as programs can be written; the function itself still works
        return None
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.detach.default:  # nothing is differentiated in a replay
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()

    def replay(given: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(outputs, graph(*given.values()), strict=True))

    return replay


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6, equal_nan=True) for name in a)
