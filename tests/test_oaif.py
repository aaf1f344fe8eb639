"""OAIF: its losses, its annotator, and that pairs and reference are what they should be."""

import json
import math

import pytest
import torch
import transformers
from conftest import TOY, load_script, make_batch, naive_logps, read_rows, text_pairs, weights_of, write_rows

oaif = load_script("oaif")
POSITIVE, SHORTER = "Prefer the more positive review.", "Prefer the shorter review."
GOOD = "The rooms were great. The staff was friendly. I would stay there again."
BAD = "The rooms were terrible."


@pytest.fixture
def flags(tiny_model, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", text_pairs(8))
    paths = {"model_name_or_path": tiny_model(), "dataset_name": data, "output_dir": str(tmp_path / "run")}
    options = {"batch_size": 4, "max_new_tokens": 6, "eval_steps": 1000, "learning_rate": 1e-2}
    others = {"judge_name_or_path": None, "dataset_test_split": "train", "annotator_instruction": "Be kind."}
    return paths | options | others | {"annotator_name_or_path": tiny_model("qwen3")}


def run_of(flags):
    args = oaif.Args(**flags)
    run = oaif.Run(args, oaif.Path(args.output_dir), torch.device("cpu"), torch.float32, 2048, None, [0])
    run.tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_name_or_path)
    run.rollout = transformers.AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    return run


def toy_annotator(**flags):
    paths = {"model_name_or_path": str(TOY / "policy"), "annotator_name_or_path": str(TOY / "annotator")}
    run = run_of(paths | {"output_dir": "unused"} | flags)
    return run, oaif.load_annotator(run)


# === Losses ===


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
def test_losses(loss):
    batch = make_batch(50)
    losses, _ = oaif.compute_loss(batch, loss=loss, beta=0.2)
    h = (batch.chosen_logps - batch.ref_chosen_logps - (batch.rejected_logps - batch.ref_rejected_logps)).tolist()
    expected = {
        "dpo": [math.log(1 + math.exp(-0.2 * x)) for x in h],
        "ipo": [(x - 2.5) ** 2 for x in h],
        "slic": [max(0, 1 - 0.2 * x) for x in h],
    }
    assert losses.tolist() == pytest.approx(expected[loss]) and (loss != "slic" or 0 in expected[loss])


@pytest.mark.parametrize("loss, first", [("dpo", math.log(2)), ("ipo", 0.25), ("slic", 1.0)])
def test_the_paper_has_a_beta_for_each_loss(flags, loss, first):
    oaif.main(oaif.Args(**flags, loss=loss))
    rows = read_rows(oaif.Path(flags["output_dir"]) / "metrics.jsonl")
    assert rows[1]["train/loss"] == pytest.approx(first, abs=1e-5)
    margin = rows[2]["train/rewards/margins"] / {"dpo": 0.1, "ipo": 1.0, "slic": 0.002}[loss]
    assert abs(margin) > 0.1  # the reference stays where the policy was


# === Annotator ===


