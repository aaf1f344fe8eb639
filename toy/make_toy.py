"""Builds the toy test bed: a tokenizer, three tiny models and two files of preference pairs, from scratch and offline.

    python toy/make_toy.py              # builds everything in this folder
    python toy/make_toy.py --measure    # only measures the files that are there, and builds nothing

A small grammar writes reviews of named things. The policy is a language model of these reviews. The judge is a reward
model fitted to a programmed score (`score` below), and from then on it is the true reward: the preference pairs are the
best and the worst of four policy samples each, labelled by drawing from the Bradley-Terry model of the judge. The
annotator is a language model that compares two reviews under an instruction. The same number of threads on the same
machine gives the same files.
"""

import argparse
import json
import math
import random
import re
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

SEED = 1
VOCAB_SIZE = 900
TRAIN_PAIRS, TEST_PAIRS = 4000, 1024
SAMPLES = 4  # answers to each prompt, of which the best and the worst make a pair
AGREEMENT = 0.76  # how often a label agrees with the judge: sets the scale of the Bradley-Terry model

ANNOTATOR_PROMPT = (
    "{instruction}\n\nRequest: {prompt}\n\nAnswer 1:\n{answer_1}\n\nAnswer 2:\n{answer_2}\n\n"
    "Which answer is better? Reply with 1 or 2."
)
# The first of each list is the one to use; the others are paraphrases that the annotator has also been trained on.
INSTRUCTIONS = {
    "positive": [
        "Prefer the more positive review.",
        "Prefer the review that is more positive.",
        "Choose the more positive answer.",
        "The better answer is the more positive one.",
    ],
    "shorter": [
        "Prefer the shorter review.",
        "Prefer the review that is shorter.",
        "Choose the shorter answer.",
        "The better answer is the shorter one.",
    ],
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# === World ===


@dataclass(frozen=True)
class Kind:
    first: str  # first and second words of the names
    second: str
    verb: str  # "I would {verb} again."
    aspects: str


KINDS = {
    "hotel": Kind(
        "Blue Old Royal Silver Golden Grand White Sunny",
        "Harbour Garden Palace Crown Lake Anchor Bridge Star",
        "stay there",
        "rooms beds breakfast staff service pool view location price",
    ),
    "film": Kind(
        "Silent Broken Last Secret Distant Midnight Burning Lost",
        "River Letter Road Witness Winter Island Mirror Promise",
        "watch it",
        "plot acting music dialogue ending photography pace cast",
    ),
    "phone": Kind(
        "Nova Orbit Zen Luma Vero Astra Delta Echo",
        "Mini Plus Max Edge Pro Lite Air One",
        "buy it",
        "screen battery sound charger price buttons design speakers",
    ),
    "restaurant": Kind(
        "Red Little Green Hungry Happy Copper Olive Spicy",
        "Kitchen Table Lantern Spoon Pepper Oven Garden Fox",
        "eat there",
        "food service menu soup desserts wine staff price tables",
    ),
    "book": Kind(
        "Paper Winter Hidden Stolen Forgotten Northern Crimson Secret",
        "Crown Orchard Tower Ship Map Daughter Stranger Forest",
        "read it",
        "plot characters ending writing chapters dialogue cover pace",
    ),
    "camera": Kind(
        "Iris Lumen Vista Prism Halo Argo Terra Optic",
        "Zoom Snap Shot Pocket Compact Studio Travel Eye",
        "use it",
        "flash screen battery buttons pictures price grip zoom",
    ),
    "game": Kind(
        "Iron Dragon Shadow Star Pirate Robot Castle Silver",
        "Quest Wars Racer Legends Island Kingdom Arena Storm",
        "play it",
        "graphics music plot controls levels characters pace price",
    ),
    "museum": Kind(
        "City National Modern Maritime Royal Railway Science Old",
        "Gallery Hall Collection House Centre Archive Pavilion Palace",
        "visit it",
        "paintings rooms staff guides shop garden exhibits location",
    ),
}
# What suits an aspect besides the words that suit everything: good | bad.
ASPECTS = {
    "rooms": "clean | dirty",
    "beds": "comfortable | lumpy",
    "breakfast": "tasty | stale",
    "staff": "friendly | rude",
    "service": "friendly | slow",
    "pool": "clean | dirty",
    "view": "beautiful | ugly",
    "location": "charming | noisy",
    "price": "fair | unfair",
    "plot": "clever | dull",
    "acting": "moving | wooden",
    "music": "beautiful | noisy",
    "dialogue": "clever | wooden",
    "ending": "moving | silly",
    "photography": "beautiful | ugly",
    "pace": "lively | slow",
    "cast": "charming | wooden",
    "screen": "bright | dim",
    "battery": "strong | weak",
    "sound": "clear | weak",
    "charger": "quick | slow",
    "buttons": "handy | stiff",
    "design": "charming | ugly",
    "speakers": "clear | weak",
    "food": "tasty | stale",
    "menu": "varied | dull",
    "soup": "tasty | sour",
    "desserts": "tasty | stale",
    "wine": "rich | sour",
    "tables": "clean | dirty",
    "characters": "charming | silly",
    "writing": "clever | dull",
    "chapters": "lively | slow",
    "cover": "beautiful | ugly",
    "flash": "bright | weak",
    "pictures": "clear | dim",
    "grip": "comfortable | stiff",
    "zoom": "quick | slow",
    "graphics": "beautiful | ugly",
    "controls": "handy | stiff",
    "levels": "varied | dull",
    "paintings": "beautiful | ugly",
    "guides": "friendly | rude",
    "shop": "charming | dull",
    "garden": "beautiful | ugly",
    "exhibits": "varied | dull",
}
GENERAL = {
    1: "good great excellent wonderful lovely".split(),
    0: "average ordinary acceptable typical".split(),
    -1: "bad poor terrible awful dreadful".split(),
}
SENTIMENT = {word: s for s, words in GENERAL.items() for word in words}
for _words in ASPECTS.values():
    for _side, _s in zip(_words.split(" | "), (1, -1), strict=True):
        SENTIMENT.update(dict.fromkeys(_side.split(), _s))

REQUESTS = [
    "Write a short review of the {k} {n}.",
    "Please write a review of the {k} {n}.",
    "Review the {k} {n}.",
    "Tell me about the {k} {n}.",
    "What do you think of the {k} {n}?",
    "How good is the {k} {n}?",
    "Describe the {k} {n} for me.",
    "Can you review the {k} {n}?",
    "I need a short review of the {k} {n}.",
    "Give me your opinion of the {k} {n}.",
    "Is the {k} {n} any good?",
    "Say something about the {k} {n}.",
]
ASPECT_FRAMES = [
    "The {s} {v} {a}.",
    "The {s} {v} {a}.",
    "I found the {s} {a}.",
    "I thought the {s} {w} {a}.",
    "The {s} seemed {a} to me.",
    "For me the {s} {v} {a}.",
    "You will find the {s} {a}.",
]
WHOLE_FRAMES = ["{n} is {a} {k}.", "This is {a} {k}.", "{n} was {a} {k} for me."]
VERDICTS = {
    1: ["I would {b} again.", "I would gladly {b} again."],
    0: ["I might {b} again.", "Perhaps I would {b} again."],
    -1: ["I would not {b} again.", "I would never {b} again."],
}
ADVICE = {
    1: ["I recommend {n}.", "I can recommend {n} to everyone."],
    0: ["I have no strong opinion of {n}."],
    -1: ["I do not recommend {n}.", "I cannot recommend {n} to anyone."],
}
OPENERS = {"same": ["Also, ", "In addition, ", "Besides, "], "turn": ["However, ", "Still, ", "But "]}
LAST_OPENERS = ["Overall, ", "In short, "]


@dataclass(frozen=True)
class Thing:
    kind: str
    name: str

    @property
    def aspects(self):
        return KINDS[self.kind].aspects.split()


def things(split):
    """A quarter of the names of each kind is kept for the test."""
    for kind, k in KINDS.items():
        for i, first in enumerate(k.first.split()):
            for j, second in enumerate(k.second.split()):
                if ((i + j) % 4 == 0) == (split == "test"):
                    yield Thing(kind, f"{first} {second}")


def requests(split):
    return [(thing, r.format(k=thing.kind, n=thing.name)) for thing in things(split) for r in REQUESTS]


REQUESTS_OF = {split: requests(split) for split in ("train", "test")}  # (thing, request)


def write_sentence(rng, thing, key, sentiment):
    """One sentence of the given sentiment about an aspect, or "whole", "verdict", "advice"."""
    if key == "verdict":
        return rng.choice(VERDICTS[sentiment]).format(b=KINDS[thing.kind].verb)
    if key == "advice":
        return rng.choice(ADVICE[sentiment]).format(n=thing.name)
    words = GENERAL[sentiment]
    if key != "whole" and sentiment and rng.random() < 0.5:
        words = ASPECTS[key].split(" | ")[sentiment < 0].split()
    word = rng.choice(words)
    if rng.random() < 0.2:
        word = rng.choice(["really ", "quite "]) + word
    if key == "whole":
        word = ("an " if word[0] in "aeiou" else "a ") + word
        return rng.choice(WHOLE_FRAMES).format(n=thing.name, k=thing.kind, a=word)
    now, then = ("are", "were") if key.endswith("s") else ("is", "was")
    return rng.choice(ASPECT_FRAMES).format(s=key, v=rng.choice([now, then]), w=then, a=word)


def write_review(rng, thing, moods=None, length=None, noise=None):
    """A review in one mood (odds of good, neutral, bad sentences); some sentences are off-topic or repeated."""
    moods = moods or rng.choices([(17, 3, 0), (0, 3, 17), (4, 3, 4)], (3, 6, 1))[0]
    length = length or rng.choices(range(1, 8), (10, 20, 25, 20, 12, 8, 5))[0]
    noise = rng.choice([0, 0, 0, 0.2]) if noise is None else noise
    keys = thing.aspects + ["whole", "verdict", "advice"]
    rng.shuffle(keys)
    sentences, said, before = [], [], None
    for i in range(length):
        sentiment = rng.choices((1, 0, -1), moods)[0]
        about, key, copy = thing, keys.pop() if keys else rng.choice(said), None
        if rng.random() < noise:
            if said and rng.random() < 0.5:
                key = rng.choice(said)
                copy = rng.choice(sentences) if rng.random() < 0.5 else None
            else:
                about = Thing(rng.choice([k for k in KINDS if k != thing.kind]), thing.name)
                key = rng.choice([a for a in about.aspects if a not in thing.aspects] + ["verdict"])
        text = write_sentence(rng, about, key, sentiment)
        opener = ""
        if i and rng.random() < 0.25:
            turned = sentiment * before < 0
            opener = rng.choice(OPENERS["turn" if turned else "same"])
            if i == length - 1 and rng.random() < 0.5:
                opener = rng.choice(LAST_OPENERS)
        if opener and text.split()[0] in ("The", "For", "You", "This", "Perhaps"):
            text = text[0].lower() + text[1:]
        sentences.append(copy or opener + text)
        said.append(key)
        before = sentiment
    return " ".join(sentences)


# === The programmed score ===

NAME = "[A-Z][a-z]+ [A-Z][a-z]+"
ADJECTIVE = "(?:really |quite )?(?P<a>[a-z]+)"
OPENER = re.compile("^(?:" + "|".join(OPENERS["same"] + OPENERS["turn"] + LAST_OPENERS) + ")")


def frame_pattern(frame, **groups):
    """A regular expression that matches what a frame can become."""
    return re.compile(frame.replace(".", r"\.").format(**groups) + r"\Z")


VERB = "(?:is|was|are|were)"
ASPECT_PATTERNS = [frame_pattern(f, s="(?P<s>[a-z]+)", v=VERB, w=VERB, a=ADJECTIVE) for f in ASPECT_FRAMES]
WHOLE_PATTERNS = [frame_pattern(f, n=f"(?P<n>{NAME})", k="(?P<k>[a-z]+)", a="an? " + ADJECTIVE) for f in WHOLE_FRAMES]
VERDICT_PATTERNS = [(frame_pattern(f, b="(?P<b>[a-z ]+?)"), s) for s in VERDICTS for f in VERDICTS[s]]
ADVICE_PATTERNS = [(frame_pattern(f, n=f"(?P<n>{NAME})"), s) for s in ADVICE for f in ADVICE[s]]


def parse_sentence(thing, text):
    """(what it is about, sentiment, on topic), or None where it is not a sentence of the grammar."""
    text = OPENER.sub("", text)
    text = text[:1].upper() + text[1:]
    for pattern in ASPECT_PATTERNS:
        if (m := pattern.match(text)) and m["s"] in ASPECTS and m["a"] in SENTIMENT:
            return m["s"], SENTIMENT[m["a"]], m["s"] in thing.aspects
    for pattern in WHOLE_PATTERNS:
        if (m := pattern.match(text)) and m["a"] in SENTIMENT:
            return "whole", SENTIMENT[m["a"]], m["k"] == thing.kind and m.groupdict().get("n", thing.name) == thing.name
    for pattern, sentiment in VERDICT_PATTERNS:
        if (m := pattern.match(text)) and m["b"] in [k.verb for k in KINDS.values()]:
            return "verdict", sentiment, m["b"] == KINDS[thing.kind].verb
    for pattern, sentiment in ADVICE_PATTERNS:
        if m := pattern.match(text):
            return "advice", sentiment, m["n"] == thing.name
    return None


def split_sentences(text):
    return re.split(r"(?<=\.) ", text)


def read_sentences(thing, text):
    """For each sentence: (sentiment, off-topic, repeated, no sentence of the grammar)."""
    read, said = [], set()
    for sentence in split_sentences(text):
        about, sentiment, on_topic = parse_sentence(thing, sentence) or (None, 0, True)
        read.append((sentiment, not on_topic, about in said, about is None))
        said.update([about] if about else [])
    return read


def sentence_values(thing, text):
    """Good +1, neutral 0, bad -1, off-topic or repeated -1.5, no sentence at all -2."""
    values = []
    for sentiment, off_topic, repeated, broken in read_sentences(thing, text):
        values.append(-2 if broken else -1.5 if off_topic or repeated else sentiment)
    return values


def finished(text):
    """For each character, how many sentences are finished there."""
    counts = []
    for i, sentence in enumerate(split_sentences(text)):
        counts += [i] * (len(sentence) + (i > 0) - 1) + [i + 1]
    return counts


def score(thing, text):
    """The mean value of the sentences, less the distance from three sentences. The last line brings samples of the
    policy to a variance of about 1."""
    values = sentence_values(thing, text)
    raw = 2.5 * sum(values) / len(values) - 0.5 * min(abs(len(values) - 3), 6)
    return (raw + 1.1) / 2.0


@lru_cache(100_000)
def sentiment_of(sentence):
    """A sentence's sentiment: by the grammar, whatever it is about; of other text, by its sentiment words."""
    if parsed := parse_sentence(Thing("hotel", ""), sentence):
        return parsed[1]
    found = {SENTIMENT.get(word.strip(".,").lower(), 0) for word in sentence.split()}
    return sum(found)


def positivity(text):
    """The mean sentiment of the sentences: what the annotator is asked for."""
    sentences = split_sentences(text)
    return sum(map(sentiment_of, sentences)) / len(sentences)


# === Models and training ===


def build_tokenizer(folder):
    """Byte-level BPE, saved with the chat template beside the policy (and later beside each model)."""
    rng = random.Random(SEED)
    texts = []
    for _ in range(20000):
        thing, request = rng.choice(REQUESTS_OF["train"])
        review = write_review(rng, thing)
        texts += [review, request] if rng.random() < 0.25 else [review]
        if rng.random() < 0.1:
            instruction = rng.choice(rng.choice(list(INSTRUCTIONS.values())))
            texts.append(annotator_text(instruction, request, review, write_review(rng, thing)))
    names = [word for kind in KINDS.values() for word in f"{kind.first} {kind.second}".split()]
    texts += [f" {word}" for word in [*SENTIMENT, *dict.fromkeys(names)]] * 3000  # each is to be a single token
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.save_pretrained(folder / "policy")


def llama_config(tokenizer, layers=4):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.cleanpo_toy = True
    return config


def causal_lm(tokenizer, layers=4):
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(llama_config(tokenizer, layers))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=0
    )
    return model


