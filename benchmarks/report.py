"""Writes results.md, frontier.png and claims.png from results.json alone: tables, verdicts and figures.

python benchmarks/report.py
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import compare
import matplotlib
import numpy as np
from compare import METHODS, SEEDS, VARIANTS

matplotlib.use("Agg")  # it draws without a screen
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = Path(__file__).resolve().parent
T975 = {2: 4.303, 4: 2.776}  # quantile of Student's t, by degrees of freedom
RETIRED = 1  # comparisons that were made and are no longer shown; they still count in the correction
DRAWN = {"spin": 3840, "oaif": 5120, "ppo": 2560, "grpo": 5120}  # answers that the policy writes for training


@dataclass
class Comparison:
    text: str
    commands: Callable[[int], list[str]]  # of a seed
    difference: Callable  # of the records of these runs


@dataclass
class Claim:
    title: str
    text: str
    comparisons: list[Comparison]


# === What is compared ===


def final(record: dict, metric: str = "judge_score") -> float:
    return record["evals"][-1][metric]


def less(metric: str) -> Callable:
    return lambda first, second: final(first, metric) - final(second, metric)


def gain(iteration: int) -> Callable:
    """What SPIN's iteration adds to the judge's score: it is evaluated before the first and after each."""
    return lambda spin: spin["evals"][iteration + 1]["judge_score"] - spin["evals"][iteration]["judge_score"]


def improvement(record: dict) -> float:
    return final(record) - record["evals"][0]["judge_score"]


def less_growth(dpo: dict, ipo: dict) -> float:
    """DPO's growth less IPO's: of the mean training margin, from passes 6 to 10 to passes 16 to 20."""
    growths = []
    for record in (dpo, ipo):
        growths.append(statistics.mean(record["margins"][15:20]) - statistics.mean(record["margins"][5:10]))
    return growths[0] - growths[1]


def shorter_at_equal_kl(dpo: dict, simpo: dict) -> float:
    """Tokens of DPO's answers less SimPO's, mean over five KLs in the upper half of the range that both runs cover."""
    courses = []
    for record in (dpo, simpo):
        points = sorted([(row["kl"], row["response_length"]) for row in record["evals"]])
        courses.append(list(zip(*points, strict=True)))
    end = min(course[0][-1] for course in courses)
    first, second = [np.interp(np.linspace(end / 2, end, 5), *course).mean() for course in courses]
    return float(first - second)


def claims(results: dict) -> list[Claim]:
    runs, accuracy = results["runs"], results["builds"]["annotator-2"]["accuracy"]

    def of(*names: str) -> Callable[[int], list[str]]:
        return lambda seed: [compare.tuned_run(runs, name, seed) for name in names]

    def guides(seed: int) -> list[str]:
        return [compare.simpo_guide_run(runs, seed), compare.tuned_run(runs, "simpo", seed)]

    def margins(beta: float) -> Callable[[int], list[str]]:
        return lambda seed: [compare.deterministic_run(script, beta, seed) for script in ("dpo.py", "ipo.py")]

    def small_annotator(seed: int) -> list[str]:
        return [compare.small_annotator_run(runs, seed)]

    def places(loss: str) -> Callable[[int], list[str]]:
        return lambda seed: [compare.online_run(runs, loss, seed), compare.offline_run(runs, loss, seed)]

    score = less("judge_score")
    return [
        Claim(
            "SPIN reaches DPO without preferences",
            "SPIN sees only the chosen answers. Its paper reports scores as good as those of DPO with preference "
            "data, or better.",
            [Comparison("judge's score, SPIN less DPO", of("spin", "dpo"), score)],
        ),
        Claim(
            "SPIN improves with each iteration",
            "In the paper the score rises in each iteration, by less and less.",
            [
                Comparison("judge's score, gain of the second iteration", of("spin"), gain(1)),
                Comparison("judge's score, gain of the third iteration", of("spin"), gain(2)),
            ],
        ),
        Claim(
            "Online feedback is better than RLHF",
            "OAIF's paper finds online DPO preferred to RLHF. Here OAIF asks an annotator, and PPO trains a reward "
            "model on the pairs; both start from the initial policy.",
            [Comparison("judge's score, OAIF less PPO", of("oaif", "ppo"), score)],
        ),
        Claim(
            "DPO is better than PPO",
            "DPO's paper reports more reward for the same KL than PPO's, and higher win rates. The frontier shows "
            "the whole trade.",
            [Comparison("judge's score, DPO less PPO", of("dpo", "ppo"), score)],
        ),
        Claim(
            "Pre-DPO improves on its guide",
            "The guide is the tuned DPO, or the tuned SimPO, of the same seed. DPO of two epochs costs what Pre-DPO "
            "costs, and is tuned separately.",
            [
                Comparison("judge's score, Pre-DPO less DPO", of("pre_dpo", "dpo"), score),
                Comparison("judge's score, Pre-DPO less DPO of two epochs", of("pre_dpo", "dpo_2_epochs"), score),
                Comparison("judge's score, Pre-DPO with the guide SimPO less SimPO", guides, score),
            ],
        ),
        Claim(
            "Online is better than offline",
            "The same loss, beta and annotator: online on answers of the policy as it is, offline on two answers of "
            "the initial policy to each prompt. The learning rates, one online and one offline, were tuned with DPO's "
            "loss.",
            [
                Comparison("judge's score, DPO's loss, online less offline", places("dpo"), score),
                Comparison("judge's score, IPO's loss, online less offline", places("ipo"), score),
                Comparison("judge's score, SLiC's loss, online less offline", places("slic"), score),
            ],
        ),
        Claim(
            "An annotator smaller than the policy improves it",
            "An annotator of 2 layers for a policy of 4, against no training at all. In "
            f"{100 * accuracy:.0f} % of the test pairs it prefers the better answer; so did those of 5 and 8 layers, "
            "so that the paper's claim about size was not tested here.",
            [Comparison("judge's score, after training less before", small_annotator, improvement)],
        ),
        Claim(
            "On deterministic preferences DPO's margin keeps growing, and IPO's does not",
            "128 pairs with the judge's own labels, twenty passes at a constant learning rate. DPO's loss has its "
            "minimum at an infinite margin, IPO's at 1 / (2 beta) nats. What is compared is how much the mean margin "
            "of the training pairs grows from passes 6 to 10 to passes 16 to 20.",
            [
                Comparison(f"growth in nats at beta {beta}, DPO less IPO", margins(beta), less_growth)
                for beta in compare.DETERMINISTIC_BETAS
            ],
        ),
        Claim(
            "SimPO's answers are shorter than DPO's",
            "SimPO's reward is a mean over tokens, so that length earns nothing. Compared at five KLs that both pass.",
            [Comparison("tokens at equal KL, DPO less SimPO", of("dpo", "simpo"), shorter_at_equal_kl)],
        ),
    ]


# === Statistics ===


def interval(values: list[float]) -> float:
    """Half the 95 % interval of the mean, by Student's t."""
    return T975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def p_value(values: list[float]) -> float:
    """For five differences, if their true mean were 0: two-sided, by Student's t with four degrees of freedom."""
    t = abs(statistics.mean(values)) / (statistics.stdev(values) / math.sqrt(len(values)))
    share = t * t / (4 + t * t)
    return 1 - math.sqrt(share) * (3 - share) / 2


