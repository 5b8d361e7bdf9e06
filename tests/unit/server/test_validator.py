"""The validator: an honest update passes, every lie has its own reason, and the others' round goes on."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from ubsmoe.config import parse_run
from ubsmoe.errors import RoundError
from ubsmoe.messages import Dropped, Reply, Step, Task, Update
from ubsmoe.methods import build
from ubsmoe.methods.method import Method, RunShape
from ubsmoe.server.update_checks import Rejected, UpdateSpec, check_update, spec_of
from ubsmoe.server.validator import UpdateSpecs, Validator
from ubsmoe.wire.codec import decode_update, encode_update
from ubsmoe.wire.packed import MAX_HEADER_BYTES, Packed, WireError
from unit.wire.messages import COUNTS, PAYLOAD, TASK, UPDATE

A = "layers.0.up.A"
SPEC = UpdateSpec(spec_of(UPDATE.adapters), spec_of(UPDATE.extras), (COUNTS.shape, COUNTS.dtype))
SENT = UPDATE.adapters[A]


STEP = Step(1, 2.0, 0.01, 0.5)


def reason(update: Update, run: Sequence[int] = (2,)) -> str:
    with pytest.raises(Rejected) as caught:
        check_update(update, TASK, SPEC, max_change=1.0, run=run)
    return str(caught.value)


def test_an_honest_update_passes() -> None:
    check_update(UPDATE, TASK, SPEC, max_change=1.0, run=(2,))


def poisoned(value: float) -> torch.Tensor:
    tensor = SENT.clone()
    tensor[2, 1, 3] = value
    return tensor


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (poisoned(float("nan")), f"{A} holds NaN or infinity"),
        (poisoned(float("inf")), f"{A} holds NaN or infinity"),
        (poisoned(-float("inf")), f"{A} holds NaN or infinity"),
        (poisoned(1e30), "weights changed by"),
        (SENT[:, :2], f"{A} has shape [5, 2, 4], expected [5, 3, 4]"),
        (SENT[:, :1], f"{A} has shape [5, 1, 4], expected [5, 3, 4]"),  # would broadcast
        (SENT[None], f"{A} has shape [1, 5, 3, 4], expected [5, 3, 4]"),
        (SENT.mT, f"{A} has shape [5, 4, 3], expected [5, 3, 4]"),
        (SENT[:0], f"{A} has shape [0, 3, 4], expected [5, 3, 4]"),
        (torch.cat([SENT, SENT[:1]]), f"{A} has shape [6, 3, 4], expected [5, 3, 4]"),
        (SENT.to(torch.int8), f"{A} is torch.int8, expected torch.float32"),
        (SENT.double(), f"{A} is torch.float64, expected torch.float32"),
        (SENT.to(torch.complex64), f"{A} is torch.complex64, expected torch.float32"),
        (SENT.to(torch.float8_e4m3fn), f"{A} is torch.float8_e4m3fn, expected torch.float32"),
    ],
)
def test_a_tensor_that_is_not_as_asked_is_named(tensor: torch.Tensor, sentence: str) -> None:
    assert sentence in reason(replace(UPDATE, adapters={A: tensor}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"adapters": {}}, f"adapters lack '{A}'"),
        ({"adapters": {A: SENT, "model.embed_tokens.weight": SENT}}, "have 'model.embed_tokens.weight'"),
        ({"extras": {"phi": PAYLOAD["phi"]}}, "extras lack 'rank'"),
        ({"round": 3}, "round is 3, expected 4"),
        ({"run": "other"}, "run is 'other', expected 'run-1'"),
        ({"base": "beef"}, "base is 'beef', expected 'f00d'"),
        ({"tier": 0}, "tier is 0, expected 1"),
        ({"num_examples": 10**12}, "num_examples is 1000000000000, announced were 7"),
        ({"num_examples": True}, "num_examples is True"),
        ({"num_examples": 7.0}, "num_examples is 7.0"),
        ({"loss": float("nan")}, "loss is nan"),
        ({"expert_tokens": COUNTS[:1]}, "expert_tokens has shape [1, 5], expected [2, 5]"),
        ({"expert_tokens": COUNTS - torch.tensor([0, 0, 0, 1, -1])}, "expert_tokens reach from -1"),
        (
            {"expert_tokens": COUNTS + torch.tensor([1, -1, 0, 0, 0])},
            "expert_tokens reach from 0 to 4, expected 0 to 3",
        ),
        (
            {"expert_tokens": COUNTS - torch.tensor([[0], [1]]) * (COUNTS == 2)},
            "of layer 1 sum to 5, expected assignments = 6",
        ),
        ({"tokens": 0, "assignments": 0}, "0 assignments for 0 tokens"),
        ({"assignments": 5}, "5 assignments for 3 tokens at K = 2"),
        ({"assignments": 7}, "7 assignments for 3 tokens at K = 2"),
        ({"steps": (STEP, STEP)}, "steps are numbered [1, 1], expected at most 16 that ascend from 1"),
        ({"steps": (STEP._replace(number=0),)}, "steps are numbered [0]"),
        ({"steps": tuple(STEP._replace(number=i) for i in range(1, 18))}, "expected at most 16"),
        ({"steps": (STEP._replace(gradient_norm=float("nan")),)}, "step 1 holds NaN or infinity"),
    ],
)
def test_a_lie_is_named(change: dict[str, Any], sentence: str) -> None:
    assert sentence in reason(replace(UPDATE, **change))


def test_elastic_steps_may_use_fewer_slots_but_never_less_than_one_per_token() -> None:
    fewer = replace(UPDATE, assignments=5, expert_tokens=torch.tensor([[3, 2, 0, 0, 0], [1, 1, 1, 1, 1]]))
    check_update(fewer, TASK, SPEC, max_change=1.0, run=(1, 2))
    too_few = replace(UPDATE, assignments=2, expert_tokens=torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]))
    assert "2 assignments for 3 tokens" in reason(too_few, run=(1, 2))


def test_the_change_is_measured_over_all_weights_that_were_sent() -> None:
    """60 weights moved by 1/4, 10 not at all: sqrt(60 / 16 / 70) = 0.2315."""
    with pytest.raises(Rejected, match=r"changed by 0\.231 .* at most 0\.23 \(rounds\.max_change\)"):
        check_update(UPDATE, TASK, SPEC, max_change=0.23, run=(2,))
    check_update(UPDATE, TASK, SPEC, max_change=0.232, run=(2,))


METHOD = build("fedavg", RunShape(num_layers=2, num_experts=5, k_max=2, rank=3, alpha=6.0))


class Known(UpdateSpecs):
    """The form of every update in this file, without a base."""

    def __init__(self) -> None:
        pass

    def __call__(self, task: Task) -> UpdateSpec:
        return SPEC


def through(
    replies: list[Reply], wanted: int, quorum: float = 0.5, method: Method = METHOD
) -> tuple[list[str], list[Dropped]]:
    """Replies to tasks of clients a to d as a round takes them: who counts, and who was dropped."""
    validator = Validator(Known(), parse_run({"rounds": {"quorum": quorum}}), method, wanted)
    asked = {client: replace(TASK, profile=replace(TASK.profile, client=client)) for client in "abcd"}
    passed: list[str] = []
    dropped: list[Dropped] = []
    for reply in replies:
        task = asked.pop(reply.client, None)
        lost = reply if isinstance(reply, Dropped) else validator.fault(reply, task, TASK.round)
        if lost:
            dropped.append(lost)
        else:
            passed.append(reply.client)
    validator.check_quorum(len(passed), TASK.round)
    return passed, dropped


def test_a_bad_update_is_dropped_and_the_others_count() -> None:
    replies = [
        replace(UPDATE, client="a"),
        replace(UPDATE, client="b", adapters={A: poisoned(float("nan"))}),
        Dropped("c", 4, "deadline", "too late"),
        replace(UPDATE, client="d"),
    ]
    passed, dropped = through(replies, wanted=4)
    assert passed == ["a", "d"]
    assert dropped == [Dropped("b", 4, "validation", f"{A} holds NaN or infinity"), replies[2]]


def test_what_the_method_finds_wrong_drops_an_update_too() -> None:
    picky = replace(METHOD, validate_update=lambda update: "its rank is 0" if update.client == "b" else None)
    passed, dropped = through([replace(UPDATE, client=client) for client in "ab"], wanted=2, method=picky)
    assert passed == ["a"]
    assert [(one.client, one.stage, one.reason) for one in dropped] == [("b", "validation", "its rank is 0")]


def test_a_second_answer_and_one_that_nobody_asked_for_do_not_count() -> None:
    passed, dropped = through([replace(UPDATE, client=client) for client in ("a", "a", "stranger", "b")], wanted=4)
    assert passed == ["a", "b"]
    assert [(one.client, one.reason.split(",")[0]) for one in dropped] == [
        ("a", "nothing was asked of this client"),
        ("stranger", "nothing was asked of this client"),
    ]


@pytest.mark.parametrize(("quorum", "wanted", "enough"), [(0.5, 4, 2), (0.51, 4, 3), (1.0, 3, 3), (0.0, 4, 1)])
def test_a_round_needs_its_quorum(quorum: float, wanted: int, enough: int) -> None:
    replies: list[Reply] = [replace(UPDATE, client=client) for client in "abcd"]
    assert len(through(replies[:enough], wanted, quorum)[0]) == enough
    with pytest.raises(RoundError, match=f"round 4: {enough - 1} updates count, rounds.quorum asks for {enough}"):
        through(replies[: enough - 1], wanted, quorum)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("experts", [1, 4, 5])
def test_what_an_update_may_weigh_is_known_before_it_comes(dtype: Any, experts: int) -> None:
    """However many of the five experts changed; one byte more than that is refused unread."""
    changed = {
        name: value + (torch.arange(len(value)) < experts).view(-1, 1, 1)
        for name, value in TASK.payload.items()
        if name in UPDATE.adapters
    }
    packed = encode_update(replace(UPDATE, adapters=changed), TASK.payload, dtype)
    size = len(packed.header) + len(packed.tensors)
    assert size <= SPEC.most_bytes <= size + sum(value.nbytes for value in changed.values()) + 2 * MAX_HEADER_BYTES
    assert decode_update(packed, SPEC.most_bytes, TASK.payload).client == UPDATE.client
    padded = Packed(packed.header, packed.tensors + bytes(SPEC.most_bytes - size + 1))
    with pytest.raises(
        WireError, match=f"a message of {SPEC.most_bytes + 1} bytes.*; at most {SPEC.most_bytes} are taken"
    ):
        decode_update(padded, SPEC.most_bytes, TASK.payload)
