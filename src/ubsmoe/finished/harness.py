"""lm-evaluation-harness on a finished run, each tier with its own adapter and budget: the optional second opinion on `evaluate`."""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from ubsmoe.config import ConfigError
from ubsmoe.errors import require
from ubsmoe.finished.run import open_run
from ubsmoe.model.checkpoint import READ
from ubsmoe.server.generation import own_generation


def harness_scores(
    path: Path,
    tasks: list[str],
    tier: int | None = None,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Score the tiers of a finished run with the harness.

    Args:
        path: the run folder.
        tasks: the harness' names for them.
        tier: counted from 1; all when left out.
        include: folder of task files (YAML) beside the harness' own; one on local data needs no network.
        limit: examples per task; all when left out.
        batch_size: requests per forward pass.

    Returns:
        Per tier: tier, top_k, rank and the harness' metrics by task, such as "acc,none".

    Raises:
        UserError: if the harness is not installed, does not know a task, or cannot get its data.
    """
    require("lm_eval", "harness")
    evaluator, tasks_module, huggingface = (
        import_module(f"lm_eval.{name}") for name in ("evaluator", "tasks", "models.huggingface")
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include: {include} is no folder; expected one with task files in YAML")
    known = tasks_module.TaskManager(include_path=include and str(include))
    if unknown := sorted(set(tasks) - set(known.all_tasks)):
        raise ConfigError(f"--harness: the harness knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    try:
        loaded = known.load(tasks)
    except Exception as error:  # of many libraries; all mean that a task's data is not to be had
        raise ConfigError(f"--harness: cannot load {', '.join(tasks)}: {error}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    run = open_run(path)
    results = []
    for profile in run.tiers if tier is None else [run.tier(tier)]:
        sparse = run.install(profile)
        model = huggingface.HFLM(pretrained=sparse.model, tokenizer=run.tokenizer, batch_size=batch_size, **READ)
        with own_generation(sparse.model, run.tokenizer):
            found = evaluator.evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False)
        sparse.clear()
        scores = {
            name: {key: value for key, value in row.items() if key != "alias"} for name, row in found["results"].items()
        }
        results.append({"tier": profile.tier, "top_k": profile.top_k, "rank": profile.rank, "scores": scores})
    return results
