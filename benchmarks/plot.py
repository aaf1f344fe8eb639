"""Show the curves of runs from their metrics.jsonl.

    python benchmarks/plot.py runs/A runs/B --output curves.png    # a picture with a panel for each metric
    python benchmarks/plot.py runs/A                               # text: first value, last value and course of each

The picture leaves out panels that no run has numbers for. Steps are counted through all stages of a run.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

PANELS = {
    "train/loss": "training loss",
    "eval/loss": "loss on the test set",
    "eval/rewards/margins": "reward margin of the test pairs",
    "eval/rewards/accuracies": "reward accuracy on the test pairs",
    "eval/reward_model/rewards/accuracies": "reward model's accuracy on the test pairs",
    "train/reward": "reward of training answers (grpo.py)",
    "train/score": "reward of training answers (rlhf_ppo.py)",
    "eval/kl": "KL to the initial model (nats a response)",
    "eval/judge_score": "judge's mean score of responses",
    "eval/win_rate": "win rate against the initial model (band: 95 %)",
    "eval/response_length": "response length (tokens)",
}


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]  # folders of runs
    output: Path | None = None  # picture to write; None = print the curves as text


def read_run(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    if not file.exists():
        sys.exit(f"error: {folder} is not the folder of a run: it has no {file.name}")
    return [json.loads(line) for line in file.read_text().splitlines()]


def print_curves(rows: list[dict]) -> None:
    """A line for each metric: its first value, its last one, and at most 50 as bars."""
    for metric in dict.fromkeys([name for row in rows for name in row if name != "step"]):
        values = [row[metric] for row in rows if metric in row]
        low, high, count = min(values), max(values), min(50, len(values))
        shown = [values[i * (len(values) - 1) // max(1, count - 1)] for i in range(count)]
        bars = ["▁▂▃▄▅▆▇█"[int(7.99 * (value - low) / (high - low or 1))] for value in shown]
        print(f"  {metric:36} {values[0]:10.4g} {values[-1]:10.4g}  {''.join(bars)}")


def draw_curve(axes, rows: list[dict], metric: str, run: str) -> None:
    """The curve of a run, if it has the metric."""
    rows = [row for row in rows if metric in row]
    steps, values = [row["step"] for row in rows], [row[metric] for row in rows]
    (line,) = axes.plot(steps, values, marker="o" if metric.startswith("eval/") else "", markersize=3, label=run)
    intervals = [row.get(f"{metric}_ci95", 0.0) for row in rows]
    lower = [value - interval for value, interval in zip(values, intervals, strict=True)]
    upper = [value + interval for value, interval in zip(values, intervals, strict=True)]
    if any(intervals):
        axes.fill_between(steps, lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)


def draw(runs: dict[str, list[dict]], output: Path) -> None:
    import matplotlib  # not needed for text

    matplotlib.use("Agg")  # it draws without a screen
    import matplotlib.pyplot as plt

    metrics = [metric for metric in PANELS if any(metric in row for rows in runs.values() for row in rows)]
    if not metrics:
        sys.exit("error: the runs have no numbers yet")
    columns = min(4, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.8 * lines), squeeze=False, layout="constrained"
    )
    for axes, metric in zip(grid.flat, metrics, strict=False):
        for name, rows in runs.items():
            draw_curve(axes, rows, metric, name)
        axes.set_title(PANELS[metric], fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(metrics) :]:
        axes.set_axis_off()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(runs)))
    figure.savefig(output, dpi=100)


def main(args: Args) -> None:
    runs = {str(folder): read_run(folder) for folder in args.runs}
    if args.output:
        draw(runs, args.output)
    else:
        for name, rows in runs.items():
            print(name)
            print_curves(rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
