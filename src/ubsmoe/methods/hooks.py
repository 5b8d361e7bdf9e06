"""What a method does inside a client's training loop, which it never copies."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

OWN = "own."
"""How the names of what a client kept for itself begin, in the payload that it installs; no server sends such a name."""


@dataclass
class Hooks:
    """What a method does inside a client's step.

    `before_training` sees the client's examples in batches. `penalties` are added to the loss of every micro-batch; `before_step`
    runs between backward and the optimiser's step, `after_step` after it, with its learning rate; `parameters` are trained beside
    the adapter; `extras` is read when training ends and travels in Update.extras. `keeps` is read then too and stays with the
    client: it is in the payload of its next `install`, by names that begin with `OWN`.
    Installing must work on the meta device too: so a server learns what an update looks like.
    """

    before_training: list[Callable[[Iterator[Mapping[str, Tensor]]], None]] = field(default_factory=list)
    penalties: list[Callable[[], Tensor]] = field(default_factory=list)
    before_step: list[Callable[[], None]] = field(default_factory=list)
    after_step: list[Callable[[float], None]] = field(default_factory=list)
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    extras: Callable[[], dict[str, Tensor]] = dict
    keeps: Callable[[], dict[str, Tensor]] = dict

    def and_then(self, other: "Hooks") -> "Hooks":
        """The hooks of both, in order."""
        return Hooks(
            [*self.before_training, *other.before_training],
            [*self.penalties, *other.penalties],
            [*self.before_step, *other.before_step],
            [*self.after_step, *other.after_step],
            [*self.parameters, *other.parameters],
            lambda: {**self.extras(), **other.extras()},
            lambda: {**self.keeps(), **other.keeps()},
        )
