"""Folders to batches: layouts, the split, decoding of every mode, pixels against torchvision, order and ranks."""

import itertools
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageOps
from tiny import noise, subset
from torchvision.transforms import v2

import dataset
from dataset import Batches
from distributed import Ranks
from images.decode import decode, try_decode
from images.folders import find_image_set
from images.opening import Opening, open_data_set
from transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess, smallest_crop
from utils import UserError, fold

CPU = torch.device("cpu")
NAMES = ("zebra", "apple", "Mango")
MIXED = {"mixup": {"mixup": 0.4}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.4, "cutmix": 1.0}}
KINDS = ["flip", "crop", "trivial", "randaugment", "augmix", "jitter", "crop,augmix,jitter,erasing", *MIXED]


def folders(root, *splits, count=5):
    for number, (split, name) in enumerate(itertools.product(splits, NAMES)):
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(count):
            noise(100 * number + index).save(folder / f"{index}.png")
    return root


def opened(root, size=10, *, cache="auto", workers=1, skip_unreadable=False, **options):
    opening = Opening(cache, workers, skip_unreadable=skip_unreadable)
    return open_data_set(root, image_size=size, seed=42, opening=opening, **options)


def fed(data, subset=None, batch_size=8, size=10, kind="flip", **options):
    how = MIXED.get(kind, {"augment": kind}) | options
    return Batches(subset or data.train, Preprocess(CPU, size), batch_size, len(data.classes), seed=7, **how)


def noisy(kind, **options):
    """Three updates of 22 images of three classes, the last of them ragged."""
    how = MIXED.get(kind, {"augment": kind}) | options
    return Batches(subset(22, side=24), Preprocess(CPU, 16), 8, 3, seed=7, **how)


def updates(batches, epoch=0, first=0):
    """Each update as its pieces joined: (images, labels)."""
    found = []
    for pieces in batches.epoch(epoch, first):
        parts = [(images, labels) for images, labels, weight, _ in pieces if weight]
        found.append(tuple(torch.cat(column) for column in zip(*parts, strict=True)) if parts else None)
    return found


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


# ---------------------------------------------------------------------------- layouts and split
@pytest.mark.parametrize(
    "splits",
    [
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train", "val"),
        ("train/train", "test/test"),
        ("seg_train/seg_train", "seg_test"),
    ],
)
def test_layouts(tmp_path, splits):
    found = find_image_set(folders(tmp_path, *splits))
    assert found.classes == ["Mango", "apple", "zebra"]  # alphabetical, as sorted() orders them
    assert [len(found.train), len(found.test), found.validation] == [15, 15, None]
    assert {path.parent.parent for path, _ in found.train} == {tmp_path / splits[0]}
    assert {path.parent.parent for path, _ in found.test} == {tmp_path / splits[1]}
    assert all(found.classes[label] == path.parent.name for path, label in found.train + found.test)


def test_a_validation_folder_of_its_own_is_used_whole(tmp_path):
    data = opened(folders(tmp_path, "train", "val", "test"))
    assert [len(data.train), len(data.validation), len(data.test)] == [15, 15, 15]
    assert {path.parts[-3] for path in data.validation.paths} == {"val"}
    assert {path.parts[-3] for path in data.train.paths} == {"train"}


def test_unlabelled_hidden_and_foreign_files_are_passed_over(tmp_path):
    root = folders(tmp_path, "train", "test")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "apple" / "notes.txt").write_text("no image")
    (root / "train" / "apple" / ".thumb.png").write_bytes(b"")
    (root / "seg_pred").mkdir()
    found = find_image_set(root)
    assert len(found.train) == 15 and found.classes == ["Mango", "apple", "zebra"]


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda root: (root / "train" / "apple").rename(root / "apple"),
            "classes apple, which the training images lack",
        ),
        (lambda root: [path.unlink() for path in (root / "train" / "zebra").iterdir()], "zebra holds no image"),
        (lambda root: (root / "train").rename(root / "elsewhere"), "(?s)no training images.*elsewhere/: 15.*Three"),
        (lambda root: (root / ".partial").mkdir(), "only a part of a data set"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, break_it, message):
    root = folders(tmp_path, "train", "test")
    break_it(root)
    with pytest.raises(UserError, match=message):
        find_image_set(root)