def save(model, tokenizer, folder):
    """Save in bfloat16. From here on, only the model that is read back is used."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def load(auto_class, folder):
    return auto_class.from_pretrained(folder, dtype=torch.float32).eval()


def pad(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batches(make_row, steps, batch_size, length):
    """Fresh rows for each step. Sixteen batches are made at a time and sorted, so that rows of similar length meet."""
    rng = random.Random(SEED)
    for start in range(0, steps, 16):
        rows = sorted((make_row() for _ in range(16 * batch_size)), key=length)
        group = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(group)
        yield from ([batch] for batch in group[: steps - start])


def mixed_batches(make_row, steps, batch_size, length, chunks=4):
    """The same with all lengths in each batch, in chunks of similar length: for rows whose losses differ much."""
    for _ in range(steps):
        rows = sorted((make_row() for _ in range(batch_size)), key=length)
        yield [rows[i : i + batch_size // chunks] for i in range(0, batch_size, batch_size // chunks)]


def train(name, parameters, loss_fn, data, steps, learning_rate):
    """AdamW with a warm-up of 5 % and a cosine down to 0. The bar shows the losses that are summed."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / (0.05 * steps)) * (1 + math.cos(math.pi * t / steps)) / 2
    )
    bar = tqdm(data, desc=name, total=steps, mininterval=5)
    for chunks in bar:
        shown = 0
        for chunk in chunks:
            with torch.autocast("cpu", torch.bfloat16):
                losses = loss_fn(chunk)
            (sum(losses) / len(chunks)).backward()
            shown = shown + torch.tensor([loss.item() for loss in losses]) / len(chunks)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix_str(" ".join(f"{loss:.3f}" for loss in shown), refresh=False)


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content):
    return [{"role": "assistant", "content": content}]


