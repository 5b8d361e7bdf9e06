"""The options under which bits are compared."""

from typing import Any

ACTING: dict[str, dict[str, Any]] = {
    "adapter": {"router": "trained", "attention": "trained"},
    "clients": {"per_round": 3},
    "train": {"rounds": 3, "clip_norm": 0.05, "weight_decay": 0.1, "gradient_accumulation": 2},
    "rounds": {"quorum": 0.3},
    "evaluate": {"max_new_tokens": 2, "max_examples": 2, "mc_accuracy": False},
}
"""Options whose arithmetic depends on the order of tensors or clients; where bits are compared, all of them act."""
