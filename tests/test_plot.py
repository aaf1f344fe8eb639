"""benchmarks/plot.py, the curves of runs."""

import pytest
from conftest import load_script, write_rows

pytest.importorskip("matplotlib")
plot = load_script("benchmarks/plot")


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plot.plt.close("all")


def write_run(folder, evals):
    rows = [{"step": step, "train/loss": 1 / step} for step in range(1, 4)]
    write_rows(folder / "metrics.jsonl", [{"step": 0} | evals[0], *rows, {"step": 4, "train/loss": 0.1} | evals[1]])
    return folder


def test_picture_has_the_numbers_of_each_run(tmp_path):
    first = [{"eval/win_rate": rate, "eval/win_rate_ci95": 0.1 * rate, "eval/kl": rate} for rate in (0.5, 0.8)]
    runs = [write_run(tmp_path / "a", [row | {"eval/response_length": 20.0} for row in first])]
    runs.append(write_run(tmp_path / "b", [{"eval/response_length": 20.0}, {"eval/response_length": 9.0}]))
    plot.main(plot.Args(runs, tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    figure = plot.plt.gcf()
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    shown = ["train/loss", "eval/win_rate", "eval/kl", "eval/response_length"]
    assert list(panels) == [plot.PANELS[metric] for metric in shown]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    lengths = [line.get_xydata().tolist() for line in panels["response length (tokens)"].lines]
    assert lengths == [[[0, 20], [4, 20]], [[0, 20], [4, 9]]]
    (band,) = panels["win rate against the initial model"].collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6).tolist()}
    assert corners == {(0, 0.45), (0, 0.55), (4, 0.72), (4, 0.88)}


def test_what_is_no_run_and_what_has_no_evaluation(tmp_path):
    with pytest.raises(SystemExit, match="error: .* is not the folder of a run"):
        plot.main(plot.Args([tmp_path], tmp_path / "curves.png"))
    write_run(tmp_path / "a", [{}, {}])
    with pytest.raises(SystemExit, match="error: the run in .*a has no evaluation yet"):
        plot.main(plot.Args([tmp_path / "a"], tmp_path / "curves.png"))
    assert not (tmp_path / "curves.png").exists()