@pytest.mark.parametrize("template", [True, False])
def test_the_probability_of_a_reply_is_that_of_its_token(flags, tiny_copy, template):
    path = tiny_copy("gemma2")
    if not template:
        (path / "chat_template.jinja").unlink()
    run = run_of(flags | {"annotator_name_or_path": str(path)})
    annotator = oaif.load_annotator(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    questions, expected = ["Which?", "Which of the two is better?", "So?" * 20], []
    for question in questions:
        text = f"<|user|>{question}<|assistant|>" if template else f"{question}\n"
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        one, two = (logits[tokenizer(reply).input_ids[0]].exp().item() for reply in "12")
        expected.append(one / (one + two))
    assert oaif.ask(run, annotator, questions).tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3


def test_the_annotator_s_template_writes_its_first_token(flags, tiny_copy):
    """As SmolLM2's, whose tokenizer has a beginning-of-sequence token and does not write it."""
    path = tiny_copy("qwen3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.bos_token = "<|user|>"  # with which the template begins
    tokenizer.save_pretrained(path)
    ids = tokenizer("<|user|>Which?<|assistant|>").input_ids
    assert ids[0] == tokenizer.bos_token_id == tokenizer("<|user|>").input_ids[0] and len(tokenizer("").input_ids) == 0
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        one, two = model(torch.tensor([ids])).logits[0, -1][[tokenizer(reply).input_ids[0] for reply in "12"]].exp()
    run = run_of(flags | {"annotator_name_or_path": str(path)})
    found = oaif.ask(run, oaif.load_annotator(run), ["Which?"]).item()
    assert found == pytest.approx((one / (one + two)).item(), abs=1e-5)


def test_both_orders_and_all_principles_are_averaged(flags, tmp_path):
    principles = tmp_path / "principles.txt"
    principles.write_text("Be kind.\n\nBe brief.\n")
    run = run_of(flags | {"principles": str(principles)})
    annotator = oaif.load_annotator(run)
    chat = [{"role": "user", "content": "Film?"}]
    prompts, firsts, seconds = ["Hotel?", chat, [*chat, {"role": "assistant", "content": "Yes."}, *chat]], [], []
    for first, second in (("Good.", "Poor."), ("Bad.", "Fine."), ("A.", "B.")):
        firsts, seconds = [*firsts, first], [*seconds, second]
    orders = oaif.annotate(run, annotator, prompts, firsts, seconds)
    for i, text in enumerate(("Hotel?", "Film?", "user: Film?\n\nassistant: Yes.\n\nuser: Film?")):
        sums = [0.0, 0.0]
        for instruction in ("Be kind.", "Be brief."):
            for order, answers in enumerate(((firsts[i], seconds[i]), (seconds[i], firsts[i]))):
                question = (
                    f"{instruction}\n\nRequest: {text}\n\nAnswer 1:\n{answers[0]}\n\nAnswer 2:\n{answers[1]}\n\n"
                    "Which answer is better? Reply with 1 or 2."
                )
                p = oaif.ask(run, annotator, [question]).item()
                sums[order] += (1 - p if order else p) / 2
        assert orders[:, i].tolist() == pytest.approx(sums, abs=1e-5)
    swapped = oaif.annotate(run, annotator, prompts, seconds, firsts)
    torch.testing.assert_close(orders.mean(0), 1 - swapped.mean(0))


@pytest.mark.parametrize("instruction, better", [(POSITIVE, GOOD), (SHORTER, BAD)])
def test_the_annotator_of_the_test_bed_does_as_it_is_told(instruction, better):
    run, annotator = toy_annotator(annotator_instruction=instruction)
    orders = oaif.annotate(run, annotator, ["Review the hotel Blue Crown."] * 2, [GOOD, BAD], [BAD, GOOD])
    expected = [1.0, 0.0] if better == GOOD else [0.0, 1.0]
    assert orders.tolist() == [pytest.approx(expected, abs=0.1)] * 2


def test_a_reward_model_as_annotator():
    run, annotator = toy_annotator(annotator_name_or_path=str(TOY / "judge"))
    assert annotator.instructions == []
    prompts = ["Review the hotel Blue Crown."] * 2
    scores = oaif.judge(run, annotator.model, annotator.tokenizer, prompts, [GOOD, BAD])
    orders = oaif.annotate(run, annotator, prompts, [GOOD, BAD], [BAD, GOOD])
    better = 1 / (1 + math.exp(scores[1] - scores[0]))
    assert better > 0.6 and orders.tolist() == [pytest.approx([better, 1 - better], abs=1e-5)] * 2


def test_an_annotator_of_another_vocabulary_and_template(flags, tiny_copy):
    path = tiny_copy("llama", vocab_size=320)
    old = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer = old.train_new_from_iterator(["Which answer is better? Reply with 1 or 2."] * 20, 300)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    tokenizer.chat_template = (
        "<|start|>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[reply] "
    )
    tokenizer.save_pretrained(path)
    oaif.main(oaif.Args(**flags | {"annotator_name_or_path": str(path)}))
    rows = read_rows(oaif.Path(flags["output_dir"]) / "metrics.jsonl")
    assert 0.5 <= rows[1]["method/preference"] <= 1


def test_an_annotator_that_only_looks_at_the_order_has_no_preference(flags, monkeypatch):
    monkeypatch.setattr(oaif, "ask", lambda run, annotator, questions: torch.full((len(questions),), 0.75))
    with pytest.raises(SystemExit, match="no preference in any of the 4 pairs"):
        oaif.main(oaif.Args(**flags))


def test_an_annotator_to_which_replies_are_not_single_tokens(flags, tiny_copy):
    """One that takes a 2 apart."""
    path = tiny_copy()
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "2"}, "content": "two, that is to say"}
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="the replies 1 and 2 are not single tokens"):
        oaif.main(oaif.Args(**flags | {"annotator_name_or_path": str(path)}))


def test_wrong_annotators(flags, tmp_path):
    for path in (tmp_path / "nothing", "some-owner/no-such-thing"):
        with pytest.raises(SystemExit, match="error: --annotator-name-or-path"):
            oaif.main(oaif.Args(**flags | {"annotator_name_or_path": str(path)}))
    with pytest.raises(SystemExit, match="cannot compare real text"):
        oaif.main(oaif.Args(**flags | {"annotator_name_or_path": oaif.Args.annotator_name_or_path}))
    with pytest.raises(SystemExit, match="instruction is about reviews: give another as --annotator-instruction"):
        oaif.main(oaif.Args(**flags | {"annotator_instruction": oaif.Args.annotator_instruction}))
    with pytest.raises(SystemExit, match="--principles nowhere.txt: no such file"):
        oaif.main(oaif.Args(**flags, principles="nowhere.txt"))


