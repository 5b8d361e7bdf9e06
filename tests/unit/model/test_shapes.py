"""Shapes stand in annotations of the model room, and the tests check them: a wrong one raises where it enters."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from ubsmoe.client.train import language_loss
from ubsmoe.data.tokens import IGNORED
from ubsmoe.maths.pseudo_gradient import PseudoGradient
from ubsmoe.model import kernel
from ubsmoe.model.adapter import MatrixAdapter
from ubsmoe.model.expert_weights import ExpertWeights, Lora
from ubsmoe.model.kernel_reference import run_assignments_slowly
from ubsmoe.model.layer import Observed, Routing
from ubsmoe.model.surgery import SparseModel
from unit.model.families import FAMILIES, tiny, words
from unit.model.small_layer import EXPERTS, HIDDEN, RANK, TOKENS, SmallLayer, normal

ROOM = sorted(Path(inspect.getfile(kernel)).parent.glob("*.py"))
SHAPED = {"Float", "Int", "Bool", "UInt8", "Shaped"}
OF_MANY_SHAPES = {("kernel.py", "backward"), ("kernel_grouped.py", "backward")}  # gradients of all inputs, and None


def is_bare(annotation: ast.AST | None) -> bool:
    """Whether it names Tensor without a shape. A dict of tensors by name has no one shape."""
    if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") in {*SHAPED, "dict", "Mapping"}:
        return False
    if isinstance(annotation, ast.Name):
        return annotation.id == "Tensor"
    return annotation is not None and any(map(is_bare, ast.iter_child_nodes(annotation)))


@pytest.mark.parametrize("path", ROOM, ids=lambda path: path.name)
def test_no_function_or_field_has_a_tensor_without_a_shape(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and (path.name, node.name) not in OF_MANY_SHAPES:
            arguments = ast.walk(node.args)
            assert not is_bare(node.returns), node.name
            assert not any(is_bare(one.annotation) for one in arguments if isinstance(one, ast.arg)), node.name
        assert not (isinstance(node, ast.AnnAssign) and is_bare(node.annotation)), ast.unparse(node)


def with_a_wrong_shape() -> dict[str, Callable[[], Any]]:
    """Calls that would run, or fail deep inside torch, if nobody looked at shapes."""
    small = SmallLayer("gated", 2)
    layer, hidden = small.layer, normal(TOKENS, HIDDEN, seed=1)
    logits, weights, index = small.router(hidden)
    a, b = normal(EXPERTS, RANK, HIDDEN, seed=2), normal(EXPERTS, HIDDEN, RANK, seed=3)
    token, expert, weight = torch.arange(3), torch.arange(3), normal(3, seed=4)
    lora, base = Lora(*small.factors.leaves(), scale=1.0), ExpertWeights.of(small.experts)
    return {
        "kernel: one weight too many": lambda: kernel.run_assignments(
            hidden, token, expert, normal(4, seed=4), base, lora
        ),
        "kernel: tokens as floats": lambda: kernel.run_assignments(hidden, weight, expert, weight, base, lora),
        "reference": lambda: run_assignments_slowly(hidden, token, expert[:2], weight, base, lora),
        "adapter: B as A": lambda: MatrixAdapter(a, a),
        "adapter: a side of another number of experts": lambda: MatrixAdapter(a, b, None, (a[:1], b)),
        "lora: A and B swapped": lambda: replace(lora, up_a=lora.up_b),
        "layer: weights of other tokens": lambda: layer.observe(logits, weights[:1], index),
        "layer: phi of all layers": lambda: Routing(2, 4, phi=normal(2, EXPERTS, seed=5)),
        "layer: bias of other experts": lambda: Routing(2, 4, normal(6, seed=5), selection_bias=normal(5, seed=5)),
        "layer: counts in floats": lambda: Observed(torch.zeros(EXPERTS)),
    }


@pytest.mark.parametrize("call", with_a_wrong_shape())
def test_a_wrong_shape_is_refused_where_it_enters(call: str) -> None:
    with pytest.raises(TypeCheckError):
        with_a_wrong_shape()[call]()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_satisfies_the_annotations_in_any_precision(family: str, dtype: torch.dtype) -> None:
    """A training step with everything on: attention (M = 1), router, phi, all scopes of a pseudo-gradient, padding."""
    sparse, ids = SparseModel(tiny(family).to(dtype), "mass"), words(3, 6)
    draw = torch.Generator().manual_seed(0)
    fresh = sparse.fresh_adapter(2, draw, shared_a=True, router=True, attention=True)
    sparse.load_adapter(fresh, alpha=2.0)
    sparse.set_top_k(2)
    sparse.set_phi(torch.randn(len(sparse.layers), sparse.num_experts, generator=draw), sparse.k_max)
    sparse.set_pseudo_gradient(PseudoGradient("sampled", scope=("experts", "router", "hidden"), fraction=0.5), draw)
    mask = torch.ones_like(ids)
    ids[0, 4:], mask[0, 4:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
    with sparse.counting():
        loss = language_loss(sparse, batch)
        loss.backward()
    assert loss.isfinite() and all(value.grad is not None for value in sparse.adapter.values())
