"""Pairs of a model's own answers, preferred by a reward that is known exactly; and data sets derived from them.

python benchmarks/sentiment/make_data.py    # samples pairs/ if it is missing: 17 minutes of one core

pairs/ has train.jsonl and test.jsonl, about different things. chosen_score and rejected_score are the true rewards. An
answer a is preferred to b with the probability sigmoid(SCALE (score(a) - score(b))), the Bradley-Terry model, and is
then `chosen`. Answers that did not end within 48 tokens are left out.

Other labels of the same answers are made from pairs/, without a model, in runs/sentiment:
thumbs/    for kto.py: single answers, desirable with the probability sigmoid(SCALE (its score - the mean score))
flipped-N/ the answer of the higher score is chosen, but in N % of the pairs the other one; ties are left out
"""

import json
import math
import random
import runpy
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
PAIRS, DERIVED = HERE / "pairs", HERE.parent.parent / "runs" / "sentiment"
SCALE = 4.0
FLIPPED = (0, 10, 30)  # percent
THINGS = {  # things, and words before them: to VADER all are neutral
    "a small, a large, a new, an old": "hotel, museum, library, zoo, beach, bridge, airport, campsite, "
    "theatre, bakery, harbour, garden, gym, cinema, school, bookshop",
    "homemade, frozen, vegan, Italian": "soup, pizza, salad, curry, noodles, burgers, pasta, cake, pie, "
    "sausages, stew, ice cream, bread, cheese, pancakes, rice",
    "a cheap, a used, a portable, a professional": "phone, laptop, camera, keyboard, printer, headset, "
    "television, radio, watch, tablet, loudspeaker, projector, scanner, drone, microphone, piano",
    "a light, a heavy, a wooden, a modern": "umbrella, sofa, mattress, kettle, table, lamp, ladder, bicycle, "
    "suitcase, tent, desk, chair, wardrobe, clock, door, boat",
    "a local, a private, a French, a young": "plumber, dentist, hairdresser, taxi driver, bank, teacher, "
    "lawyer, gardener, painter, tailor, cook, pianist, photographer, farmer, newspaper, electrician",
    "a recent, a long, a short, a Russian": "documentary, musical, western, memoir, biography, sitcom, opera, "
    "podcast, poem, essay, lecture, cartoon, ballet, symphony, travel guide, fairy tale",
}


@dataclass
class Args:
    model_name_or_path: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    seed: int = 1


def make_prompts(rng: random.Random) -> tuple[list, list]:
    """Prompts as chat messages, to train on and to test on: three things of each kind are for testing."""
    train, test = [], []
    for words, things in THINGS.items():
        things = rng.sample(things.split(", "), k=16)  # in a new order
        for place, thing in enumerate(things):
            for word in words.split(", "):
                question = f"What do you think of {word} {thing}? Answer in one short sentence."
                messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
                (train if place >= 3 else test).append(messages)
    return train, rng.sample(test, k=64)


@torch.no_grad()
def sample_answers(model, tokenizer, prompts: list) -> list[str]:
    """An answer to each prompt, at temperature 1; empty if it did not end."""
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 48}
    output = model.generate(**inputs, **settings)[:, inputs.input_ids.shape[1] :].tolist()
    ended = [tokenizer.eos_token_id in answer for answer in output]
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [answer if end and answer.strip() else "" for answer, end in zip(answers, ended, strict=True)]


def sample_pairs(args: Args) -> None:
    """Write pairs/: three pairs to each training prompt, two to each test prompt."""
    rng = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    torch.manual_seed(args.seed)
    for split, prompts, count in zip(("train", "test"), make_prompts(rng), (3, 2), strict=True):
        found = [[] for _ in prompts]  # different answers to each prompt
        while missing := [i for i in range(len(prompts)) if len(found[i]) < 2 * count]:
            for batch in [missing[start : start + 64] for start in range(0, len(missing), 64)]:
                answers = sample_answers(model, tokenizer, [prompts[i] for i in batch])
                for i, answer in zip(batch, answers, strict=True):
                    found[i] += [answer] if answer and answer not in found[i] else []
                print(split, sum(len(answers[: 2 * count]) for answers in found), "answers", flush=True)
        rows = make_pairs(prompts, found, count, rng)
        if split == "train":
            rng.shuffle(rows)
        write_rows(PAIRS / f"{split}.jsonl", rows)


