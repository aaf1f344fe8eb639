"""Runs all methods on the test bed for results.json: their tuning, their strengths, and what the papers' claims need.

    python benchmarks/compare.py                   # every run that results.json lacks, two at a time; then the report
    python benchmarks/compare.py --only 'dpo.py'   # only those of them whose command matches this regular expression
    python benchmarks/compare.py --again 'COMMAND' # a run of results.json once more: are its numbers the same?

Each run is a script in a process of its own with one thread. Its numbers are stored in results.json under its command
as soon as it is over, so that the next call goes on from there. `plan` says which runs there are, and in which order.
Tuning: three learning rates at the default strength, then the two other strengths at the best of them, all with seed 0
and on prompts that no other run is measured on. The best is the one with the highest judge's score.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
FOLDER = "runs/compare"  # for data and models that runs need, and for the runs themselves until they have been read
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
SEEDS = (1, 2, 3, 4, 5)  # besides 0, the seed of the tuning


@dataclass
class Args:
    only: str = ""  # regular expression: run only the commands in which it is found
    again: str = ""  # a command of results.json, to be run again
    jobs: int = 2  # runs at a time


@dataclass(frozen=True)
class Method:
    title: str
    script: str  # with flags that stay the same
    strength: str  # flag of the strength
    values: tuple[float, ...]  # of this flag; the middle one is the default, and a single one is not tuned
    data: str = "pairs"  # {seed} stands for the run's seed


METHODS = {
    "dpo": Method("DPO", "dpo.py", "--beta", (0.03, 0.1, 0.3)),
    "ipo": Method("IPO", "ipo.py", "--beta", (0.02, 0.05, 0.15)),
    "simpo": Method("SimPO", "simpo.py", "--gamma-beta-ratio", (0.275, 0.55, 1.1)),
    "pre_dpo": Method("Pre-DPO", "pre_dpo.py", "--beta", (0.03, 0.1, 0.3)),
    "kto": Method("KTO", "kto.py", "--beta", (0.03, 0.1, 0.3)),
    "spin": Method("SPIN", "spin.py --prompts-per-iteration 1280", "--beta", (0.3, 1, 3)),
    "oaif": Method("OAIF", "oaif.py", "--beta", (0.03, 0.1, 0.3)),
    # Without supervised fine-tuning, so that all start from one policy; with a reward model made by its own stage 2.
    "ppo": Method(
        "PPO",
        f"rlhf_ppo.py --sft-epochs 0 --reward-name-or-path {FOLDER}/reward-{{seed}}",
        "--kl-coef",
        (0.02, 0.05, 0.15),
    ),
    # With the same reward model; in 80 steps, as by default.
    "grpo": Method("GRPO", f"grpo.py --reward-name-or-path {FOLDER}/reward-{{seed}}", "--beta", (0.013, 0.04, 0.12)),
}
VARIANTS = {  # tuned because claims need them; other losses use the learning rates tuned with DPO's, online and offline
    "dpo_2_epochs": Method("DPO, two epochs", "dpo.py --num-train-epochs 2", "--beta", (0.03, 0.1, 0.3)),
    "offline_dpo": Method("DPO, offline", "dpo.py", "--beta", (0.1,), "annotated-{seed}"),
}
OFFLINE = {"dpo": "dpo.py --beta 0.1", "ipo": "ipo.py --beta 0.05", "slic": f"{FOLDER}/slic.py --beta 0.002"}
ONLINE = {"dpo": "--beta 0.1", "ipo": "--loss ipo --beta 0.05", "slic": "--loss slic --beta 0.002"}
DEFAULTS = (
    "dpo",
    "ipo",
    "simpo",
    "pre_dpo",
    "kto",
    "spin",
    "oaif",
    "grpo",
    "rlhf_ppo",
)  # scripts, for one run by default
DETERMINISTIC_BETAS = (0.05, 0.1, 0.3)
SMALL_ANNOTATOR = {"layers": 2, "steps": 900}  # the policy has four layers
DPO_LOSS = "losses = -p * F.logsigmoid(beta * h) - (1 - p) * F.logsigmoid(-beta * h)"
SLIC_LOSS = "losses = torch.relu(1 - beta * h)"


# === The commands of runs ===


def command(script: str, flags: str, seed: int, data: str = "pairs", prompts: int = 256, eval_steps: int = 1000) -> str:
    """The command of a run on the prompts of the tables, or with seed 0 on those for tuning."""
    words = f"python {script.format(seed=seed)} {flags} --dataset-name {FOLDER}/{data.format(seed=seed)} --seed {seed}"
    split = "--dataset-test-split validation --num-eval-prompts 256" if seed == 0 else f"--num-eval-prompts {prompts}"
    return f"{words} {split} --eval-steps {eval_steps}"


def tuning_runs(runs: dict, name: str) -> dict[tuple[float, float], str]:
    """The runs of a method's tuning that can be named so far, by learning rate and strength."""
    method = (METHODS | VARIANTS)[name]
    default = method.values[len(method.values) // 2]
    found = {(rate, default): method_run(runs, name, rate, default, 0) for rate in LEARNING_RATES}
    if all(run in runs for run in found.values()):
        rate, _ = max(found, key=lambda point: runs[found[point]]["evals"][-1]["judge_score"])
        found |= {(rate, value): method_run(runs, name, rate, value, 0) for value in method.values}
    return found


def tuned(runs: dict, name: str) -> tuple[float, float] | None:
    """The learning rate and strength of a method's best run, once all have been made."""
    if name == "pre_dpo" and not (tuned(runs, "dpo") and tuned(runs, "simpo")):
        return None
    found = tuning_runs(runs, name)
    if not all(run in runs for run in found.values()):
        return None
    return max(found, key=lambda point: runs[found[point]]["evals"][-1]["judge_score"])


def method_run(runs: dict, name: str, rate: float, strength: float, seed: int) -> str:
    """The command of a method's run."""
    method, eval_steps = (METHODS | VARIANTS)[name], 1000
    flags = f"--learning-rate {rate:g} {method.strength} {strength:g}"
    if name == "pre_dpo":  # the guide is the tuned DPO
        flags += " --guide-learning-rate {:g} --guide-beta {:g}".format(*tuned(runs, "dpo"))
    if name in ("dpo", "simpo") and seed > 0 and (rate, strength) == tuned(runs, name):
        eval_steps = 10  # lengths are compared on the way
    return command(method.script, flags, seed, method.data, eval_steps=eval_steps)


def tuned_run(runs: dict, name: str, seed: int) -> str:
    return method_run(runs, name, *tuned(runs, name), seed)


def online_run(runs: dict, loss: str, seed: int) -> str:
    rate, _ = tuned(runs, "oaif")
    return command("oaif.py", f"--learning-rate {rate:g} {ONLINE[loss]}", seed)


def offline_run(runs: dict, loss: str, seed: int) -> str:
    rate, _ = tuned(runs, "offline_dpo")
    script, beta = OFFLINE[loss].split(" ", 1)
    return command(script, f"--learning-rate {rate:g} {beta}", seed, "annotated-{seed}")


def simpo_guide_run(runs: dict, seed: int) -> str:
    """Pre-DPO with the tuned SimPO as its guide, and otherwise the flags of the tuned Pre-DPO."""
    rate, beta = tuned(runs, "pre_dpo")
    guide_rate, ratio = tuned(runs, "simpo")
    flags = f"--learning-rate {rate:g} --beta {beta:g} --guide simpo --guide-learning-rate {guide_rate:g}"
    return command("pre_dpo.py", f"{flags} --guide-simpo-beta 2.5 --guide-simpo-gamma-beta-ratio {ratio:g}", seed)


def small_annotator_run(runs: dict, seed: int) -> str:
    """OAIF with an annotator smaller than the policy."""
    flags = "--learning-rate {:g} --beta {:g}".format(*tuned(runs, "oaif"))
    return command("oaif.py", f"{flags} --annotator-name-or-path {FOLDER}/annotator-2/annotator", seed)


def deterministic_run(script: str, beta: float, seed: int) -> str:
    """Twenty passes over 128 pairs whose labels the judge has given without noise."""
    flags = f"--beta {beta:g} --learning-rate 0.0003 --lr-scheduler-type constant --batch-size 32 --num-train-epochs 20"
    return command(script, flags, seed, "deterministic", prompts=16)


def few_desirable_run(weights: str, seed: int) -> str:
    """KTO with its defaults, on all examples or with nine of ten desirable ones missing."""
    return command("kto.py", weights, seed, "pairs" if weights == ALL else "few-desirable")


ALL, BALANCED, UNWEIGHTED = "--beta 0.1", "--desirable-weight 10", "--desirable-weight 1"


def plan(runs: dict) -> list[str]:
    """All runs that can be named so far; those still missing wait for the tuning of a method."""
    planned, ready = [], []
    for name in METHODS | VARIANTS:
        if name != "pre_dpo" or (tuned(runs, "dpo") and tuned(runs, "simpo")):
            planned += tuning_runs(runs, name).values()
            ready += [name] if tuned(runs, name) else []
    for seed in SEEDS:
        planned += [tuned_run(runs, name, seed) for name in ready if name != "offline_dpo"]
        if "pre_dpo" in ready:
            planned += [simpo_guide_run(runs, seed)]
        if "oaif" in ready:
            planned += [small_annotator_run(runs, seed)]
            planned += [online_run(runs, loss, seed) for loss in ONLINE]
        if "offline_dpo" in ready:
            planned += [offline_run(runs, loss, seed) for loss in OFFLINE]
        for beta in DETERMINISTIC_BETAS:
            planned += [deterministic_run(script, beta, seed) for script in ("dpo.py", "ipo.py")]
    for weights in (ALL, BALANCED, UNWEIGHTED):
        planned += [few_desirable_run(weights, seed) for seed in SEEDS[:3]]
    planned += [f"python {script}.py" for script in DEFAULTS]
    for seed in SEEDS[1:3]:
        planned += [f"python {script}.py --seed {seed}" for script in ("oaif", "grpo", "rlhf_ppo")]
    planned += [f"python grpo.py --loss-type {loss}" for loss in ("dr_grpo", "rloo", "dapo")]
    return list(dict.fromkeys(planned))


# === The data of runs ===


def write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data() -> None:
    """Write 2,560 of the test bed's pairs, with separate test prompts for tuning and for the tables; and subsets."""
    folder = ROOT / FOLDER
    train, test = [[json.loads(line) for line in (ROOT / f"toy/{name}.jsonl").open()] for name in ("train", "test")]
    for split, rows in {"train": train[:2560], "test": test[:256], "validation": test[256:512]}.items():
        pairs, deterministic, few = [], [], []
        for number, row in enumerate(rows):
            prompt, sides = {"prompt": row["prompt"]}, (row["chosen"], row["rejected"])
            pairs.append(prompt | dict(zip(("chosen", "rejected"), sides, strict=True)))
            better, worse = reversed(sides) if row["label_flipped"] else sides
            deterministic.append(prompt | {"chosen": better, "rejected": worse})
            if split != "train" or number % 10 == 0:
                few.append(prompt | {"completion": row["chosen"], "label": True})
            if split == "train":
                few.append(prompt | {"completion": row["rejected"], "label": False})
        write_rows(folder / "pairs" / f"{split}.jsonl", pairs)
        write_rows(folder / "deterministic" / f"{split}.jsonl", deterministic[:128])
        write_rows(folder / "few-desirable" / f"{split}.jsonl", few)
    text = (ROOT / "dpo.py").read_text()
    assert text.count(DPO_LOSS) == 1
    (folder / "slic.py").write_text(text.replace(DPO_LOSS, SLIC_LOSS))
    (folder / "toy").unlink(missing_ok=True)
    (folder / "toy").symlink_to(ROOT / "toy")


def build(name: str) -> float:
    """Make data or a model by training code: pairs of the initial policy's answers, a reward model, or an annotator."""
    folder, (kind, number) = ROOT / FOLDER / name, name.split("-")
    unfinished, run = folder.with_name(f"{name}.unfinished"), folder.with_name(f"{name}.run")
    for leftover in (unfinished, run):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    if kind == "annotator":
        (unfinished / "policy").symlink_to(ROOT / "toy" / "policy")
        code = f"build_annotator(Path('{unfinished}'), **{SMALL_ANNOTATOR})"
        code = f"from pathlib import Path; from make_toy import build_annotator; {code}"
        seconds = call(f'python -c "{code}"', folder.with_suffix(".txt"), PYTHONPATH=str(ROOT / "toy"))
    elif kind == "reward":
        words = command("rlhf_ppo.py", "--sft-epochs 0 --num-train-epochs 0", int(number), prompts=16)
        seconds = call(f"{words} --output-dir {run}", folder.with_suffix(".txt"))
        shutil.copytree(run / "reward_model", unfinished, dirs_exist_ok=True)
    else:
        words = command("oaif.py", "--learning-rate 0", int(number), prompts=16)
        seconds = call(f"{words} --output-dir {run}", folder.with_suffix(".txt"))
        rows = [json.loads(line) for line in (run / "annotated.jsonl").open()]
        write_rows(
            unfinished / "train.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
        )
        for split in ("test", "validation"):
            shutil.copy(ROOT / FOLDER / "pairs" / f"{split}.jsonl", unfinished)
    unfinished.rename(folder)
    return seconds


def annotator_accuracy(name: str) -> float:
    """How often an annotator prefers the answer that the judge scores higher, on test pairs in both orders."""
    sys.path.insert(0, str(ROOT / "toy"))
    import make_toy

    path = ROOT / FOLDER / name / "annotator"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer, right = AutoTokenizer.from_pretrained(path), []
    rows = [json.loads(line) for line in (ROOT / "toy" / "test.jsonl").open()]
    for order in (("chosen", "rejected"), ("rejected", "chosen")):
        questions = [(row["prompt"][0]["content"], *[row[side][0]["content"] for side in order]) for row in rows]
        said = make_toy.verdicts(model, tokenizer, make_toy.INSTRUCTIONS["positive"][0], questions) > 0
        better = [(order[0] == "chosen") != row["label_flipped"] for row in rows]  # is the first answer the better one?
        right += (said == torch.tensor(better)).tolist()
    return sum(right) / len(right)


# === Running and reading ===


def call(words: str, log: Path, **environment: str) -> float:
    """Run a command from the project's folder; returns the seconds of processor time that it took."""
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as stream:
        options = {"stdout": stream, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": os.environ | environment}
        process = subprocess.Popen([sys.executable, *shlex.split(words)[1:]], **options)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{words}\nfailed:\n{log.read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def execute(words: str) -> dict:
    """Make a run, and read its numbers."""
    folder = ROOT / FOLDER / f"run-{time.time_ns()}"
    seconds = call(f"{words} --output-dir {folder}", folder.with_suffix(".txt"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    record = {"cpu_seconds": round(seconds), "evals": []}
    for row in rows:
        numbers = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
        if "kl" in numbers:
            record["evals"].append({"step": row["step"]} | {key: float(f"{x:.6g}") for key, x in numbers.items()})
    if "/deterministic" in words:  # the mean margin of each pass, in nats
        beta = json.loads((folder / "args.json").read_text())["args"]["beta"]
        margins = [row["train/rewards/margins"] / beta for row in rows if "train/loss" in row]
        passes = [margins[start : start + 4] for start in range(0, len(margins), 4)]
        record["margins"] = [float(f"{sum(margins) / len(margins):.6g}") for margins in passes]
    shutil.rmtree(folder)
    folder.with_suffix(".txt").unlink()
    return record


def save(results: dict) -> None:
    unfinished = RESULTS.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=0) + "\n")
    unfinished.rename(RESULTS)


def build_missing(results: dict, todo: list[str], jobs: int) -> None:
    """Build what runs need, and store each record, if there is none yet, as soon as it is built."""
    parts = {part for words in todo for part in re.findall(rf"{FOLDER}/(\w+-\d+)", words)}
    missing = [part for part in sorted(parts) if not (ROOT / FOLDER / part).exists()]
    with ThreadPoolExecutor(jobs) as pool:
        for part, seconds in zip(missing, pool.map(build, missing), strict=True):
            record = {"cpu_seconds": round(seconds)}
            if part.startswith("annotator"):
                record["accuracy"] = annotator_accuracy(part)
            results["builds"].setdefault(part, record)
            save(results)


def run_all(results: dict, todo: list[str], jobs: int) -> None:
    """Make runs, several at a time, and store each as soon as it is over."""
    build_missing(results, todo, jobs)
    with ThreadPoolExecutor(jobs) as pool:
        tasks = {words: pool.submit(execute, words) for words in todo}
        try:
            for number, (words, task) in enumerate(tasks.items(), start=1):
                results["runs"][words] = task.result()
                save(results)
                print(f"{number}/{len(todo)} {results['runs'][words]['cpu_seconds']} s: {words}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(args: Args) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"builds": {}, "runs": {}}
    write_data()
    if args.again:
        build_missing(results, [args.again], args.jobs)
        old, new = results["runs"][args.again], execute(args.again)
        same = {key: old[key] == new[key] for key in old if key != "cpu_seconds"}
        if not all(same.values()):
            sys.exit(f"numbers differ: {new}")
        print("the numbers are the same")
        return
    while True:
        missing = [words for words in plan(results["runs"]) if words not in results["runs"]]
        todo = [words for words in missing if re.search(args.only, words)]
        if not todo:
            break
        run_all(results, todo, args.jobs)
    if not missing:
        subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py"], check=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
