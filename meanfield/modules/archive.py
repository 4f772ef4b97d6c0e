"""The graph in a file that torch.export.save wrote, without running anything that stands in it.

`torch.export.load` falls back on unpickling whatever a file holds, and evaluates expressions in it.  Here the graph is
read as the JSON that it is, tensors as the raw numbers that they are; what would have to be unpickled is refused.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanfield.modules.steps import Graph, Signal, Step, named, with_defaults
from meanfield.validation import Misuse

EXPORTED = ".pt2"
DTYPES = {5: torch.int64, 7: torch.float32, 8: torch.float64}  # torch's numbers in files
MOST_BYTES = 2**32  # of one member: what says more of itself is no network for this
AGAIN = "save it again by torch.export.save of torch 2.9 or newer, or pass the module itself to from_module"


def of_file(path: str | Path) -> Graph:
    """The graph of a .pt2 file; its tensors on the CPU.  ValueError where it is damaged or of another layout."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive, path).graph()
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no file of torch.export.save: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is laid out in a way that is not known here ({error!r}); {AGAIN}") from error


class _Archive:
    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path = archive, path
        self.members = {name.partition("/")[2]: name for name in archive.namelist()}  # below one folder

    def graph(self) -> Graph:
        if "models/model.json" not in self.members:
            raise Misuse("path", str(self.path), f"holds no models/model.json; {AGAIN}")
        module = self.json("models/model.json")["graph_module"]
        signature, graph = module["signature"], module["graph"]
        held, given = {}, []
        for spec in signature["input_specs"]:
            ((kind, entry),) = spec.items()
            if kind == "user_input":
                given.append(entry["arg"]["as_tensor"]["name"])
            elif kind in ("parameter", "buffer", "tensor_constant"):
                held[entry["arg"]["name"]] = self.tensor(entry[f"{kind}_name"])
        outputs = [each["as_tensor"]["name"] for each in graph["outputs"] if "as_tensor" in each]
        if len(given) != 1 or len(outputs) != 1:
            remedy = f"takes {len(given)} tensors and gives {len(outputs)}; it must take images and give outputs"
            raise Misuse("path", str(self.path), remedy)
        shapes = {name: _shape(meta) for name, meta in graph["tensor_values"].items()}
        steps = [_step(node, held, shapes) for node in graph["nodes"]]
        return Graph(given[0], shapes[given[0]] or (), steps, outputs[0], "module")

    def tensor(self, name: str) -> Tensor:
        for kind, folder in (("weights", "weights"), ("constants", "constants")):
            config = self.json(f"data/{folder}/model_{kind}_config.json")["config"]
            if name in config:
                return self.raw(name, config[name], f"data/{folder}")
        raise Misuse("path", str(self.path), f"holds no tensor {name!r}")

    def raw(self, name: str, entry: Mapping[str, Any], folder: str) -> Tensor:
        """A contiguous tensor of plain numbers."""
        if entry["use_pickle"]:
            raise Misuse("path", str(self.path), f"holds {name} as a pickle, which could run code; {AGAIN}")
        meta = entry["tensor_meta"]
        if meta["dtype"] not in DTYPES:
            raise Misuse("path", str(self.path), f"holds {name} in a dtype that is not float32 or float64")
        dtype, sizes = DTYPES[meta["dtype"]], [each["as_int"] for each in meta["sizes"]]
        content = self.content(f"{folder}/{entry['path_name']}")
        strides, offset = [each["as_int"] for each in meta["strides"]], meta["storage_offset"]["as_int"]
        held = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
        needed = 1 + offset + sum((size - 1) * stride for size, stride in zip(sizes, strides)) if 0 not in sizes else 0
        if min([*sizes, *strides, offset], default=0) < 0 or needed > len(held):
            raise ValueError(f"{self.path} is damaged: {name} is said to have {math.prod(sizes)} numbers")
        return held.as_strided(sizes, strides, offset).clone()

    def json(self, member: str) -> Any:
        return json.loads(self.content(member))

    def content(self, member: str) -> bytes:
        if member not in self.members:
            raise Misuse("path", str(self.path), f"holds no {member}; {AGAIN}")
        information = self.archive.getinfo(self.members[member])
        if information.file_size > MOST_BYTES:
            raise Misuse("path", str(self.path), f"says that {member} takes {information.file_size} bytes")
        return self.archive.read(information)


def _step(node: Mapping[str, Any], held: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> Step:
    operator = node["target"].removeprefix("torch.ops.aten.")
    arguments = {each["name"]: _value(each["arg"], held) for each in node["inputs"]}
    outputs = [each["as_tensor"]["name"] for each in node["outputs"] if "as_tensor" in each]
    name, shape = (outputs[0], shapes.get(outputs[0])) if len(outputs) == 1 else (node["name"], None)
    # of every module around it, outermost first: key,place,class
    stack = node["metadata"].get("nn_module_stack", "").split(";")[-1].split(",")
    layer = named(stack[1], stack[2]) if len(stack) == 3 else "module"
    return Step(operator, with_defaults(operator, arguments), name, shape, layer)


def _value(argument: Mapping[str, Any], held: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = argument.items()
    if kind == "as_tensor":
        return held[value["name"]] if value["name"] in held else Signal(value["name"])
    if kind == "as_tensors":
        return [held.get(each["name"], Signal(each["name"])) for each in value]
    if kind == "as_none":
        return None
    if kind in ("as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools"):
        return value
    return Signal(json.dumps(value))  # sizes that depend on the number of images, and whatever else is no constant


def _shape(meta: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Without the axis of the images, which may be a symbol."""
    sizes = [each.get("as_int") for each in meta["sizes"][1:]]
    return tuple(sizes) if meta["sizes"] and None not in sizes else None