def test_train_and_validation_share_no_image(data):
    found = opened(data, 20)
    parts = (found.train, found.validation, found.test)
    assert [len(part) for part in parts] == [19, 5, 6]
    assert len({path for part in parts for path in part.paths}) == 30
    assert all(
        found.classes[label] == path.parent.name
        for part in parts
        for path, label in zip(part.paths, part.labels, strict=True)
    )


# ------------------------------------------------------------------------------------ decoding
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "PA", "RGBA", "LA", "CMYK", "1", "I;16", "YCbCr", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    smooth = Image.fromarray(np.linspace(0, 255, 480).astype(np.uint8).reshape(20, 24))
    grey = np.asarray(smooth)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = smooth.convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode)
    file = tmp_path / f"image.{'tif' if mode in ('PA', 'CMYK', 'F', 'YCbCr') else 'png'}"
    image.save(file)
    if mode == "YCbCr" and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("this Pillow writes TIFF files in YCbCr that it cannot read")
    with Image.open(file) as stored:
        assert stored.mode == mode
    array = decode(file)
    assert array.shape == (20, 24, 3) and array.dtype == np.uint8
    expected = np.asarray((smooth.convert("1") if mode == "1" else smooth).convert("RGB"))
    assert np.abs(array.astype(int) - expected).max() <= 3


def test_transparency_is_laid_on_white(tmp_path):
    file = tmp_path / "image.png"
    for opacity, colour in ((0, [255, 255, 255]), (51, [244, 224, 214]), (255, [200, 100, 50])):
        Image.new("RGBA", (4, 4), (200, 100, 50, opacity)).save(file)
        assert decode(file)[0, 0].tolist() == colour
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).convert("P")
    palette.save(file, transparency=bytes(range(256)))
    opacity = np.arange(16).reshape(4, 4, 1) * 16 / 255
    expected = np.asarray(palette.convert("RGB")) * opacity + 255 * (1 - opacity)
    assert np.abs(decode(file) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path, orientation):
    upright = noise(size=(12, 7))
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    exif = Image.Exif()
    exif[0x0112] = undo.get(orientation, 1)
    stored = upright if orientation == 1 else ImageOps.exif_transpose(_with_exif(upright, exif))
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "turned.png"), np.asarray(upright))


def _with_exif(image, exif):
    copy = image.copy()
    copy.getexif()[0x0112] = exif[0x0112]
    return copy


@pytest.mark.parametrize("limit, larger, kept", [(20, False, 20), (20, True, 30), (200, False, 36)])
def test_images_are_kept_no_larger_than_needed(data, limit, larger, kept):
    found = opened(data, limit, keep_larger=larger)
    assert found.train.store.array.shape[1:] == (kept, kept, 3)
    first = Image.open(found.train.paths[0]).resize((kept, kept), Image.Resampling.BILINEAR)
    assert np.array_equal(found.train.store.array[found.train.positions[0]], first)


