"""benchmarks/sentiment: the stored labels, the data made from them, the planned runs, a place beside DPO's frontier."""

import json
import math
import statistics
import sys

import numpy as np
import pytest
import tyro
from conftest import ROOT, load_script, read_rows

pytest.importorskip("vaderSentiment")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "benchmarks" / "sentiment"))
import frontier  # noqa: E402
import make_data  # noqa: E402
import reward  # noqa: E402


def test_labels_are_as_noisy_as_bradley_terry_says(tmp_path):
    assert reward.reward([""], ["VADER is smart, handsome, and funny."]) == [0.8316]  # as VADER's authors print
    train, test = [read_rows(make_data.PAIRS / f"{split}.jsonl") for split in ("train", "test")]
    scores = [(row["chosen_score"], row["rejected_score"]) for row in train]
    again = [reward.reward(train, [row[side] for row in train]) for side in ("chosen", "rejected")]
    assert scores == list(zip(*again, strict=True))
    probs, right = [1 / (1 + math.exp(-4 * abs(a - b))) for a, b in scores if a != b], sum(a > b for a, b in scores)
    assert abs(right - sum(probs)) < 3 * math.sqrt(sum(p * (1 - p) for p in probs))
    make_data.derive(tmp_path)
    flipped = [read_rows(tmp_path / f"flipped-{percent}" / "train.jsonl") for percent in (0, 10, 30)]
    wrong = [sum(row["chosen_score"] < row["rejected_score"] for row in rows) / len(rows) for rows in flipped]
    assert wrong == pytest.approx([0, 0.1, 0.3], abs=1e-3)
    prompts, trained = [[str(row["prompt"]) for row in rows] for rows in (test, train)]
    assert len(set(prompts[:64])) == 64 and not set(prompts) & set(trained)
    assert prompts == [str(row["prompt"]) for row in read_rows(tmp_path / "thumbs" / "test.jsonl")]


def test_stored_runs_are_those_of_the_plan_and_of_the_page():
    runs, page = json.loads(frontier.RESULTS.read_text()), (frontier.HERE / "README.md").read_text()
    assert set(runs) == set(frontier.plan()) and page.split("## Results\n")[1] == frontier.write_tables(runs)
    for _, script, *flags in map(str.split, frontier.plan()):
        tyro.cli(load_script(script.removesuffix(".py")).Args, args=flags)


def test_a_run_beside_a_course():
    """The line through (KL, reward) (0, 0), (2, 1) and (4, 1) for a prompt, twice as high for the other."""

    def course(*points: tuple[float, float]) -> dict:
        places = [{"kl": kl, "each_judge_score": [height, 2 * height]} for kl, height in points]
        return {"evals": [{"step": step} | place for step, place in enumerate(places)]}

    line = course((0, 0), (4, 1), (2, 1))
    assert frontier.above(line, course((0, 0), (1, 0.7))).tolist() == pytest.approx([0.2, 0.4])  # the line is at 0.5
    assert frontier.below(line, course((0, 0), (9, 0.7))).tolist() == pytest.approx([0.3, 0.6])  # and level here, at 1
    both = course((0, 0), (1, 0.7), (9, 0.7))
    assert frontier.above(line, both).tolist() == pytest.approx([-0.05, -0.1])
    assert frontier.above(line, both, first_step=2).tolist() == pytest.approx([-0.3, -0.6])


def test_verdicts():
    steady, noisy, low = np.array([0.1, 0.2, 0.3]), np.array([-1.0, 0.1, 1.2]), np.array([-0.1, -0.1, 0.1])
    assert frontier.verdict([steady, steady]) == "holds" and frontier.verdict([-steady, -steady]) == "does not hold"
    assert frontier.verdict([noisy, noisy]) == "open" and frontier.verdict([low, 9 + steady]) == "open"
    values = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(noisy) / math.sqrt(3)
    assert frontier.interval(noisy) == pytest.approx(values, rel=1e-4)
