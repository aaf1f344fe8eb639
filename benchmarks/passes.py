"""Time and memory of dpo.py's forward and backward passes on a GPU, by the size of the micro-batches.

    python benchmarks/shapes.py 0.5B
    python benchmarks/passes.py --model-name-or-path runs/shapes/0.5B                    # as dpo.py does it
    python benchmarks/passes.py --model-name-or-path runs/shapes/0.5B --engine autocast  # and without FSDP

Pairs are random tokens: prompts of 50 to 400, answers of 50 to 600. There is no optimiser; AdamW adds 8 bytes for each
parameter.
"""

import random
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dpo  # noqa: E402


@dataclass
class Args:
    model_name_or_path: str = str(ROOT / "toy" / "policy")  # causal language model, as hub id or folder
    micro_batch_tokens: tuple[int, ...] = (3600, 8192, 16384)  # values of dpo.py's flag
    engine: Literal["fsdp", "kept", "autocast"] = "fsdp"  # kept: FSDP, whose layers keep their gathered weights
    pairs_per_step: int = 16
    steps: int = 3  # timed steps, after one that is not


def random_pairs(luck: random.Random, count: int) -> list[dpo.Pair]:
    pairs = []
    for row in range(count):
        ids = [[luck.randrange(5, 800) for _ in range(luck.randint(50, most))] for most in (400, 600, 600)]
        pairs.append(dpo.Pair(row, "", {}, *ids, preference_prob=1.0))
    return pairs


def measure(run: dpo.Run, model: Any, args: Args) -> str:
    """Steps of forward and backward passes: their speed and the GPU memory."""
    autocast = partial(torch.autocast, dpo.DEVICE.type, torch.bfloat16, enabled=args.engine == "autocast")

    def loss_of(pairs: list[dpo.Pair]) -> tuple[torch.Tensor, dict]:
        with autocast():
            return dpo.compute_loss(dpo.forward(model, pairs), 0.1, 0.0)

    luck, passes, tokens, seconds = random.Random(0), 0, 0, 0.0
    torch.cuda.reset_peak_memory_stats()
    for step in range(args.steps + 1):
        pairs = random_pairs(luck, args.pairs_per_step)
        torch.cuda.synchronize()
        start = time.time()
        groups = dpo.micro_batches([len(pair) for pair in pairs], run.args.micro_batch_tokens)
        for indices in groups:
            losses, _ = loss_of([pairs[i] for i in indices])
            losses.sum().backward()
        model.zero_grad()
        torch.cuda.synchronize()
        if step > 0:
            seconds += time.time() - start
            passes += len(groups)
            tokens += sum([len(pair) for pair in pairs])
    memory = torch.cuda.max_memory_allocated() / 2**30
    return f"{1000 * seconds / passes:.0f} ms a pass, {tokens / seconds:.0f} tokens a second, {memory:.1f} GB"


def main(args: Args) -> None:
    run = dpo.start_run(dpo.Args(model_name_or_path=args.model_name_or_path))
    shard = dpo.fully_shard
    if args.engine == "kept":
        dpo.fully_shard = lambda module, **flags: shard(module, **flags | {"reshard_after_forward": False})
    if args.engine == "autocast":
        dpo.fully_shard = lambda *_, **__: None
    model = dpo.load_model(run, args.model_name_or_path, trainable=True)
    for tokens in args.micro_batch_tokens:
        some = replace(run, args=replace(run.args, micro_batch_tokens=tokens))
        print(f"{args.engine}, --micro-batch-tokens {tokens}: {measure(some, model, args)}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
