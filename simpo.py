# region method: header
"""Simple Preference Optimisation (SimPO), Meng et al. 2024, https://arxiv.org/abs/2405.14734

The policy pi is trained on pairs of a chosen answer y_w and a rejected answer y_l to a prompt x, without a reference.
The reward of an answer is its mean log-probability per token, which also guides generation, with a margin gamma to win:

    r(y)    = beta / |y| * log pi(y|x)
    L(y, z) = -log sigmoid(r(y) - r(z) - gamma)
    loss    = p L(y_w, y_l) + (1 - p) L(y_l, y_w)

p = 1 is SimPO (Eq. 6); --label-smoothing, or a column preference_prob, lowers it. Where sources differ, this script
- has gamma / beta as its flag, as the authors' code (TRL: gamma itself); 0.55 with beta 2.5 is gamma 1.375;
- counts the end-of-sequence token in |y|, but not the assistant's header (the authors' data code does count it);
- asks for gamma whichever answer is preferred (the authors' label smoothing: -gamma for a flipped label);
- takes beta, gamma / beta, learning rate 1e-6 (ten times that with LoRA) of the authors' Llama-3-8B-Instruct, a linear
  decay (authors: cosine), 64 pairs a step (authors: 128), and drops pairs over --max-length.
Nothing but a small learning rate and one epoch holds the policy: watch eval/kl.

    python simpo.py                              # the built-in test bed, about a minute on two CPU cores
    python simpo.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name trl-lib/ultrafeedback_binarized
"""
# endregion

import contextlib
import gc
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import tyro
import wandb
from datasets import load_dataset
from huggingface_hub import snapshot_download
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# All scripts are alike outside of `# region method` ... `# endregion`. load_pairs reads and tokenises, plan_batches and
# micro_batches cut, forward finds log-probabilities, compute_loss is the method, train updates, evaluate samples.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
TOY = Path(__file__).resolve().parent / "toy"


@dataclass
class Args:
    # region method: args
    # --- SimPO ---
    beta: float = 2.5  # scale of the rewards; the authors use 2 to 10
    gamma_beta_ratio: float = 0.55  # margin gamma, divided by beta; the authors use 0.1 to 0.8
    label_smoothing: float = 0.0  # assumed share of flipped labels
    learning_rate: float | None = None  # None = 1e-6 as in the authors' code (1e-5 with LoRA), 3e-4 on the test bed
    DEFAULTS = {"learning_rate": (1e-6, 1e-5, 3e-4)}  # in place of None: for a real model, with LoRA, on the test bed
    # endregion
    # --- model ---
    model_name_or_path: str = str(TOY / "policy")  # initial policy: a causal language model, as hub id or folder
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if CUDA else "float32"  # of the computation
    lora_rank: int = 0  # train LoRA adapters of this rank (alpha twice that) on all linear layers; 0 = all weights
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    # --- data ---
    dataset_name: str = str(TOY)  # preference pairs: hub id, .jsonl, .json or .parquet file, or folder of such files
    dataset_train_split: str = "train"  # split to train on
    dataset_test_split: str = "test"  # split to evaluate on; if there is none, the last 10 % of the pairs, at most 512
    max_length: int = 1024  # longest prompt with answer, in tokens; longer pairs are dropped
    # --- optimisation ---
    batch_size: int = 64  # pairs per optimiser step, over all devices
    micro_batch_tokens: int = 8192 if CUDA else 2048  # padded tokens in a pass; affects speed and memory only
    num_train_epochs: int = 1  # passes over the training pairs
    max_steps: int | None = None  # most optimiser steps; 0 = only evaluate
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"  # constant: no warm-up, no decay
    warmup_ratio: float = 0.1  # share of the steps over which the learning rate rises
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # --- evaluation ---
    eval_steps: int = 50  # steps between evaluations; the first and the last step are always evaluated
    num_eval_prompts: int = 256  # test pairs to evaluate on, with their prompts to answer
    max_new_tokens: int = 128  # longest sampled response, in tokens
    judge_name_or_path: str | None = None  # reward model that scores the responses; None = none, or the test bed's own
    # --- run ---
    seed: int = 1  # of the order of the data, the sampling and LoRA's initial weights
    output_dir: str | None = None  # folder of the run; None = runs/<script>__<seed>__<time>
    save_steps: int = 0  # steps between checkpoints; 0 = none
    resume: bool = False  # go on with the run in --output-dir, with its flags, from its last checkpoint
    track: bool = False  # log to Weights & Biases as well


