"""Pictures whose content is known, a tiny LLaVA that names things that are not there, and pairs to cure it.

    python docs/vision_demo.py runs/vision               # about a minute: FOLDER/model, data and pictures
    python vision_dpo.py --model-name-or-path runs/vision/model --dataset-name runs/vision/data \\
        --judge-name-or-path docs/vision_demo.py --beta 0.3 --learning-rate 5e-4 --num-train-epochs 2 --batch-size 16 \\
        --max-new-tokens 32

A picture has one to four things, each with a colour and a shape, in the quarters of a square; its description names
them in reading order. The model learns from correct pictures, but in their descriptions each thing is replaced by
another one with probability --noise. In a pair, the rejected description has one thing that is not in the picture. As
the judge, this file returns minus the number of such things.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

COLOURS, SHAPES = ["red", "green", "blue", "yellow"], ["circle", "square", "triangle"]
THINGS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
WORDS = ["<pad>", "<image>", "<end>", "user:", "assistant:", "describe", "a", "and", *COLOURS, *SHAPES]
PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]}]
TEMPLATE = """{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}
{{- '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}
{{- '<end>' if message['role'] == 'assistant' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"""


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    seed: int = 1
    noise: float = 0.3
    steps: int = 1000  # of next-token prediction, on 32 pictures each
    pairs: int = 800


def draw(things: list[str | None]) -> Image.Image:
    """A picture with a thing in each quarter; None leaves a quarter empty."""
    picture = Image.new("RGB", (32, 32), "black")
    pen = ImageDraw.Draw(picture)
    for i, thing in enumerate(things):
        if thing:
            colour, shape = thing.split()
            x, y = i % 2 * 16 + 2, i // 2 * 16 + 2
            if shape == "circle":
                pen.ellipse((x, y, x + 11, y + 11), colour)
            if shape == "square":
                pen.rectangle((x, y, x + 11, y + 11), colour)
            if shape == "triangle":
                pen.polygon([(x, y + 11), (x + 11, y + 11), (x + 5, y)], colour)
    return picture


def describe(things: list[str | None]) -> str:
    return " and ".join(f"a {thing}" for thing in things if thing)


def change(things: list[str | None], i: int, luck: random.Random) -> list[str | None]:
    """The things, with thing i replaced by one that is not in the picture."""
    return things[:i] + [luck.choice([thing for thing in THINGS if thing not in things])] + things[i + 1 :]


def reward(prompts, completions, things, **columns):
    """Minus the number of things that are named more often than they are in the picture."""
    scores = []
    for completion, present in zip(completions, things, strict=True):
        named = re.findall(r"\w+ (?:circle|square|triangle)", completion[0]["content"])
        scores.append(-sum(max(0, named.count(thing) - present.count(thing)) for thing in set(named)))
    return scores


def make_model() -> tuple[transformers.LlavaForConditionalGeneration, transformers.LlavaProcessor]:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    pictures = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = transformers.LlavaProcessor(pictures, tokenizer, chat_template=TEMPLATE, **settings)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    language = transformers.LlamaConfig(
        vocab_size=len(WORDS), bos_token_id=None, eos_token_id=2, pad_token_id=0, **sizes
    )
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=language, image_token_index=1, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def train(model: torch.nn.Module, processor: transformers.LlavaProcessor, scenes: list, args: Args) -> None:
    """Next-token prediction of descriptions with errors."""
    luck, head = random.Random(args.seed), processor.apply_chat_template(PROMPT, add_generation_prompt=True)
    inputs = processor(images=[draw(things) for things in scenes], text=[head] * len(scenes), return_tensors="pt")
    prompt, pixels = inputs["input_ids"], inputs["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = transformers.get_scheduler("linear", optimizer, 50, args.steps)
    for _ in tqdm(range(args.steps), "next-token prediction"):
        rows, texts = [luck.randrange(len(scenes)) for _ in range(32)], []
        for things in [scenes[row] for row in rows]:
            for i in [i for i, thing in enumerate(things) if thing and luck.random() < args.noise]:
                things = change(things, i, luck)
            texts.append(describe(things) + " <end>")
        answers = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
        ids = torch.cat([prompt[rows], answers], dim=1)
        labels = torch.cat([torch.full_like(prompt[rows], -100), answers.masked_fill(answers == 0, -100)], dim=1)
        model(input_ids=ids, pixel_values=pixels[rows], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def write_pairs(folder: Path, split: str, scenes: list, luck: random.Random) -> None:
    lines = []
    for name in ("data", "pictures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for things in scenes:
        file = folder / "pictures" / f"{split}-{len(lines)}.png"
        draw(things).save(file)
        wrong = change(things, luck.choice([i for i, thing in enumerate(things) if thing]), luck)
        row = {"prompt": PROMPT, "images": [str(file)], "things": things}
        row["chosen"], row["rejected"] = [
            [{"role": "assistant", "content": describe(each)}] for each in (things, wrong)
        ]
        lines.append(json.dumps(row) + "\n")
    (folder / "data" / f"{split}.jsonl").write_text("".join(lines))


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    luck, scenes = random.Random(args.seed), {}
    while len(scenes) < 4000 + args.pairs + 128:
        things = [luck.choice(THINGS) if luck.random() < 0.6 else None for _ in range(4)]
        if any(things):
            scenes[tuple(things)] = things  # each once, so that no test picture was seen before
    scenes = list(scenes.values())
    model, processor = make_model()
    train(model, processor, scenes[:4000], args)
    model.save_pretrained(args.folder / "model")
    processor.save_pretrained(args.folder / "model")
    write_pairs(args.folder, "train", scenes[4000:-128], luck)
    write_pairs(args.folder, "test", scenes[-128:], luck)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
