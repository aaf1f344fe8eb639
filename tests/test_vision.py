"""docs/vision.patch, with the tiny LLaVA of docs/vision_demo.py and random weights."""

import subprocess

import pytest
import torch
from conftest import ROOT, chat, load_script, read_rows, start, weights_of, write_rows
from datasets import Dataset

demo = pytest.importorskip("PIL") and load_script("docs/vision_demo")
BROKEN = {"nowhere.png": ["nowhere.png"], "cannot identify image": [b"no picture"], "no images were passed": []}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    subprocess.run(
        ["patch", "--fuzz=0", "-o", folder / "vision_dpo.py", ROOT / "dpo.py", ROOT / "docs/vision.patch"], check=True
    )
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        model, processor = demo.make_model()
        torch.nn.utils.vector_to_parameters(0.3 * torch.randn(model.num_parameters()), model.parameters())
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    demo.write_pairs(folder, "test", [["red circle", None, "blue square", None]] * 3, demo.random.Random(0))
    text = {"prompt": chat("describe"), "chosen": chat("", "a")[1:], "rejected": chat("", "and")[1:]}
    write_rows(folder / "data/train.jsonl", [*read_rows(folder / "data/test.jsonl"), text])
    return load_script(f"{folder}/vision_dpo"), folder


def test_run(made):
    (vision, folder), judge = made, str(ROOT / "docs/vision_demo.py")
    flags = {"model_name_or_path": f"{folder}/policy", "dataset_name": f"{folder}/data", "output_dir": f"{folder}/run"}
    vision.main(vision.Args(judge_name_or_path=judge, batch_size=2, learning_rate=1e-2, max_new_tokens=8, **flags))
    first, _, last = read_rows(folder / "run/metrics.jsonl")
    assert abs(first["eval/kl"]) < 1e-4 < last["eval/kl"] and last["eval/loss"] < first["eval/loss"] - 0.01
    assert all(".language_model." in name for name in weights_of(folder / "run/model")) and "eval/judge_score" in last


@pytest.mark.parametrize("message", BROKEN)
def test_a_missing_or_broken_image_is_named(made, message):
    run, row = start(made[0].__name__, f"{made[1]}/policy"), read_rows(made[1] / "data/test.jsonl")[0]
    with pytest.raises(SystemExit, match=f"^error: row 1 of split train: .*{message}"):
        made[0].encode_rows(run, [row, row | {"images": BROKEN[message]}], "train")


def test_loss_and_gradient_are_those_of_trl(made):
    (vision, folder), trl, paths = made, pytest.importorskip("trl"), [f"{made[1]}/policy", f"{made[1]}/reference"]
    run, rows = start(vision.__name__, paths[0], lora_rank=0), read_rows(folder / "data/test.jsonl")
    policy, reference = [vision.load_model(run, path, trainable=True) for path in paths]
    pairs = vision.add_reference(run, reference, vision.encode_rows(run, rows, "train"), [[0, 1, 2]])
    ours = vision.compute_loss(vision.forward(policy, pairs), 0.1, 0.0)[0].mean()
    models = [vision.AutoModelForImageTextToText.from_pretrained(path) for path in paths]
    config = trl.DPOConfig(f"{folder}/trl", beta=0.1, bf16=False, use_cpu=True, report_to="none")
    trainer = trl.DPOTrainer(*models, config, train_dataset=Dataset.from_list(rows), processing_class=run.processor)
    theirs = trainer.compute_loss(models[0], next(iter(trainer.get_train_dataloader())))
    (ours + theirs).backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5) and abs(ours.item() - 0.6931) > 0.01
    for (name, weight), other in zip(policy.named_parameters(), models[0].parameters(), strict=True):
        expected = None if "vision" in name or "projector" in name else other.grad
        torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-6)
