"""What answering the test questions takes, per tier: FLOPs and memory, at most.

A prompt is read once, to rank its candidates and to write an answer, which is taken to be as long as it may be; a beam search
reads it once more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ubsmoe.config import RunSettings
from ubsmoe.costs.flops import forward_flops_per_token
from ubsmoe.costs.memory import evaluation_memory_bytes
from ubsmoe.costs.tiers import TierCost
from ubsmoe.costs.workload import Batch
from ubsmoe.data.sources import load_test
from ubsmoe.data.tasks import Example
from ubsmoe.data.tokens import tokenize
from ubsmoe.plan.tiers import TierPlan


@dataclass(frozen=True)
class Asked:
    """One test question: tokens of its prompt and of one candidate, and how many candidates are ranked."""

    prompt: int
    completion: int
    candidates: int


def read_questions(settings: RunSettings, tokenizer: Any) -> list[Asked]:
    """The run's test questions; as long as data.max_length allows where there is no tokenizer. Raises UserError."""
    groups = load_test(settings.data, tokenizer, settings.seed)
    chosen = [example for group in groups.values() for example in group[: settings.evaluate.max_examples]]
    if tokenizer is None:
        return [_longest(settings, example) for example in chosen]
    tokens = tokenize(chosen, tokenizer, settings.data, "test")
    pairs = zip(chosen, tokens, strict=True)
    return [
        Asked(one.prompt_length, len(one.input_ids) - one.prompt_length, _ranked(settings, example))
        for example, one in pairs
    ]


def evaluations(settings: RunSettings) -> int:
    """How often a run evaluates."""
    rounds, evaluate = settings.train.rounds, settings.evaluate
    between = rounds // evaluate.every if evaluate.every else 0
    last = evaluate.after and not (evaluate.every and rounds % evaluate.every == 0)
    return evaluate.before + between + last


def evaluation_costs(
    settings: RunSettings, plan: TierPlan, questions: Sequence[Asked], speed: float
) -> Mapping[str, Any]:
    """All evaluations of a run, in FLOPs and seconds, and the memory of the tier that needs most.

    Args:
        settings: the run.
        plan: its tiers.
        questions: its test questions.
        speed: FLOPs per second.
    """
    times = evaluations(settings)
    flops = times * sum(_flops(settings, plan, cost, one) for cost in plan.costs for one in questions)
    memory = max(_memory(settings, plan, cost, questions) for cost in plan.costs) if times and questions else 0
    return {
        "times": times,
        "questions": len(questions),
        "flops": flops,
        "seconds": flops / speed,
        "memory_bytes": memory,
    }


def _flops(settings: RunSettings, plan: TierPlan, cost: TierCost, one: Asked) -> float:
    written = one.candidates * one.completion + _beams(settings) * settings.evaluate.max_new_tokens
    batch = Batch.full(1, one.prompt + max(one.completion, settings.evaluate.max_new_tokens))
    per_token = forward_flops_per_token(plan.shape, cost.top_k, replace(plan.of(cost), batch=batch))
    body = per_token.total - per_token.head
    reads = 1 if settings.evaluate.decoding == "greedy" else 2
    return body * (reads * one.prompt + written) + per_token.head * (reads + written)


def _memory(settings: RunSettings, plan: TierPlan, cost: TierCost, questions: Sequence[Asked]) -> int:
    evaluate, count = settings.evaluate, min(settings.evaluate.batch_size, len(questions))
    prompt, completion = (max(getattr(one, part) for one in questions) for part in ("prompt", "completion"))
    candidates = max(one.candidates for one in questions)
    length = prompt + max(completion, evaluate.max_new_tokens)
    workload = replace(plan.of(cost), batch=Batch.full(count, length))
    rows, labelled = count * max(candidates, _beams(settings)), count * candidates * completion
    return evaluation_memory_bytes(plan.shape, cost.top_k, workload, rows, labelled)


def _beams(settings: RunSettings) -> int:
    return settings.evaluate.num_beams if settings.evaluate.decoding == "beam" else 1


def _ranked(settings: RunSettings, example: Example) -> int:
    return max(1, len(example.candidates)) if settings.evaluate.mc_accuracy else 1


def _longest(settings: RunSettings, example: Example) -> Asked:
    most = settings.data.max_length
    return Asked(most, settings.evaluate.max_new_tokens, _ranked(settings, example))
