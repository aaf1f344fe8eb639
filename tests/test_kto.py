"""KTO: its loss and gradient in closed form, its examples, and its steps."""

import math

import pytest
import torch
from conftest import TOY, chat, load_plain, load_script, naive_logps, read_rows, start, text_pairs, write_rows

kto = load_script("kto")


@pytest.mark.parametrize("z0", [0.0, 1.5])
def test_loss_and_gradient(z0):
    """Equations 8 and 10 of the paper, with u = beta (r - z0): w sigma(-+ u), and -+ w beta sigma(u) (1 - sigma(u))."""
    logratios = torch.tensor([-2.0, 0.3, 4.0, -1.0], requires_grad=True)
    losses, metrics = kto.compute_loss(logratios, torch.tensor([1.0, 1.0, 0.0, 0.0]), 0.3, z0, (2.0, 0.5))
    losses.sum().backward()
    for i, (weight, sign) in enumerate([(2, 1), (2, 1), (0.5, -1), (0.5, -1)]):
        value = 1 / (1 + math.exp(-0.3 * (logratios[i].item() - z0)))
        assert losses[i].item() == pytest.approx(weight * (1 - value if sign == 1 else value))
        assert logratios.grad[i].item() == pytest.approx(-sign * weight * 0.3 * value * (1 - value), rel=1e-5)
        margin = sign * 0.3 * (logratios[i].item() - z0)
        assert [values[i].item() for values in metrics.values()] == pytest.approx([margin, float(margin > 0)])


HEAD, BOTH = ["<|user|>a<|assistant|>"], ["b<|end|>", "c<|end|>"]
ROWS = {
    "text": ({"prompt": "a", "completion": "b", "label": True}, ["a", "b<|end|>", ""]),
    "chat": ({"prompt": chat("a"), "completion": chat("a", "b")[1:], "label": False}, [*HEAD, "", "b<|end|>"]),
    "pair": ({"prompt": chat("a"), "chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]}, [*HEAD, *BOTH]),
    "conversations": ({"chosen": chat("a", "b"), "rejected": chat("a", "c")}, [*HEAD, *BOTH]),
}


@pytest.mark.parametrize("form", ROWS)
def test_rows(form):
    row, texts = ROWS[form]
    run = start("kto", TOY / "policy")
    (pair,) = kto.encode_rows(run, [row], "train")
    assert run.tokenizer.batch_decode([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]) == texts
    examples = [(example.chosen_ids, example.preference_prob) for example in kto.make_examples([pair])]
    assert examples == [(ids, label) for ids, label in ((pair.chosen_ids, 1.0), (pair.rejected_ids, 0.0)) if ids]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "label": True},
        {"prompt": "a", "completion": "", "label": False},
        {"prompt": "a", "completion": "b", "label": "False"},
    ],
)
def test_bad_rows_end_the_run(row):
    with pytest.raises(SystemExit, match="^error: row 0 of split train(: label is 'False'| needs )"):
        kto.encode_rows(start("kto", TOY / "policy"), [row], "train")


def test_other_answers_are_those_of_the_previous_example_of_the_step():
    pairs = [kto.Pair(row, "a", {}, [5], [10 + row], [], 1.0) for row in range(5)]
    examples, batches = kto.add_others(pairs, [[3, 0, 4], [2, 1]], max_length=2)
    assert [(e.row, e.chosen_ids, e.rejected_ids) for e in examples] == [
        (3, [13], [14]), (0, [10], [13]), (4, [14], [10]), (2, [12], [11]), (1, [11], [12]),
    ]  # fmt: skip
    assert batches == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("micro_batch_tokens", [1, 10_000])
def test_steps_are_those_of_a_naive_loop(micro_batch_tokens, tiny_model, tmp_path):
    """Two steps of a run, whatever its micro-batches: loss, z0, gradient norm; and the test loss after them."""
    path, rows = tiny_model(), []
    for i, pair in enumerate(text_pairs(6)):
        label = i % 2 == 1
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label})
    flags = {"dataset_name": write_rows(tmp_path / "rows.jsonl", rows * 2), "batch_size": 5, "max_steps": 2}
    flags |= {"max_grad_norm": 1e9, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    flags |= {"learning_rate": 1e-2, "max_new_tokens": 2, "micro_batch_tokens": micro_batch_tokens, "beta": 0.5}
    kto.main(kto.Args(model_name_or_path=path, output_dir=str(tmp_path / "run"), **flags))
    logged = read_rows(tmp_path / "run" / "metrics.jsonl")[1:]

    run, model, reference = start("kto", path, **flags), load_plain(path), load_plain(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    examples = kto.make_examples(kto.load_pairs(run)[0])

    def naive_ratio(example, answer):
        logps, ref_logps = [naive_logps(plain, example.prompt_ids, answer).sum() for plain in (model, reference)]
        return logps - ref_logps.detach()

    def naive_loss(example, z0):
        sign, weight = (1, 2.0) if example.preference_prob == 1 else (-1, 0.5)
        return weight * (1 - torch.sigmoid(sign * 0.5 * (naive_ratio(example, example.chosen_ids) - z0)))

    batches = kto.plan_batches(run.args, len(examples))
    for row, batch, rate in zip(logged, batches, (1e-2, 5e-3), strict=True):  # after warm-up, down to 0 at a third step
        others = zip(batch, batch[-1:] + batch[:-1], strict=True)
        kls = [naive_ratio(examples[i], examples[other].chosen_ids).item() for i, other in others]
        z0 = max(0.0, sum(kls) / len(batch))
        loss = sum(naive_loss(examples[i], z0) for i in batch) / len(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        for name, expected in (("loss", loss.detach()), ("z0", z0), ("grad_norm", norm)):
            assert row[f"train/{name}"] == pytest.approx(float(expected), rel=1e-4, abs=1e-5), name
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    assert logged[1]["train/z0"] > 0  # else z0 would be untested
    losses = [naive_loss(example, z0=0.0).item() for example in kto.make_examples(kto.load_pairs(run)[1])]
    assert logged[1]["eval/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
