"""Gradient checkpointing: of every decoder layer only the input is kept, and the layer runs again when its gradient is due.

The second run is for the numbers alone. What a layer does on the side (counting tokens, adding up routing masses, drawing
assignments, choosing the trainable experts) has happened in the first run and must not happen twice.

Source: Chen et al. 2016 (arXiv 1604.06174), by torch.utils.checkpoint.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from jaxtyping import UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ubsmoe.model.layer import SparseLayer
from ubsmoe.model.surgery import SparseModel


@contextmanager
def recomputing(sparse: SparseModel) -> Iterator[None]:
    """Inside, decoder layers keep their input alone; gradients are bit-identical."""
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
    generator = layer.routing.generator
    return nullcontext(), _again(layer, generator.get_state() if generator else None)


@contextmanager
def _again(layer: SparseLayer, before: UInt8[Tensor, " bytes"] | None) -> Iterator[None]:
    """Run the layer once more with its generator in the state that it had `before` the first run."""
    layer.recomputing, generator = True, layer.routing.generator
    now = generator.get_state() if generator else None
    if generator and before is not None:
        generator.set_state(before)
    try:
        yield
    finally:
        layer.recomputing = False
        if generator and now is not None:
            generator.set_state(now)
