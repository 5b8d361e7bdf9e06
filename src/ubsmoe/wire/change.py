"""What a client changed, as tensors for the wire: of each tensor only the experts it touched, in the precision of the run.

Both sides know the task, so an expert whose numbers are bit for bit those of the task need not travel:

    float32     the touched experts' new values: nothing is lost
    bfloat16    their change, rounded to 8 significant bits
    int8        their change, one float32 scale per row: of A (and of a core R, or a router) over its inputs, of B over its
                outputs, so that each rank-one term of an adapter keeps a scale of its own on either side

    adapters.{name}   [T, ...], T touched of the M experts
    scales.{name}     int8 only, [T, ...] with one axis of size 1
    experts.{name}    bool [M], which experts; left out when all were touched

What no task sent down, such as an A that the client drew itself, is measured from zero. Touched is what the numbers say, not
the counts: weight decay, penalties and pseudo-gradients move experts that no token went to.

No error feedback: for it clients would have to keep something between rounds, and then nodes could not come and go, nor 1,000
clients take the memory of ten. What int8 loses is bounded without it, by 1/254 of the largest change in a row.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ubsmoe.config import WireDtype
from ubsmoe.maths.quantise import dequantise, quantise
from ubsmoe.messages import Task, Tensors, Update
from ubsmoe.wire.form import row_axis


class ChangeError(ValueError):
    """Tensors that describe no change of what was sent; the text says why."""


def pack_change(after: Tensors, before: Tensors, dtype: WireDtype) -> dict[str, Tensor]:
    """The tensors that say how `after` differs from `before`."""
    parts: dict[str, Tensor] = {}
    for name, value in after.items():
        value = value.detach().cpu()
        old = before[name].cpu() if name in before else torch.zeros_like(value)
        touched = _touched(value, old)
        sent = value[touched] if dtype == "float32" else value[touched] - old[touched]
        if dtype == "int8":
            sent, parts[f"scales.{name}"] = quantise(sent, row_axis(name))
        parts[f"adapters.{name}"] = sent.bfloat16() if dtype == "bfloat16" else sent
        if not touched.all():
            parts[f"experts.{name}"] = touched
    return parts


def upload_bytes(update: Update, task: Task, dtype: WireDtype) -> int:
    """Bytes of the tensors and counts that say what an update changed, whether or not it had to travel; no headers."""
    counts = update.expert_tokens.nbytes + 2 * 8  # tokens and assignments
    parts = pack_change(update.adapters, task.payload, dtype)
    return sum(tensor.nbytes for tensor in (*parts.values(), *update.extras.values())) + counts


def unpack_change(parts: dict[str, Tensor], before: Tensors, max_bytes: int) -> dict[str, Tensor]:
    """What `pack_change` was given.

    Args:
        parts: its result, from whoever sent it; emptied, so that no tensor is held twice.
        before: the same as there.
        max_bytes: of all tensors that are measured from zero together; few bytes can describe many zeros.

    Raises:
        ChangeError: if the parts do not fit one another, or `before`.
    """
    named: dict[str, dict[str, Tensor]] = {}
    while parts:
        key, tensor = parts.popitem()
        part, _, name = key.partition(".")
        named.setdefault(name, {})[part] = tensor
    after: dict[str, Tensor] = {}
    for name in sorted(named):
        after[name] = _unpack(name, named.pop(name), before.get(name), max_bytes)
        max_bytes -= 0 if name in before else after[name].nbytes
    return after


def _unpack(name: str, parts: Mapping[str, Tensor], before: Tensor | None, max_bytes: int) -> Tensor:
    sent, scale, touched = parts.get("adapters"), parts.get("scales"), parts.get("experts")
    if sent is None or sent.dim() < 2:
        raise ChangeError(f"{name}: no tensor of experts")
    if touched is None:
        touched = torch.ones(len(sent), dtype=torch.bool)
    if touched.dtype != torch.bool or touched.dim() != 1 or int(touched.sum()) != len(sent):
        raise ChangeError(f"{name}: {len(sent)} experts, but experts.{name} says otherwise")
    shape = (len(touched), *sent.shape[1:])
    if before is None and 4 * math.prod(shape) > max_bytes:
        raise ChangeError(f"{name}: {[*shape]} is more than the {max_bytes} bytes that are taken")
    old = torch.zeros(shape) if before is None else before.cpu()
    if old.shape != shape:
        raise ChangeError(f"{name} has shape {[*shape]}, sent was {[*old.shape]}")
    if (sent.dtype == torch.int8) != (scale is not None):
        raise ChangeError(f"{name}: int8 and scales go together")
    if scale is not None:
        axis = row_axis(name) % sent.dim()
        if scale.dtype != torch.float32 or scale.shape != (*sent.shape[:axis], 1, *sent.shape[axis + 1 :]):
            raise ChangeError(f"{name}: scales of shape {[*scale.shape]} for {[*sent.shape]}")
        sent = dequantise(sent, scale)
    elif sent.dtype not in (torch.float32, torch.bfloat16):
        raise ChangeError(f"{name} is {sent.dtype}")
    exact = parts["adapters"].dtype == torch.float32
    if touched.all():  # nothing of the old stays, so that no copy adds to what a reply may cost
        return sent if exact else sent.float().add_(old)
    after = old.clone()
    after[touched] = sent if exact else old[touched] + sent.float()
    return after


def _touched(value: Tensor, old: Tensor) -> Tensor:
    """[M]: the experts of which a single bit differs; NaN and a zero's sign are bits too."""
    return (value.contiguous().view(torch.int32) != old.contiguous().view(torch.int32)).flatten(1).any(1)
