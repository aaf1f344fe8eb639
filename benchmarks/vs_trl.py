"""dpo.py against TRL's DPOTrainer: the same numbers, then speed and memory.

    python benchmarks/vs_trl.py --model-name-or-path MODEL --dataset-name PAIRS.jsonl --max-length 512

1. Agreement. Both train three steps in float32 on the same pairs. Token ids and their order must be the same, and
   loss, gradient norm and rewards must agree (see `compare`). Otherwise nothing is measured.
2. Equal settings. Same pairs in the same micro-batches, same dtype, optimiser and attention, no gradient checkpointing,
   reference log-probabilities computed beforehand; the time of that pass is counted on both sides.
3. Defaults against defaults. Only model, data, longest length, pairs a step and learning rate are given; on a CPU also
   TRL's use_cpu, without which TRL refuses to start there with its default, bfloat16 autocast.

Each run is a process of its own, so that its peak memory is its own, and the two sides take turns. dpo.py runs its own
`main`, but evaluation and saving are taken out of it, since they are switched off in TRL; and where settings are to be
equal, its micro-batches hold a fixed number of pairs, as TRL's do.
"""

import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
SIDES, WORKERS, CONTESTS = ("dpo.py", "TRL"), ("run_cleanpo", "run_trl"), ("equal settings", "defaults")
METRICS = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
CHECK_STEPS, BETA, TOLERANCE, ROUNDING = 3, 0.1, 1e-4, 1e-6
TRL_BATCH = 8  # pairs a micro-batch by TRL's default


@dataclass
class Args:
    model_name_or_path: str = str(ROOT / "toy" / "policy")  # causal language model, as hub id or folder
    dataset_name: str = str(ROOT / "toy")  # preference pairs, as dpo.py takes them; too long pairs are left out
    max_length: int = 512  # longest prompt with completion, in tokens
    pairs_per_step: int = 8  # pairs an optimiser step, a multiple of 8
    device_batch: int = 1  # pairs a micro-batch, with equal settings
    warmup_steps: int = 1  # first steps of each run, which are not timed
    steps: int = 4  # timed steps of each run
    repeats: int = 3  # runs of each side in each contest; 0 = only see whether the two agree
    learning_rate: float = 1e-5  # constant in the agreement and with equal settings
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # with equal settings: of the computation; auto as in dpo.py
    peak_tflops: float | None = None  # of the GPU in this dtype: adds the share of it that is used
    seed: int = 1  # of the choice and the order of the pairs
    out: Path = Path(__file__).with_suffix(".json")  # file of the results


def settings_of(side: str, contest: str, args: Args, machine: dict[str, Any]) -> dict[str, Any]:
    """Flags of dpo.py, or arguments of TRL's DPOConfig."""
    check, equal = contest == "agreement", contest != "defaults"
    both = {"learning_rate": args.learning_rate, "max_length": args.max_length, "seed": args.seed}
    both |= {"max_steps": CHECK_STEPS if check else args.warmup_steps + args.steps}
    if equal:
        both |= {"lr_scheduler_type": "constant", "max_grad_norm": 1.0, "beta": BETA}
        both |= {"gradient_checkpointing": False}
    if side == "dpo.py":
        flags = both | {"batch_size": args.pairs_per_step}
        if equal:
            flags |= {"dtype": "float32" if check else machine["dtype"]}
        return flags | {"num_train_epochs": CHECK_STEPS if check else 1}
    pairs = args.device_batch if equal else TRL_BATCH
    config = both | {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": args.pairs_per_step // pairs}
    config |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": machine["device"] == "cpu"}
    if equal:  # weights are float32 as in dpo.py; bf16 is about the computation
        config |= {"model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"}}
        config |= {"bf16": machine["dtype"] == "bfloat16" and not check, "logging_steps": 1 if check else 10**6}
        config |= {"weight_decay": 0.0, "precompute_ref_log_probs": True, "train_sampling_strategy": "sequential"}
    return config


# === Workers, each in a process of its own ===