def holm(p_values: list[float]) -> list[float]:
    """The p-values, adjusted for their number, after Holm 1979."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(values: list[float], adjusted: float) -> str:
    if adjusted >= 0.05:
        return "open"
    return "holds" if statistics.mean(values) > 0 else "does not hold"


def together(verdicts: list[str]) -> str:
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if set(verdicts) == {"holds"} else "open"


# === results.md ===


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def mean_of(records: list[dict], metric: str, digits: int) -> str:
    values = [final(record, metric) for record in records]
    return f"{statistics.mean(values):.{digits}f} ± {interval(values):.{digits}f}"


NUMBERS = {"judge_score": 2, "win_rate": 3, "kl": 2, "response_length": 1}  # with their decimals
HEADS = ["judge's score", "win rate", "KL", "tokens"]


def numbers(records: list[dict]) -> list[str]:
    return [mean_of(records, metric, digits) for metric, digits in NUMBERS.items()]


def tuned_table(results: dict) -> str:
    runs, rows = results["runs"], []
    for name, method in METHODS.items():
        rate, strength = compare.tuned(runs, name)
        records = [runs[compare.tuned_run(runs, name, seed)] for seed in SEEDS]
        flags = f"{rate:g}, {method.strength.removeprefix('--')} {strength:g}"
        rows.append(
            [method.title, flags, *numbers(records), f"{seconds_of(results, name):.0f}", f"{DRAWN.get(name, 0):,}"]
        )
    return table(["method", "learning rate, strength", *HEADS, "seconds", "answers drawn"], rows)


def seconds_of(results: dict, name: str) -> float:
    """Seconds of a run with two evaluations, mean over the tuning; PPO's and GRPO's include their reward model."""
    runs = results["runs"]
    seconds = statistics.mean([runs[command]["cpu_seconds"] for command in compare.tuning_runs(runs, name).values()])
    return seconds + (results["builds"]["reward-0"]["cpu_seconds"] if name in ("ppo", "grpo") else 0)


def default_table(runs: dict) -> str:
    rows = []
    for script in compare.DEFAULTS:
        record = runs[f"python {script}.py"]
        cells = [f"{final(record, metric):.{digits}f}" for metric, digits in NUMBERS.items()]
        rows.append([f"`python {script}.py`", *cells])
    return table(["command", *HEADS], rows)


def tuning_table(runs: dict) -> str:
    rows = []
    for name, method in (METHODS | VARIANTS).items():
        found = compare.tuning_runs(runs, name)
        best = compare.tuned(runs, name)
        cells = []
        for rate, strength in found:
            score = f"{final(runs[found[rate, strength]]):.2f}"
            cells.append(f"{rate:g}, {strength:g}: {f'**{score}**' if (rate, strength) == best else score}")
        rows.append([method.title, "; ".join(cells)])
    return table(["method", "learning rate, strength: judge's score"], rows)


def claim_texts(results: dict) -> tuple[str, str, int]:
    """The table of verdicts, a paragraph for each claim, and the number of comparisons."""
    runs, found, all_p = results["runs"], [], []
    for claim in claims(results):
        for comparison in claim.comparisons:
            values = []
            for seed in SEEDS:
                values.append(comparison.difference(*[runs[command] for command in comparison.commands(seed)]))
            found.append((claim, comparison, values))
            all_p.append(p_value(values))
    adjusted = holm(all_p + [1.0] * RETIRED)
    verdicts, lines = {}, {}
    for (claim, comparison, values), p in zip(found, adjusted, strict=False):
        verdicts.setdefault(claim.title, []).append(verdict(values, p))
        signs = " ".join(["+" if value > 0 else "-" for value in values])
        lines.setdefault(claim.title, []).append(
            f"- {comparison.text}: {statistics.mean(values):+.3f} ± {interval(values):.3f}, seeds {signs}, "
            f"p {p:.2g}: **{verdict(values, p)}**\n"
        )
        commands = "".join([f"      {command}\n" for command in comparison.commands(1)])
        lines[claim.title].append(f"\n{commands}\n")
    rows = [[title, f"**{together(some)}**"] for title, some in verdicts.items()]
    paragraphs = []
    for claim in claims(results):
        paragraphs.append(
            f"### {claim.title}: {together(verdicts[claim.title])}\n\n{claim.text}\n\n" + "".join(lines[claim.title])
        )
    return table(["claim", "verdict"], rows), "\n".join(paragraphs), len(found) + RETIRED


def strengths(runs: dict, name: str) -> dict[float, dict]:
    """The records of a method's tuning at the best learning rate, by strength."""
    rate, _ = compare.tuned(runs, name)
    found = compare.tuning_runs(runs, name)
    return {strength: runs[found[rate, strength]] for strength in sorted(METHODS[name].values)}