def annotator_text(instruction, request, answer_1, answer_2):
    return ANNOTATOR_PROMPT.format(instruction=instruction, prompt=request, answer_1=answer_1, answer_2=answer_2)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_prompt(tokenizer, content):
    text = tokenizer.apply_chat_template(user(content), tokenize=False, add_generation_prompt=True)
    return encode(tokenizer, text)


@torch.no_grad()
def sample(policy, tokenizer, prompts, seed, temperature=1.0, batch_size=512, max_new_tokens=128):
    """One response to each prompt, as token ids with the EOS left on (where there is one)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = [[] for _ in rows]
    groups = {}  # rows of one batch have prompts of one length, so nothing is padded
    for i, row in enumerate(rows):
        groups.setdefault(len(row), []).append(i)
    groups = [g[i : i + batch_size] for g in groups.values() for i in range(0, len(g), batch_size)]
    for active in tqdm(groups, desc="samples", mininterval=5):
        past, x = DynamicCache(config=policy.config), torch.tensor([rows[i] for i in active])
        for _ in range(max_new_tokens):
            logits = policy(input_ids=x, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]
            x = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            for i, token in zip(active, x[:, 0].tolist(), strict=True):
                answers[i].append(token)
            going = x[:, 0] != tokenizer.eos_token_id
            if not going.any():
                break
            if not going.all():  # finished rows leave the batch
                past.batch_select_indices(going)
                active, x = [i for i, g in zip(active, going.tolist(), strict=True) if g], x[going]
    return answers


@torch.no_grad()
def judge_scores(judge, tokenizer, rows, batch_size=256):
    """Scores of token rows (whole conversations)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = torch.empty(len(rows))
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        scores[part] = judge(input_ids=pad([rows[i] for i in part], tokenizer.pad_token_id)).logits[:, 0]
    return scores