# ------------------------------------------------------------------------- pixels and flips
def torchvisions(paths, side, *, normalize=True):
    steps = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    if normalize:
        steps.append(v2.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    resize = v2.Resize((side, side))
    tail = v2.Compose(steps)
    return torch.stack([tail(resize(Image.open(path).convert("RGB"))) for path in paths])


def assert_within_two_levels(ours, theirs, std):
    levels = (ours - theirs).abs() * torch.tensor(std).view(3, 1, 1) * 255
    share = (levels.amax((1, 2, 3)) <= 2.001).double().mean()
    assert share >= 0.995, f"only {share:.1%} of {len(ours)} images"


@pytest.mark.parametrize("side", [20, 64], ids=["smaller", "larger"])
def test_pixels_are_torchvisions(data, side):
    found = opened(data, side)
    images = torch.cat([images for images, *_ in fed(found, found.test, size=side).evaluation()])
    assert_within_two_levels(images, torchvisions(found.test.paths, side), IMAGENET_STD)
    assert images.dtype == torch.float32 and images.shape == (6, 3, side, side)
    batches = Batches(found.test, Preprocess(CPU, side, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), 8, 3)
    images = torch.cat([images for images, *_ in batches.evaluation()])
    assert 0 <= images.min() < 0.2 and 0.6 < images.max() <= 1.000001
    assert_within_two_levels(images, torchvisions(found.test.paths, side, normalize=False), (1, 1, 1))


@pytest.mark.parametrize("side", [7, 50])
def test_resizing_on_the_device_is_torchvisions(side):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 24, 21, 3), dtype=np.uint8))
    ours = Preprocess(CPU, side)(images)
    tail = v2.Compose(
        [v2.Resize((side, side)), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    assert_within_two_levels(ours, tail(images.permute(0, 3, 1, 2)), IMAGENET_STD)


def test_flips_are_torchvisions_and_half_of_all():
    batches = noisy("flip")
    whole = [(images, places) for images, _, places in batches.evaluation()]
    plain = [pair for images, places in whole for pair in zip(places.tolist(), images, strict=True)]
    flipped = 0
    for epoch in range(4):
        for images, labels in updates(batches, epoch):
            for image, label in zip(images, labels, strict=True):
                matches = [place for place, own in plain if torch.equal(own, image)]
                mirrored = [place for place, own in plain if torch.equal(v2.functional.horizontal_flip(own), image)]
                assert int(label) == batches.subset.labels[(matches or mirrored)[0]]
                flipped += bool(mirrored)
    assert 27 <= flipped <= 61  # of 88, each with probability one half


@pytest.mark.parametrize("batch_size, kind", [(1, "none"), (5, "crop")])
def test_images_of_other_sizes_change_nothing_for_the_rest(tmp_path, batch_size, kind):
    """Neither a larger nor a smaller epoch's images are resized twice, whatever else a folder holds."""
    found = []
    for odd in (False, True):
        root = folders(tmp_path / str(odd), "train", "test", count=10)
        for number, path in enumerate(sorted(root.rglob("*.png"))):
            noise(number, (48, 48)).save(path)
        if odd:
            noise(99, (30, 20)).save(root / "train" / "zebra" / "0.png")
        data = opened(root, 32, keep_larger=True)
        assert (data.train.store.shapes is not None) == odd
        batches = fed(data, size=32, kind=kind, batch_size=batch_size, start_size=16, epochs=3)
        order = batches._order(torch.Generator().manual_seed(fold(7, 0)))
        paths = [data.train.paths[place].relative_to(root) for place in order]
        images = torch.cat([images for images, _ in updates(batches)])
        assert images.shape[1:] == (3, 16, 16)
        found.append(dict(zip(paths, images, strict=True)))
    plain, mixed = found
    assert len(plain.keys() & mixed.keys()) > 15
    for path in plain.keys() & mixed.keys() - {Path("train/zebra/0.png")}:
        assert torch.equal(mixed[path], plain[path]), path


@pytest.mark.parametrize("side, kept, room, smallest", [(16, 36, 24, 0.5), (24, 36, 36, 1 / 3), (32, 36, 36, 0.25)])
def test_a_crop_is_taken_from_no_more_pixels_than_there_are(tmp_path, monkeypatch, side, kept, room, smallest):
    """And shows more of a small image than of one of full size."""
    root = folders(tmp_path, "train", "test")
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        noise(number, (20, 20) if number % 5 == 0 else (kept, kept)).save(path)
    seen = set()
    crop = dataset.random_resized_crop

    def watched(images, draws, side, smallest):
        seen.add((images.shape[2:], side, smallest))
        return crop(images, draws, side, smallest)

    monkeypatch.setattr(dataset, "random_resized_crop", watched)
    updates(fed(opened(root, 32, keep_larger=True), size=32, kind="crop", start_size=side, epochs=2))
    assert [*seen] == [((room, room), side, pytest.approx(smallest))]


@pytest.mark.parametrize("side, full, smallest", [(128, 128, 0.25), (96, 128, 1 / 3), (64, 96, 0.375), (32, 256, 0.5)])
def test_the_smallest_crop_of_small_images_shows_more(side, full, smallest):
    assert smallest_crop(side, full) == pytest.approx(smallest)
    ramp = torch.arange(300.0).expand(1, 3, 300, 300)
    draws = torch.tensor([[1.0, 0.0, 0.5, 0.5, 0.5]])  # not mirrored, the smallest area, square, in the middle
    shown = dataset.random_resized_crop(ramp, draws, 30, smallest_crop(side, full))
    assert shown.max() - shown.min() == pytest.approx(300 * smallest**0.5, abs=300 / 30)


def test_mixing_by_hand():
    """The weights of the labels are those of the pixels: MixUp as a sum, CutMix as the share of the area."""
    (plain, labels), *_ = updates(noisy("flip"))
    before = plain.roll(1, 0)
    for kind in ("mixup", "cutmix"):
        (mixed, shares), *_ = updates(noisy(kind))
        alike = labels == labels.roll(1)
        assert torch.equal(shares.argmax(1)[alike], labels[alike]) and (shares.sum(1) - 1).abs().max() < 1e-6
        own = shares[torch.arange(len(labels)), labels][~alike]
        assert (own - own[0]).abs().max() < 1e-6 and 0 < own[0] < 1  # drawn once for the update
        if kind == "mixup":
            assert (mixed - before.lerp(plain, float(own[0]))).abs().max() < 1e-5
        else:
            from_own = (mixed == plain).all(1)
            from_other = (mixed == before).all(1)
            assert (from_own | from_other).all()
            assert abs(float(from_own[~alike].float().mean()) - float(own[0])) < 0.02


# --------------------------------------------------------------------- determinism and ranks
@pytest.mark.parametrize("kind", KINDS)
def test_batches_depend_on_seed_epoch_and_position_alone(kind):
    batches = noisy(kind)
    whole = updates(batches, 3)
    torch.manual_seed(1)
    torch.rand(5)
    assert same(updates(noisy(kind), 3), whole)
    assert not same(updates(batches, 4), whole)
    for first in (1, 2, 3):  # a start in mid-epoch
        assert same(updates(noisy(kind), 3, first), whole[first:])
    assert [images.shape for images, _ in whole] == [(count, 3, 16, 16) for count in (8, 8, 6)]
    assert all(images.isfinite().all() for images, _ in whole)
    labels = torch.cat([labels for _, labels in whole])
    if kind in MIXED:
        assert labels.shape == (22, 3) and torch.allclose(labels.sum(1), torch.ones(22)) and labels.amax(1).min() < 1
    else:
        assert torch.bincount(labels).tolist() == [8, 7, 7]  # each image once
    batches.seed = 8
    assert not same(updates(batches, 3), whole)


@pytest.mark.parametrize("ranks, accumulate", [(1, 3), (3, 2), (8, 1)])
@pytest.mark.parametrize("kind", ["flip", "crop,augmix,jitter,erasing", "both"])  # drawn, drawn by itself, mixed
def test_the_pieces_of_all_ranks_are_one_process_batches(ranks, accumulate, kind):
    whole = updates(noisy(kind))
    shares = [noisy(kind, accumulate=accumulate, ranks=Ranks(rank, rank, ranks)) for rank in range(ranks)]
    parts = [updates(share) for share in shares]
    for update, (images, labels) in enumerate(whole):
        pieces = [part[update] for part in parts if part[update] is not None]
        assert torch.equal(torch.cat([piece[0] for piece in pieces]), images)
        assert torch.equal(torch.cat([piece[1] for piece in pieces]), labels)
    for share in shares:  # every rank takes part in every update, and knows its last piece
        lasts = [[last for *_, last in pieces] for pieces in share.epoch(0)]
        assert len(lasts) == 3 and all(row[-1] and not any(row[:-1]) for row in lasts)


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_evaluate_every_image_once(ranks):
    shares = [noisy("flip", ranks=Ranks(rank, rank, ranks)).evaluation() for rank in range(ranks)]
    assert sorted(place for share in shares for *_, places in share for place in places.tolist()) == list(range(22))


# --------------------------------------------------------------------------- cached or streamed
@pytest.mark.parametrize("workers, side", [(0, 50), (2, 20)])
def test_streamed_batches_are_the_cached_ones_bit_for_bit(data, side, workers):
    cached = opened(data, side, cache="memory")
    streamed = opened(data, side, cache="none", workers=workers)
    assert type(streamed.train.store) is not type(cached.train.store)
    assert cached.fingerprint == streamed.fingerprint
    for first in (0, 2):
        assert same(updates(fed(cached, size=side), 1, first), updates(fed(streamed, size=side), 1, first))
    one, other = ([images for images, *_ in fed(x, x.test, size=side).evaluation()] for x in (cached, streamed))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_cache_is_built_once_and_made_anew_when_a_file_changes(tmp_path, monkeypatch):
    root = folders(tmp_path, "train", "test")
    decoded = []
    real = try_decode
    monkeypatch.setattr("images.cache.try_decode", lambda path, *more: decoded.append(path) or real(path, *more))
    headers = []
    monkeypatch.setattr("images.cache.read_header", lambda path, rules: headers.append(path))
    first = opened(root)
    assert len({*decoded}) == len({*headers}) == 30
    decoded.clear()
    headers.clear()
    assert opened(root).fingerprint == first.fingerprint and not decoded and not headers
    noise(999).save(root / "train" / "apple" / "0.png")
    assert opened(root).fingerprint != first.fingerprint


def flipped(content: bytes, place: int = -5) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 64
    return bytes(changed)


DAMAGES = {
    "truncated": lambda file, notes: file.write_bytes(file.read_bytes()[:-1000]),
    "emptied": lambda file, notes: file.write_bytes(b""),
    "garbage": lambda file, notes: file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size)),
    "one byte": lambda file, notes: file.write_bytes(flipped(file.read_bytes())),
    "notes garbage": lambda file, notes: notes.write_bytes(b"\xff{"),
    "notes emptied": lambda file, notes: notes.write_text('{"crc32": [1], "unreadable": {"x": 1}}'),
    "notes of another": lambda file, notes: notes.write_text(
        json.dumps({"crc32": [5] * len(np.load(file)), "unreadable": {}})
    ),
    "notes gone": lambda file, notes: notes.unlink(),
    "other array": lambda file, notes: np.save(file, np.array([{"an": "object"}]), allow_pickle=True),
    "folder": lambda file, notes: (file.unlink(), file.mkdir()),
}