def spin_table(runs: dict) -> str:
    rows = []
    for beta, record in strengths(runs, "spin").items():
        rows.append([f"{beta:g}", *[f"{row['judge_score']:.2f}" for row in record["evals"]]])
    return table(["beta", "before", "iteration 1", "iteration 2", "iteration 3"], rows)


def kto_table(runs: dict) -> str:
    kinds = {
        "all examples": compare.ALL,
        "a tenth of the desirable ones, balanced": compare.BALANCED,
        "a tenth of the desirable ones, unweighted": compare.UNWEIGHTED,
    }
    rows = []
    for text, weights in kinds.items():
        records = [runs[compare.few_desirable_run(weights, seed)] for seed in SEEDS[:3]]
        rows.append([text, *numbers(records)])
    return table(["KTO trained on", *HEADS], rows)


REPORT = """\
# Results

All methods on the [test bed](../toy/README.md), whose judge is the true reward. `compare.py` made the runs, and
`report.py` wrote this page from their numbers, which are in [results.json](results.json). Win rates are against the
initial policy, KL is to it, in nats a response. Means over seeds ± half the 95 % interval (Student's t); 256 test
prompts. Seconds are the processor time of a run, evaluation included.

## The methods, tuned

Each method had the same small budget: three learning rates and three strengths ([below](#tuning)), chosen by the
judge's score on other prompts and another seed. All start from the initial policy and have the same 2,560 pairs. Means
of five seeds.

{tuned}
*Answers drawn* are those that the policy wrote to be trained on; OAIF also asks its annotator about each pair of them.
PPO and GRPO have one reward model, of rlhf_ppo.py's second stage, whose time is in the seconds of both.

![judge's score against KL](frontier.png)

Lines are the three strengths at the best learning rate (the tuning's runs, seed 0), rings the table's five seeds. The
cost of a run stands beside the names.

## The scripts' defaults

One run of each on all 4,000 pairs, as in the front page's table. `rlhf_ppo.py` includes supervised fine-tuning here.

{default}
## The papers' claims

There are {count} comparisons of five seeds each, one of which was retired: annotators of three sizes, which judged
equally well. Runs of one seed answer the same prompts with the same random numbers,
and their difference counts. The p-values (Student's t, two-sided) are corrected for the {count} comparisons (Holm). A
comparison *holds* if p is below 0.05 and its mean above 0, *does not hold* if p is below 0.05 and its mean below 0, and
is *open* otherwise. A claim holds if all its comparisons do, and does not hold if one has that verdict. The verdicts
are about this test bed: a policy of a million parameters, answers of 25 tokens, 2,560 pairs. Commands are of seed 1.

How far to trust them: all runs had been made before, by an older sampler and so with other luck, and with a tuning of
its own. Then OAIF was below PPO (by the same -0.145, but p 0.044), and online over offline was open (p 0.038, 0.0059
and, with SLiC's loss, 0.13). The other seven verdicts were the same.

{verdicts}
![margins, SPIN's iterations, lengths](claims.png)

{claims}
## SPIN's betas

Judge's score at the best learning rate (the tuning's runs, seed 0).

{spin}
## KTO with few desirable examples

Three seeds. Nine of ten desirable examples were dropped; *balanced* weights the rest by ten.

{kto}
## Tuning

Seed 0, 256 prompts that no other run is measured on; the best in bold. Where its strength is the lowest or highest
of the three, a wider search might find better.

{tuning}"""


