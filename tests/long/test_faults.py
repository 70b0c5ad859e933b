"""Faults and hostile input: what was finished stays, every message is plain, nothing hangs, no traceback.

FAULT_FUZZ=300 pytest tests/long/test_faults.py tries 300 mutilated checkpoints instead of 12.
"""

import contextlib
import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import assert_equal, outcome

import main
import train as training
from images import cache, decode
from runs.checkpoint import load_checkpoint
from utils import UserError


@pytest.fixture
def own_data(tmp_path):
    """Return a data set that a test may damage."""
    return tiny.draw(tmp_path / "data")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Return the folder of a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    assert tiny.train(data, runs) == 0
    return runs / "run"


@pytest.fixture
def said(capsys):
    """Return stderr since the last call; it never contains a traceback or too many lines."""

    def read(lines: int = 16) -> str:
        text = capsys.readouterr().err
        assert "Traceback" not in text
        assert len(text.splitlines()) <= lines
        return text

    return read


def interrupted(data: Path, runs: Path, *more: object) -> None:
    """Stop a run after its second update."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.stop_after(patch, 2)
        assert tiny.train(data, runs, *more) == 130


def during_update(monkeypatch, number: int, act) -> None:
    """Call `act` before update `number` of the next training."""
    calls = []
    original = training.update_weights

    def update(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            act()
        return original(*arguments, **options)

    monkeypatch.setattr(training, "update_weights", update)


# ---------------------------------------------------------------------------- signals, processes
def long_run(data: Path, runs: Path, *more: object):
    """Start a process that trains until it is stopped, in its second epoch or later."""
    process = tiny.start(tiny.words(data, runs, "--epochs=10000", *more))
    tiny.wait_for((runs / "run" / "last.pt").exists, process)
    return process


def test_signal_to_the_whole_group(data, tmp_path):
    """As schedulers and terminals send it: to the program and to its loading workers."""
    process = long_run(data, tmp_path, "--cache=none", "--num_workers=1")
    os.killpg(process.pid, signal.SIGTERM)
    status, _, errors = tiny.finish(process)
    assert (status, "Traceback" in errors) == (143, False), errors
    assert "SIGTERM: finishing this update" in errors and "Go on with the same command and --resume" in errors
    load_checkpoint(tmp_path / "run" / "last.pt")


def test_second_signal_ends_at_once(data, tmp_path):
    process = long_run(data, tmp_path)
    os.kill(process.pid, signal.SIGSTOP)  # so that both signals wait for it together
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    status, _, errors = tiny.finish(process)
    assert status in (130, 143) and "saved in" not in errors and "Traceback" not in errors
    load_checkpoint(tmp_path / "run" / "last.pt")


def test_interrupt_while_decoding(data, tmp_path, monkeypatch, said):
    """Ctrl-C does not wait for all images to be decoded."""
    decoded = []
    original = decode.try_decode

    def slow(path, limit, rules):
        decoded.append(path)
        if len(decoded) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.002)
        return original(path, limit, rules)

    monkeypatch.setattr(cache, "try_decode", slow)
    many = tiny.draw(tmp_path / "many", train=400)
    assert tiny.train(many, tmp_path) == 130
    assert len(decoded) < 300
    assert not list((many / ".cache").glob(".*.tmp"))
    assert "interrupted" in said()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers through /proc")
def test_killed_loading_worker(data, tmp_path):
    process = long_run(data, tmp_path, "--cache=none", "--num_workers=1")
    tiny.wait_for(lambda: bool(children(process.pid)), process)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    status, _, errors = tiny.finish(process)
    assert status == 1 and "Traceback" not in errors, errors
    assert "worker" in errors and "--num_workers" in errors and "--resume" in errors
    load_checkpoint(tmp_path / "run" / "last.pt")


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset"), ConnectionRefusedError(111, "no")])
def test_a_worker_that_dies_in_the_middle_of_a_message(error, data, tmp_path, monkeypatch, said):
    during_update(monkeypatch, 2, tiny.raising(error))
    assert tiny.train(data, tmp_path) == 1
    assert "a data loading worker died" in said()


def test_lock_is_refused_and_taken_over(data, tmp_path, said):
    holder = "import sys, time; sys.path.insert(0, sys.argv[1]); from runs.folder import RunDirectory\n"
    holder += "RunDirectory(sys.argv[2]).open(); print('held', flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tiny.ROOT), str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        env=tiny.environment(),
    ) as process:
        assert process.stdout.readline() == b"held\n"
        assert tiny.train(data, tmp_path) == 2
        text = said()
        assert str(process.pid) in text and socket.gethostname() in text and "--checkpoint_name" in text
        process.kill()
    assert tiny.train(data, tmp_path) == 0


def test_lock_is_given_back_after_every_end(data, tmp_path):
    interrupted(data, tmp_path)
    assert tiny.train(data / "nowhere", tmp_path, "--resume") == 2
    assert tiny.train(data, tmp_path, "--resume") == 0


def test_stale_temporaries_are_cleaned_up(own_data, tmp_path):
    (tmp_path / "run").mkdir()
    assert tiny.train(own_data, tmp_path, name="before") == 0
    cache = own_data / ".cache"
    keys = [file.stem for file in cache.glob("*.npy")]
    stale = [tmp_path / "run" / ".last.pt.x1.tmp", *(cache / f".{key}.4711.tmp" for key in keys)]
    for file in [*cache.glob("*.npy"), *cache.glob("*.json")]:
        file.unlink()
    for file in stale:
        file.write_bytes(b"half")
    assert len(stale) == 3
    assert tiny.train(own_data, tmp_path) == 0
    assert [file for file in stale if file.exists()] == []


# --------------------------------------------------------------------------------------- disk
@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of some megabytes; returns (folder, function that remounts it with other options)."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root may mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_while_saving(data, small_disk, tmp_path, said):
    """The disk holds the first checkpoints, not the temporary copy of the second ones."""
    disk, remount = small_disk
    large = "--model=shufflenet_v2_x0_5"
    assert tiny.train(data, tmp_path, large) == 0
    assert tiny.train(data, disk, large) == 1
    text = said()
    assert "No space left" in text and "free at least" in text and "--resume" in text
    assert load_checkpoint(disk / "run" / "last.pt")["progress"]["epoch"] == 1
    assert not list((disk / "run").glob(".*.tmp"))
    remount("size=64m")
    assert tiny.train(data, disk, large, "--resume") == 0
    assert_equal(outcome(tmp_path / "run"), outcome(disk / "run"))


def test_full_disk_at_the_start(data, small_disk, said):
    disk, _ = small_disk
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert tiny.train(data, disk) == 1
    assert "No space left" in said()


def test_full_disk_while_writing_the_cache(finished, small_disk, tmp_path, monkeypatch, capsys):
    disk, _ = small_disk
    data = tiny.draw(disk / "data")
    assert tiny.train(data, tmp_path) == 0  # too little free space is seen at once
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40))
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert main.main([w for w in tiny.words(data, tmp_path, "--overwrite") if w != "--quiet"]) == 0
    assert "No space left" in capsys.readouterr().out
    assert not list((data / ".cache").glob(".*.tmp"))


def test_read_only_folders(small_disk, finished, tmp_path, monkeypatch, said):
    disk, remount = small_disk
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "no" / "cache"))
    data = tiny.draw(disk / "data")
    interrupted(data, disk)
    remount("ro")
    assert tiny.train(data, disk, "--resume") == 1
    assert "Read-only" in said() + ""
    assert tiny.train(data, disk, name="new") == 1
    assert "Read-only" in said()
    assert tiny.train(data, tmp_path) == 0  # images on a read-only disk, and nowhere to keep a cache
    remount("rw,size=64m")
    assert tiny.train(data, disk, "--resume") == 0
    assert_equal(outcome(finished), outcome(disk / "run"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES])
def test_disk_fails_while_training(number, data, tmp_path, monkeypatch, said):
    """As where a failing disk turns read-only, or a quota is reached, before the second checkpoint."""

    def break_disk():
        until = time.monotonic() + 60
        while not (tmp_path / "run" / "last.pt").exists() and time.monotonic() < until:
            time.sleep(0.002)  # for the thread that writes the first
        monkeypatch.setattr(os, "fsync", tiny.raising(OSError(number, os.strerror(number))))

    during_update(monkeypatch, 5, break_disk)
    assert tiny.train(data, tmp_path) == 1
    text = said()
    assert os.strerror(number) in text and "--resume" in text and str(tmp_path / "run") in text
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 1


def test_vanished_folder(data, tmp_path, monkeypatch, said):
    during_update(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run"))
    assert tiny.train(data, tmp_path) == 1
    assert "folder is gone" in said()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_file_where_a_folder_is_expected(name, data, tmp_path, said):
    (tmp_path / "file").write_text("")
    assert tiny.train(data, tmp_path / name) == 2
    assert "--checkpoint_dir" in said()
    assert tiny.train(tmp_path / name, tmp_path) == 2
    assert "no training images" in said()


@pytest.mark.parametrize("name", ["last.pt", "best_model.pt", "metrics.jsonl", "result.json", "config.json", "lock"])
def test_folder_where_a_file_is_expected(name, data, tmp_path, said):
    (tmp_path / "run" / name / "inner").mkdir(parents=True)
    assert tiny.train(data, tmp_path) in (1, 2)
    assert str(tmp_path / "run") in said()
    assert tiny.train(data, tmp_path, "--overwrite") in (1, 2)
    said()


# -------------------------------------------------------------------------------- checkpoints
class RunsCode:
    """Unpickling it creates a file: what a hostile checkpoint would do, and worse."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def mutilations(checkpoint: Path, mark: Path):
    """(name, function that writes a hostile file) for all that can be wrong with a checkpoint."""
    good = torch.load(checkpoint, weights_only=True)
    raw = checkpoint.read_bytes()

    def saved(content):
        return lambda file: torch.save(content, file)

    def changed(**values):
        return saved({**good, **values})

    def without(name):
        return saved({key: value for key, value in good.items() if key != name})

    weights = good["model"]
    first = next(iter(weights))
    head = next(name for name in weights if weights[name].shape == (3, 16))
    return {
        "torch file that runs code": saved({**good, "extra": RunsCode(mark)}),
        "pickle that runs code": lambda file: file.write_bytes(pickle.dumps(RunsCode(mark))),
        "old pickle that runs code": lambda file: torch.save(
            RunsCode(mark), file, _use_new_zipfile_serialization=False
        ),
        "empty": lambda file: file.write_bytes(b""),
        "text": lambda file: file.write_text("weights"),
        "half": lambda file: file.write_bytes(raw[: len(raw) // 2]),
        "without its end": lambda file: file.write_bytes(raw[:-30]),
        "image": lambda file: Image.new("RGB", (9, 9)).save(file, "png"),
        "folder": lambda file: file.mkdir(),
        "list": saved([1, 2]),
        "tensor": saved(torch.zeros(3)),
        "empty table": saved({}),
        "no model": without("model"),
        "no classes": without("classes"),
        "no model name": without("model_name"),
        "no format": without("format"),
        "no image size": without("image_size"),
        "model of text": changed(model="weights"),
        "weights of text": changed(model={**weights, first: "x"}),
        "missing weight": changed(model={n: w for n, w in weights.items() if n != first}),
        "other shape": changed(model={**weights, first: torch.zeros(2)}),
        "other head": changed(model={**weights, head: torch.zeros(4, 16)}),
        "other model": changed(model_name="resnet18"),
        "unknown model": changed(model_name="resnet999"),
        "model name of numbers": changed(model_name=[18]),
        "size of text": changed(image_size="36"),
        "size below zero": changed(image_size=-1),
        "classes of numbers": changed(classes=[1, 2, 3]),
        "other classes": changed(classes=["a", "b", "c"]),
        "fewer classes": changed(classes=["coast", "field"]),
        "unknown normalisation": changed(normalize="sometimes"),
        "a name of numbers": changed(model={**weights, 5: weights[first]}),
    }


NEW_HEAD = ("no ", "other head", "other classes", "fewer", "classes", "size", "unk", "model name", "other model")


def test_hostile_checkpoint(data, finished, tmp_path, said):
    """evaluate, --pretrained_path and --resume of hostile files: exit 2, a plain message, no code run."""
    mark = tmp_path / "code was run"
    files = {file: mutilations(finished / file, mark) for file in ("best_model.pt", "last.pt")}
    for number, name in enumerate(files["last.pt"]):
        run = tmp_path / str(number)
        shutil.copytree(finished, run)
        (run / "result.json").unlink()
        for file, writers in files.items():
            (run / file).unlink()
            writers[name](run / file)
        assert main.main(["evaluate", f"--checkpoint_dir={tmp_path}", f"--checkpoint_name={number}", "--quiet"]) == 2
        text = said()
        if name == "other classes":  # a whole checkpoint, of which nothing is to be tested here
            assert "holds no image of the classes a, b, c" in text
        else:
            assert "checkpoint" in text or "--model" in text, name
        assert tiny.train(data, tmp_path, "--resume", name=str(number)) == 2, name
        assert str(run) in said()
        new = (f"--pretrained_path={run / 'last.pt'}", "--epochs=1")
        status = tiny.train(data, tmp_path, *new, name=f"new{number}")
        if name == "a name of numbers":  # every weight is there; what has no name is passed over
            assert status == 0
        else:
            assert status == 2 or name.startswith(NEW_HEAD), said()
        said()
        assert not mark.exists(), name


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": None},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"progress": None},
        {"progress": {}},
        {"progress": {"epoch": "x"}},
        {"progress": {"unknown": 1}},
        {"scaler": 5},
        {"fingerprint": "x"},
        {"progress": {"epoch": -3}},
        {"progress": {"update": 99}},
        {"fingerprint": None},
        {"format": 1},
    ],
    ids=str,
)
def test_damaged_state(change, data, tmp_path, said):
    """Parts of last.pt that are missing or of the wrong kind."""
    fp16 = ["--amp", "--amp_dtype=float16"] if "scaler" in change else []
    interrupted(data, tmp_path, *fp16)
    file = tmp_path / "run" / "last.pt"
    content = torch.load(file, weights_only=True)
    for name, value in change.items():
        partial = isinstance(value, dict) and name == "progress" and value
        content[name] = {**content[name], **value} if partial else value
    torch.save(content, file)
    said()
    assert tiny.train(data, tmp_path, "--resume", *fp16) == 2
    text = said()
    assert "fingerprint" in change or "last.pt" in text


