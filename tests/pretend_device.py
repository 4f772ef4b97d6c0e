"""A CUDA device that is not there: numbers of the CPU that carry its tag, to find device bugs and host reads.

    with PretendDevice() as device:
        x = torch.zeros(3, device="cuda")
        x + torch.zeros(3)  # raises, as CUDA does
    device.reads  # how often the host has waited for a number

Storages are tagged, so that views, detached copies and parameters carry the tag of what they share.  A function mode
answers `.device`, `.to`, `device=` and `generator=` as on a machine with CUDA; a dispatch mode sees every operation
below, the backward pass included, hands the tag on and counts.  What CUDA refuses raises: tensors of two devices, a
generator of another device, `.numpy()`, products of integer matrices.  A read is what makes the host wait: `item`,
`bool`, `tolist`, masks, sizes that depend on values, copies to the host, checked factorisations.  `tf32=True` rounds
what float32 products read as recent devices do where `torch.backends` allows it.  No timing, no streams, no memory.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo  # it indexes the functions of torch.cuda, before some are replaced
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PLAIN_GENERATOR = torch.Generator
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
INSIDE = "/meanfield/"
PRUNE_EVERY = 20_000  # tags of storages that are gone
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPYING = {"copy_", "copy", "_foreach_copy_", "set_", "resize_"}
NO_SCALARS = {"cat", "stack", "hstack", "vstack"}  # of which CUDA takes none from the host
READING = {  # the host needs their size, or looks whether they failed
    *("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave"),
    *("unique_dim", "_unique2", "unique_consecutive", "_linalg_eigh", "linalg_eigh", "linalg_eig", "linalg_eigvals"),
    *("_linalg_svd", "linalg_cholesky", "linalg_inv", "_linalg_check_errors", "linalg_lstsq"),
}
PRODUCTS = {"mm", "addmm", "bmm", "mv", "dot", "addmv", "baddbmm"}
CONVOLUTIONS = {"convolution", "convolution_backward"}


def tensors_in(value: Any, found: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Those in nested tuples, lists and dicts."""
    found = [] if found is None else found
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            tensors_in(each, found)
    return found


def is_cuda(device: Any) -> bool:
    return torch.device(device).type == "cuda"


