"""Run folders as `server.run.run` leaves them, without the hours: every number drawn from a seed."""

from pathlib import Path

import torch

from ubsmoe.config import parse_run, to_json
from ubsmoe.maths import balance
from ubsmoe.storage.runfolder import RunFolder

LAYERS, EXPERTS, ROUNDS, KS = 4, 32, 3, (2, 4, 6, 8)  # the shipped base's sizes: the costs are counted from it


def write_run(
    folder: Path, method: str = "ubsmoe", seed: int = 0, phi: bool = True, finished: bool = True, after: float = 0.7
) -> Path:
    settings = parse_run(
        {"seed": seed, "clients": {"count": 4}, "train": {"rounds": ROUNDS}, "method": {"name": method}}
    )
    draw = torch.Generator().manual_seed(seed)
    with RunFolder.open_or_create(folder, to_json(settings)) as run:
        counts = {"task": 30 + seed, "<other>": 10}  # another seed, another split
        share = {"size": 40 + seed, "counts": counts}
        report = {
            "field": "task",
            "mean_total_variation": 0.25,
            "clients": [{"client": i, **share} for i in range(len(KS))],
        }
        run.events.append("partition", 0, report=report)
        before = _evaluate(run, 0, 0.2)
        for number in range(1, ROUNDS + 1):
            for tier, top_k in enumerate(KS):
                run.events.append(
                    "client", number, client=f"client-{tier}", tier=tier, top_k=top_k, rank=8, examples=40,
                    tokens=1000, assignments=1000 * top_k, loss=1 / number, seconds=top_k / 10,
                    upload_bytes=10_000 * top_k, download_bytes=90_000, steps=_steps(number, tier),
                )  # fmt: skip
            run.events.append("dropped", number, client="client-4", stage="deadline", reason="answered < too late")
            used = torch.rand(LAYERS, EXPERTS, generator=draw, dtype=torch.float64) + 0.1 * number
            extras = {"phi": (0.5 - used).tolist()} if phi else {}
            run.events.append(
                "round", number, seconds=2.0, loss=1 / number, entropy=balance.normalised_entropy(used).tolist(),
                gini=balance.gini(used).tolist(), dead_experts=0, utilization=used.tolist(), **extras,
            )  # fmt: skip
        last = _evaluate(run, ROUNDS, after)
        if finished:
            run.write_summary({"seconds": 6.0, "adapter_sha256": "ab" * 32, "before": before, "after": last})
    return folder


def _steps(number: int, tier: int) -> dict[str, list[float]]:
    """Steps 2 and 4 of a round."""
    norms = [tier + 2.0, tier + 1.0]
    return {
        "number": [2, 4],
        "loss": [2 / number, 1 / number],
        "learning_rate": 2 * [0.01 / number],
        "gradient_norm": norms,
    }


def _evaluate(run: RunFolder, number: int, accuracy: float) -> list[dict[str, dict[str, float]]]:
    results = []
    for tier, top_k in enumerate(KS):
        score = {"examples": 50, "loss": 1.0 - 0.1 * tier, "accuracy": accuracy + 0.05 * tier, "unparsed": 0.02}
        score |= {"mc_accuracy": accuracy, "chance": 0.25, "majority": 0.3}
        results.append({"task": score, "macro": score})
        said = {
            "task": "task",
            "prompt": "Is <it>?",
            "truth": "yes",
            "said": "yes" if number else "no",
            "right": number > 0,
        }
        run.events.append("answers", number, tier=tier, answers=[said])
        run.events.append("evaluated", number, tier=tier, top_k=top_k, rank=8, scores=results[-1])
    return results
