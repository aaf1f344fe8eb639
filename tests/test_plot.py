"""benchmarks/plot.py, the curves of runs."""

import pytest
from conftest import load_script, write_rows

pyplot = pytest.importorskip("matplotlib.pyplot")
plot = load_script("benchmarks/plot")


def write_run(folder, evals, **metrics):
    rows = [{"step": step, "train/loss": 1 / step} | metrics for step in range(1, 4)]
    write_rows(folder / "metrics.jsonl", [{"step": 0} | evals[0], *rows, {"step": 4, "train/loss": 0.1} | evals[1]])
    return folder


def test_picture_has_the_numbers_of_each_run(tmp_path):
    """A run without evaluation, as with --num-eval-prompts 0, is drawn as far as it goes."""
    first = [{"eval/win_rate": rate, "eval/win_rate_ci95": 0.1 * rate, "eval/kl": rate} for rate in (0.5, 0.8)]
    runs = [write_run(tmp_path / "a", [row | {"eval/response_length": 20.0} for row in first])]
    runs.append(write_run(tmp_path / "b", [{"eval/response_length": 20.0}, {"eval/response_length": 9.0}]))
    runs.append(write_run(tmp_path / "c", [{}, {}], **{"train/reward": 2.0}))
    plot.main(plot.Args(runs, tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    figure = pyplot.gcf()
    panels = [axes for axes in figure.axes if axes.axison]
    shown = ["train/loss", "train/reward", "eval/kl", "eval/win_rate", "eval/response_length"]
    assert [axes.get_title() for axes in panels] == [plot.PANELS[metric] for metric in shown]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(run) for run in runs]
    curves = [[line.get_xydata().tolist() for line in axes.lines] for axes in panels]
    assert curves[0] == [[[1, 1], [2, 1 / 2], [3, 1 / 3], [4, 0.1]]] * 3
    assert curves[1] == [[], [], [[1, 2], [2, 2], [3, 2]]]
    assert curves[4] == [[[0, 20], [4, 20]], [[0, 20], [4, 9]], []]


def test_text_has_first_value_last_value_and_course(tmp_path, capsys):
    write_rows(tmp_path / "metrics.jsonl", [{"step": i, "train/loss": 400 - 2 * i} for i in range(99)])
    plot.main(plot.Args([tmp_path]))
    name, first, last, bars = capsys.readouterr().out.splitlines()[1].split()
    assert (name, first, last, bars[0], bars[-1], len(bars)) == ("train/loss", "400", "204", "█", "▁", 50)
