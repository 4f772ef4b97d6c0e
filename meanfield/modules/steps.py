"""What a module does, step by step: the operators of its graph in order, each with the layer that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from meanfield.validation import Misuse, WrongType


class Signal(NamedTuple):
    """The output of an earlier step, or the images."""

    name: str


@dataclass(frozen=True, eq=False)
class Step:
    """One operator of ATen.

    operator: its name and overload, "conv2d.default".  arguments: by name, defaults too; tensors that the module holds
    as they are, what is computed as a `Signal`.  name: of its output; shape: of that without the axis of the images,
    None where it is no tensor.  layer: the module it belongs to, as messages name it.
    """

    operator: str
    arguments: Mapping[str, Any]
    name: str
    shape: tuple[int, ...] | None
    layer: str

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of what it takes of earlier steps."""
        found: list[str] = []
        for value in self.arguments.values():
            entries = value if isinstance(value, (list, tuple)) and not isinstance(value, Signal) else [value]
            found += [each.name for each in entries if isinstance(each, Signal)]
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Graph:
    """The steps from images of shape (C, H, W), a Signal of the name `images`, to the output; of which `argument`."""

    images: str
    shape: tuple[int, ...]
    steps: Sequence[Step]
    output: str
    argument: str


def of_module(module: Any, example: Tensor | None) -> Graph:
    """The graph of a module on images like the example (N, C, H, W), by torch.export; of an exported program its own.

    Nothing of the module changes.
    """
    if isinstance(module, torch.export.ExportedProgram):
        return _read(module)
    if not isinstance(module, nn.Module):
        raise WrongType("module", type(module).__name__, "a torch.nn.Module or what torch.export made of one")
    if not isinstance(example, Tensor) or example.ndim != 4 or len(example) == 0:
        came = tuple(example.shape) if isinstance(example, Tensor) else example
        raise Misuse("example", came, "must be images (N, C, H, W); of vectors make (N, d, 1, 1), and Flatten first")
    try:
        return _read(torch.export.export(module, (example,), strict=False))
    except Exception as error:  # whatever the module raises, or torch about it
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise Misuse("module", type(module).__name__, f"cannot be followed on the example: {said[0]}") from error


def _read(program: Any) -> Graph:
    held = {spec.arg.name: _tensor(program, spec.target) for spec in program.graph_signature.input_specs if spec.target}
    given = program.graph_signature.user_inputs
    if len(given) != 1 or len(program.graph_signature.user_outputs) != 1:
        raise Misuse("module", f"{len(given)} inputs", "must take one tensor of images and give one tensor of outputs")
    steps, shape = [], ()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == given[0]:
            shape = _shape(node)
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        arguments = {} if schema is None else dict(zip((each.name for each in schema.arguments), node.args))
        arguments = {name: _value(value, held) for name, value in {**arguments, **node.kwargs}.items()}
        operator = str(node.target).removeprefix("aten.")
        steps.append(Step(operator, with_defaults(operator, arguments), node.name, _shape(node), _layer(node)))
    return Graph(given[0], shape or (), steps, program.graph_signature.user_outputs[0], "module")


def _tensor(program: Any, name: str) -> Any:
    return program.state_dict[name] if name in program.state_dict else program.constants.get(name)


def _value(value: Any, held: Mapping[str, Any]) -> Any:
    if isinstance(value, Node):
        return held[value.name] if value.name in held else Signal(value.name)
    return [_value(each, held) for each in value] if isinstance(value, (list, tuple)) else value


def _shape(node: Node) -> tuple[int, ...] | None:
    found = node.meta.get("val")
    return tuple(map(int, found.shape[1:])) if isinstance(found, Tensor) and found.ndim else None


def _layer(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {"": ("", "module")}).values())
    return named(*(str(each) for each in stack[-1]))


def named(path: str, kind: str) -> str:
    """A layer in a message: its place and its class."""
    kind = kind.rpartition(".")[2].rstrip("'>")
    return f"{path} ({kind})" if path else kind


def with_defaults(operator: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operator of ATen, those that were left out as well; of another one as they are."""
    name, _, overload = operator.partition(".")
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    found = getattr(packet, overload, None) if packet is not None and overload.isidentifier() else None
    if found is None:
        return dict(arguments)
    return {
        each.name: arguments.get(each.name, each.default_value if each.has_default_value() else None)
        for each in found._schema.arguments
    }
