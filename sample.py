"""Chat with a model in the terminal, let it answer a file of prompts, or label its answers by hand.

    python sample.py toy/policy                              # an empty line or Ctrl-D ends the chat
    python sample.py runs/RUN --compare toy/policy --judge toy/judge
    python sample.py runs/RUN --prompts alpaca_eval.json --output answers.json
    python sample.py runs/RUN --prompts question.jsonl --output answers.jsonl --output-format arena-hard
    python sample.py runs/RUN --prompts toy/train.jsonl --label preferences.jsonl

A model is a hub id, a folder, or the folder of a run; LoRA adapters load, too. Without a chat template it gets plain
text: in a chat, all lines so far. A file of prompts has rows with `instruction` or `prompt`, a string (which is what a
user says) or chat messages. Answers are drawn from the whole distribution at --temperature; a model's own top-p or
penalties are ignored. With --output, --compare's model gets the same random numbers, and writes NAME.compare.json. The
formats are
- alpaca-eval: a JSON list of {instruction, output, generator}, for AlpacaEval 1 and 2;
- arena-hard: lines of {uid, ans_id, model, messages}, for Arena-Hard-Auto since April 2025 and its questions (v2.0 or
  v0.1). Its style control also wants metadata, which its utils/add_markdown_info.py adds.

With --label a person presses a key for the better of two answers: two by the model, or one by each model. Each label is
appended at once to a file of preference pairs to train on, and the same command goes on where it left off.
"""

import contextlib
import json
import math
import os
import random
import runpy
import statistics
import sys
import termios
import textwrap
import tty
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew at each new length, for longer than it computes


@dataclass
class Args:
    model: tyro.conf.Positional[str]  # hub id, folder of a model or adapter, or folder of a run
    compare: str | None = None  # a second model to answer the same prompts
    judge: str | None = None  # scores the answers: reward model, or .py file with reward(), as in the training scripts
    prompts: Path | None = None  # .json or .jsonl file of prompts (or pairs) to answer; None = chat
    output: Path | None = None  # file to write the answers to
    output_format: Literal["alpaca-eval", "arena-hard"] = "alpaca-eval"  # of the --output file
    label: Path | None = None  # .jsonl file of preference pairs to append a person's labels to
    temperature: float = 0.7  # 0 = greedy; the authors of SimPO used 0.5 to 0.9
    max_new_tokens: int = 1024  # longest answer, in tokens; shorter where the model has no more positions
    batch_size: int = 16 if CUDA else 4  # prompts of a file to answer at a time; changing it changes the answers
    seed: int = 1  # of the sampling


def load(path: str, kind: Any = AutoModelForCausalLM) -> tuple[str, Any, Any]:
    """Name, model and tokenizer."""
    folder = Path(path, "model") if Path(path, "args.json").exists() else Path(path)
    if folder != Path(path) and not folder.exists():
        sys.exit(f"error: the run in {path} has not ended: there is no {folder}")
    name = [part for part in folder.resolve().parts if part != "model"][-1] if folder.exists() else path
    model, info = kind.from_pretrained(folder.as_posix(), dtype=DTYPE, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        sys.exit(f"error: {path} has no weights for {min(info['missing_keys'])}, it is not a {type(model).__name__}")
    return name, model.to(DEVICE).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder.as_posix())


