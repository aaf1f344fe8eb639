"""Peak memory of a forward and backward pass of dpo.py on a CPU, by the size of the vocabulary.

python benchmarks/vocabulary.py        # one pair with answers of 2,048 tokens each, a process for each size
"""

import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    vocabulary: int = 0  # 0 = each of 1,000, 50,000 and 150,000
    answer_length: int = 2048  # tokens of either answer


def measure(args: Args) -> None:
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers

    import dpo

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=args.vocabulary, max_position_embeddings=4096, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        run = dpo.start_run(dpo.Args())
        model = dpo.load_model(run, folder, trainable=True)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # of GB; ru_maxrss is in bytes there, else in KB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    answers = torch.randint(5, args.vocabulary, (2, args.answer_length)).tolist()
    fields = {"row": 0, "prompt": "", "prompt_ids": [5, 6], "preference_prob": 1.0}
    pair = dpo.Pair(**fields, columns={}, chosen_ids=answers[0], rejected_ids=answers[1])
    losses, _ = dpo.compute_loss(dpo.forward(model, [pair]), 0.1, 0.0)
    losses.sum().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    logits = 2 * args.answer_length * args.vocabulary * 4 / 2**30
    print(
        f"{args.vocabulary} tokens: peak {peak:.2f} GB, {peak - before:.2f} GB of it new; all logits: {logits:.2f} GB"
    )


def main(args: Args) -> None:
    if args.vocabulary:
        measure(args)
    for size in (1_000, 50_000, 150_000) if not args.vocabulary else ():
        command = [sys.executable, __file__, "--vocabulary", str(size), "--answer-length", str(args.answer_length)]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
