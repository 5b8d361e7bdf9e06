"""What an update to a task must look like, and whether bytes that claim to be one do, by their header alone.

No tensor is built until names, shapes and dtypes are those that the task asked for: few bytes can describe many.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ubsmoe.config import WireDtype
from ubsmoe.messages import Tensors
from ubsmoe.wire.packed import MAX_HEADER_BYTES, WireError

Form = tuple[torch.Size, torch.dtype]
Declared = Mapping[str, tuple[str, tuple[int, ...]]]
"""What a header says of each tensor: its dtype, as safetensors writes it, and its shape."""

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int64: "I64", torch.bool: "BOOL"}
SENT_AS: Mapping[WireDtype, str] = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}


@dataclass(frozen=True)
class UpdateSpec:
    """What an update to one task must look like: the shape and dtype of every tensor, by name."""

    adapters: Mapping[str, Form]
    extras: Mapping[str, Form]
    expert_tokens: Form

    @property
    def num_bytes(self) -> int:
        """Bytes of such an update's tensors."""
        forms = (*self.adapters.values(), *self.extras.values(), self.expert_tokens)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in forms)

    @property
    def most_bytes(self) -> int:
        """What an update to this task can have at most on the wire, in any of its precisions; known before one comes."""
        # which experts travel, one byte each, or the scales of int8, which come instead of three bytes of each number
        flags = sum(shape[0] for shape, _ in self.adapters.values())
        return self.num_bytes + flags + 2 * MAX_HEADER_BYTES


def spec_of(tensors: Tensors) -> dict[str, Form]:
    """The form of tensors that are as they should be."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def check_declared(declared: Declared, spec: UpdateSpec, dtype: WireDtype) -> None:
    """Check that a header declares an update of this form, its change in this precision, and nothing else.

    Raises:
        WireError: naming the first tensor that was not asked for, is missing, or has another form.
    """
    exact = {f"extras.{name}": form for name, form in spec.extras.items()} | {"expert_tokens": spec.expert_tokens}
    known = {f"{part}.{name}" for name in spec.adapters for part in ("adapters", "scales", "experts")} | exact.keys()
    if unknown := sorted(declared.keys() - known):
        raise WireError(f"an update to this task has no tensor {unknown[0]!r}")
    for name, (shape, kind) in exact.items():
        _check(name, declared, CODES[kind], tuple(shape))
    for name, (shape, _) in spec.adapters.items():
        _check_change(name, declared, tuple(shape), SENT_AS[dtype])


def _check_change(name: str, declared: Declared, shape: tuple[int, ...], code: str) -> None:
    """The parts of `wire.change` for one tensor: as many rows as experts were touched, at most all."""
    sent, mask, scale = (declared.get(f"{part}.{name}") for part in ("adapters", "experts", "scales"))
    rows = sent[1][0] if sent and sent[1] else 0
    if rows > shape[0] or (mask is None and rows != shape[0]):
        rows = shape[0]  # what `_check` below then says was expected
    _check(f"adapters.{name}", declared, code, (rows, *shape[1:]))
    if mask:
        _check(f"experts.{name}", declared, "BOOL", shape[:1])
    if (scale is not None) != (code == "I8"):
        raise WireError(f"{name}: int8 and scales go together")
    if scale:
        axis = row_axis(name) % len(shape)
        _check(f"scales.{name}", declared, "F32", (rows, *shape[1:axis], 1, *shape[axis + 1 :]))


def row_axis(name: str) -> int:
    """The axis a scale sums up; by the tensor's name, since a width can equal a rank."""
    return 1 if name.endswith(".B") else -1


def _check(name: str, declared: Declared, code: str, shape: tuple[int, ...]) -> None:
    if name not in declared:
        raise WireError(f"an update to this task needs the tensor {name!r}")
    if declared[name] != (code, shape):
        came = f"{declared[name][0]} {[*declared[name][1]]}"
        raise WireError(f"{name} is {came}, expected {code} {[*shape]}")