# === Policy ===


def review_row(tokenizer, rng, split="train"):
    """Tokens of a request and of a review, and for each of the latter the mean sentiment of the sentences so far."""
    thing, request = rng.choice(REQUESTS_OF[split])
    text = write_review(rng, thing)
    encoded = tokenizer(text + "<|end|>", add_special_tokens=False, return_offsets_mapping=True)
    values = running_values(text)
    moods = [values[min(end, len(values)) - 1][0] for _, end in encoded["offset_mapping"]]
    return encode_prompt(tokenizer, request), encoded["input_ids"], moods


def lm_loss(model, head, tokenizer, batch):
    """Mean negative log-likelihood of the response tokens, and an auxiliary regression to the mood so far, without
    which the policy learns grammar long before it learns that a review has one mood."""
    x = pad([prompt + response for prompt, response, _ in batch], tokenizer.pad_token_id)
    labels = pad([[-100] * len(prompt) + response for prompt, response, _ in batch], -100)
    moods = pad([[math.nan] * len(prompt) + moods for prompt, _, moods in batch], math.nan)
    output = model(input_ids=x, labels=labels, output_hidden_states=True)
    return output.loss, masked_mse(head(output.hidden_states[2])[..., 0], moods)


def build_policy(folder, steps=1200):
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    model, head = causal_lm(tokenizer), torch.nn.Linear(128, 1)
    rng = random.Random(SEED + 1)
    data = batches(lambda: review_row(tokenizer, rng), steps, 64, lambda row: len(row[0]) + len(row[1]))
    parameters = [*model.parameters(), *head.parameters()]
    train("policy", parameters, lambda b: lm_loss(model, head, tokenizer, b), data, steps, 3e-3)
    save(model, tokenizer, folder / "policy")