class Batch(NamedTuple):
    """A micro-batch of B pairs. Each field is (B,) in float32; log-probabilities are sums over the answer's tokens."""

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    preference_prob: torch.Tensor


# region method: loss
def compute_loss(batch: Batch, beta: float, gamma: float, label_smoothing: float) -> tuple[torch.Tensor, dict]:
    """Loss and metrics of each pair, (B,). A micro-batch is but a part of a step, so no pair may depend on others."""
    chosen_logps = batch.chosen_logps / batch.chosen_lengths
    rejected_logps = batch.rejected_logps / batch.rejected_lengths
    margins = beta * (chosen_logps - rejected_logps)
    p = batch.preference_prob * (1 - label_smoothing) + (1 - batch.preference_prob) * label_smoothing
    losses = -p * F.logsigmoid(margins - gamma) - (1 - p) * F.logsigmoid(-margins - gamma)  # p = 1: Eq. 6
    metrics = {
        "rewards/chosen": beta * chosen_logps,
        "rewards/rejected": beta * rejected_logps,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
    }
    return losses, metrics


# endregion
@dataclass(frozen=True)  # what stays the same throughout a run
class Run:
    args: Args  # with a value for each flag that was None
    folder: Path
    tokenizer: Any
    stop_ids: list[int]  # tokens that end an answer
    saved_step: int  # of the checkpoint to go on from, 0 if there is none


@dataclass(frozen=True)
class Pair:
    row: int  # its number in the data
    prompt: str | list[dict]  # as read: a judge has its own chat template
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    preference_prob: float
    ref_chosen_logp: float = 0.0
    ref_rejected_logp: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def load_pairs(run: Run) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and pairs to test on."""
    args, path = run.args, Path(run.args.dataset_name)
    if path.is_file():
        splits = load_dataset("parquet" if path.suffix == ".parquet" else "json", data_files=str(path), streaming=True)
    else:  # files are streamed, since the cache of datasets misses a change that keeps a file's time
        splits = load_dataset(args.dataset_name, streaming=path.exists())
    train_pairs = encode_rows(run, splits[args.dataset_train_split], args.dataset_train_split)
    if args.dataset_test_split in splits:
        test_pairs = encode_rows(run, splits[args.dataset_test_split], args.dataset_test_split)
    else:
        kept = len(train_pairs) - min(512, math.ceil(len(train_pairs) / 10))
        train_pairs, test_pairs = train_pairs[:kept], train_pairs[kept:]
    if min(len(train_pairs), len(test_pairs)) < WORLD_SIZE:
        sys.exit(f"error: {len(train_pairs)} pairs to train and {len(test_pairs)} to test on are too few")
    first = [train_pairs[0].prompt_ids, train_pairs[0].chosen_ids, train_pairs[0].rejected_ids]
    tqdm.write(f"{len(train_pairs)} to train on, the first: {run.tokenizer.batch_decode(first)}")
    return train_pairs, test_pairs[: args.num_eval_prompts]


# region method: rows
def encode_rows(run: Run, rows: Iterable[dict], split: str) -> list[Pair]:
    """Pairs of token ids from the rows of a split."""
    pairs, count = [], 0
    for row in rows:
        where = f"row {count} of split {split}"
        prompt, chosen, rejected = split_row(row, where)
        prob = 1.0 if row.get("preference_prob") is None else row["preference_prob"]
        if not 0 <= prob <= 1:
            sys.exit(f"error: {where}: preference_prob is {prob}, and not from 0 to 1")
        texts = render(run.tokenizer, prompt, chosen, rejected)
        # Each text by itself, as in generation: tokens of the whole could reach across the end of the prompt.
        prompt_ids, *answers = run.tokenizer(texts, add_special_tokens=False).input_ids
        chosen_ids, rejected_ids = [cut_answer(ids + run.stop_ids[:1], run.stop_ids) for ids in answers]
        pair = Pair(count, prompt, prompt_ids, chosen_ids, rejected_ids, prob)
        if len(pair) <= run.args.max_length and chosen_ids != rejected_ids:
            pairs.append(pair)
        count += 1
    tqdm.write(f"{split}: {len(pairs)} of {count} pairs; {count - len(pairs)} dropped: too long, or chosen = rejected")
    return pairs


def split_row(row: dict, where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a row, as strings or as lists of chat messages."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        shared = 0  # two conversations: what they have in common is the prompt
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    parts = (prompt, chosen, rejected)
    alike = {type(part) for part in parts} in ({str}, {list})
    if not alike or not all([part and (part if isinstance(part, str) else part[-1]["content"]) for part in parts]):
        sys.exit(f"error: {where} has {[k for k in row if row[k]]}: needed are prompt, chosen, rejected, text or chat")
    return parts


# endregion
def render(tokenizer: Any, prompt: str | list[dict], *answers: str | list[dict]) -> list[str]:
    """Texts of a prompt and of its answers: messages by the chat template, strings after the tokenizer's BOS."""
    if isinstance(prompt, str):
        bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
        return [bos + prompt.removeprefix(bos), *answers]
    head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    texts = [tokenizer.apply_chat_template(prompt + answer, tokenize=False) for answer in answers]
    if not all(text.startswith(head) for text in texts):
        sys.exit("error: the tokenizer's chat template renders a prompt otherwise once it is answered")
    return [head, *(text.removeprefix(head) for text in texts)]