def make_pairs(prompts: list, found: list[list[str]], count: int, rng: random.Random) -> list[dict]:
    """Of six answers to a prompt, sorted by score, the first is paired with the fourth, and so on: few ties."""
    reward, ranked, rows = runpy.run_path(str(HERE / "reward.py"))["reward"], [], []
    for texts in found:
        scores = reward(texts[: 2 * count], texts[: 2 * count])  # prompts do not matter to it
        ranked.append(sorted(zip(scores, texts, strict=False)))
    for place in range(count):
        for prompt, answers in zip(prompts, ranked, strict=True):
            worse, better = answers[place], answers[place + count]
            right = rng.random() < 1 / (1 + math.exp(-SCALE * (better[0] - worse[0])))
            rows.append(make_row(prompt, *((better, worse) if right else (worse, better))))
    return rows


def make_row(prompt: list, chosen: tuple[float, str], rejected: tuple[float, str]) -> dict:
    """A pair, from two tuples (score, answer)."""
    sides = [[{"role": "assistant", "content": text}] for _, text in (chosen, rejected)]
    row = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    return row | {"chosen_score": chosen[0], "rejected_score": rejected[0]}


def derive(folder: Path) -> None:
    """Write thumbs/ and flipped-N/. The first rows of their test splits are about the same things as those of pairs/"""
    train, test = [[json.loads(line) for line in (PAIRS / f"{split}.jsonl").open()] for split in ("train", "test")]
    mean_score = statistics.fmean([row["chosen_score"] + row["rejected_score"] for row in train]) / 2
    rng = random.Random(1)
    for split, rows in {"train": train, "test": test}.items():
        thumbs = []
        for row in rows:
            for side in ("chosen", "rejected") if split == "train" else rng.sample(["chosen", "rejected"], k=1):
                score = row[f"{side}_score"]
                label = rng.random() < 1 / (1 + math.exp(-SCALE * (score - mean_score)))
                thumbs.append({"prompt": row["prompt"], "completion": row[side], "label": label, "score": score})
        if split == "train":
            rng.shuffle(thumbs)
        write_rows(folder / "thumbs" / f"{split}.jsonl", thumbs)
    untied = [row for row in train if row["chosen_score"] != row["rejected_score"]]
    for percent in FLIPPED:
        wrong, rows = set(random.Random(1).sample(range(len(untied)), k=round(len(untied) * percent / 100))), []
        for number, row in enumerate(untied):
            sides = [(row[f"{side}_score"], row[side][0]["content"]) for side in ("chosen", "rejected")]
            sides.sort(reverse=number not in wrong)
            rows.append(make_row(row["prompt"], *sides))
        write_rows(folder / f"flipped-{percent}" / "train.jsonl", rows)
        write_rows(folder / f"flipped-{percent}" / "test.jsonl", test)


def write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(args: Args) -> None:
    if not PAIRS.exists():
        sample_pairs(args)
    derive(DERIVED)
    for split in ("train", "test"):
        pairs = [json.loads(line) for line in (PAIRS / f"{split}.jsonl").open()]
        leads = [pair["chosen_score"] - pair["rejected_score"] for pair in pairs]
        shares = [statistics.fmean(some) for some in ([x > 0 for x in leads], [x < 0 for x in leads])]
        print(
            f"{split}: {len(pairs)} pairs; the higher score is chosen in {shares[0]:.1%}, the lower in {shares[1]:.1%}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