def choose_pairs(job: dict[str, Any], _: Path) -> dict[str, Any]:
    """Write the pairs of all runs: train.jsonl for dpo.py, and trl.jsonl in the order in which dpo.py visits them."""
    import dpo

    args, folder = Args(**job["args"]), Path(job["data"])
    data = {"dataset_name": args.dataset_name, "max_length": args.max_length, "batch_size": args.pairs_per_step}
    dtype = {} if args.dtype == "auto" else {"dtype": args.dtype}
    run = dpo.start_run(dpo.Args(**data, **dtype, model_name_or_path=args.model_name_or_path, seed=args.seed))
    fitting, _ = dpo.load_pairs(run)
    count = args.pairs_per_step * (args.warmup_steps + args.steps)
    if len(fitting) < count:
        sys.exit(f"error: {count} pairs are needed, but only {len(fitting)} have at most {args.max_length} tokens")
    path = Path(args.dataset_name)
    kind = {".csv": "csv", ".parquet": "parquet"}.get(path.suffix, "json")
    source = {"data_files": str(path), "path": kind} if path.is_file() else {"path": args.dataset_name}
    rows = list(dpo.load_dataset(**source, streaming=path.exists())["train"])
    pairs = random.Random(args.seed).sample(fitting, count)
    for name, some, epochs in (("agreement", pairs[: args.pairs_per_step], CHECK_STEPS), ("contest", pairs, 1)):
        (folder / name).mkdir()
        batches = dpo.plan_batches(replace(run.args, num_train_epochs=epochs), len(some))
        visited = []
        for batch in batches:
            visited += sorted([some[i] for i in batch], key=len, reverse=True)
        # dpo.py wants a test set: the shortest pair, which adds next to nothing to the reference pass.
        for file, chosen in (("train", some), ("test", [min(some, key=len)]), ("trl", visited)):
            parts = [dpo.split_row(rows[pair.row], "") for pair in chosen]
            lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), part, strict=True))) for part in parts]
            (folder / name / f"{file}.jsonl").write_text("\n".join(lines))
    gpu = dpo.torch.cuda.get_device_name() if dpo.CUDA else None
    facts = {"device": dpo.DEVICE.type, "gpu": gpu, "dtype": run.args.dtype}
    return facts | {"threads": dpo.torch.get_num_threads(), "stop_ids": run.stop_ids}


class Watch:
    """Clock and notes of a run."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.size, self.started, self.reference_seconds = job["args"]["pairs_per_step"], job["started"], 0.0
        self.pairs, self.times, self.tokens = 0, [], []  # times: of the start of each step, and of the end

    def now(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.time()

    def micro_batch(self, pairs: float, tokens: Any) -> None:
        """Call before each micro-batch of the training, or each half of it."""
        if self.pairs % self.size == 0:
            self.times.append(self.now())
            self.tokens.append(0)
        self.pairs += pairs
        self.tokens[-1] += tokens

    def result(self, model: Any) -> dict[str, Any]:
        import torch

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "step_seconds": [end - start for start, end in zip(self.times, self.times[1:], strict=False)],
            "step_tokens": [int(tokens) for tokens in self.tokens],
            "reference_seconds": self.reference_seconds,
            "first_step_done": self.times[1] - self.started,
            "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        }


def run_cleanpo(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """dpo.py's main, watched."""
    import dpo

    watch, models, visited = Watch(job), [], []
    forward, add_reference = dpo.forward, dpo.add_reference

    def watched_forward(model, pairs):
        if dpo.torch.is_grad_enabled():
            visited.extend(pairs)
            watch.micro_batch(len(pairs), sum(map(len, pairs)))
        return forward(model, pairs)

    def watched_reference(run, model, *rest):
        models.append(model)
        with dpo.torch.no_grad():
            dpo.token_logps(model, [([0] * 64, [0] * 64)])  # warm-up
        start = watch.now()
        pairs = add_reference(run, model, *rest)
        watch.reference_seconds += watch.now() - start
        return pairs

    def cut_like_trl(lengths, tokens, rank=0, world_size=1):
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        size = job["args"]["device_batch"]
        return [order[k : k + size] for k in range(0, len(order), size)]

    dpo.forward, dpo.add_reference = watched_forward, watched_reference
    dpo.evaluate, dpo.save_model = (lambda *_, **__: {}), (lambda *_: None)
    if job["contest"] != "defaults":
        dpo.micro_batches = cut_like_trl
    places = {"dataset_name": job["data"], "output_dir": str(folder / "run")}
    dpo.main(dpo.Args(model_name_or_path=job["args"]["model_name_or_path"], **places, **job["settings"]))
    watch.times.append(watch.now())
    if job["contest"] != "agreement":
        return watch.result(models[0])
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: row[f"train/{name}"] for name in METRICS} for row in logged if row["step"] > 0]
    pairs = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in visited]
    return watch.result(models[0]) | {"metrics": metrics, "pairs": pairs}


