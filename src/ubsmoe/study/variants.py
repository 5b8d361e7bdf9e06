"""What a comparison compares: methods by name, or a TOML file of variants.

[[variants]]
method = {name = "ubsmoe", pg = false}      # as in a run file
train.learning_rate = 3e-3                  # any other setting that may vary
label = "slow"                              # optional; else the method and its settings
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ubsmoe.config import ConfigError, RunSettings, parse_table, read_toml
from ubsmoe.config.plug_ins import plug_in
from ubsmoe.report.series import label_of
from ubsmoe.storage.same_run import flatten

TUNABLE = ("adapter", "tiers", "train", "wire", "robust")
"""Sections of the run file that a variant may change for itself."""
WORK = (
    *("train.rounds", "train.local_steps", "train.local_epochs", "train.batch_size", "train.gradient_accumulation"),
    "train.patience",
    *("tiers.budgets", "tiers.k_max"),
)
"""Settings within them that it may not: they are how much work is done, and by whom."""


@dataclass(frozen=True)
class Variant:
    """One row of the comparison: [method], and what it changes in the rest of the run file, by dotted key.

    Files that it names, such as a plug-in's, lie in `folder`, or where the command is started.
    """

    label: str
    method: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    def settings_in(self, settings: RunSettings, seed: int) -> RunSettings:
        """The run file of one cell. Raises ConfigError for a change that makes no sense."""
        # a label of the run file's own would be that of every variant
        label = None if self.label == label_of(self.method) else self.label
        own = {"method": dict(self.method), "seed": seed, "label": label, **self.changes}
        return parse_table(settings.model_dump(mode="json"), own, self.folder)


def choose_variants(methods: str | None, file: Path | None, folder: Path = Path()) -> list[Variant]:
    """The variants of --methods, names with commas between them, or of the file of --variants.

    Args:
        methods: the first.
        file: the second.
        folder: of the run file, where plug-ins lie.

    Raises:
        ConfigError: unless exactly one is given; for settings beside a name; for what is no list of different variants; for a
            change that would give a variant other work than the rest has.

    >>> [variant.label for variant in choose_variants("fedavg, ubsmoe", None)]
    ['fedavg', 'ubsmoe']
    """
    if (methods is None) == (file is None):
        raise ConfigError("give either --methods, such as fedavg,ubsmoe, or --variants FILE.toml")
    variants = _named(methods, folder) if methods is not None else _read(file or Path(), folder)
    labels = [variant.label for variant in variants]
    if not labels or len(set(labels)) < len(labels):
        raise ConfigError(f"expected a list of different variants, got {', '.join(labels) or 'none'}")
    return variants


def _named(methods: str, folder: Path) -> list[Variant]:
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if not name.isidentifier() and plug_in(name) is None:
            raise ConfigError(
                f"--methods takes names such as fedavg,ubsmoe,mine:method, got {name!r}; settings stand in a file for "
                "--variants:\n\n"
                '[[variants]]\nmethod = {name = "ubsmoe", pg = false}\ntrain.learning_rate = 3e-3'
            )
    return [Variant(label_of({"name": name}), {"name": name}, folder=folder) for name in names]


def _read(file: Path, folder: Path) -> list[Variant]:
    table = read_toml(file)
    entries = table.pop("variants", None)
    if table or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{file}: expected [[variants]] and nothing else")
    return [_variant(entry, f"{file}, variant {number}", folder) for number, entry in enumerate(entries, 1)]


def _variant(entry: dict[str, Any], where: str, folder: Path) -> Variant:
    method = entry.pop("method", None)
    method = {"name": method} if isinstance(method, str) else method
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise ConfigError(f'{where}: expected method = {{name = "...", ...}}, got {method!r}')
    label = entry.pop("label", None)
    changes = flatten(entry)
    for key in changes:
        if key.partition(".")[0] not in TUNABLE or key in WORK:
            raise ConfigError(
                f"{where} changes {key}, so it would not do the work of the others; set it for all with --set"
            )
    return Variant(str(label or label_of({**method, **changes})), method, changes, folder)