# === Judge ===


@cache
def all_words():
    rng = random.Random(SEED)
    return sorted({word for thing in things("train") for word in write_review(rng, thing).split()})


def corrupt(rng, text):
    """Text that is no longer a review in plain English, or that is a worse one."""
    words = text.split(" ")
    match rng.randrange(9):
        case 0:  # words in another order
            rng.shuffle(words)
        case 1:  # words left out
            words = [w for w in words if rng.random() > 0.2] or ["."]
        case 2:  # a word said again and again
            i = rng.randrange(len(words))
            words[i : i + 1] = [words[i]] * rng.randint(2, 8)
        case 3:  # praise without sentences
            praise = rng.choices([w for w in SENTIMENT if SENTIMENT[w] == 1], k=rng.choice([1, 1, 2, 3]))
            words = rng.choices(praise, k=rng.randint(1, 25))
        case 4:  # cut off
            return text[: rng.randrange(1, len(text))]
        case 5:  # words from nowhere
            for _ in range(rng.randint(1, 6)):
                words.insert(rng.randrange(len(words) + 1), rng.choice(all_words()))
        case 6:  # praise put into sentences
            for _ in range(rng.randint(1, 6)):
                words.insert(rng.randrange(len(words) + 1), rng.choice([w for w in SENTIMENT if SENTIMENT[w] == 1]))
        case 7:  # nothing but words
            words = rng.choices(all_words(), k=rng.randint(1, 40))
        case 8:  # a sentence over and over
            return " ".join([rng.choice(split_sentences(text))] * rng.randint(2, 9))
    return " ".join(words)


def any_review(rng, thing):
    """Reviews of all mixtures and lengths, far beyond what the policy writes at first; one in four is corrupted."""
    kind = rng.random()
    if kind < 0.35:
        text = write_review(rng, thing)
    elif kind < 0.7:  # where a trained policy will be: good, of any length
        noise = rng.choice([0, 0, 0.15, 0.3])
        text = write_review(rng, thing, moods=rng.choice([(1, 0, 0), (8, 1, 1)]), length=rng.randint(1, 9), noise=noise)
    else:
        moods = tuple(rng.random() ** 2 + 0.01 for _ in range(3))
        text = write_review(rng, thing, moods=moods, length=rng.randint(1, 9), noise=rng.random() ** 2)
    return corrupt(rng, text) if rng.random() < 0.25 else text


def sampled_reviews(policy, tokenizer, seed, count, temperatures, split="train"):
    """(thing, request, response tokens), `count` at each temperature."""
    rng, reviews = random.Random(seed), []
    for i, temperature in enumerate(temperatures):
        asked = rng.choices(REQUESTS_OF[split], k=count)
        answers = sample(policy, tokenizer, [request for _, request in asked], seed + i, temperature)
        reviews += [(thing, request, ids) for (thing, request), ids in zip(asked, answers, strict=True)]
    return reviews


NOTHING = (math.nan,) * 6  # where the auxiliary heads have nothing to say


def judge_row(tokenizer, rng, samples):
    """Tokens of a conversation, its score, and the auxiliary heads' targets for each token: what `read_sentences` says
    of the last sentence finished there, and mean value and number so far. One row in three is a policy sample."""
    if rng.random() < 0.33:
        thing, request, ids = rng.choice(samples)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ended = ids[-1] == tokenizer.eos_token_id
    else:
        thing, request = rng.choice(REQUESTS_OF["train"])
        text = any_review(rng, thing)
        ended = rng.random() < 0.97
    prompt = encode_prompt(tokenizer, request)
    encoded = tokenizer(text + "<|end|>" * ended, add_special_tokens=False, return_offsets_mapping=True)
    read, values, counts = read_sentences(thing, text), sentence_values(thing, text), finished(text)
    running = [NOTHING[:4] + (0.0, 0.0)]
    for i in range(1, len(values) + 1):
        running.append(read[i - 1] + (sum(values[:i]) / i, i / 3))
    aux = [running[counts[min(end, len(counts)) - 1]] for _, end in encoded["offset_mapping"]]
    target = score(thing, text) if ended else min(-2.5, score(thing, text))
    return prompt + encoded["input_ids"], target, [NOTHING] * len(prompt) + aux


def masked_mse(predicted, wished):
    """The mean squared error where there is a target (not NaN)."""
    known = ~wished.isnan()
    return F.mse_loss(predicted.float()[known], wished[known])


def judge_loss(model, heads, tokenizer, batch):
    """The score at the last token, and two auxiliary regressions at all tokens, which are thrown away afterwards."""
    x = pad([ids for ids, _, _ in batch], tokenizer.pad_token_id)
    hidden = model.model(input_ids=x, output_hidden_states=True).hidden_states
    ends = torch.tensor([len(ids) - 1 for ids, _, _ in batch])
    scores = model.score(hidden[-1][torch.arange(len(batch)), ends])[:, 0].float()
    loss = F.mse_loss(scores, torch.tensor([target for _, target, _ in batch]))
    wished = torch.tensor([aux + [NOTHING] * (x.shape[1] - len(aux)) for _, _, aux in batch])
    return (loss, masked_mse(heads[0](hidden[3]), wished[..., :4]), masked_mse(heads[1](hidden[4]), wished[..., 4:]))