def as_chat(prompt: str | list[dict]) -> list[dict]:
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def encode(tokenizer: Any, chat: list[dict]) -> list[int]:
    bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
    text = bos + "\n".join([message["content"] for message in chat])
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def generate(args: Args, model: Any, tokenizer: Any, chats: list, place: int, streamer: Any = None) -> list[str]:
    """An answer to each chat; seed and place determine the random numbers."""
    prompts, listed = [encode(tokenizer, chat) for chat in chats], model.generation_config.eos_token_id
    width = max([len(prompt) for prompt in prompts])
    padded = torch.tensor([[-1] * (width - len(prompt)) + prompt for prompt in prompts], device=DEVICE)  # on the left
    stop_ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    stops = {"eos_token_id": list(stop_ids), "pad_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(top_k=0, **stops)  # in place of the model's own
    room = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize) - width
    if room < 1:
        sys.exit(f"error: a prompt of {width} tokens leaves the model no room to answer")
    options = {"max_new_tokens": min(args.max_new_tokens, room), "attention_mask": (padded >= 0).long()}
    options |= {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {}
    torch.manual_seed(1_000_003 * args.seed + place)
    rows = model.generate(padded.clamp(min=0), streamer=streamer, **options)
    return tokenizer.batch_decode(rows[:, width:], skip_special_tokens=True)


def score(judge: str | tuple, prompts: list, answers: list[str], columns: dict[str, list]) -> list[float]:
    completions, scores = [[{"role": "assistant", "content": answer}] for answer in answers], []
    if isinstance(judge, str):  # a Python file
        completions = [c if isinstance(p, list) else a for p, c, a in zip(prompts, completions, answers, strict=True)]
        scores = list(runpy.run_path(judge)["reward"](prompts=prompts, completions=completions, **columns))
        bad = [score for score in scores if score is None or not math.isfinite(score)]
        if bad or len(scores) != len(answers):
            sys.exit(f"error: {judge} has {len(scores)} scores for {len(answers)} answers, {len(bad)} are not finite")
        return scores
    model, tokenizer = judge
    model.config.pad_token_id = None  # texts come one at a time: the score is read at the last token
    for prompt, completion in zip(prompts, completions, strict=True):
        text = tokenizer.apply_chat_template(as_chat(prompt) + completion, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written the special ones
        scores.append(model(input_ids=torch.tensor([ids], device=DEVICE)).logits.item())
    return scores


def talk(args: Args, models: list[tuple], judge: str | tuple | None) -> None:
    chats = [[] for _ in models]
    for line in iter(lambda: input("> "), ""):
        for (name, model, tokenizer), chat in zip(models, chats, strict=True):
            chat.append({"role": "user", "content": line})
            print(f"[{name}]" if args.compare else "")
            streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            answer = generate(args, model, tokenizer, [chat], len(chat), streamer)[0]
            print(f"(judge's score {score(judge, [chat], [answer], {})[0]:.3f})\n" if judge else "")
            chat.append({"role": "assistant", "content": answer})


def read_prompts(file: Path) -> tuple[list[dict], list[str | list[dict]]]:
    text, prompts = file.read_text(encoding="utf-8").strip(), []
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n")]
    for row in rows:
        prompts.append(row.get("instruction") or row.get("prompt"))
        if not prompts[-1]:
            sys.exit(f"error: row {len(prompts) - 1} of {file} has no instruction or prompt, but {sorted(row)}")
    return rows, prompts


def answer_file(args: Args, models: list[tuple], judge: str | tuple | None) -> None:
    (rows, prompts), scores = read_prompts(args.prompts), []
    chats = [as_chat(prompt) for prompt in prompts]
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for (name, model, tokenizer), suffix in zip(models, ["", ".compare"], strict=False):
        answers, lines, file = [], [], args.output.with_suffix(suffix + args.output.suffix)
        for start in tqdm(range(0, len(rows), args.batch_size), name):
            answers += generate(args, model, tokenizer, chats[start : start + args.batch_size], start)
        for row, chat, answer in zip(rows, chats, answers, strict=True):
            instruction, uid = "\n\n".join([message["content"] for message in chat]), row.get("uid", str(len(lines)))
            line = {"instruction": instruction, "output": answer, "generator": name}
            if args.output_format == "arena-hard":
                line = {"uid": uid, "ans_id": f"{name}-{uid}", "model": name}
                line["messages"] = [*chat, {"role": "assistant", "content": {"answer": answer}}]
            lines.append(json.dumps(line))
        text = "\n".join(lines) if args.output_format == "arena-hard" else "[\n" + ",\n".join(lines) + "\n]"
        file.write_text(text + "\n")
        print(f"{name}: {len(rows)} answers in {file}")
        if judge:
            scores.append(score(judge, prompts, answers, columns))
    titles = [f"judge's score of {name}" for name, _, _ in models] + [f"win rate of {models[0][0]}"]
    if len(scores) == 2:
        scores.append([(1 + (ours > theirs) - (ours < theirs)) / 2 for ours, theirs in zip(*scores, strict=True)])
    for title, values in zip(titles, scores, strict=False):
        interval = 1.96 * statistics.pstdev(values) / math.sqrt(len(values))
        print(f"{title}: {statistics.fmean(values):.3f} +- {interval:.3f}")


def read_key(keys: dict[str, str]) -> str:
    """One of the keys: pressed in a terminal, else the first letter of a line; q at the end of the input."""
    print(", ".join([f"{key}: {meaning}" for key, meaning in keys.items()]), end=" > ", flush=True)
    key = ""
    while key not in keys:
        if sys.stdin.isatty():
            settings = termios.tcgetattr(sys.stdin)
            try:
                tty.setcbreak(sys.stdin)  # no Enter needed; what was typed before does not count
                key = os.read(sys.stdin.fileno(), 16).decode(errors="replace")
            finally:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
        else:
            key = sys.stdin.readline()[:1] or "q"
    print(key)
    return key


def show(title: str, text: str) -> None:
    print(f"[{title}]", *[textwrap.fill(line, 79) for line in text.split("\n")], "", sep="\n", flush=True)


def show_answers(args: Args, models: list[tuple], chat: list[dict]) -> list[str]:
    """Two answers to a chat in random order; the same ones when the chat is shown again."""
    luck, answers = random.Random(json.dumps(chat)), []
    for message in chat:
        show(message["role"], message["content"])
    for _, model, tokenizer in models:
        answers += generate(args, model, tokenizer, [chat] * (2 // len(models)), luck.randrange(10**6))
    luck.shuffle(answers)
    for number, answer in enumerate(answers, 1):
        show(f"answer {number}", answer)
    return answers


def label_file(args: Args, models: list[tuple]) -> None:
    skipped, prompts, key = args.label.with_suffix(".skipped"), read_prompts(args.prompts)[1], ""
    if models[0][2].chat_template:  # training, too, is to see a chat
        prompts = [as_chat(prompt) for prompt in prompts]
    args.label.parent.mkdir(parents=True, exist_ok=True)
    for file in (skipped, args.label):
        if file.exists() and file.read_bytes()[-1:] not in (b"", b"\n"):  # an editor may have dropped the line's end
            with file.open("ab") as stream:
                stream.write(b"\n")
    done = [(file, line) for file in (skipped, args.label) if file.exists() for line in file.open("rb")]
    seen = {json.dumps(json.loads(line)["prompt"]) for _, line in done}
    left = [text for text in dict.fromkeys(json.dumps(prompt) for prompt in prompts) if text not in seen]
    while key != "q":
        print(f"\n--- {len(done)} of {len(done) + len(left)} done ---\n")
        answers = show_answers(args, models, as_chat(json.loads(left[0]))) if left else ["", ""]
        keys = {"1": "better", "2": "better", "t": "tie"} if all(answers) and answers[0] != answers[1] else {}
        keys |= ({"s": "skip"} if left else {}) | ({"u": "undo"} if done else {}) | {"q": "quit"}
        key = read_key(keys)
        if key == "u":
            file, line = done.pop()
            os.truncate(file, file.stat().st_size - len(line))
            left.insert(0, json.dumps(json.loads(line)["prompt"]))
        elif key != "q":
            prompt, prob = json.loads(left.pop(0)), 1.0 if key in "12" else 0.5
            if isinstance(prompt, list):
                answers = [[{"role": "assistant", "content": answer}] for answer in answers]
            chosen, rejected = reversed(answers) if key == "2" else answers
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "preference_prob": prob}
            done.append((skipped if key == "s" else args.label, (json.dumps(row) + "\n").encode()))
            with done[-1][0].open("ab") as stream:
                stream.write(done[-1][1])


def main(args: Args) -> None:
    if bool(args.prompts) != bool(args.output) + bool(args.label) or (args.label and args.judge):
        sys.exit("error: --prompts goes with either --output or --label, and --judge not with --label")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    models = [load(path) for path in (args.model, args.compare) if path]
    reward_model = args.judge and not args.judge.endswith(".py")
    judge = load(args.judge, AutoModelForSequenceClassification)[1:] if reward_model else args.judge
    if args.output:
        answer_file(args, models, judge)
    else:
        with contextlib.suppress(EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
            label_file(args, models) if args.label else talk(args, models, judge)
        print()  # the shell's prompt has a line of its own


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
