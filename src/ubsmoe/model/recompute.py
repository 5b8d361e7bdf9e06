"""Gradient checkpointing: of every decoder layer only the input is kept, and the layer runs again when its gradient is due.

The second run is for the numbers alone. What a layer does on the side (counting tokens, adding up routing masses, drawing pairs,
moving the experts' means, choosing who learns) has happened in the first run and must not happen twice.

Source: Chen et al. 2016 (arXiv 1604.06174), by torch.utils.checkpoint.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.surgery import SparseModel


@contextmanager
def recomputing(sparse: SparseModel) -> Iterator[None]:
    """Inside, decoder layers keep their input alone; gradients are the same to the bit."""
    owners = {layer.router: layer for layer in sparse.layers}
    with ExitStack() as stack:
        for decoder in _decoders(sparse):
            layer = next((owners[module] for module in decoder.modules() if module in owners), None)
            decoder.forward = partial(
                checkpoint,
                decoder.forward,
                use_reentrant=False,
                preserve_rng_state=False,  # the base is in eval mode: no dropout
                context_fn=partial(_contexts, layer),
            )
            stack.callback(delattr, decoder, "forward")
        yield


def _decoders(sparse: SparseModel) -> list[nn.Module]:
    """All layers of the stack that the first router is in, dense ones too."""
    path = next(name for name, module in sparse.model.named_modules() if module is sparse.layers[0].router)
    stack = re.match(r"(.*)\.\d+\.", path)
    assert stack, path
    return list(sparse.model.get_submodule(stack[1]).children())


def _contexts(layer: SparseLayer | None) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around the first run and around the second."""
    if layer is None:
        return nullcontext(), nullcontext()
    return nullcontext(), _again(layer, layer.generator.get_state() if layer.generator else None)


@contextmanager
def _again(layer: SparseLayer, drawn_from: torch.Tensor | None) -> Iterator[None]:
    layer.recomputing = True
    now = layer.generator.get_state() if layer.generator else None
    if layer.generator and drawn_from is not None:
        layer.generator.set_state(drawn_from)
    try:
        yield
    finally:
        layer.recomputing = False
        if layer.generator and now is not None:
            layer.generator.set_state(now)