def test_a_damaged_cache_is_noticed_and_built_anew(tmp_path, caplog):
    """With the images of one that never was damaged."""
    caplog.set_level("INFO", "amp-train")
    root = folders(tmp_path, "train", "test")
    expected = updates(fed(opened(root)))
    for name, damage in DAMAGES.items():
        caplog.clear()
        arrays = sorted((root / ".cache").glob("*.npy"))
        assert len(arrays) == 2
        for file in arrays:
            damage(file, file.with_suffix(".json"))
        assert same(updates(fed(opened(root))), expected), name
        assert "is damaged" in caplog.text or "notes" in name or name == "folder", name


def test_unreadable_images_are_all_listed_or_left_out(tmp_path, caplog):
    root = folders(tmp_path, "train", "test", count=20)
    broken = sorted((root / "train" / "apple").iterdir())[:12]
    for path in broken:
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="12 images cannot be read") as refused:
        opened(root)
    message = str(refused.value)
    assert sum(line.startswith("  /") for line in message.splitlines()) == 10
    assert "and 2 more" in message and "--skip_unreadable" in message
    data = opened(root, skip_unreadable=True)
    assert len(data.train) + len(data.validation) == 48 and sorted(data.unreadable) == sorted(map(str, broken))
    assert any("left out" in text for text in caplog.messages)
    for path in (root / "train" / "zebra").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no readable train image is left in zebra"):
        opened(root, skip_unreadable=True)


def test_paths_are_found_from_a_relative_folder(tmp_path, monkeypatch):
    folders(tmp_path, "train", "test")
    monkeypatch.chdir(tmp_path)
    assert len(opened(Path(".")).train) == 12