# === Pairs and reference ===


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_is_the_initial_policy_in_all_steps(flags, monkeypatch, rank):
    seen, make_pairs = [], oaif.make_pairs
    monkeypatch.setattr(oaif, "make_pairs", lambda *inputs: seen.append(make_pairs(*inputs)) or seen[-1])
    oaif.main(oaif.Args(**flags, lora_rank=rank, num_train_epochs=2))
    assert len(seen) == 4
    for pairs in seen:
        stored = torch.tensor([[pair.ref_chosen_logps, pair.ref_rejected_logps] for pair in pairs])
        expected = naive_logps(flags["model_name_or_path"], pairs)
        torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-3)
    rows = read_rows(oaif.Path(flags["output_dir"]) / "metrics.jsonl")
    assert abs(rows[4]["train/rewards/margins"]) > 1e-3


def test_preferred_answers_are_chosen_and_written_out(flags, monkeypatch):
    """By an annotator that likes the letter e."""

    def count(run, annotator, prompts, firsts, seconds):
        odds = torch.tensor([float(a.count("e") - b.count("e")) for a, b in zip(firsts, seconds, strict=True)])
        return torch.sigmoid(odds).expand(2, -1)

    monkeypatch.setattr(oaif, "annotate", count)
    oaif.main(oaif.Args(**flags | {"max_new_tokens": 30}, num_train_epochs=8))
    folder = oaif.Path(flags["output_dir"])
    annotated, rows = read_rows(folder / "annotated.jsonl"), read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if "train/loss" in row]
    assert sum(4 - row["method/ties"] for row in trained) == len(annotated) > 16
    assert any(row["method/ties"] for row in trained)
    for row in annotated:
        better = row["chosen"].count("e") - row["rejected"].count("e")
        assert better > 0 and row["annotator_prob"] == pytest.approx(1 / (1 + math.exp(-better)))


def test_a_step_without_a_preference_ends_only_the_first(flags, monkeypatch):
    """Equal answers say nothing of the annotator either."""
    generate, steps = oaif.generate, []

    def same_answers(run, prompts, *rest):
        answers = generate(run, prompts, *rest)
        if len(prompts) == 8:  # two answers to each of four prompts: a step, and no evaluation
            steps.append(run.step)
            equal = range(4) if run.step == 1 else [0]
            answers = [answers[i - 4] if i - 4 in equal else answer for i, answer in enumerate(answers)]
        return answers

    monkeypatch.setattr(oaif, "generate", same_answers)
    probs = torch.tensor([[0.9, 0.8, 0.2, 0.6], [0.1, 0.7, 0.1, 0.3]])  # the orders differ on the first and the last
    monkeypatch.setattr(oaif, "annotate", lambda *inputs: probs)
    flags["dataset_name"] = write_rows(oaif.Path(flags["dataset_name"]).with_name("more.jsonl"), text_pairs(12))
    oaif.main(oaif.Args(**flags | {"num_eval_prompts": 3}))
    rows = [row for row in read_rows(oaif.Path(flags["output_dir"]) / "metrics.jsonl") if "train/loss" in row]
    assert steps == [0, 1, 2]
    assert [row["method/ties"] for row in rows] == [1, 4, 1]
    assert [row["method/order_agreement"] for row in rows] == [pytest.approx(2 / 3), 1, pytest.approx(2 / 3)]
    assert rows[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[1]["train/grad_norm"] < 1e-4
    assert len(read_rows(oaif.Path(flags["output_dir"]) / "annotated.jsonl")) == 6


def test_learning_rate_0_only_annotates_and_other_scripts_train_on_it(flags, tmp_path):
    oaif.main(oaif.Args(**flags | {"learning_rate": 0.0}))
    folder = oaif.Path(flags["output_dir"])
    before, after = weights_of(flags["model_name_or_path"]), weights_of(folder / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(read_rows(folder / "annotated.jsonl")) == 8
    dpo = load_script("pre_dpo")
    names = ("model_name_or_path", "batch_size", "max_new_tokens", "judge_name_or_path")
    again = {name: flags[name] for name in names} | {"dataset_name": str(folder / "annotated.jsonl")}
    dpo.main(dpo.Args(**again, output_dir=str(tmp_path / "dpo")))
    assert (tmp_path / "dpo" / "model_outputs.json").exists()


def test_only_evaluating(flags):
    oaif.main(oaif.Args(**flags, max_steps=0))
    (row,) = read_rows(oaif.Path(flags["output_dir"]) / "metrics.jsonl")
    assert row["step"] == 0 and row["eval/kl"] == 0