def cut_answer(ids: list[int], stop_ids: list[int]) -> list[int]:
    """An answer up to and with its first stop token."""
    stops = [place for place, token in enumerate(ids) if token in stop_ids]
    return ids[: stops[0] + 1] if stops else ids


def plan_batches(args: Args, num_pairs: int) -> list[list[int]]:
    """Indices of the pairs of each optimiser step, in an order that depends on the seed and the epoch alone."""
    if args.batch_size % WORLD_SIZE != 0:
        sys.exit(f"error: a step of {args.batch_size} does not divide by the {WORLD_SIZE} devices")
    batches, usable = [], num_pairs - num_pairs % WORLD_SIZE  # devices need equal shares: the rest is left out
    for epoch in range(args.num_train_epochs):
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
        order = torch.randperm(num_pairs, generator=generator).tolist()[:usable]
        batches += [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    return batches[: args.max_steps]


def micro_batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Indices of this process's rows, longest first, in groups of at most `tokens` padded tokens (or of one row)."""
    # A round gives each process a row, and its longest decides on a new group for all: FSDP needs equally many of each.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups, width = [], 0
    for start in range(0, len(order), WORLD_SIZE):
        if not groups or (len(groups[-1]) + 1) * width > tokens:
            groups.append([])
            width = lengths[order[start]]
        groups[-1] += order[start + RANK : start + WORLD_SIZE][:1]
    return [group for group in groups if group]


def gather(share: dict[int, Any]) -> list:
    """The items of all processes, each of which holds some, in the order of their keys."""
    shares = [share] * WORLD_SIZE
    if WORLD_SIZE > 1:  # alone, gloo's thread would only start a pool of threads that slow down all others
        dist.all_gather_object(shares, share)
    return [item for _, item in sorted(ChainMap(*shares).items())]


def load_model(run: Run, path: str, kind: Any = AutoModelForCausalLM, trainable: bool = False) -> Any:
    """A model without dropout: to be trained and sharded, or whole, frozen and in the dtype of the computation."""
    gc.collect()  # models of an earlier stage, which FSDP's hooks keep alive
    args, compute_dtype, config = run.args, getattr(torch, run.args.dtype), AutoConfig.from_pretrained(path)
    for name, value in vars(config.get_text_config()).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config.get_text_config(), name, 0.0)
    dtype = torch.float32 if trainable and args.lora_rank == 0 else compute_dtype
    model, info = kind.from_pretrained(path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        sys.exit(f"error: {path} has no weights for {min(info['missing_keys'])}, it is no {type(model).__name__}")
    model.to(DEVICE).eval()
    if not trainable:
        return model.requires_grad_(False)
    if args.lora_rank > 0:
        torch.manual_seed(args.seed)
        lora = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        if kind is AutoModelForSequenceClassification:
            lora.task_type, model.score = "SEQ_CLS", model.score.float()  # the head is trained as well
        model = peft.get_peft_model(model, lora)  # adapters are float32, all other weights frozen
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if WORLD_SIZE > 1 or compute_dtype != torch.float32:  # FSDP serves for mixed precision as well, on one device too
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mp_policy=precision)
        # By default the root's weights would stay gathered after a pass without gradients, and updates be lost.
        fully_shard(model, mp_policy=precision, reshard_after_forward=True)
    return model.train()  # there is no dropout: this is for gradient checkpointing


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """For sampling and scoring: no gradients, and whole weights, so that the processes need not keep in step."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.eval()
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    with torch.no_grad():
        yield
    for module in sharded:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()
    model.train()


def token_logps(model: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Log-probability of each answer token of N rows (prompt, answer), (N, T), where it is predicted; 0 elsewhere."""
    # Padding on the right needs no attention mask: no token that counts sees it, and attention is faster without.
    input_ids = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in rows], batch_first=True)  # (N, T)
    predicts = torch.zeros(input_ids.shape, dtype=torch.bool)  # where the next token is one of the answer
    for i, (prompt, answer) in enumerate(rows):
        predicts[i, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = True
    input_ids, predicts = input_ids.to(DEVICE), predicts.to(DEVICE)
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=predicts).logits  # of the answers alone, (n, V)
    targets = input_ids.roll(-1, dims=1)[predicts]
    logps = -F.cross_entropy(logits.float(), targets, reduction="none")  # bfloat16 would err by up to 0.1 nats a token
    return torch.zeros(predicts.shape, device=DEVICE).masked_scatter(predicts, logps)


