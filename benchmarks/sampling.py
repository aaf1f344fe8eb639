"""Tokens per second that the scripts sample on one device: `generate`, as oaif.py's training calls it.

python benchmarks/sampling.py --model-name-or-path runs/shapes/0.5B --dataset-name runs/shapes/pairs.jsonl
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    model_name_or_path: str = str(ROOT / "toy" / "policy")  # causal language model, as hub id or folder
    dataset_name: str = str(ROOT / "toy")  # preference pairs, whose prompts are answered
    num_prompts: int = 128  # prompts to answer at a time
    max_prompt_length: int = 256  # longest prompt that is taken, in tokens
    max_new_tokens: int = 128  # longest answer
    micro_batch_tokens: tuple[int, ...] = (
        4096,
        8192,
        16384,
    )  # values of the flag of this name: generate takes twice as many, at least 8192


def main(args: Args) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    import oaif

    model_and_data = {"model_name_or_path": args.model_name_or_path, "dataset_name": args.dataset_name}
    run = oaif.start_run(oaif.Args(**model_and_data, max_new_tokens=args.max_new_tokens))
    pairs, _ = oaif.load_pairs(run)
    prompts = [pair.prompt_ids for pair in pairs if len(pair.prompt_ids) <= args.max_prompt_length][: args.num_prompts]
    model = oaif.load_model(run, args.model_name_or_path, trainable=True)
    for tokens in args.micro_batch_tokens:
        run = replace(run, args=replace(run.args, micro_batch_tokens=tokens))
        for seed in range(2):  # the first one is not timed
            start = time.time()
            with oaif.inference(model), oaif.torch.compiler.set_stance("force_eager"):
                answers = oaif.generate(run, model, prompts, seed, temperature=0.9)
            seconds, sampled = time.time() - start, sum([len(answer) for answer in answers])
            if seed > 0:
                rate = f"{sampled / seconds:.0f} a second"
                print(f"--micro-batch-tokens {tokens}: {sampled} tokens in {seconds:.2f} s, {rate}")
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
