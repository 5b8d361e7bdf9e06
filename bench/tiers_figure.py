"""The README's figure: accuracy per tier with 95 % intervals over seeds, from the study's tables.

python bench/tiers_figure.py [--data docs/data] [--out docs/figures]     writes tiers.svg, tiers.png, tiers.csv
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib

from ubsmoe.report.comparison import interval
from ubsmoe.report.figures import STYLE, Rows, panels, save
from ubsmoe.report.series import COLOURS

SHOWN = (
    # label in the tables, its words, the file it stands in, hatch
    ("FlexLoRA at the tier's K", "rank-based (FlexLoRA), at the tier's compute", "compensation_baselines.csv", ".."),
    ("fedavg", "naive averaging", "compensation_confirmed.csv", "///"),
    ("UB-SMoE", "UB-SMoE as published (reconstructed)", "compensation_confirmed.csv", "\\\\\\"),
    ("fedavg, map", "naive averaging with compensation (ours)", "compensation_confirmed.csv", ""),
    ("UB-SMoE, map", "UB-SMoE with compensation (ours)", "compensation_confirmed.csv", ""),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("docs/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = panels(1, (6.6, 3.4))
        rows: Rows = []
        for index, (label, words, file, hatch) in enumerate(SHOWN):
            values = accuracy_by_top_k(options.data / file, label)
            found = {top_k: interval(of_seeds) for top_k, of_seeds in values.items()}
            rows += [
                {"method": label, "top_k": top_k, "seeds": len(values[top_k]), "accuracy": mean, "interval": half}
                for top_k, (mean, half) in found.items()
            ]
            look: dict[str, Any] = {"color": COLOURS[index], "hatch": hatch, "edgecolor": "white"}
            places = [tier + 0.17 * (index - 2) for tier in range(len(found))]
            means, halves = zip(*found.values(), strict=True)
            axes.bar(
                places, means, width=0.16, label=words, yerr=halves, ecolor="#555555", error_kw={"lw": 0.8}, **look
            )
        axes.set(ylabel="accuracy, % (chance 35.4)", xlabel="experts per token of the tier, K (K_max = 8)")
        axes.set_xticks(range(len(found)), [str(top_k) for top_k in found])
        axes.grid(axis="x", visible=False)
        axes.axhline(35.4, color="#888888", lw=0.8, ls=":")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        save(figure, rows, options.out / "tiers")


def accuracy_by_top_k(path: Path, label: str) -> dict[int, list[float]]:
    """Percent of the macro mean, per K one number for each seed."""
    found: dict[int, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] == label and row["task"] == "macro":
                found.setdefault(int(row["top_k"]), []).append(100 * float(row["accuracy"]))
    return found


if __name__ == "__main__":
    main()