def forward(model: Any, pairs: list[Pair]) -> Batch:
    """The log-probabilities of a micro-batch of pairs, with what else is known of them."""
    column = partial(torch.tensor, dtype=torch.float32, device=DEVICE)
    chosen = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rejected = [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    # Apart they are padded less, which counts on a CPU. Together they need fewer kernels, which counts on a GPU.
    passes = [chosen + rejected] if CUDA else [chosen, rejected]
    logps = torch.cat([token_logps(model, rows).sum(-1) for rows in passes])
    return Batch(
        *logps.chunk(2),  # chosen, rejected
        ref_chosen_logps=column([pair.ref_chosen_logp for pair in pairs]),
        ref_rejected_logps=column([pair.ref_rejected_logp for pair in pairs]),
        chosen_lengths=column([len(pair.chosen_ids) for pair in pairs]),
        rejected_lengths=column([len(pair.rejected_ids) for pair in pairs]),
        preference_prob=column([pair.preference_prob for pair in pairs]),
    )


def add_reference(run: Run, reference: Any, pairs: list[Pair], batches: list[list[int]]) -> list[Pair]:
    """The pairs with the reference's log-probabilities."""
    logps = {}
    with inference(reference):
        # In the batches of the training: equal micro-batches are rounded equally, and margins start at exactly 0.
        for indices in tqdm(batches, "reference", leave=False, delay=2, disable=RANK > 0):
            new, share = [i for i in indices if i not in logps], {}
            for group in micro_batches([2 * len(pairs[i]) for i in new], run.args.micro_batch_tokens):
                batch = forward(reference, [pairs[new[k]] for k in group])
                table = torch.stack([batch.chosen_logps, batch.rejected_logps], dim=1)
                share |= zip(group, table.tolist(), strict=True)
            logps |= zip(new, gather(share), strict=True)
    logps = [logps.get(i, (math.nan, math.nan)) for i in range(len(pairs))]
    return [replace(pair, ref_chosen_logp=c, ref_rejected_logp=r) for pair, (c, r) in zip(pairs, logps, strict=True)]


def mean_loss(run: Run, items: list, loss_of: Callable, backward: bool) -> dict[str, float]:
    """Means of what loss_of gives for the items of micro-batches; `backward` adds the gradient of the mean loss."""
    rows = {}
    for group in micro_batches([2 * len(item) for item in items], run.args.micro_batch_tokens):
        losses, metrics = loss_of([items[i] for i in group])
        if not losses.isfinite().all():
            sys.exit(f"error: a loss in rows {[items[i].row for i in group]} is not finite; nothing was updated")
        if backward:
            (losses.sum() * WORLD_SIZE / len(items)).backward()  # FSDP takes the mean over the devices
        rows |= zip(group, torch.stack([losses, *metrics.values()], dim=1).tolist(), strict=True)
    return dict(zip(["loss", *metrics], torch.tensor(gather(rows)).mean(0).tolist(), strict=True))


def train(run: Run, models: dict, gradients_of: Callable, steps: int, adamw: dict, measure: Callable, start=0) -> int:
    """Train for `steps` steps with a new AdamW, numbered from start + 1; returns the last number."""
    args, step, last_step = run.args, start, start + steps
    if run.saved_step > last_step:  # the checkpoint to go on from is of a later stage
        return last_step
    optimizer = torch.optim.AdamW(torch.nn.ModuleDict(models).parameters(), weight_decay=0.0, fused=True, **adamw)
    # Such a schedule is 0 at its first and last step: of one that is longer by a step, those in between are taken.
    warmup_steps = math.ceil(args.warmup_ratio * steps)
    schedule = transformers.get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, steps + 1).lr_lambdas[0]
    if run.saved_step > start:
        step = run.saved_step
        reader = dcp.HuggingFaceStorageReader(str(run.folder / f"checkpoint-{step}"))
        dcp.load(training_state(models, optimizer), storage_reader=reader)
    elif step == 0:
        log(run, 0, measure(0))
    bar = tqdm(range(step + 1, last_step + 1), "training", last_step, initial=step, mininterval=1, disable=RANK > 0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = adamw["lr"] * schedule(step - start)
        for metrics in gradients_of(step - start - 1):  # when it yields, the gradients of an update are there
            for name, model in models.items():
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
                if not math.isfinite(norm):
                    sys.exit(f"error: the gradient of step {step} is not finite; nothing was updated")
                metrics["grad_norm" if name == "policy" else f"{name}_grad_norm"] = norm
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=metrics["loss"], refresh=False)
        metrics = {f"train/{name}": value for name, value in metrics.items()} | {"train/learning_rate": group["lr"]}
        if step % args.eval_steps == 0 or step == last_step:
            metrics |= measure(step)
        log(run, step, metrics)
        if args.save_steps and (step % args.save_steps == 0 or step == last_step):
            save_checkpoint(run, models, optimizer, step)
    return last_step


