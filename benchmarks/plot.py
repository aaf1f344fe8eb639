"""Draw the curves of runs from their metrics.jsonl into one picture, a panel for each metric.

    python benchmarks/plot.py runs/A runs/B --output curves.png

The band around a win rate is its 95 % interval. A panel that no run has numbers for is left out.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")  # it draws without a screen
import matplotlib.pyplot as plt  # noqa: E402

PANELS = {
    "train/loss": "training loss",
    "eval/rewards/accuracies": "reward accuracy",
    "eval/win_rate": "win rate against the initial model",
    "eval/kl": "KL to the initial model (nats)",
    "eval/response_length": "response length (tokens)",
    "eval/judge_score": "judge's score",
}


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]  # folders of runs
    output: Path = Path("curves.png")  # picture to write


def read_run(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    if not file.exists():
        sys.exit(f"error: {folder} is not the folder of a run: it has no {file.name}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if not any("eval/response_length" in row for row in rows):
        sys.exit(f"error: the run in {folder} has no evaluation yet")
    return rows


def draw(axes: plt.Axes, rows: list[dict], metric: str, run: str) -> None:
    """The curve of a run, if it has the metric."""
    rows = [row for row in rows if metric in row]
    steps, values = [row["step"] for row in rows], [row[metric] for row in rows]
    (line,) = axes.plot(steps, values, marker="o" if metric.startswith("eval/") else "", markersize=3, label=run)
    intervals = [row.get(f"{metric}_ci95", 0.0) for row in rows]
    lower = [value - interval for value, interval in zip(values, intervals, strict=True)]
    upper = [value + interval for value, interval in zip(values, intervals, strict=True)]
    if any(intervals):
        axes.fill_between(steps, lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)


def main(args: Args) -> None:
    runs = [(folder.resolve().name, read_run(folder)) for folder in args.runs]
    metrics = [metric for metric in PANELS if any(metric in row for _, rows in runs for row in rows)]
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.8 * lines), squeeze=False, layout="constrained"
    )
    for axes, metric in zip(grid.flat, metrics, strict=False):
        for name, rows in runs:
            draw(axes, rows, metric, name)
        axes.set(title=PANELS[metric], xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(metrics) :]:
        axes.set_axis_off()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(runs)))
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