def write_page(results: dict) -> str:
    runs = results["runs"]
    verdicts, paragraphs, count = claim_texts(results)
    return REPORT.format(
        tuned=tuned_table(results),
        default=default_table(runs),
        verdicts=verdicts,
        claims=paragraphs,
        count=count,
        spin=spin_table(runs),
        kto=kto_table(runs),
        tuning=tuning_table(runs),
    )


# === Figures ===


def draw_frontier(results: dict) -> None:
    runs = results["runs"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, method) in enumerate(METHODS.items()):
        color, course = f"C{number}", strengths(runs, name)
        kls, scores = [[final(record, metric) for record in course.values()] for metric in ("kl", "judge_score")]
        values = ", ".join([f"{value:g}" for value in course])
        text = f"{method.title} ({method.strength.removeprefix('--')} {values}): {seconds_of(results, name):.0f} s"
        if name in DRAWN:
            text += f", {DRAWN[name]:,} answers"
        axes.plot(kls, scores, marker="o", markersize=4, color=color, label=text)
        records = [runs[compare.tuned_run(runs, name, seed)] for seed in SEEDS]
        kls, scores = [[final(record, metric) for record in records] for metric in ("kl", "judge_score")]
        axes.plot(kls, scores, "o", markersize=8, markerfacecolor="none", color=color, linestyle="none")
    axes.set(xscale="log", xlabel="KL to the initial policy (nats a response)", ylabel="judge's score")
    axes.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(FOLDER / "frontier.png", dpi=120, metadata={"Software": None})


def draw_claims(results: dict) -> None:
    runs = results["runs"]
    figure, (margin, spin, length) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for script, style in (("dpo.py", "-"), ("ipo.py", "--")):
        for number, beta in enumerate(compare.DETERMINISTIC_BETAS):
            curves = [runs[compare.deterministic_run(script, beta, seed)]["margins"] for seed in SEEDS]
            label = f"{script.removesuffix('.py').upper()}, beta {beta}"
            margin.plot(range(1, 21), np.mean(curves, axis=0), style, color=f"C{number}", label=label)
    margin.set(title="deterministic labels: margin of training pairs", xlabel="pass over the pairs", ylabel="nats")
    for beta, record in strengths(runs, "spin").items():
        spin.plot(range(4), [row["judge_score"] for row in record["evals"]], marker="o", label=f"beta {beta:g}")
    spin.set(title="SPIN", xlabel="iteration", ylabel="judge's score", xticks=range(4))
    for number, name in enumerate(("dpo", "simpo")):
        for seed in SEEDS:
            rows = sorted(runs[compare.tuned_run(runs, name, seed)]["evals"], key=lambda row: row["kl"])
            label = METHODS[name].title if seed == SEEDS[0] else None
            length.plot(
                [row["kl"] for row in rows],
                [row["response_length"] for row in rows],
                ".-",
                color=f"C{number}",
                alpha=0.6,
                label=label,
            )
    length.set(title="lengths during training", xlabel="KL (nats)", ylabel="tokens")
    for axes in (margin, spin, length):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(FOLDER / "claims.png", dpi=100, metadata={"Software": None})


def main() -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    missing = [command for command in compare.plan(results["runs"]) if command not in results["runs"]]
    if missing:
        raise SystemExit(
            f"error: results.json lacks {len(missing)} runs, which compare.py makes; the first: {missing[0]}"
        )
    (FOLDER / "results.md").write_text(write_page(results))
    draw_frontier(results)
    draw_claims(results)


if __name__ == "__main__":
    main()