def generate(run: Run, model: Any, prompts: list[list[int]], seed: int, temperature: float) -> list[list[int]]:
    """A response to each prompt, in token ids; call it inside of inference()."""
    # A number for each prompt and position: any model, micro-batch and number of devices meets the same luck.
    uniforms = torch.rand(len(prompts), run.args.max_new_tokens, generator=torch.Generator().manual_seed(seed))
    lengths, share = [len(prompt) + run.args.max_new_tokens for prompt in prompts], {}
    for group in micro_batches(lengths, 4 * run.args.micro_batch_tokens):  # without gradients more tokens fit
        width, uniform = max([len(prompts[i]) for i in group]), uniforms[group].to(DEVICE)
        padded = [[-1] * (width - len(prompts[i])) + prompts[i] for i in group]  # on the left
        mask = (torch.tensor(padded, device=DEVICE) >= 0).long()  # (N, T)
        input_ids, ended, tokens, cache = torch.tensor(padded, device=DEVICE).clamp(min=0), mask[:, :1] < 0, [], None
        while len(tokens) < run.args.max_new_tokens and not ended.all():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
            output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cdf = (output.logits[:, -1].float() / temperature).softmax(-1).cumsum(-1)  # (N, V)
            token = torch.searchsorted(cdf, uniform[:, len(tokens), None] * cdf[:, -1:], right=True)  # inverse CDF
            input_ids, cache = token.clamp(max=cdf.shape[1] - 1), output.past_key_values
            mask = F.pad(mask, (0, 1), value=1)
            ended |= torch.isin(input_ids, torch.tensor(run.stop_ids, device=DEVICE))
            tokens.append(input_ids)
        answers = [cut_answer(row, run.stop_ids) for row in torch.cat(tokens, dim=1).tolist()]
        share |= zip(group, answers, strict=True)
    return gather(share)