def rounded_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """To the nearest of 10 bits of mantissa; other dtypes as they are."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class PretendDevice(TorchFunctionMode):
    def __init__(self, *, tf32: bool = False) -> None:
        super().__init__()
        self.tf32 = tf32
        self.tags: dict[int, StorageWeakRef] = {}
        self.events: Counter[tuple[str, str, str]] = Counter()  # (kind, file:line, what)
        self.operations = 0  # that have an operand on the device
        self.wanted: list[bool] = []  # where what has no operands is made, per call under way
        self.silent = 0

    @property
    def reads(self) -> int:
        return sum(count for (kind, *_), count in self.events.items() if kind == "read")

    def places(self, kind: str) -> list[str]:
        """What happened where, most often first."""
        found = [(count, place, what) for (each, place, what), count in self.events.items() if each == kind]
        return [f"{count} {place} {what}" for count, place, what in sorted(found, reverse=True)]

    # ---- tags

    def holds(self, tensor: Any) -> bool:
        while isinstance(tensor, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        try:
            return tensor.untyped_storage()._cdata in self.tags
        except (RuntimeError, NotImplementedError, AttributeError):  # without a storage
            return False

    def tag(self, tensor: torch.Tensor, on: bool = True) -> None:
        with torch._C.DisableTorchFunction():
            if tensor.is_meta or tensor.layout != torch.strided:
                return
            storage = tensor.untyped_storage()
            if not on:
                self.tags.pop(storage._cdata, None)
                return
            self.tags[storage._cdata] = StorageWeakRef(storage)
            if len(self.tags) % PRUNE_EVERY == 0:
                self.tags = {key: ref for key, ref in self.tags.items() if not ref.expired()}

    def note(self, kind: str, what: str) -> None:
        if not self.silent:
            self.events[kind, _place(), what] += 1

    def refuse(self, what: str, error: type[Exception] = RuntimeError) -> None:
        self.note("refused", what)
        raise error(f"pretend device: {what} at {_place()}")

    @contextlib.contextmanager
    def silently(self) -> Iterator[None]:
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1

    # ---- calls as Python makes them

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__" and self.holds(args[0]):
            known = {"device": CUDA, "is_cuda": True, "is_cpu": False}
            return known.get(func.__self__.__name__) or self._run(func, args, kwargs)
        if name == "get_device" and self.holds(args[0]):
            return 0
        if name in ("numpy", "__array__", "tolist") and self.holds(args[0]):
            if name == "__array__" or (name == "numpy" and not kwargs.get("force")):
                self.refuse(f"{name}() of a tensor on cuda", TypeError)
            self.note("read", name)
            with self.silently():
                return func(*args, **kwargs)
        if name in ("to", "cuda", "cpu") and isinstance(args[0], torch.Tensor):
            return self._moved(name, args, kwargs)
        if name == "type_as":
            return self._moved("to", args[:2], {})
        if name == "__deepcopy__":
            copied = func(*args, **kwargs)
            self.tag(copied, self.holds(args[0]))
            return copied
        if name == "one_hot" and len(args) + len(kwargs) > 1:  # only the CPU looks whether classes are in range
            with self.silently():
                return self._run(func, args, kwargs)
        return self._made(func, name, args, kwargs)

    def _made(self, func, name, args, kwargs):
        """A call that may say on which device its result, or its random numbers, are to be."""
        given = kwargs.get("device")
        target = None if given is None else is_cuda(given)
        if target:
            kwargs["device"] = CPU
        operands = tensors_in((args, kwargs))
        here = any(map(self.holds, operands))
        generator = next((leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Generator)), None)
        if generator is not None and (here if target is None else target) != is_cuda(generator.device):
            self.refuse(f"{name} with a generator on {generator.device}")
        if name in ("tensor", "as_tensor", "asarray") and target is not None:
            made = func(*args, **{**kwargs, "device": None})
            if self.holds(made) != target:
                self.note("write" if target else "read", name)
                with self.silently():
                    made = made.clone() if any(made is each for each in operands) or name != "tensor" else made
                self.tag(made, target)
            return made
        made = self._run(func, args, kwargs, here if target is None else target)
        if target is not None:
            for leaf in tensors_in(made):
                self.tag(leaf, target)
        return made

    def _run(self, func, args, kwargs, wanted: bool | None = None):
        self.wanted.append(any(map(self.holds, tensors_in((args, kwargs)))) if wanted is None else wanted)
        try:
            return func(*args, **kwargs)
        finally:
            self.wanted.pop()

    def _moved(self, name, args, kwargs):
        """Tensor.to, .cuda and .cpu; always a storage of its own where the device changes."""
        tensor, rest, device = args[0], list(args[1:]), kwargs.pop("device", None)
        if name != "to":
            device, rest = (CUDA if name == "cuda" else CPU), []
        elif rest and isinstance(rest[0], torch.Tensor):
            other = rest.pop(0)
            device, rest = (CUDA if self.holds(other) else CPU), [other.dtype, *rest]
        elif rest and isinstance(rest[0], (str, torch.device)):
            device = rest.pop(0)
        elif rest and rest[0] is None:
            rest.pop(0)
        if device is not None and torch.device(device).type == "meta":
            return tensor.to("meta")
        before = self.holds(tensor)
        after = before if device is None else is_cuda(device)
        leads = rest if rest and isinstance(rest[0], torch.dtype) and device is None else [CPU, *rest]
        moved = tensor.to(*leads, **kwargs)
        if before != after:
            self.note("write" if after else "read", "copy")
            if moved.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                with self.silently():
                    moved = moved.clone()
            self.tag(moved, after)
        return moved

    # ---- operations as the dispatcher sees them

    def dispatched(self, func, args, kwargs):
        name = func._schema.name.removeprefix("aten::")
        operands = tensors_in((args, kwargs))
        tagged = [self.holds(each) for each in operands]
        on = any(tagged) or bool(not operands and self.wanted and self.wanted[-1])
        if any(tagged):
            self.operations += not func.is_view
            self._check(name, args, operands, tagged)
            if name in COPYING:
                on = tagged[0]
                if len(set(tagged)) > 1 and name != "set_":
                    self.note("write" if on else "read", name)
        if self.tf32 and on and _rounds(name):
            args = tuple(rounded_to_tf32(e) if isinstance(e, torch.Tensor) and e.ndim > 1 else e for e in args)
        made = func(*args, **kwargs)
        for leaf in tensors_in(made):
            if func._schema.is_mutable and any(leaf is each for each in operands):
                continue
            if on or not operands:
                self.tag(leaf, on)
        return made

    def _check(self, name, args, operands, tagged) -> None:
        if name in READING:
            self.note("read", name)
        if name in PRODUCTS and not (operands[0].is_floating_point() or operands[0].is_complex()):
            self.refuse(f"{name} of {operands[0].dtype}, which has no kernel", NotImplementedError)
        if name in INDEXING:
            indices = tensors_in(args[1])
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.note("read", "mask")
            others = [each for each in operands if not any(each is index for index in indices)]
            if not self.holds(args[0]) or any(each.ndim and not self.holds(each) for each in others):
                self.refuse(f"{name} of tensors on two devices")
        elif name not in COPYING and any(
            not on and (each.ndim or name in NO_SCALARS) for each, on in zip(operands, tagged)
        ):
            shapes = ", ".join(f"{'cuda' if on else 'cpu'}{tuple(each.shape)}" for each, on in zip(operands, tagged))
            self.refuse(f"{name}({shapes})")

    # ---- entering and leaving

    def __enter__(self):
        self.exits = contextlib.ExitStack()
        for where, name, value in self._replacements():
            self.exits.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, value)
        self.exits.enter_context(_Dispatch(self))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.exits.close()

    def _replacements(self):
        plain = torch.nn.Module.to

        def moved(module, *args, **kwargs):  # its arguments are parsed in C++, where a tensor's device is the real one
            if "device" in kwargs:
                args = (kwargs.pop("device"), *args)
            elif args and isinstance(args[0], torch.Tensor):
                args = (CUDA if self.holds(args[0]) else CPU, args[0].dtype, *args[1:])
            return plain(module, *args, **kwargs)

        none = lambda *args, **kwargs: None  # noqa: E731
        cuda = torch.cuda
        return [
            (torch, "Generator", _Generator),
            (torch.nn.Module, "to", moved),
            (cuda, "is_available", lambda: True),
            (cuda, "device_count", lambda: 1),
            (cuda, "mem_get_info", lambda device=None: (2**40, 2**40)),
            (cuda, "device", lambda device: contextlib.nullcontext()),
            (cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state()),
            *((cuda, name, none) for name in ("synchronize", "manual_seed", "set_rng_state", "_lazy_init")),
        ]


class _Dispatch(TorchDispatchMode):
    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self.device.dispatched(func, args, kwargs or {})


class _AnyGenerator(type(torch.Generator)):
    """Annotations that were looked up while the device was there outlive it."""

    def __instancecheck__(cls, value) -> bool:
        return isinstance(value, PLAIN_GENERATOR)


class _Generator(torch.Generator, metaclass=_AnyGenerator):
    """Draws what one of the CPU draws, and says that it is elsewhere."""

    def __new__(cls, device: Any = "cpu"):
        made = super().__new__(cls)
        made.where = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self):
        return CUDA if is_cuda(self.where) else self.where

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


def _place() -> str:
    """The innermost line of the library, or of whoever called torch."""
    frame, outside = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if INSIDE in file and "/tests/" not in file and "/torch/" not in file:
            return f"{file.rpartition(INSIDE)[2]}:{frame.f_lineno}"
        if not outside and "/torch/" not in file and file != __file__:
            outside = f"{file.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return outside


def _rounds(name: str) -> bool:
    """Whether `torch.backends` lets the device round what this operation reads."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9
        allowed = {"convolutions": cudnn.conv.fp32_precision == "tf32", "products": matmul.fp32_precision == "tf32"}
    else:
        allowed = {"convolutions": cudnn.allow_tf32, "products": matmul.allow_tf32}
    return allowed["convolutions"] if name in CONVOLUTIONS else allowed["products"] and name in PRODUCTS
