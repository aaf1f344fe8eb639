"""Writes a model of random weights in the shape of a real one, and long pairs: all that a measurement of speed needs.

    python benchmarks/shapes.py 0.5B                   # writes runs/shapes/0.5B and runs/shapes/pairs.jsonl
    python benchmarks/vs_trl.py --model-name-or-path runs/shapes/0.5B --dataset-name runs/shapes/pairs.jsonl

The shapes are those of Qwen2.5 with its vocabulary of 151,936, of which the test bed's tokenizer uses 900. A pair joins
1 to 40 of the test bed's training pairs, so that prompt and answer have up to about 2,000 tokens.
"""

import json
import random
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "shapes"
WIDTHS = {  # of Qwen2.5: https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json and its sibling
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}


def write_model(shape: str) -> int:
    """Write a model and its tokenizer; returns the number of its parameters."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "policy")
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = WIDTHS[shape] | {"vocab_size": 151_936, "num_key_value_heads": 2, "max_position_embeddings": 32_768}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(tie_word_embeddings=True, **sizes, **ends))
    model.to(torch.bfloat16).save_pretrained(FOLDER / shape)
    tokenizer.save_pretrained(FOLDER / shape)
    return model.num_parameters()


def join(rows: list[dict], name: str) -> list[dict]:
    """One message with the text of many."""
    return [rows[0][name][0] | {"content": " ".join([row[name][0]["content"] for row in rows])}]


def write_pairs(count: int) -> None:
    rows = [json.loads(line) for line in (ROOT / "toy" / "train.jsonl").open()]
    luck = random.Random(0)
    chosen = [luck.sample(rows, luck.randint(1, 40)) for _ in range(count)]
    pairs = [{name: join(some, name) for name in ("prompt", "chosen", "rejected")} for some in chosen]
    (FOLDER / "pairs.jsonl").write_text("".join([json.dumps(pair) + "\n" for pair in pairs]))


def main(shape: tyro.conf.Positional[Literal["0.5B", "1.5B"]], pairs: int = 1000) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_pairs(pairs)
    print(f"{write_model(shape):,} parameters in {FOLDER / shape}, {pairs} pairs in {FOLDER / 'pairs.jsonl'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
