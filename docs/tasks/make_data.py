"""Prompts for the rewards beside this file.

python docs/tasks/make_data.py format runs/format            # train.jsonl and test.jsonl in that folder
python docs/tasks/make_data.py arithmetic runs/arithmetic
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

THINGS = (
    "a river, a city at night, winter, a good friend, the moon, a train journey, bread, a library, the sea, a garden"
)
THINGS += ", a dog, a market, rain, a bicycle, a mountain, music, a bridge, coffee, an island, a school, a kitchen, tea"
THINGS += (
    ", a hospital, the desert, a cat, a forest, snow, a birthday, a ship, a piano, a castle, honey, a village, sleep"
)
THINGS += ", a theatre, a horse, the wind, a museum, a farm, an airport"
WORDS = [
    "bright",
    "quiet",
    "yellow",
    "seven",
    "window",
    "always",
    "stone",
    "north",
    "silver",
    "paper",
    "morning",
    "open",
]
ENDINGS = ["That is all.", "The end.", "Thank you.", "I hope this helps."]


@dataclass
class Args:
    task: Annotated[Literal["format", "arithmetic"], tyro.conf.Positional]
    folder: Annotated[Path, tyro.conf.Positional]
    num_prompts: int = 2000  # for training; 200 more, all different and about other things or numbers, are for testing
    seed: int = 1


def format_row(rng: random.Random, split: str) -> dict:
    thing = rng.choice(THINGS.split(", ")[::2] if split == "train" else THINGS.split(", ")[1::2])
    kind = rng.choice(["sentences", "lower case", "ending", "word"])
    value = {"sentences": str(rng.randint(1, 4)), "ending": rng.choice(ENDINGS), "word": rng.choice(WORDS)}.get(
        kind, ""
    )
    wish = {
        "sentences": f"Write exactly {value} sentence{'s' * (value != '1')}.",
        "lower case": "Write in lower case only, without any capital letter.",
        "ending": f'End your answer with the words "{value}"',
        "word": f'Use the word "{value}".',
    }[kind]
    return {"prompt": f"Describe {thing} briefly. {wish}", "constraint": kind, "value": value}


def arithmetic_row(rng: random.Random, split: str) -> dict:
    first, second = rng.randint(2, 99), rng.randint(2, 99)
    while (first + second) % 5 != 0 if split == "test" else (first + second) % 5 == 0:
        second = rng.randint(2, 99)
    return {"prompt": f"What is {first} + {second}? End with the number.", "answer": str(first + second)}


def main(args: Args) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    rng, make_row = random.Random(args.seed), {"format": format_row, "arithmetic": arithmetic_row}[args.task]
    for split, count in (("train", args.num_prompts), ("test", 200)):
        rows = {}
        while len(rows) < count:
            row = make_row(rng, split)
            key = row["prompt"] if split == "test" else len(rows)
            rows[key] = row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
        with (args.folder / f"{split}.jsonl").open("w") as file:
            file.writelines([json.dumps(row) + "\n" for row in rows.values()])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