def run_trl(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """TRL's DPOTrainer, watched."""
    import datasets
    import torch
    import trl

    torch.backends.cuda.enable_cudnn_sdp(job["contest"] == "defaults")  # off in dpo.py
    watch, stop_ids, names = Watch(job), job["stop_ids"], ("prompt_ids", "chosen_ids", "rejected_ids")

    def end_with_stop_token(row: dict[str, Any]) -> dict[str, Any]:
        ends = {name: [i for i, token in enumerate(row[name]) if token in stop_ids] for name in names[1:]}
        return {name: row[name][: end[0] + 1] if end else row[name] + stop_ids[:1] for name, end in ends.items()}

    class Watched(trl.DPOTrainer):
        def _prepare_dataset(self, *inputs):
            # TRL's completions keep what a chat template writes after the stop token (SmolLM2's: a newline).
            dataset = super()._prepare_dataset(*inputs)
            return dataset if job["contest"] == "defaults" else dataset.map(end_with_stop_token)

        def _precompute_ref_logps(self, dataset, *rest):
            batch = {name: x.to(self.args.device) for name, x in self.data_collator([dataset[0]]).items()}
            self.compute_ref_log_probs(self.model, batch)  # warm-up
            start = watch.now()
            dataset = super()._precompute_ref_logps(dataset, *rest)
            watch.reference_seconds = watch.now() - start
            return dataset

        def compute_loss(self, model, inputs, *rest, **options):
            watch.micro_batch(len(inputs["input_ids"]) // 2, inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *rest, **options)

    data = datasets.load_dataset("json", data_files=f"{job['data']}/trl.jsonl", split="train")
    config = trl.DPOConfig(str(folder / "run"), **job["settings"])
    trainer = Watched(job["args"]["model_name_or_path"], args=config, train_dataset=data)
    trainer.train()
    watch.times.append(watch.now())
    metrics = [
        {name: row[name] for name in [*METRICS, "logps/chosen"]}
        for row in trainer.state.log_history
        if "grad_norm" in row
    ]
    pairs = [[row[name] for name in names] for row in trainer.train_dataset]
    return watch.result(trainer.model) | ({"metrics": metrics, "pairs": pairs} if job["contest"] == "agreement" else {})


def work(name: str, file: Path) -> None:
    """Do the job described in a file, and write its result beside it."""
    sys.path.insert(0, str(ROOT))
    result = globals()[name](json.loads(file.read_text()), file.parent)
    (file.parent / "result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # a process group or a thread of either side must not hold up the end


def start(worker: str, args: Args, data: Path, **job: Any) -> dict[str, Any]:
    """The result of one of the functions above, called in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        job |= {"args": asdict(args) | {"out": None}, "data": str(data), "started": time.time()}
        file.write_text(json.dumps(job))
        env = {"HF_DATASETS_CACHE": folder, "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
        command, pipe = [sys.executable, __file__, "--worker", worker, str(file)], subprocess.PIPE
        done = subprocess.run(command, env=os.environ | env, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout[-4000:]}\nerror: {worker} failed")
        return json.loads((Path(folder) / "result.json").read_text())


# === Comparison ===


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[dict], bool]:
    """Print the agreement; return its rows, and whether all is well: each value within 1e-4 of its size.

    A reward is beta times a difference of two log-probabilities, whose rounding errors grow with their own size: 1e-6
    of that is allowed on top. Before the first update rewards are nothing but such errors, and the accuracy is chance.
    """
    rows, same = [], ours["pairs"] == theirs["pairs"]
    print(f"token ids are {'the same' if same else 'NOT the same'}\n")
    print("| step | metric | dpo.py | TRL | relative difference |\n|---|---|---|---|---|")
    for step, values in enumerate(zip(ours["metrics"], theirs["metrics"], strict=True), 1):
        for name in METRICS:
            a, b = (value[name] for value in values)
            rounding = ROUNDING * BETA * abs(values[1]["logps/chosen"]) if name.startswith("rewards/") else 0.0
            fine = abs(a - b) <= TOLERANCE * abs(b) + rounding or (step == 1 and name == "rewards/accuracies")
            relative = abs(a - b) / abs(b) if b else None
            rows.append({"step": step, "metric": name, "dpo.py": a, "TRL": b, "relative": relative, "fine": fine})
            text = f"{relative:.1e}" if fine and b else "" if fine else "too much"
            print(f"| {step} | {name} | {a:.8g} | {b:.8g} | {text} |")
    return rows, same and all(row["fine"] for row in rows)


def figures(run: dict[str, Any], args: Args) -> dict[str, float]:
    """Figures of a run. Each pair is visited once, so each token has the same share of the reference pass."""
    seconds, tokens = (sum(run[name][args.warmup_steps :]) for name in ("step_seconds", "step_tokens"))
    share = run["reference_seconds"] * tokens / sum(run["step_tokens"])
    values = {"real tokens a second": tokens / (seconds + share), "seconds a step": (seconds + share) / args.steps}
    values |= {"of which reference pass": share / args.steps, "peak memory, GB": run["peak_memory"] / 2**30}
    values |= {"seconds until the first step is done": run["first_step_done"]}
    if args.peak_tflops:  # 6 FLOP a parameter and token for the policy and 2 for the reference, without attention
        flop = 8 * run["parameters"] * values["real tokens a second"]
        values |= {"share of peak FLOP/s": flop / (args.peak_tflops * 1e12)}
    return values


def summarise(runs: list[dict], args: Args, version: str) -> list[dict[str, Any]]:
    """Print and return medians with ranges. A ratio's range is that over the repeats."""
    rows = []
    print(f"\n| contest | | dpo.py | TRL {version} | dpo.py / TRL |\n|---|---|---|---|---|")
    for contest in CONTESTS:
        ours, theirs = ([figures(r, args) for r in runs if (r["contest"], r["side"]) == (contest, s)] for s in SIDES)
        for name in ours[0]:
            a, b = ([values[name] for values in side] for side in (ours, theirs))
            middle = [statistics.median(side) for side in (a, b)]
            cells = [[middle[0], min(a), max(a)], [middle[1], min(b), max(b)], None]
            if middle[1] > 0:
                ratios = [x / y for x, y in zip(a, b, strict=True)]
                cells[2] = [middle[0] / middle[1], min(ratios), max(ratios)]
            rows.append({"contest": contest, "figure": name, **dict(zip([*SIDES, "ratio"], cells, strict=True))})
            texts = ["{:.3g} ({:.3g} to {:.3g})".format(*cell) if cell else "" for cell in cells]
            print(f"| {contest} | {name} | {' | '.join(texts)} |")
    return rows


def main(args: Args) -> None:
    if min(args.warmup_steps, args.steps) < 1 or any(args.pairs_per_step % n for n in (args.device_batch, TRL_BATCH)):
        sys.exit(f"error: needs warm-up steps, timed steps, and pairs in multiples of {TRL_BATCH} and --device-batch")
    packages = ("torch", "transformers", "trl", "accelerate", "datasets")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.machine())
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    record = {"command": " ".join(["python benchmarks/vs_trl.py", *words]), "versions": versions}
    with tempfile.TemporaryDirectory() as folder:
        machine = start("choose_pairs", args, Path(folder))
        stop_ids = machine.pop("stop_ids")
        record |= {"machine": {"cpu": cpu, "cores": os.cpu_count()} | machine, "settings": {}, "runs": []}

        def run(side: str, contest: str) -> dict[str, Any]:
            settings = record["settings"][f"{contest}, {side}"] = settings_of(side, contest, args, machine)
            data, worker = "agreement" if contest == "agreement" else "contest", WORKERS[SIDES.index(side)]
            return start(worker, args, Path(folder, data), contest=contest, settings=settings, stop_ids=stop_ids)

        print(f"{machine['gpu'] or cpu}; agreement of {CHECK_STEPS} steps on {args.pairs_per_step} pairs in float32")
        record["agreement"], fine = compare(*(run(side, "agreement") for side in SIDES))
        if not fine:
            sys.exit("error: the two do not compute the same, so nothing is measured")
        for _ in range(args.repeats):
            for contest in CONTESTS:
                for side in SIDES:
                    record["runs"].append({"contest": contest, "side": side} | run(side, contest))
                    texts = [f"{name} {value:.3g}" for name, value in figures(record["runs"][-1], args).items()]
                    print(f"{contest}, {side}: {', '.join(texts)}", flush=True)
                    args.out.write_text(json.dumps(record, indent=1) + "\n")  # what is left if a later run fails
    if args.repeats > 0:
        record["summary"] = summarise(record["runs"], args, versions["trl"])
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main(tyro.cli(Args))
