"""benchmarks/compare.py and report.py: the runs that are planned, how they are read, the statistics, and the page."""

import json
import math
import random
import re
import shlex
import sys

import pytest
import tyro
from conftest import ROOT, load_script, read_rows, start

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare  # noqa: E402

pytestmark = pytest.mark.slow
report = pytest.importorskip("report", reason="the figures need matplotlib")
RESULTS = json.loads(compare.RESULTS.read_text())


@pytest.fixture
def runs():
    """All runs with numbers that are made up."""
    luck, runs = random.Random(0), {}
    while todo := [command for command in compare.plan(runs) if command not in runs]:
        for command in todo:
            runs[command] = {"evals": [{"step": 0, "judge_score": 0.0}, {"step": 63, "judge_score": luck.random()}]}
    return runs


def test_commands_parse(runs):
    for command in runs:
        _, script, *flags = shlex.split(command)
        name = re.fullmatch(r"(?:runs/compare/)?(\w+)\.py", script)[1].replace("slic", "dpo")
        tyro.cli(load_script(name).Args, args=flags)


def test_tuning_takes_the_best_rate_and_then_the_best_strength(runs):
    scores = {}
    for (rate, strength), command in compare.tuning_runs(runs, "dpo").items():
        assert "--seed 0 --dataset-test-split validation" in command
        scores[rate, strength] = runs[command]["evals"][-1]["judge_score"]
    rate = max((1e-4, 3e-4, 1e-3), key=lambda rate: scores[rate, 0.1])
    strength = max((0.03, 0.1, 0.3), key=lambda strength: scores[rate, strength])
    assert len(scores) == 5 and compare.tuned(runs, "dpo") == (rate, strength)


def test_data(tmp_path, monkeypatch):
    """Deterministic labels are the judge's; prompts for tuning and for the tables have nothing in common."""
    monkeypatch.setattr(compare, "FOLDER", tmp_path)
    compare.write_data()
    names = ("deterministic/train", "pairs/test", "pairs/validation", "few-desirable/train")
    pairs, test, validation, few = [read_rows(tmp_path / f"{name}.jsonl") for name in names]
    prompts = [{row["prompt"][0]["content"] for row in rows} for rows in (test, validation)]
    assert len(test) == len(validation) == 256 and not prompts[0] & prompts[1]
    assert sum(row["label"] for row in few) == 256 and len(few) == 2816
    dpo, run = load_script("dpo"), start("dpo", ROOT / "toy/policy")
    rows = dpo.encode_rows(run, pairs[:40], "train")
    better, worse = [
        dpo.judge(run, str(ROOT / "toy/judge"), rows, [row[side][0]["content"] for row in pairs[:40]])
        for side in ("chosen", "rejected")
    ]
    assert all(score > other for score, other in zip(better, worse, strict=True))


@pytest.mark.parametrize("t", [0.0, 0.5, report.T975[4], 8.0])
def test_p_value(t):
    """Against the density of Student's t with four degrees of freedom, summed up."""
    noise = [-2.0, -1.0, 0.0, 1.0, 2.0]  # of standard deviation sqrt(2.5): its mean's is sqrt(0.5)
    step = 1e-3
    inside = sum(0.375 * (1 + (step * (k + 0.5)) ** 2 / 4) ** -2.5 for k in range(round(t / step))) * step
    assert report.p_value([value + t * math.sqrt(0.5) for value in noise]) == pytest.approx(1 - 2 * inside, abs=1e-3)
    assert t != report.T975[4] or 1 - 2 * inside == pytest.approx(0.05, abs=1e-4)


def test_holm():
    assert report.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_verdicts():
    assert report.verdict([1.0, 2.0], 0.04) == "holds" and report.verdict([-1.0, -2.0], 0.04) == "does not hold"
    assert report.verdict([1.0, 2.0], 0.06) == "open"
    assert report.together(["holds", "holds"]) == "holds" and report.together(["holds", "open"]) == "open"
    assert report.together(["open", "does not hold"]) == "does not hold"


def test_lengths_at_equal_kl():
    """Two straight lines, whose distance is 3 + 2 KL; it is taken at KLs from 2 to 4, on average 3."""
    dpo = {"evals": [{"kl": kl, "response_length": 25 - kl} for kl in (0.0, 1.0, 4.0)]}
    simpo = {"evals": [{"kl": kl, "response_length": 22 - 3 * kl} for kl in (0.0, 3.0, 6.0)]}
    assert report.shorter_at_equal_kl(dpo, simpo) == pytest.approx(9.0)


def test_stored_runs_are_those_of_the_plan():
    assert set(RESULTS["runs"]) == set(compare.plan(RESULTS["runs"]))


def test_stored_page_is_that_of_the_stored_runs():
    assert (ROOT / "benchmarks" / "results.md").read_text() == report.write_page(RESULTS)


def test_front_page_has_the_stored_numbers():
    for script in compare.DEFAULTS:
        last = RESULTS["runs"][f"python {script}.py"]["evals"][-1]
        row = re.search(rf"^\| \[{script}\.py\].*$", (ROOT / "README.md").read_text(), re.M)[0]
        assert row.endswith(f"| {last['win_rate']:.2f} | {last['kl']:.1f} |")