def test_best_model_as_last(data, finished, tmp_path, said):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(finished / "best_model.pt", tmp_path / "run" / "last.pt")
    assert tiny.train(data, tmp_path, "--resume") == 2
    assert "last.pt" in said()


def test_fuzzed_checkpoints(finished, tmp_path):
    """Bytes flipped, cut out or cut off anywhere: refused in words or read, never anything else."""
    raw = (finished / "best_model.pt").read_bytes()
    file = tmp_path / "fuzzed.pt"
    refused = 0
    count = int(os.environ.get("FAULT_FUZZ", "12"))
    for seed in range(count):
        chance = random.Random(seed)
        content = bytearray(raw)
        if seed % 3 == 0:
            del content[chance.randrange(len(raw)) :]
        elif seed % 3 == 1:
            start = chance.choice([chance.randrange(2000), chance.randrange(len(raw) * 2 // 3, len(raw))])
            del content[start : start + chance.randrange(1, 600)]
        else:
            for _ in range(chance.choice([1, 30, 3000])):
                place = chance.choice([chance.randrange(len(raw)), chance.randrange(len(raw) // 2)])
                content[place] = chance.randrange(256)
        file.write_bytes(content)
        try:
            load_checkpoint(file)
        except UserError as error:
            assert "fuzzed.pt" in str(error)
            refused += 1
    assert refused > count // 3
    print(f"{count} mutilated checkpoints, {refused} refused")


# ------------------------------------------------------------------------------------- images
def huge_png(file: Path, width: int, height: int) -> None:
    """Return a PNG with a header of width x height pixels and a body of a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def plant_hostile_images(folder: Path, good: Path) -> list[str]:
    """Write damaged image files into `folder`; return the name that a message must give each."""
    jpeg = folder / "whole.jpg"
    Image.effect_noise((300, 300), 60).convert("RGB").save(jpeg)
    (folder / "truncated.jpg").write_bytes(jpeg.read_bytes()[:4000])
    (folder / "cut.png").write_bytes(good.read_bytes()[:700])
    (folder / "nothing.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "page.png").write_text("<html><script>alert(1)</script></html>")
    (folder / "noise.webp").write_bytes(np.random.default_rng(0).bytes(5000))
    huge_png(folder / "bomb.png", 60_000, 60_000)
    huge_png(folder / "large.png", 12_000, 12_000)
    huge_png(folder / "thin.png", 1, 2**31 - 1)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "ring1.png").symlink_to("ring2.png")
    (folder / "ring2.png").symlink_to("ring1.png")
    (folder / "gone.png").symlink_to("/nonexistent/file.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    (folder / "line\nbreak.jpg").write_text("x")
    (folder / "quote'\".jpg").write_text("x")
    Path(os.fsdecode(os.fsencode(folder) + b"/bytes\xff\xfe.jpg")).write_text("x")
    planted = [path.name for path in folder.iterdir() if not path.stem.isdigit() and path != jpeg]
    assert len(planted) == 18
    return [name.replace("\n", r"\n").replace("\udcff\udcfe", r"\udcff\udcfe") for name in planted]


def plant_odd_but_good(folder: Path) -> None:
    """Files that are images whatever they look like, and files that are to be passed over."""
    Image.new("RGB", (1, 5000), "red").save(folder / "tall.png")
    Image.new("RGB", (5000, 1), "red").save(folder / "wide.png")
    Image.new("RGB", (40, 30), "red").save(folder / "really a png.jpg", "png")
    Image.new("L", (1, 1)).save(folder / "dot.BMP")
    for mode in ("1", "P", "LA", "RGBA", "CMYK", "I;16", "F"):
        Image.new(mode, (20, 20)).save(
            folder / f"{mode.replace(';', '')}.tif" if mode in ("CMYK", "I;16", "F") else folder / f"mode {mode}.png"
        )
    (folder / "names\n'\"\t\\ $x_{ <b> | *.png").write_bytes((folder / "tall.png").read_bytes())
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png")).write_bytes((folder / "tall.png").read_bytes())
    for name in (".DS_Store", "._whole.jpg", "Thumbs.db", "desktop.ini", ".hidden.png", "notes.txt"):
        (folder / name).write_text("x")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._a.png").write_text("x")
    (folder / "folder.png").mkdir()
    (folder / "again").symlink_to(folder)
    beside = folder.parent
    (beside / "__MACOSX").mkdir()
    (beside / "__MACOSX" / "._a.png").write_text("x")
    (beside / ".ipynb_checkpoints").mkdir()
    (beside / "Thumbs.db").write_text("x")
    (beside / "loop").symlink_to("loop")


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_hostile_images(cache, own_data, tmp_path, said, capsys):
    folder = own_data / "seg_train" / "seg_train" / "coast"
    names = plant_hostile_images(folder, tiny.images(own_data)[0])
    assert tiny.train(own_data, tmp_path, f"--cache={cache}", "--num_workers=0") == 2
    text = said()
    assert f"{len(names)} images cannot be read" in text and "--skip_unreadable" in text
    assert sum(name in text for name in names) == 10 and f"and {len(names) - 10} more" in text
    words = tiny.words(own_data, tmp_path, f"--cache={cache}", "--num_workers=0", "--skip_unreadable")
    assert main.main([word for word in words if word != "--quiet"]) == 0
    assert f"{len(names)} images cannot be read and are left out" in capsys.readouterr().out
    stored = tiny.config(tmp_path / "run")["dataset"]
    assert stored["train"] == 20 and len(stored["unreadable"]) == 18  # 25 readable ones, a fifth for validation


def test_every_hostile_image_is_named(own_data, tmp_path, said):
    """One at a time: each gives a message of its own, with its name on one line."""
    folder = own_data / "seg_train" / "seg_train" / "coast"
    names = plant_hostile_images(folder, tiny.images(own_data)[0])
    planted = [path for path in folder.iterdir() if not path.stem.isdigit() and path.name != "whole.jpg"]
    assert len(planted) == len(names)
    for path in planted:
        reason = decode.try_decode(path, 36)
        assert isinstance(reason, str) and reason and "\n" not in reason, path
    for name, rules in (("bomb.png", None), ("thin.png", None), ("large.png", decode.Rules(max_megapixels=143))):
        reason = decode.try_decode(folder / name, 36, rules)
        assert "larger than --max_megapixels allows" in reason and "pixels" in reason, (name, reason)
    assert "truncated" in decode.try_decode(folder / "large.png", 36)  # 144 megapixels are allowed
    assert "regular" in decode.try_decode(folder / "pipe.png", 36)


def test_odd_but_good_images(own_data, tmp_path, said):
    plant_odd_but_good(own_data / "seg_train" / "seg_train" / "coast")
    assert tiny.train(own_data, tmp_path) == 0
    stored = tiny.config(tmp_path / "run")["dataset"]
    assert stored["classes"] == list(tiny.CLASSES)
    assert stored["train"] + stored["val"] == 24 + 13
    said()


def test_hostile_class_names(tmp_path):
    """Names that would break paths, Markdown, HTML or plots go through training, testing, pictures and prediction."""
    names = (
        "quote'\"`",
        "pipe|s**",
        "$x_{",
        "<b>&amp;<i>",
        "new\nline",
        "car\rriage",
        os.fsdecode(b"\xff\xfe"),
        "-dash",
        "日本 🙂",
        "%s{0}\\n",
        "x" * 200,
    )
    data = tiny.draw(tmp_path / "data", train=66, test=11, classes=names)
    commands = [
        tiny.words(data, tmp_path, "--epochs=1"),
        ["evaluate", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run"],
        [
            "predict",
            f"--checkpoint_dir={tmp_path}",
            "--checkpoint_name=run",
            str(data / "seg_test"),
            f"--csv={tmp_path / 'p.csv'}",
            f"--json={tmp_path / 'p.json'}",
            f"--contact_sheet={tmp_path / 'p.png'}",
        ],
        ["prepare", "--check", f"--data_dir={data}"],
    ]
    for command in commands:
        status, _, errors = tiny.finish(tiny.start(command, pictures=True))
        assert (status, errors) == (0, "")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["classes"] == sorted(names)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<b>&amp;<i>" not in page


def test_data_folder_with_a_hostile_name(tmp_path):
    data = tiny.draw(Path(os.fsdecode(os.fsencode(tmp_path) + b"/new\nline \xff $x_{ <b>")))
    command = [word for word in tiny.words(data, data, "--epochs=1", name="a b|$") if word != "--quiet"]
    status, _, errors = tiny.finish(tiny.start(command, pictures=True))
    assert (status, errors) == (0, "")


# ---------------------------------------------------------------------- data that changes, caches
def rewrite(path: Path, content: bytes) -> None:
    """Replace the content, and set the file's time back as `cp -p` and `rsync` do."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES = {
    "removed": lambda path: path.unlink(),
    "truncated": lambda path: rewrite(path, path.read_bytes()[:900]),
    "emptied": lambda path: rewrite(path, b""),
    "replaced": lambda path: Image.new("RGB", (36, 36)).save(path),
    "replaced, same size and time": lambda path: rewrite(path, path.with_name("003.png").read_bytes()),
    "added": lambda path: shutil.copy(path, path.with_name("new.png")),
    "renamed": lambda path: path.rename(path.with_name("renamed.png")),
    "moved to another class": lambda path: path.rename(path.parent.parent / "town" / path.name),
}


@pytest.mark.parametrize(("part", "cache"), [("seg_train", "auto"), ("seg_test", "none")])
@pytest.mark.parametrize("change", CHANGES)
def test_data_changed_before_resuming(change, part, cache, data, own_data, tmp_path, said):
    place = own_data / part / part / "coast" / "000.png"
    for path in (place, place.with_name("003.png")):  # stored without compression: all of one size
        Image.open(path).save(path, compress_level=0)
    interrupted(own_data, tmp_path, f"--cache={cache}", "--num_workers=0")
    said()
    CHANGES[change](place)
    status = tiny.train(own_data, tmp_path, "--resume", f"--cache={cache}", "--num_workers=0")
    text = said()
    if change == "added":  # split.csv says what the run is about: a new file is left out
        assert status == 0
        assert "new.png" not in (tmp_path / "run" / "split.csv").read_text()
    else:
        assert status == 2
        missing = "1 image of the run's split.csv cannot be found"
        reasons = (missing, "are not those this run began with", "cannot be read")
        assert any(reason in text for reason in reasons), text


@pytest.mark.parametrize("workers", [0, 1])
def test_image_vanishes_while_training(workers, own_data, tmp_path, monkeypatch, said):
    """Streamed images are read from disk in every epoch: one that is gone is named."""

    def remove():
        for path in tiny.images(own_data):
            path.unlink()

    during_update(monkeypatch, 3, remove)
    assert tiny.train(own_data, tmp_path, "--cache=none", f"--num_workers={workers}") in (1, 2)
    text = said()
    assert ".png" in text and "no longer be read" in text


# ------------------------------------------------------------------- numbers, memory, wrong folders
def test_nan_in_pretrained_weights(data, finished, tmp_path, said):
    content = torch.load(finished / "best_model.pt", weights_only=True)
    weights = {
        name: torch.full_like(w, float("nan")) if w.is_floating_point() else w for name, w in content["model"].items()
    }
    torch.save(weights, tmp_path / "nan.pt")
    assert tiny.train(data, tmp_path, f"--pretrained_path={tmp_path / 'nan.pt'}") == 2
    text = said()
    assert "nan.pt are not finite" in text and "diverged" in text


def test_nan_in_a_checkpoint(data, tmp_path, said):
    interrupted(data, tmp_path)
    file = tmp_path / "run" / "last.pt"
    content = torch.load(file, weights_only=True)
    next(iter(content["model"].values())).fill_(float("nan"))
    torch.save(content, file)
    said()
    assert tiny.train(data, tmp_path, "--resume") == 2
    assert "finite" in said()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=["cuda", "python", "cpu", "driver", "cublas"],
)
def test_out_of_memory(error, data, tmp_path, monkeypatch, said):
    during_update(monkeypatch, 2, tiny.raising(error))
    assert tiny.train(data, tmp_path) == 1
    text = said()
    assert "out of memory" in text and "--batch_size 8" in text and "--accumulate 2" in text
    assert "memory" in json.loads((tmp_path / "run" / "failure.json").read_text())["reason"]


def test_out_of_memory_while_predicting(data, finished, monkeypatch, said):
    monkeypatch.setattr("commands.evaluate.evaluate", tiny.raising(torch.OutOfMemoryError("CUDA out of memory.")))
    assert main.main(["evaluate", f"--checkpoint_dir={finished.parent}", "--checkpoint_name=run"]) == 1
    text = said()
    assert "--batch_size" in text and "--accumulate" not in text


def test_a_class_of_one_image_is_trained_on(own_data, tmp_path, capsys):
    """It cannot be in training and validation."""
    images = sorted((own_data / "seg_train" / "seg_train" / "town").iterdir())
    for path in images[1:]:
        path.unlink()
    assert main.main([word for word in tiny.words(own_data, tmp_path) if word != "--quiet"]) == 0
    assert "no validation image of town: tested with support 0" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- the table
def test_table_of_faults_names_tests_that_exist():
    table = (tiny.ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    named = set()
    for row in rows:
        tests = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row)
        assert tests, f"a row without a test: {row}"
        for file, test in tests:
            [path] = (tiny.ROOT / "tests").rglob(f"{file}.py")
            assert f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)
            named.add(test)
    own = re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(encoding="utf-8"), re.M)
    assert set(own) - named <= {"test_table_of_faults_names_tests_that_exist"}