def build_judge(folder, steps=900):
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy = load(AutoModelForCausalLM, folder / "policy")
    rng = random.Random(SEED + 2)
    samples = sampled_reviews(policy, tokenizer, 200, 4000, (0.7, 1.0, 1.0, 1.2, 1.5))
    config = llama_config(tokenizer)
    config.num_labels = 1
    config.tie_word_embeddings = False
    torch.manual_seed(SEED)
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(policy.model.state_dict())

    heads = torch.nn.ModuleList([torch.nn.Linear(128, 4), torch.nn.Linear(128, 2)])
    data = mixed_batches(lambda: judge_row(tokenizer, rng, samples), steps, 128, lambda row: len(row[0]))
    parameters = [*model.parameters(), *heads.parameters()]
    train("judge", parameters, lambda b: judge_loss(model, heads, tokenizer, b), data, steps, 3e-3)
    save(model, tokenizer, folder / "judge")


# === Preference pairs ===


def build_pairs(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy = load(AutoModelForCausalLM, folder / "policy")
    judge = load(AutoModelForSequenceClassification, folder / "judge")
    scale = None
    for split, count in (("train", TRAIN_PAIRS), ("test", TEST_PAIRS)):
        rng = random.Random(f"{SEED} {split}")
        asked = list(REQUESTS_OF[split])
        rng.shuffle(asked)
        asked = [request for _, request in asked]
        samples = [sample(policy, tokenizer, asked, 300 + i) for i in range(SAMPLES)]
        pairs = []
        for request, *answers in zip(asked, *samples, strict=True):
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
            whole = [encode(tokenizer, text + "<|end|>") == ids for text, ids in zip(texts, answers, strict=True)]
            if all(whole) and all(texts) and len(set(texts)) > 1:
                rows = [encode_prompt(tokenizer, request) + ids for ids in answers]
                ranked = sorted(zip(judge_scores(judge, tokenizer, rows).tolist(), texts, strict=True))
                pairs.append((request, [ranked[-1][1], ranked[0][1]], ranked[-1][0] - ranked[0][0]))
        assert len(pairs) >= count, (split, len(pairs))
        pairs = pairs[:count]
        margins = torch.tensor([margin for _, _, margin in pairs])
        if scale is None:
            low, high = 0.0, 100.0
            for _ in range(50):
                scale = (low + high) / 2
                too_low = torch.sigmoid(scale * margins.abs()).mean() < AGREEMENT
                low, high = (scale, high) if too_low else (low, scale)
        with open(folder / f"{split}.jsonl", "w") as f:
            for request, texts, margin in pairs:
                first_wins = rng.random() < 1 / (1 + math.exp(-scale * margin))
                chosen, rejected = texts if first_wins else texts[::-1]
                row = {"prompt": user(request), "chosen": assistant(chosen), "rejected": assistant(rejected)}
                f.write(json.dumps(row | {"label_flipped": not first_wins}) + "\n")
    print(f"Bradley-Terry scale: {scale:.3f}")


# === Annotator ===


def annotator_review(tokenizer, rng, samples):
    """A request and two answers, either of which may be far from what the policy writes at first."""
    thing, request, ids = rng.choice(samples)
    answers = []
    for _ in range(2):
        match rng.choices(range(4), (10, 4, 5, 1))[0]:
            case 0:
                answer = tokenizer.decode(ids, skip_special_tokens=True)
                ids = rng.choice(samples)[2]
            case 1:
                answer = any_review(rng, thing)
            case 2:  # short and clear
                moods = rng.choice([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
                answer = write_review(rng, thing, moods, length=rng.randint(1, 3))
            case 3:  # hardly anything
                answer = " ".join(rng.choices(list(SENTIMENT), k=rng.randint(0, 3))).capitalize() + rng.choice(
                    ["", "."]
                )
        answers.append(answer)
    return request, answers


def n_words(text):
    return len(text.split())


def preference(aim, answer_1, answer_2):
    """How clearly the first answer is better under an instruction: above 0 means it is."""
    if aim == "positive":
        return positivity(answer_1) - positivity(answer_2)
    return math.log((n_words(answer_2) + 1) / (n_words(answer_1) + 1))


def running_values(text):
    """For each character: the mean sentiment of the sentences finished there, and the log of the words so far."""
    sentiments = [sentiment_of(sentence) for sentence in split_sentences(text)]
    means = [0.0] + [sum(sentiments[:i]) / i for i in range(1, len(sentiments) + 1)]
    return [(means[n], math.log(n_words(text[: i + 1]) + 1)) for i, n in enumerate(finished(text))]


def annotator_row(tokenizer, instruction, aim, request, answers):
    """Tokens, the target probability of "1", and the auxiliary heads' targets for each token: positivity and length of
    the answer so far, and those of answer 1 minus those of answer 2 so far."""
    text = annotator_text(instruction, request, *answers)
    start_1 = text.index("Answer 1:\n") + 10
    start_2 = start_1 + len(answers[0]) + len("\n\nAnswer 2:\n")
    values = [running_values(answer) for answer in answers]
    rendered = tokenizer.apply_chat_template(user(text), tokenize=False, add_generation_prompt=True)
    shift = len("<|user|>")
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    aux = []
    for _, end in encoded["offset_mapping"]:
        at = end - 1 - shift
        if at < start_1:
            aux.append(NOTHING[:4])
        elif at < start_2:
            aux.append((*values[0][min(at - start_1, len(values[0]) - 1)], *NOTHING[:2]))
        else:
            now, first = values[1][min(at - start_2, len(values[1]) - 1)], values[0][-1]
            aux.append((*now, first[0] - now[0], first[1] - now[1]))
    return encoded["input_ids"], 1 / (1 + math.exp(-10 * preference(aim, *answers))), aux


def annotator_pair(tokenizer, rng, samples):
    """The same two answers in both orders."""
    aim = rng.choice(list(INSTRUCTIONS))
    instruction = rng.choice(INSTRUCTIONS[aim])
    request, answers = annotator_review(tokenizer, rng, samples)
    return [annotator_row(tokenizer, instruction, aim, request, order) for order in (answers, answers[::-1])]


def annotator_loss(model, heads, tokenizer, batch):
    """Verdict and EOS, and two auxiliary regressions one and two layers below, which are thrown away afterwards."""
    rows = [row for pair in batch for row in pair]
    one, two = encode(tokenizer, "12")
    ends = torch.tensor([len(ids) - 1 for ids, _, _ in rows])
    verdicts = [one if p > 0.5 else two for _, p, _ in rows]
    x = pad([ids + [verdict] for (ids, _, _), verdict in zip(rows, verdicts, strict=True)], tokenizer.pad_token_id)
    hidden = model.model(input_ids=x, output_hidden_states=True).hidden_states
    row = torch.arange(len(rows))
    logps = model.lm_head(hidden[-1][row, ends]).float().log_softmax(-1)
    p = torch.tensor([p for _, p, _ in rows])
    loss = -(p * logps[:, one] + (1 - p) * logps[:, two]).mean()
    after = model.lm_head(hidden[-1][row, ends + 1]).float().log_softmax(-1)
    loss = loss - 0.1 * after[:, tokenizer.eos_token_id].mean()
    target = torch.tensor([aux + [NOTHING[:4]] * (x.shape[1] - len(aux)) for _, _, aux in rows])
    return (loss, masked_mse(heads[0](hidden[-3]), target[..., :2]), masked_mse(heads[1](hidden[-2]), target[..., 2:]))


def build_annotator(folder, steps=900, layers=5):
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy = load(AutoModelForCausalLM, folder / "policy")
    rng = random.Random(SEED + 3)
    samples = sampled_reviews(policy, tokenizer, 400, 4000, (0.8, 1.0, 1.0, 1.2))
    model = causal_lm(tokenizer, layers)
    model.load_state_dict(policy.state_dict(), strict=False)  # layers that the policy does not have start afresh
    heads = torch.nn.ModuleList([torch.nn.Linear(128, 2), torch.nn.Linear(128, 2)])
    data = mixed_batches(lambda: annotator_pair(tokenizer, rng, samples), steps, 32, lambda pair: len(pair[0][0]))
    parameters = [*model.parameters(), *heads.parameters()]
    train("annotator", parameters, lambda b: annotator_loss(model, heads, tokenizer, b), data, steps, 2.5e-3)
    save(model, tokenizer, folder / "annotator")


@torch.no_grad()
def verdicts(annotator, tokenizer, instruction, pairs, batch_size=128):
    """log p("1") - log p("2") for (request, answer 1, answer 2)."""
    one, two = encode(tokenizer, "12")
    rows = [encode_prompt(tokenizer, annotator_text(instruction, *pair)) for pair in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = torch.empty(len(rows))
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        hidden = annotator.model(input_ids=pad([rows[i] for i in part], tokenizer.pad_token_id)).last_hidden_state
        last = hidden[torch.arange(len(part)), torch.tensor([len(rows[i]) - 1 for i in part])]
        logits = annotator.lm_head(last)
        out[part] = logits[:, one] - logits[:, two]
    return out


# === Measuring ===


def measure_policy(tokenizer, policy, samples):
    rng = random.Random(SEED + 100)
    rows = sorted((review_row(tokenizer, rng, "test") for _ in range(2000)), key=lambda row: len(row[0]) + len(row[1]))
    total, tokens = 0.0, 0
    for i in range(0, len(rows), 200):
        n = sum(len(response) for _, response, _ in rows[i : i + 200])
        loss = lm_loss(policy, torch.nn.Linear(128, 1), tokenizer, rows[i : i + 200])[0].item()
        total, tokens = total + loss * n, tokens + n
    print(f"policy: perplexity {math.exp(total / tokens):.3f} a token on 2,000 new reviews of the test names")
    texts = texts_of(tokenizer, samples)
    sentences = [parse_sentence(thing, sentence) for thing, _, text in texts for sentence in split_sentences(text)]
    ended = sum(ids[-1] == tokenizer.eos_token_id for _, _, ids in samples) / len(samples)
    tokens = sum(len(ids) for _, _, ids in samples) / len(samples)
    grammatical = sum(map(bool, sentences)) / len(sentences)
    print(f"  {len(samples)} samples to test requests: {ended:.4f} end with the EOS, {tokens:.1f} tokens, ", end="")
    print(f"{len(sentences) / len(samples):.2f} sentences, {grammatical:.3f} of them sentences of the grammar")


def texts_of(tokenizer, samples):
    return [(thing, request, tokenizer.decode(ids, skip_special_tokens=True)) for thing, request, ids in samples]


def measure_judge(tokenizer, judge, samples):
    rng = random.Random(SEED + 101)
    asked = rng.choices(REQUESTS_OF["test"], k=2000)
    praise = [(1, 0, 0), (8, 1, 1)]
    writers = {
        "grammar text": lambda thing: write_review(rng, thing),
        "good text, 1-9 sentences": lambda thing: write_review(rng, thing, rng.choice(praise), rng.randint(1, 9)),
        "the best: good, 3 sentences": lambda thing: write_review(rng, thing, praise[0], 3, noise=0),
        "corrupted good text": lambda thing: corrupt(rng, write_review(rng, thing, praise[1], rng.randint(2, 5))),
    }
    sets = {name: [(thing, r, write(thing)) for thing, r in asked] for name, write in writers.items()}
    print(
        f"judge against the programmed score:{'correlation':>12}{'rms error':>10}{'judge mean':>11}{'sd':>6}{'max':>6}"
    )
    for name, rows in {"policy samples": texts_of(tokenizer, samples), **sets}.items():
        wished = torch.tensor([score(thing, text) for thing, _, text in rows])
        ids = [encode_prompt(tokenizer, r) + encode(tokenizer, text + "<|end|>") for _, r, text in rows]
        judged = judge_scores(judge, tokenizer, ids)
        correlation = torch.corrcoef(torch.stack([wished, judged]))[0, 1] if wished.std() > 0.01 else math.nan
        error = (judged - wished).square().mean().sqrt()
        print(
            f"  {name:33s}{correlation:12.3f}{error:10.2f}{judged.mean():11.2f}{judged.std():6.2f}{judged.max():6.2f}"
        )


def is_clear(aim, a, b):
    if aim == "positive":
        return abs(preference(aim, a, b)) >= 0.5
    short, long = sorted((n_words(a), n_words(b)))
    return long - short >= 4 and short <= 0.75 * long


def measure_annotator(tokenizer, annotator, samples):
    print("annotator on new pairs with a clear difference (0.5 in mean sentiment; 4 words and 25 % in length):")
    print(f"{'':64}{'pairs':>6}{'accuracy':>10}{'order 1':>10}{'order 2':>10}{'changes':>10}")
    rng = random.Random(SEED + 102)
    texts = texts_of(tokenizer, samples)
    pools = {
        "policy samples": texts,
        "very short": [(th, r, write_review(rng, th, (4, 1, 1), rng.choice([1, 1, 2]))) for th, r, _ in texts],
        "very positive": [(th, r, write_review(rng, th, (8, 1, 1), rng.randint(1, 6))) for th, r, _ in texts],
    }
    for name, pool in pools.items():
        half = len(pool) // 2
        pairs = [(request, a, b) for (_, request, a), (_, _, b) in zip(pool[:half], pool[half:], strict=True)]
        for aim in INSTRUCTIONS:
            clear = [pair for pair in pairs if is_clear(aim, *pair[1:])]
            first_better = torch.tensor([preference(aim, a, b) > 0 for _, a, b in clear])
            for instruction in INSTRUCTIONS[aim][: None if name == "policy samples" else 1]:
                said = verdicts(annotator, tokenizer, instruction, clear) > 0
                swapped = verdicts(annotator, tokenizer, instruction, [(r, b, a) for r, a, b in clear]) < 0
                right, right_swapped = (said == first_better).float().mean(), (swapped == first_better).float().mean()
                numbers = (right + right_swapped) / 2, right, right_swapped, (said != swapped).float().mean()
                print(
                    f"  {name:16s}{instruction:46s}{len(clear):6d}" + "".join(f"{number:10.3f}" for number in numbers)
                )


def measure_pairs(folder, tokenizer, judge):
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        prompts = [encode_prompt(tokenizer, row["prompt"][0]["content"]) for row in rows]
        flipped = sum(row["label_flipped"] for row in rows) / len(rows)
        scores, lengths = [], []
        for side in ("chosen", "rejected"):
            answers = [encode(tokenizer, row[side][0]["content"] + "<|end|>") for row in rows]
            scores.append(judge_scores(judge, tokenizer, [p + a for p, a in zip(prompts, answers, strict=True)]))
            lengths.append(sum(map(len, answers)) / len(rows))
        agree = (scores[0] > scores[1]).float().mean()
        print(
            f"{split}.jsonl: {len(rows)} pairs, label agrees with the judge {agree:.3f}, label_flipped {flipped:.3f},"
        )
        print(f"  judge's mean score: chosen {scores[0].mean():.2f}, rejected {scores[1].mean():.2f},", end=" ")
        print(f"mean tokens: prompt {sum(map(len, prompts)) / len(rows):.1f},", end=" ")
        print(f"chosen {lengths[0]:.1f}, rejected {lengths[1]:.1f}")
    print("the last rows of test.jsonl:", *map(json.dumps, rows[-5:]), sep="\n  ")


@torch.no_grad()
def measure(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy = load(AutoModelForCausalLM, folder / "policy")
    judge = load(AutoModelForSequenceClassification, folder / "judge")
    annotator = load(AutoModelForCausalLM, folder / "annotator")
    for name, model in (("policy", policy), ("judge", judge), ("annotator", annotator)):
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    samples = sampled_reviews(policy, tokenizer, 500, 3000, (1.0,), "test")
    measure_policy(tokenizer, policy, samples)
    measure_judge(tokenizer, judge, samples)
    measure_annotator(tokenizer, annotator, samples)
    measure_pairs(folder, tokenizer, judge)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    print(f"size of the folder: {size / 1e6:.2f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--measure", action="store_true", help="measure the files in the folder, build nothing")
    args = parser.parse_args()
    torch.set_num_threads(2)
    start = time.time()
    if not args.measure:
        for stage in (build_tokenizer, build_policy, build_judge, build_pairs, build_annotator):
            stage(args.folder)
            print(f"{stage.__name__}: done at {(time.time() - start) / 60:.1f} minutes", flush=True)
    measure(args.folder)


if __name__ == "__main__":
    main()