def judge_text(judge: Any, tokenizer: Any, prompt: str | list[dict], response: str) -> float:
    """The score that a reward model gives to a response."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written them
    return judge(input_ids=torch.tensor([ids], device=DEVICE)).logits.item()


@torch.no_grad()
def evaluate(run: Run, policy: Any, test_pairs: list[Pair], loss_of: Callable, step: int) -> dict[str, float]:
    """Loss and accuracy on the test pairs; judge's score, win rate and KL to the initial model on sampled responses."""
    args, file, share = run.args, run.folder / "samples.jsonl", {}
    initial = load_model(run, args.model_name_or_path)  # read again each time: training needs the memory
    if args.judge_name_or_path:
        judge = load_model(run, args.judge_name_or_path, AutoModelForSequenceClassification)
        judge.config.pad_token_id = None  # texts come alone: the last token is to be read, whichever it is
        judge_tokenizer = AutoTokenizer.from_pretrained(args.judge_name_or_path)
    with inference(policy):
        means = mean_loss(run, test_pairs, loss_of, backward=False)
        prompts = [pair.prompt_ids for pair in test_pairs]
        answers = generate(run, policy, prompts, args.seed, temperature=1.0)
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        for group in micro_batches(lengths, args.micro_batch_tokens):
            rows = [(prompts[i], answers[i]) for i in group]
            logratios = (token_logps(policy, rows) - token_logps(initial, rows)).sum(-1)
            for i, logratio in zip(group, logratios.tolist(), strict=True):
                prompt, text = test_pairs[i].prompt, run.tokenizer.decode(answers[i], skip_special_tokens=True)
                share[i] = {"step": step, "prompt": prompt, "response": text, "kl": logratio}
                share[i] |= {"response_length": len(answers[i]), "eos_rate": float(answers[i][-1] in run.stop_ids)}
                if args.judge_name_or_path:
                    share[i]["judge_score"] = judge_text(judge, judge_tokenizer, prompt, text)
    initial_rows = read_rows(file, step=0) if step > 0 else None
    rows = gather(share)
    if args.judge_name_or_path:
        for row, first in zip(rows, initial_rows or rows, strict=True):
            tie = row["response"] == first["response"] or row["judge_score"] == first["judge_score"]
            row["win_rate"] = 0.5 if tie else float(row["judge_score"] > first["judge_score"])
        means["win_rate_ci95"] = 1.96 * statistics.pstdev([row["win_rate"] for row in rows]) / math.sqrt(len(rows))
    append_rows(file, rows)
    wandb.log({"eval/samples": wandb.Table(list(rows[0]), [list(row.values()) for row in rows])}, step=step)
    for name in list(rows[0])[3:]:  # behind step, prompt and response
        means[name] = statistics.fmean([row[name] for row in rows])
    return {f"eval/{name}": value for name, value in means.items()}


def append_rows(file: Path, rows: list[dict]) -> None:
    with file.open("a") if RANK == 0 else open(os.devnull, "w") as stream:
        stream.write("".join([json.dumps(row) + "\n" for row in rows]))


def read_rows(file: Path, step: int) -> list[dict]:
    return [row for row in map(json.loads, file.open()) if row["step"] == step]


