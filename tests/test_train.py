"""examples/train.py, briefly: what it writes, that a run goes on, that processes together do what one does, and what it
says when something is missing.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vitkernels import info
from vitkernels.models import create_model

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--override", "embed_dim=32", "--limit", "64", "--batch-size", "16", "--epochs", "2"]
STEPS = 4  # of an epoch
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo here"
)


@pytest.fixture(scope="module", autouse=True)
def train():
    """The program. It runs on the CPU, on one thread: two fight for the cores of a machine that does more than this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        module = importlib.import_module("train")
        patch.setattr(module.options, "device_type", lambda args: "cpu")
        patch.delenv("RANK", raising=False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield module
        torch.set_num_threads(threads)


def run(train, folder: Path, *options: str) -> dict:
    """The last checkpoint of a run."""
    assert train.main([*TINY, "--output", str(folder), *options]) == 0
    return load(folder)


def load(folder: Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


def losses(saved: dict) -> list[float]:
    return [loss for epoch in saved["history"] for loss in epoch["losses"]]


def interrupt(train, patch, after: int) -> None:
    """Ctrl-C while a step is under way, after so many whole ones."""
    step, left = train.Run.step, iter(range(after))

    def interrupted(self, images, labels):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self, images, labels)

    patch.setattr(train.Run, "step", interrupted)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    run(train, folder)
    return folder


@pytest.fixture(scope="module")
def half(train, tmp_path_factory) -> Path:
    """The folder of the same run, interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(train, patch, after=STEPS + 2)
        assert train.main([*TINY, "--output", str(folder)]) == 130
    return folder


@pytest.fixture
def begun(half, tmp_path) -> Path:
    """A copy of the interrupted run."""
    return shutil.copytree(half, tmp_path / "begun")


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A folder of dark and bright images of several sizes and modes."""
    random, folder = np.random.default_rng(0), tmp_path / "photographs"
    for name, low in (("bright", 128), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for i, mode in enumerate(["RGB", "L", "RGBA", "P", "RGB", "RGB", "RGB", "RGB"]):
            pixels = random.integers(low, low + 128, (40 + i, 56 - 3 * i, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{i}.png")
        (folder / name / "notes.txt").write_text("no image")
    return folder


def test_a_run_leaves_checkpoints_a_log_and_a_picture(whole):
    assert {path.name for path in whole.iterdir()} == {"best.pt", "last.pt", "log.jsonl", "curve.png"}
    saved = load(whole)
    assert [len(epoch["losses"]) for epoch in saved["history"]] == [STEPS, STEPS]
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == losses(saved)
    assert [line["step"] for line in lines if "step" in line] == list(range(1, 2 * STEPS + 1))
    assert [line["accuracy"] for line in lines if "accuracy" in line] == [e["accuracy"] for e in saved["history"]]
    with Image.open(whole / "curve.png") as picture:
        picture.load()
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 10
    model = create_model(**saved["build"])
    model.load_state_dict(saved["model"])
    assert model.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, len(saved["classes"]))


def test_an_interrupted_run_goes_on_bit_for_bit(train, whole, begun, capsys):
    before = load(begun)
    assert len(before["history"]) == 1 and (begun / "curve.png").exists()
    after, expected = run(train, begun, "--resume"), load(whole)
    assert losses(after) == losses(expected)
    assert [epoch["accuracy"] for epoch in after["history"]] == [epoch["accuracy"] for epoch in expected["history"]]
    assert all(torch.equal(x, expected["model"][name]) for name, x in after["model"].items())
    assert not all(torch.equal(x, before["model"][name]) for name, x in after["model"].items())
    for name, state in after["optimizer"]["state"].items():
        assert all(torch.equal(x, expected["optimizer"]["state"][name][key]) for key, x in state.items())
    assert after["schedule"] == expected["schedule"]
    assert (begun / "log.jsonl").read_text().count("\n") == 2 * STEPS + 2


def test_an_interrupt_keeps_the_last_epoch_and_says_how_to_go_on(train, begun, monkeypatch, capsys):
    before = (begun / "last.pt").read_bytes()
    interrupt(train, monkeypatch, after=1)
    assert train.main([*TINY, "--output", str(begun), "--resume"]) == 130
    assert (begun / "last.pt").read_bytes() == before and "--resume goes on" in capsys.readouterr().err


def test_an_interrupt_before_the_first_checkpoint_leaves_none(train, tmp_path, monkeypatch, capsys):
    interrupt(train, monkeypatch, after=1)
    assert train.main([*TINY, "--output", str(tmp_path)]) == 130
    assert not list(tmp_path.glob("*.pt")) and "before the first checkpoint" in capsys.readouterr().err


def test_a_failed_write_leaves_the_file_that_was_there(train, tmp_path):
    def fail(path: Path) -> None:
        path.write_text("a part")
        raise OSError("disk full")

    (tmp_path / "last.pt").write_text("whole")
    with pytest.raises(OSError, match="disk full"):
        train.replace(tmp_path / "last.pt", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("last.pt", "whole")]


def torchrun(folder: Path, *options: str) -> None:
    """Two processes on the CPU, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(EXAMPLES / "train.py"), *TINY, "--output", str(folder), *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1  # of one process


@needs_gloo
def test_ddp_learns_as_one_process(whole, tmp_path):
    torchrun(tmp_path, "--parallel", "ddp")
    assert losses(load(tmp_path)) == pytest.approx(losses(load(whole)), abs=1e-4)
    assert load(tmp_path)["history"][-1]["accuracy"] == load(whole)["history"][-1]["accuracy"]


@needs_gloo
def test_fsdp_goes_on_for_one_process_and_back(train, whole, begun, tmp_path):
    """The first epoch is one process's, the second one FSDP's, the third one process's again."""
    torchrun(begun, "--parallel", "fsdp", "--resume")
    assert losses(load(begun)) == pytest.approx(losses(load(whole)), abs=1e-4)
    assert load(begun)["history"][-1]["accuracy"] == load(whole)["history"][-1]["accuracy"]
    alone = run(train, shutil.copytree(whole, tmp_path / "alone"), "--resume", "--epochs", "3")
    assert losses(run(train, begun, "--resume", "--epochs", "3")) == pytest.approx(losses(alone), abs=1e-4)


def test_fused_and_reference_learn_alike(train, whole, tmp_path):
    if not (found := info()["backend cpu"]).startswith("available"):
        pytest.skip(f"backend cpu {found}")
    plain = run(train, tmp_path, "--backend", "reference")
    fused = load(whole)
    assert losses(plain) == pytest.approx(losses(fused), abs=1e-3)
    assert any(not torch.equal(x, fused["model"][name]) for name, x in plain["model"].items())  # it was another program


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_amp_learns_nearly_as_float32(train, whole, tmp_path, amp):
    saved = run(train, tmp_path, "--amp", amp)
    assert losses(saved) == pytest.approx(losses(load(whole)), abs=0.1)
    assert bool(saved["scaler"]) == (amp == "float16")


@pytest.mark.parametrize("parts", [False, True], ids=["classes", "train and val"])
def test_a_folder_of_images(train, photographs, tmp_path, parts):
    options = ["--data", str(photographs), "--image-size", "32", "--batch-size", "4"]
    if parts:
        shutil.move(photographs, tmp_path / "train")
        for name in ("bright", "dark"):
            shutil.copytree(tmp_path / "train" / name, tmp_path / "parts" / "val" / name)
        shutil.move(tmp_path / "train", tmp_path / "parts" / "train")
        options[1] = str(tmp_path / "parts")
    saved = run(train, tmp_path / "run", *options, "--workers", "0")
    assert saved["classes"] == ["bright", "dark"] and saved["settings"]["images"] == (16 if parts else 13)
    assert losses(run(train, tmp_path / "loaded", *options, "--workers", "2")) == losses(saved)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_is_no_image_is_named(train, photographs, tmp_path, workers):
    (photographs / "dark" / "1.png").write_bytes(b"no image")
    options = ["--data", str(photographs), "--image-size", "32", "--batch-size", "4", "--workers", workers]
    with pytest.raises(SystemExit, match=r"\A[^\n]*dark/1.png cannot be read as an image[^\n]*\Z"):
        train.main([*TINY, "--output", str(tmp_path / "run"), *options])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_learns_nearly_as_the_cpu(train, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(train.options, "device_type", lambda args: "cuda")
    saved = run(train, tmp_path)
    assert losses(saved) == pytest.approx(losses(load(whole)), abs=0.1)
    assert len(run(train, tmp_path, "--resume", "--epochs", "3")["history"]) == 3


def refusal(train, capsys, *options: object) -> str:
    """The one line that a run ends with."""
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *map(str, options)])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1
    return printed


@pytest.mark.parametrize(
    "options, said",
    [
        (["--epochs", "0"], "--epochs: must be an integer of at least 1, got '0'"),
        (["--epochs", "1.5"], "--epochs: must be an integer of at least 1, got '1.5'"),
        (["--lr", "0"], "--lr: must be a number above 0, got '0'"),
        (["--lr", "nan"], "--lr: must be a number above 0, got 'nan'"),
        (["--seed", "-1"], "--seed: must be an integer of at least 0 and at most 4294967295, got '-1'"),
        (["--label-smoothing", "2"], "--label-smoothing: must be a number of at least 0 and at most 1, got '2'"),
        (["--image-size", "-4"], "--image-size: must be an integer of at least 1, got '-4'"),
        (["--image-size", "3"], "images must be at least 4 x 4 pixels"),
        (["--backend", "fast"], "--backend: invalid choice: 'fast'"),
        (["--model", "crossformer_smal"], "did you mean crossformer_small"),
        (["--override", "embed_dim"], "--override: must be NAME=VALUE, such as drop_path=0.1, got 'embed_dim'"),
        (["--override", "width=3"], "crossformer_tiny has no argument width; it has embed_dim"),
        (["--override", "heads=(3, 5)"], "dim must be a multiple of heads"),
        (["--warmup", "2"], "--warmup must be less than the 2 epochs, got 2"),
        (["--batch-size", "65"], "--batch-size must be at most the 64 images for training, got 65"),
        (["--parallel", "ddp"], "torchrun --nproc-per-node 2"),
        (["--resume"], "there is no"),
        (["--resume", "--overwrite"], "not allowed with argument"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(train, tmp_path, capsys, options, said):
    assert said in refusal(train, capsys, "--output", tmp_path / "run", *options)


def test_a_folder_without_images_by_class_is_refused(train, tmp_path, capsys):
    folder, options = tmp_path / "photographs", ["--output", tmp_path / "run", "--data", tmp_path / "photographs"]
    assert "photographs is not a folder" in refusal(train, capsys, *options)
    (folder / "cat").mkdir(parents=True)
    assert "at least 2 classes, it holds 1" in refusal(train, capsys, *options)
    (folder / "dog").mkdir()
    assert "found 0 and 0 files" in refusal(train, capsys, *options)
    for path in ("train/cat", "train/dog", "val/bird"):
        (folder / path).mkdir(parents=True)
    assert "classes without images for training: bird" in refusal(train, capsys, *options)


def test_a_run_is_not_overwritten_or_mixed_with_another(train, begun, capsys):
    options, before = ["--output", begun], (begun / "last.pt").read_bytes()
    assert "--resume goes on from it, --overwrite begins anew" in refusal(train, capsys, *options)
    assert "lr 0.0025, not 0.1" in refusal(train, capsys, *options, "--resume", "--lr", "0.1")
    assert "seed 0, not 1" in refusal(train, capsys, *options, "--resume", "--seed", "1")
    other = ["--override", "embed_dim=64", "--limit", "32"]
    said = refusal(train, capsys, *options, "--resume", *other)
    assert "embed_dim 32, not 64" in said and "images 64, not 32" in said
    assert (begun / "last.pt").read_bytes() == before
    (begun / "last.pt").write_bytes(b"no checkpoint")
    assert "last.pt is no checkpoint of this program" in refusal(train, capsys, *options, "--resume")


def test_a_loss_that_is_not_finite_ends_a_run(train, begun, monkeypatch, capsys):
    before = (begun / "last.pt").read_bytes()
    monkeypatch.setattr(train.Run, "step", lambda self, images, labels: torch.tensor(float("nan")))
    assert "the loss of epoch 2/2 is not finite" in refusal(train, capsys, "--output", begun, "--resume")
    assert (begun / "last.pt").read_bytes() == before


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_batches(train, world):
    alone = train.datasets.training_batches(50, 12, 0, 7, 0, 1)
    shares = [train.datasets.training_batches(50, 12, 0, 7, rank, world) for rank in range(world)]
    assert len(alone) == 4 and len(torch.cat([rows for rows, _ in alone]).unique()) == 48
    for (rows, draws), *parts in zip(alone, *shares):
        together = torch.cat([part[0] for part in parts]).sort()
        assert torch.equal(together.values, rows.sort().values)
        drawn = torch.cat([part[1] for part in parts])[together.indices]
        assert torch.equal(drawn, draws[rows.argsort()])
    tests = [train.datasets.test_batches(50, 12, rank, world) for rank in range(world)]
    assert len({tuple(len(rows) for rows, _ in test) for test in tests}) == 1  # in step with each other
    own = [torch.cat([rows for rows, _ in test])[: len(range(r, 50, world))] for r, test in enumerate(tests)]
    assert torch.equal(torch.cat(own).sort().values, torch.arange(50))


def test_every_epoch_and_seed_has_an_order_of_its_own(train):
    batches = [train.datasets.training_batches(50, 50, *which, 0, 1)[0] for which in ((0, 1), (0, 2), (1, 1))]
    assert len({tuple(rows.tolist()) for rows, _ in batches}) == len({draws.sum().item() for _, draws in batches}) == 3


def test_the_learning_rate_rises_and_falls(train):
    rates = [train.rate_at(step, 10, 100) for step in range(101)]
    assert rates[10] == max(rates) == 1 and rates[100] == 0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert train.rate_at(0, 0, 100) == 1


@pytest.mark.parametrize("name", ["boat_swin_tiny", "mvit_v2_tiny", "crossformer_pp_small"])
def test_weights_alone_decay(train, name, tmp_path):
    argv = ["--model", name, "--output", str(tmp_path), "--override", "depths=(1, 1, 1, 1)"]
    args = train.options.parse(argv, "")
    team, data = train.Team(torch.device("cpu")), train.datasets.Data(["a", "b"], 3, range(64), range(2))
    built = train.begin(args, data, team)
    decay = {p: group["weight_decay"] for group in built.optimizer.param_groups for p in group["params"]}
    for name, parameter in built.model.named_parameters():
        product = parameter.ndim > 1 and "rel_pos" not in name and "bias_table" not in name
        assert (decay[parameter] > 0) == product, name


def test_a_terminal_has_a_bar(train, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with train.display.progress(2, 8, True) as (tick, line):
        for _ in range(6):
            tick(1, torch.tensor(0.5))
        line("epoch 1/1: loss 0.500")
    assert "epoch 1/1: loss 0.500" in capsys.readouterr().err
