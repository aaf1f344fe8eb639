"""Iterated DPO: a policy learns from its own answers, of which a judge picks the best and the worst, round by round.

    python docs/iterated_dpo.py --rounds 2 --model-name-or-path MODEL --dataset-name DATA --judge-name-or-path JUDGE

Each round has its own prompts, and starts from the previous one's model, its reference. Other flags are dpo.py's, but
rounds are not resumed, and run on one device.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo  # noqa: E402


@dataclass
class Args:
    rounds: int = 2
    num_prompts: int = 2000  # prompts to answer in each round, at most
    num_answers: int = 4  # answers to each prompt


def make_pairs(run: dpo.Run, policy: dpo.Any, pairs: list[dpo.Pair], count: int, seed: int, ties: bool) -> list[dict]:
    """Rows with the best and the worst of some answers to each prompt, if both ended; equal scores only with ties."""
    pairs, rows = [pair for pair in pairs for _ in range(count)], []
    with dpo.inference(policy), dpo.torch.compiler.set_stance("force_eager"):
        answers = dpo.generate(run, policy, [pair.prompt_ids for pair in pairs], seed, temperature=1.0)
        texts = run.tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = dpo.judge(run, run.args.judge_name_or_path, pairs, texts)
    ended = [answer[-1] in run.stop_ids for answer in answers]
    for start in range(0, len(pairs), count):
        ranked, prompt = sorted(range(start, start + count), key=lambda i: scores[i]), pairs[start].prompt
        sides = {"chosen": texts[ranked[-1]], "rejected": texts[ranked[0]]}
        differ = ties or scores[ranked[-1]] > scores[ranked[0]]
        if differ and all(sides.values()) and ended[ranked[0]] and ended[ranked[-1]]:
            if isinstance(prompt, list):
                sides = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
            rows.append(pairs[start].columns | {"prompt": prompt, "preference_prob": 1.0} | sides)
    return rows


def main(args: Args, flags: list[str]) -> None:
    run = dpo.start_run(tyro.cli(dpo.Args, args=flags))
    if run.args.judge_name_or_path is None or run.args.lora_rank > 0:
        sys.exit("error: --judge-name-or-path is needed, and --lora-rank 0, since a round starts from a whole model")
    if run.args.resume or dpo.WORLD_SIZE > 1:
        sys.exit("error: rounds are not resumed, and run on one device")
    (train_pairs, test_pairs), path = dpo.load_pairs(run), run.args.model_name_or_path
    dpo.dist.destroy_process_group()  # each round has its own
    for number in range(1, args.rounds + 1):
        policy, data = dpo.load_model(run, path), run.folder / f"pairs-{number}"
        data.mkdir(parents=True)
        some_pairs = train_pairs[number - 1 :: args.rounds][: args.num_prompts]
        for split, pairs in (("train", some_pairs), ("test", test_pairs)):
            seed = run.args.seed * args.rounds + number
            rows = make_pairs(run, policy, pairs, args.num_answers, seed, ties=split == "test")
            (data / f"{split}.jsonl").write_text("".join([json.dumps(row) + "\n" for row in rows]))
        del policy  # the training needs the memory
        flags = {"model_name_or_path": path, "dataset_name": str(data), "output_dir": f"{run.folder}/{number}"}
        dpo.main(replace(run.args, **flags, dataset_train_split="train", dataset_test_split="test"))
        dpo.wandb.finish()
        path = f"{run.folder}/{number}/model"


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