def log(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Write the metrics of a step, and show those of an evaluation."""
    append_rows(run.folder / "metrics.jsonl", [{"step": step} | metrics])
    wandb.log(metrics, step=step)
    names = ["loss", "rewards/accuracies", "judge_score", "win_rate", "kl", "response_length", "eos_rate"]
    shown = [f"{name} {metrics[f'eval/{name}']:.3f}" for name in names if f"eval/{name}" in metrics]
    if shown:
        tqdm.write(f"step {step:4}: {', '.join(shown)}")


def training_state(models: dict, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Trained weights and AdamW's moments by name: a checkpoint is written from them, and read into them."""
    tensors = {}
    for model_name, model in models.items():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                if not optimizer.state[weight]:  # before the first step
                    zeros = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                    optimizer.state[weight] = zeros | {"step": torch.zeros((), device=DEVICE)}
                for key, value in {"weight": weight.detach(), **optimizer.state[weight]}.items():
                    tensors[f"{model_name}.{name}.{key}"] = value
    return tensors


def save_checkpoint(run: Run, models: dict, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write all that training changes, beside and then renamed: a run that is killed leaves no half checkpoint."""
    folder, unfinished = run.folder / f"checkpoint-{step}", run.folder / "unfinished"
    writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
    dcp.save(training_state(models, optimizer), storage_writer=writer)
    if RANK == 0:
        sizes = {file.name: file.stat().st_size for file in run.folder.glob("*.jsonl")}
        (unfinished / "sizes.json").write_text(json.dumps(sizes))
        unfinished.rename(folder)
        for older in set(run.folder.glob("checkpoint-*")) - {folder}:
            shutil.rmtree(older)
    dist.barrier()


def start_run(args: Args) -> Run:
    """Connect the processes, and settle what the flags leave open."""
    own_group = {} if WORLD_SIZE > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", **own_group)
    if CUDA:
        torch.cuda.set_device(DEVICE)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew at each new length, for longer than it computes
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # one process speaks
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.resume and Path(args.output_dir or sys.exit("error: --resume needs --output-dir"), "args.json").exists():
        stored = json.loads(Path(args.output_dir, "args.json").read_text())["args"]
        args = Args(**stored | {"output_dir": args.output_dir, "resume": True})
    for flag, value in asdict(args).items():
        if flag.endswith("name_or_path") and value and not Path(value).exists():  # the hub is asked once a run
            files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            args = replace(args, **{flag: snapshot_download(value, allow_patterns=files)})
    path = args.model_name_or_path
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        sys.exit(f"error: the tokenizer of {path} has no end-of-sequence token, so no answer could end")
    stop_ids = [tokenizer.eos_token_id]
    if Path(path, "generation_config.json").exists():  # chat models may name several
        listed = transformers.GenerationConfig.from_pretrained(path).eos_token_id
        stop_ids += listed if isinstance(listed, list) else [] if listed is None else [listed]
    toy = getattr(config, "cleanpo_toy", False)
    name = f"runs/{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    settled = {flag: values[2 if toy else args.lora_rank > 0] for flag, values in args.DEFAULTS.items()}
    settled |= {"judge_name_or_path": str(TOY / "judge") if toy else None, "output_dir": gather({RANK: name})[0]}
    settled = {flag: value for flag, value in settled.items() if getattr(args, flag) is None}
    positions = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)
    settled["max_new_tokens"] = min(args.max_new_tokens, positions // 2)
    settled["max_length"] = min(args.max_length, positions - settled["max_new_tokens"])
    tqdm.write(", ".join([f"{flag} {value}" for flag, value in settled.items()]))
    args = replace(args, **settled)
    saved_steps = [int(path.name.removeprefix("checkpoint-")) for path in Path(args.output_dir).glob("checkpoint-*")]
    return Run(args, Path(args.output_dir), tokenizer, stop_ids, max(saved_steps, default=0))


def open_folder(run: Run, pairs: list[Pair]) -> None:
    """Take the run's folder and write down what repeats the run; to resume one, see that its data are the same."""
    file, digest = run.folder / "args.json", hashlib.sha256()
    for pair in pairs:
        digest.update(repr(pair).encode())
    record = {"args": asdict(run.args), "data": digest.hexdigest(), "devices": f"{WORLD_SIZE} x {DEVICE.type}"}
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    stored = json.loads(file.read_text()) if file.exists() else None
    dist.barrier()  # all have looked before the first one writes
    if stored and (not run.args.resume or (run.folder / "model").exists()):
        sys.exit(f"error: {run.folder} holds a run: name another --output-dir, or --resume it if it has no model/ yet")
    if stored and stored["data"] != record["data"]:
        sys.exit(f"error: {run.args.dataset_name} has changed since the run in {run.folder} began")
    mode = None if run.args.track and RANK == 0 else "disabled"  # before there is a folder, since a login may fail
    wandb.init(id=run.folder.name, resume="allow" if stored else "never", config=record, mode=mode)
    if RANK == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(__file__, run.folder)
        shutil.rmtree(run.folder / "unfinished", ignore_errors=True)
        saved = run.folder / f"checkpoint-{run.saved_step}/sizes.json"
        sizes = json.loads(saved.read_text()) if saved.exists() else {}
        for rows in run.folder.glob("*.jsonl") if stored else ():  # what came after the checkpoint comes again
            os.truncate(rows, sizes.get(rows.name, 0))
    tqdm.write(f"the run is in {run.folder}" + f" and goes on at step {run.saved_step} with its flags" * bool(stored))
    if RANK == 0 and not stored:  # in one piece: a run that is killed leaves all of it or nothing
        (run.folder / "unfinished.json").write_text(json.dumps(record, indent=1))
        (run.folder / "unfinished.json").rename(file)
    dist.barrier()


def save_model(run: Run, model: Any, folder: Path) -> None:
    """Save a model in the dtype of the computation, of LoRA the adapter, with the tokenizer."""
    names = model.state_dict().keys()
    with inference(model):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        if RANK == 0:
            tensors = {name: tensors[name].to("cpu", copy=True) for name in names if name in tensors}
            model.save_pretrained(folder, state_dict=tensors)
            run.tokenizer.save_pretrained(folder)


def finish_run(run: Run, policy: Any) -> None:
    """Save the policy, and show what has changed from the first evaluation to the last one."""
    save_model(run, policy, run.folder / "unfinished")
    if RANK == 0:
        (run.folder / "unfinished").rename(run.folder / "model")
        step = json.loads((run.folder / "samples.jsonl").read_text().splitlines()[-1])["step"]
        samples = [read_rows(run.folder / "samples.jsonl", number) for number in (0, step)]
        for before, after in list(zip(*samples, strict=True))[:3]:
            tqdm.write(f"\nprompt: {before['prompt']}\nbefore: {before['response']}\nafter:  {after['response']}")
        tqdm.write(f"\n{'':24}{'initial':>10}{'final':>10}")
        first, last = [read_rows(run.folder / "metrics.jsonl", number)[0] for number in (0, step)]
        for name in list(first)[1:]:
            tqdm.write(f"{name.removeprefix('eval/'):24}{first[name]:10.4f}{last[name]:10.4f}")
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's thread must not outlive the interpreter


def main(args: Args) -> None:
    run = start_run(args)
    # region method: procedure
    args = run.args
    train_pairs, test_pairs = load_pairs(run)
    batches = plan_batches(args, len(train_pairs))
    policy = load_model(run, args.model_name_or_path, trainable=True)
    open_folder(run, train_pairs + test_pairs)

    def loss_of(pairs: list[Pair]) -> tuple[torch.Tensor, dict]:
        return compute_loss(forward(policy, pairs), args.beta, args.beta * args.gamma_beta_ratio, args.label_smoothing)

    def gradients_of(step: int) -> Iterator[dict[str, float]]:
        yield mean_loss(run, [train_pairs[i] for i in batches[step]], loss_of, backward=True)

    measure = partial(evaluate, run, policy, test_pairs, loss_of)
    train(run, {"policy": policy}, gradients_of, len(batches), {"lr": args.learning_rate}, measure)
    # endregion
    finish_run(run, policy)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
