"""Data: what comes out of each source, and what becomes of it in a batch."""

import contextlib
import errno
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import types
import typing
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import network
import train


def write_images(folder, classes=("cat", "dog"), count=3, size=(8, 8)):
    for part in ("train", "test"):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", size, (label * 100, number, 7)).save(
                    folder / part / name / f"{number}.png")
    return folder


def test_pixel_statistics_by_hand():
    images = torch.tensor([0, 255, 51, 204], dtype=torch.uint8).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    mean, std = data.pixel_statistics(images)
    assert mean == pytest.approx([0.5] * 3)
    assert std == pytest.approx([((0.25 + 0.09) / 2) ** 0.5] * 3)
    assert data.pixel_statistics(images * 0)[1] == (0, 0, 0)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_passing_error_leaves_no_image_out(error, tmp_path, monkeypatch):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / part / "a" / f"{number}.png")
    opening, failed = Image.open, []

    def fails_once(path, **more):
        if Path(path).name == "1.png" and not failed:
            failed.append(path)
            raise error
        return opening(path, **more)

    monkeypatch.setattr(Image, "open", fails_once)
    with pytest.raises((OSError, MemoryError)):
        data.load(str(tmp_path), tmp_path / "cache", val=0, skip_bad=True)
    assert len(data.load(str(tmp_path), tmp_path / "cache", val=0, skip_bad=True).train.labels) == 3


def test_mean_of_image_stds_is_not_the_pixel_std():
    flat = torch.stack([torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (0, 255)])
    assert data.pixel_statistics(flat)[1] == pytest.approx([0.5] * 3)
    assert data.mean_of_image_stds(flat) == (0, 0, 0)


def test_validation_split_is_balanced_and_disjoint():
    labels = torch.arange(10).repeat(50)
    rest, held = data.held_out(labels, 100, seed=3)
    assert torch.bincount(labels[held]).tolist() == [10] * 10
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(500))
    assert torch.equal(held, data.held_out(labels, 100, seed=3)[1])
    assert not torch.equal(held, data.held_out(labels, 100, seed=4)[1])


def test_of_a_small_class_no_larger_share_is_held_out_than_of_a_large_one():
    labels = torch.tensor([0] * 1000 + [1] * 1000 + [2] * 60 + [3])
    rest, held = data.held_out(labels, 206, seed=0)
    assert torch.bincount(labels[rest]).tolist() == [900, 900, 54, 1]
    assert torch.bincount(labels[held]).tolist() == [100, 100, 6]
    kept = data.balanced(labels, 206, seed=0)  # a limit takes as many of each
    assert torch.bincount(labels[kept]).tolist() == [73, 72, 60, 1]


@pytest.mark.parametrize("count", [-1, 500, 501])
def test_validation_split_out_of_range(count):
    with pytest.raises(ValueError, match="499"):
        data.held_out(torch.zeros(500), count, seed=0)


def test_shapes_are_the_same_every_time_and_balanced():
    shapes = data._drawn.__wrapped__(200, seed=1)
    assert torch.equal(shapes.images, data.draw_shapes(200, seed=1).images)
    for drawn in (data.draw_shapes(200, seed=1), data.load("shapes", limit=20, val=0).train):
        drawn.images[:] = 0  # a copy: those of the next are not changed
        drawn.labels[:] = 0
    assert torch.equal(shapes.images, data.draw_shapes(200, seed=1).images)
    assert torch.equal(shapes.labels, data.draw_shapes(200, seed=1).labels)
    assert data.load("shapes", limit=20, val=0).train.images.any()
    assert shapes.images.shape == (200, 3, 32, 32) and shapes.images.dtype == torch.uint8
    assert torch.bincount(shapes.labels).tolist() == [20] * 10


def test_shapes_are_beyond_a_linear_classifier():
    shapes = data.load("shapes", val=0)
    preprocessing = data.Preprocessing(32, shapes.mean, shapes.std)
    pixels = preprocessing(shapes.train.images).flatten(1)
    linear = torch.nn.Linear(3072, 10)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-3)
    for rows in torch.arange(len(pixels)).repeat(2).split(500):
        optimizer.zero_grad()
        F.cross_entropy(linear(pixels[rows]), shapes.train.labels[rows]).backward()
        optimizer.step()
    test = preprocessing(shapes.test.images).flatten(1)
    assert (linear(test).argmax(1) == shapes.test.labels).float().mean() < 0.4


def test_normalize_by_hand():
    images = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    out = data.Preprocessing(2, (0.5, 0.25, 0.2), (0.5, 0.25, 0.1))(images)
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([1.0, -1.0, 0.0]), atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert data.Preprocessing(4, (0.5,) * 3, (0.5,) * 3)(images).shape == (1, 3, 4, 4)


def test_pixels_are_bytes_and_batches_square():
    split = split_of_noise()
    floats = data.Split(split.images.float().contiguous(memory_format=torch.channels_last),
                        split.labels)
    before = floats.images.clone()
    for use in (data.Preprocessing(16, [0.5] * 3, [0.5] * 3), lambda _: batches_of(floats)):
        with pytest.raises(ValueError, match=r"torch\.float32, \d+×3×16×16: must be bytes"):
            use(floats.images)
    assert torch.equal(floats.images, before)
    assert data.Preprocessing(16, [0.5] * 3, [0.5] * 3)(split.images).shape == (20, 3, 16, 16)
    with pytest.raises(ValueError, match="16×12 pixels: must be square"):
        batches_of(data.Split(split.images[:, :, :12], split.labels))


def test_numbers_of_numpy_and_of_tensors_are_numbers():
    first = torch.rand(3, generator=data.generator(0, "a", 3))
    for three in (np.int64(3), torch.tensor(3)):
        assert torch.equal(first, torch.rand(3, generator=data.generator(0, "a", three)))
    assert not torch.equal(first, torch.rand(3, generator=data.generator(0, "a", 4)))
    assert network.build("lenet", torch.tensor(2) + 1)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_whoever_changes_the_shapes_changes_a_copy():
    _, before = data.load_split("test", "shapes")
    kept = before.images.clone()
    before.images.zero_()
    assert torch.equal(data.load_split("test", "shapes")[1].images, kept)
    with pytest.raises(ValueError, match="part=val: must be train or test"):
        data.load_split("val", "shapes")


def split_of_noise(count=20, size=16):
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return data.Split(images, torch.arange(count))


def batches_of(split, augment=(), **settings):
    return data.Batches(split, (0.5,) * 3, (0.5,) * 3, settings.pop("batch_size", 5), augment,
                        **settings)


def test_batches_without_augmentation_are_the_images():
    split = split_of_noise()
    for images, labels in batches_of(split).epoch(0):
        assert torch.allclose(images, split.images[labels].float() / 127.5 - 1, atol=1e-5)


def test_crop_and_flip_against_slices_of_the_padded_image():
    split = split_of_noise()
    padded = F.pad(split.images.float() / 127.5 - 1, (2, 2, 2, 2), mode="reflect")
    places = set()
    for images, labels in batches_of(split, ("crop", "flip")).epoch(1):
        for image, label in zip(images, labels):
            found = [(y, x, flip) for y in range(5) for x in range(5) for flip in (False, True)
                     if torch.allclose((padded[label].flip(2) if flip else padded[label])
                                       [:, y:y + 16, x:x + 16], image, atol=1e-5)]
            assert len(found) == 1
            places |= set(found)
    assert len({flip for _, _, flip in places}) == 2 and len(places) > 10


def test_without_crop_no_image_is_moved():
    split = split_of_noise()
    batches = batches_of(split, ("crop",), batch_size=20)
    images, labels = next(batches.epoch(0, crop=False))
    assert torch.allclose(images, split.images[labels].float() / 127.5 - 1, atol=1e-5)
    assert torch.equal(labels, next(batches.epoch(0))[1])


def test_alternating_flip_shows_each_image_both_ways_in_two_epochs():
    split = split_of_noise()
    batches = batches_of(split, ("alternating_flip",), batch_size=20)
    shown = []
    for epoch in (0, 1, 2):
        images, labels = next(batches.epoch(epoch))
        shown.append(images[labels.argsort()])
    assert torch.equal(shown[0], shown[1].flip(3)) and torch.equal(shown[0], shown[2])


def test_cutout_blanks_a_square_of_a_quarter():
    images, _ = next(batches_of(split_of_noise(), ("cutout",), batch_size=20).epoch(0))
    blank = (images == 0).all(1).flatten(1).sum(1)
    assert blank.max() == 16 and (blank >= 4).all() and blank.float().mean() > 9
    images, _ = next(batches_of(split_of_noise(size=12), ("cutout",), batch_size=20).epoch(0))
    assert (images == 0).all(1).flatten(1).sum(1).max() == 9  # 3×3
    near = batches_of(split_of_noise(size=12))._cutout_mask(torch.tensor([[5], [0]]))[0, :, :, 0]
    assert (~near).nonzero().tolist() == [[y, x] for y in (4, 5, 6) for x in (0, 1)]


def test_a_step_depends_on_seed_epoch_and_step_alone():
    split = split_of_noise()
    whole = list(batches_of(split, ("crop", "flip", "cutout")).epoch(2))
    late = list(batches_of(split, ("crop", "flip", "cutout")).epoch(2, start=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:], late)) and len(late) == 2
    assert not torch.equal(whole[0][1], next(batches_of(split).epoch(3))[1])
    assert not torch.equal(whole[0][1], next(batches_of(split, seed=1).epoch(2))[1])


def test_processes_share_the_same_global_batch():
    split = split_of_noise()
    whole = next(batches_of(split, ("crop",), batch_size=6).epoch(0))
    shares = [next(batches_of(split, ("crop",), batch_size=6, rank=rank, world=2).epoch(0))
              for rank in (0, 1)]
    for part in (0, 1):
        together = torch.stack([share[part] for share in shares], 1).flatten(0, 1)
        assert torch.equal(together, whole[part])


AUGMENTS = [(), ("flip",), ("crop",), ("crop", "alternating_flip"), ("cutout",),
            ("crop", "flip", "cutout")]


@pytest.mark.parametrize("settings", [{}, {"size": 12}, {"crop": False}, {"start": 2},
                                      {"rank": 1, "world": 2}])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_batches_are_the_same_on_every_way(augment, settings, monkeypatch):
    noise = split_of_noise(40).images
    split = data.Split(data.Rows(noise, torch.arange(1, 40, 2)), torch.arange(20))
    settings = dict(settings)
    share = {name: settings.pop(name) for name in ("rank", "world") if name in settings}
    batches = {way: batches_of(split, augment, way=way, batch_size=6, **share)
               for way in ("store", "device", "host")}
    batches["tensor"] = batches_of(data.Split(split.images[:], split.labels), augment, batch_size=6,
                                   way="host", **share)
    for epoch in (0, 3):
        epochs = {way: list(part.epoch(epoch, **settings)) for way, part in batches.items()}
        with monkeypatch.context() as patch:
            patch.setattr(data, "OVERLAPPING", ())
            epochs |= {f"{way}, by pixels": list(part.epoch(epoch, **settings))
                       for way, part in batches.items()}
        for way, found in epochs.items():
            for (images, labels), (same, same_labels) in zip(found, epochs["store"], strict=True):
                assert torch.equal(images, same) and torch.equal(labels, same_labels), way


@pytest.mark.parametrize("free, way", [(2 * 6144 * 20, "store"), (2 * 6144 * 20 - 2, "host")])
def test_the_way_is_chosen_by_what_is_free(free, way, monkeypatch):
    """20 images of 16×16 with margins of 2, twice, are 20·2·20²·3 bytes, and half may be used."""
    split, augment = split_of_noise(), ("crop", "flip")
    monkeypatch.setattr(data, "free_memory", lambda _device: free * 20**2 / 32**2)
    batches = batches_of(split, augment)
    assert batches.way == way and ("mirror" in batches.describe_way()) == (way == "store")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert batches_of(split, augment).way == "host"


@pytest.mark.parametrize("names", [("memory.max", "memory.current", "memory.stat"), (
    "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")])
@pytest.mark.parametrize("about, free", [("inactive_file 100\n", 500), ("", 400), (None, 400)])
def test_a_containers_limit_holds_whatever_it_tells_of_its_files(names, about, free, monkeypatch):
    said = dict(zip((Path("/sys/fs/cgroup", name) for name in names), ("1000\n", "600\n", about)))

    def read(path):
        if said.get(path) is None:
            raise FileNotFoundError
        return said[path]

    monkeypatch.setattr(Path, "read_text", read)
    assert data.free_memory() == free


def test_nobody_need_tell_what_is_free(monkeypatch):
    assert 1 << 20 < data.free_memory() < 1 << 50
    monkeypatch.setattr(Path, "read_text", lambda _path: "")
    assert data.free_memory() > 0
    monkeypatch.delattr(os, "sysconf")
    assert data.free_memory() == float("inf") and data.free_memory("meta") == float("inf")


def test_folder_is_read_and_cached(tmp_path):
    folder = write_images(tmp_path / "images")
    first = data.load(str(folder), tmp_path / "cache", val=0)
    assert first.classes == ("cat", "dog") and first.train.images.shape == (6, 3, 8, 8)
    assert first.train.images[:, 0, 0, 0].tolist() == [0, 0, 0, 100, 100, 100]
    second = data.load(str(folder), tmp_path / "cache", val=0)
    assert torch.equal(first.test.images, second.test.images)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".cache"] * 2
    time.sleep(0.01)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "train" / "cat" / "0.png")
    assert data.load(str(folder), tmp_path / "cache", val=0).train.images[0, 0, 0, 0] == 9


@pytest.mark.skipif(os.name == "nt", reason="does not say when a file was last changed")
def test_images_of_the_same_size_and_time_are_told_apart(tmp_path):
    path = write_images(tmp_path / "images") / "train" / "cat" / "0.bmp"
    for color in (5, 9):  # as out of an archive that gives all its files one time
        Image.new("RGB", (8, 8), (color,) * 3).save(path)
        os.utime(path, (1e9, 1e9))
        images = data.load(str(tmp_path / "images"), tmp_path / "cache", val=0).train.images
        assert images[0, 0, 0, 0] == color


def test_a_fingerprint_changes_with_the_files_alone(tmp_path):
    def fingerprint(folder):
        return data.load(str(folder), tmp_path / "cache", val=0).fingerprint

    folder = write_images(tmp_path / "images")
    first = fingerprint(folder)
    assert first == data.fingerprint_of(str(folder))
    assert first == fingerprint(folder.rename(tmp_path / "moved"))
    seen, folder = {first}, tmp_path / "moved"
    (folder / "train/cat/0.png").rename(folder / "train/cat/renamed.png")
    seen.add(fingerprint(folder))
    (folder / "test/dog/0.png").unlink()
    seen.add(fingerprint(folder))
    Image.effect_noise((8, 8), 99).save(folder / "test/dog/0.png")
    seen.add(fingerprint(folder))
    assert len(seen) == 4
    assert data.load("shapes", val=0).fingerprint == data.fingerprint_of("shapes") == "shapes"


def test_without_writes_nothing_is_made_or_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_args, **_kwargs: pytest.fail("download"))
    folder, root = write_images(tmp_path / "images"), tmp_path / "root"
    assert len(data.load(str(folder), root, val=0, writes=False).train.labels) == 6
    with pytest.raises(FileNotFoundError, match="`root=FOLDER`"):
        data.load_split("test", "cifar10", root, writes=False)
    assert not root.exists()


def pixels_of(folder, root, **settings):
    dataset = data.load(str(folder), root, **{"val": 0, **settings})
    return torch.cat([dataset.train.images[:], dataset.test.images[:]])


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "images", size=(64, 64))
    whole = pixels_of(folder, tmp_path / "whole")
    (tmp_path / "file").touch()
    assert torch.equal(pixels_of(folder, tmp_path / "file"), whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a disk that is full after a while
    try:
        assert torch.equal(pixels_of(folder, tmp_path / "full"), whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=70_000))
    assert torch.equal(pixels_of(folder, tmp_path / "small"), whole)
    assert not (tmp_path / "full").exists() and not (tmp_path / "small").exists()
    said = capsys.readouterr().err
    assert said.count("are held in memory") == 6
    assert re.search(r"file/folder-\w+\.cache: cannot be written \(File exists\); ", said)
    monkeypatch.setattr(data, "free_memory", lambda: 70_000)
    with pytest.raises(OSError, match="GB are free"):
        pixels_of(folder, tmp_path / "small")


def test_a_damaged_cache_is_made_again(tmp_path, capsys):
    folder = write_images(tmp_path / "images")
    whole = pixels_of(folder, tmp_path / "cache")
    cache = max((tmp_path / "cache").iterdir())
    good = cache.read_bytes()
    other = good[:-8].replace(b'"rows": [0', b'"rows": [9')
    damages = [b"", good[:-1], good[1:], good + b"x", bytes([good[0] ^ 1]) + good[1:], bytes(300),
               other + b"%08x" % zlib.crc32(other)]
    for damaged in damages:
        cache.write_bytes(damaged)
        assert torch.equal(pixels_of(folder, tmp_path / "cache"), whole)
        assert cache.read_bytes() == good and capsys.readouterr().err.count("damaged (") == 1
    cache.unlink()
    os.mkfifo(cache)
    assert torch.equal(pixels_of(folder, tmp_path / "cache"), whole)
    assert cache.read_bytes() == good
    cache.unlink()
    os.mkfifo(cache.with_suffix(".lock"))
    assert torch.equal(pixels_of(folder, tmp_path / "cache"), whole) and not cache.exists()


def test_one_process_decodes_while_the_others_wait(tmp_path, monkeypatch):
    folder, read, seen = write_images(tmp_path / "images"), data.read_image, []

    def slowly(path, *settings, **more):
        seen.append(path)
        time.sleep(0.02)
        return read(path, *settings, **more)

    monkeypatch.setattr(data, "read_image", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: pixels_of(folder, tmp_path / "cache"), range(3)))
    assert len(seen) == 12 and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".cache"}


@pytest.mark.parametrize("settings", [{}, {"skip_bad": True}, {"val": 2}])
def test_a_limit_keeps_the_split_and_reads_no_more(settings, tmp_path, monkeypatch):
    folder, read, seen = write_images(tmp_path / "images", count=10), data.read_image, []
    monkeypatch.setattr(data, "read_image", lambda path, *settings, **more: seen.append(path)
                        or read(path, *settings, **more))
    settings = {"val": 6, "seed": 1, **settings}
    few = data.load(str(folder), tmp_path / "cache", limit=4, **settings)
    assert len(seen) == (40 if settings.get("skip_bad") else 8 + min(4, settings["val"]))
    every = data.load(str(folder), tmp_path / "cache", **settings)
    for part in ("train", "val", "test"):
        same = data.subset(getattr(every, part), 4, seed=1)
        assert torch.equal(getattr(few, part).images[:], same.images[:])
        assert torch.equal(getattr(few, part).labels, same.labels)


def test_rows_are_used_like_a_tensor():
    images, numbers = split_of_noise().images, torch.tensor([3, 5, 8, 9])
    rows, same = data.Rows(images, numbers), images[numbers]
    assert rows.shape == same.shape and len(rows) == 4
    for index in (1, -1, slice(None), slice(None, None, 3), [2, 0], same[:, 0, 0, 0] > 99,
                  torch.tensor([1, 1])):
        assert torch.equal(rows[index], same[index])
    preprocessing = data.Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(preprocessing(rows), preprocessing(same))
    assert [len(part) for part in rows.split(3)] == [3, 1]
    assert data.pixel_statistics(rows) == data.pixel_statistics(same)


def test_folder_of_other_sizes_is_resized(tmp_path):
    folder = write_images(tmp_path / "images", size=(40, 30))
    assert data.load(str(folder), tmp_path, 16, val=0).train.images.shape == (6, 3, 16, 16)


def test_small_images_are_enlarged_where_sizes_differ(tmp_path):
    folder = write_images(tmp_path / "images")
    assert data.load(str(folder), tmp_path, 16, val=0).train.images.shape == (6, 3, 8, 8)
    Image.new("RGB", (12, 12), (100, 9, 9)).save(folder / "train" / "cat" / "1.png")
    dataset = data.load(str(folder), tmp_path, 16, val=0)
    assert dataset.train.images.shape == (6, 3, 16, 16) and dataset.test.images.shape[2] == 8
    assert dataset.train.images[1].flatten(1).unique(dim=1).flatten().tolist() == [100, 9, 9]
    assert dataset.train.images[0].flatten(1).unique(dim=1).flatten().tolist() == [0, 0, 7]


def test_folder_errors_name_what_is_wrong(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="no such data set or folder"):
        data.load(str(tmp_path / "loop"))
    assert data.folder_of(str(tmp_path / "loop")).name == "loop"
    with pytest.raises(OSError, match="no such data set or folder"):
        data.load(str(tmp_path / "nothing"), tmp_path)
    folder = write_images(tmp_path / "images")
    (folder / "train" / "cat" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"bad\.jpg.*; `skip_bad`"):
        data.load(str(folder), tmp_path, val=0)
    for _ in range(2):  # also when the images come from a cache
        assert len(data.load(str(folder), tmp_path, val=0, skip_bad=True).train.labels) == 6
        assert "files of train that cannot be read (1)" in capsys.readouterr().err
    (folder / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match="bird"):
        data.load(str(folder), tmp_path, val=0)
    (folder / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match="no images"):
        data.load(str(folder), tmp_path, val=0)


def test_what_no_image_can_be_is_not_opened(tmp_path):
    """A pipe and a device would be read for ever; PostScript would be handed to a program."""
    folder = write_images(tmp_path / "images")
    odd = folder / "train" / "cat"
    os.mkfifo(odd / "pipe.png")
    (odd / "device.png").symlink_to("/dev/zero")
    (odd / "dangling.png").symlink_to("nowhere")
    (odd / "loop.png").symlink_to("loop.png")
    (odd / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with open(odd / "huge.png", "wb") as file:
        file.truncate(1 << 40)
    for path in odd.glob("[!0-9]*"):
        with pytest.raises(OSError, match=path.name.replace(".", r"\.")):
            data.read_image(path)
    with pytest.raises(OSError, match="skip_bad"):
        data.load(str(folder), tmp_path / "cache", val=0)
    dataset = data.load(str(folder), tmp_path / "cache", val=0, skip_bad=True)
    assert dataset.train.labels.tolist() == [0] * 3 + [1] * 3


def test_what_is_left_out_of_a_folder_is_said(tmp_path, capsys):
    folder = write_images(tmp_path / "images")
    for name, colour in (("a.gif", 50), ("b.TIF", 60)):
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(folder / "test" / "cat" / name)
    (folder / "train" / "cat" / "inner" / "more").mkdir(parents=True)
    for name in ("inner/1.png", "inner/more/2.png", "notes.txt", ".hidden", "._0.png", "README"):
        (folder / "train" / "cat" / name).touch()
    for name in ("val", ".git"):
        (folder / name).mkdir()
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "beside.png").touch()
    (folder / "test" / "fish").symlink_to(tmp_path / "nowhere")
    (folder / "train" / "dog" / "all").symlink_to("/")  # which is not walked through
    (folder / "cover.jpg").touch()
    dataset = data.load(str(folder), tmp_path / "cache", val=0)
    assert dataset.test.images[:, 0, 0, 0].tolist() == [0, 0, 0, 50, 60, 100, 100, 100]
    assert capsys.readouterr().err == (
        f"{folder}: left out files beside the classes (2), files in folders within a class (2), "
        "files of type .txt (1), files of type unknown (1), "
        "folders and images beside train and test (2), hidden files (1), "
        "hidden folders beside the classes (1), links to folders within a class (1)\n")
    (folder / "train" / "two\nlines").mkdir()
    (folder / "test" / "two\nlines").mkdir()
    with pytest.raises(ValueError, match=r"two\\nlines"):
        data.load(str(folder), tmp_path / "cache")


def test_cifar_without_files_and_network(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz.*shapes.*FOLDER"):
        data.load("cifar10", tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


ODD_IMAGES = {
    "grey": Image.new("L", (4, 4), 100), "grey16": Image.new("I;16", (4, 4), 100 * 257),
    "palette": Image.new("RGB", (4, 4), (100, 100, 100)).convert("P", palette=1),
    "cmyk": Image.new("CMYK", (4, 4), (0, 0, 0, 155)),
    "transparent": Image.new("RGBA", (4, 4), (100, 100, 100, 255)),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_odd_images_are_read_right(kind, tmp_path):
    path = tmp_path / ("image.tiff" if kind == "cmyk" else "image.png")
    ODD_IMAGES[kind].save(path)
    assert (data.read_image(path).int() - 100).abs().max() <= 1


def test_grey_of_16_bits_is_rounded_and_damaged_exif_does_no_harm(tmp_path):
    Image.new("I;16", (4, 4), 40_000).save(tmp_path / "grey.png")
    assert (data.read_image(tmp_path / "grey.png") == 156).all()  # 40 000 / 257 = 155.6
    small = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    Image.fromarray(small.permute(1, 2, 0).numpy()).save(tmp_path / "small.png")
    enlarged = data.resize(small[None].float(), 32)[0]  # as `Batches` and `Preprocessing` do
    assert (data.read_image(tmp_path / "small.png", 32) - enlarged).abs().max() <= 1
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "a.png", exif=b"garbage!")
    assert (data.read_image(tmp_path / "a.png") == 9).all()


@pytest.mark.parametrize("tall", [False, True])
def test_an_image_is_made_smaller_with_all_its_pixels(tall):
    images = torch.zeros(1, 3, 16, 4)
    images[:, :, ::4] = 4.0  # every fourth line: their mean is 1
    images = images if tall else images.mT
    assert torch.allclose(data.resize(images, 4)[:, :, 1:3, 1:3], torch.ones(1, 3, 2, 2), atol=0.2)
    assert data.resize(images, 4).mean() == pytest.approx(1, abs=0.2)


def test_names_that_look_the_same_are_told_apart(tmp_path):
    for part, name in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        (tmp_path / part / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"only: 'cafe\\u0301', 'caf\\xe9'"):
        data.load(str(tmp_path), tmp_path)
    assert data.told_apart(["cat", "cat "]) == ["'cat'", "'cat '"]
    assert data.told_apart(["caf\u00e9", "cat"]) == ["caf\u00e9", "cat"]


def test_a_share_is_no_number_of_images():
    with pytest.raises(ValueError, match=r"val=0\.1: must be a whole number from 0 to"):
        data.load("shapes", val=0.1)
    assert len(data.load("shapes", val=torch.tensor(3).numpy()[()]).val.labels) == 3


def test_transparency_rotation_and_animation(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (data.read_image(tmp_path / "clear.png") == 255).all()
    turned, exif = Image.new("RGB", (4, 2), "white"), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").shape == (3, 4, 2)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((10, 10, 10), (200, 200, 200))]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert (data.read_image(tmp_path / "moving.webp") == 10).all()


def test_bad_images_are_named(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(whole[:16] + header + whole[29:])
    for number, grey in enumerate((-1, 65536)):  # that 16 bits do not hold
        Image.new("I", (4, 4), grey).save(tmp_path / f"{number}.tiff")
    for name in ("cut.png", "empty.png", "bomb.png", "missing.png", "0.tiff", "1.tiff"):
        with pytest.raises(OSError, match=name.replace(".", r"\.")):
            data.read_image(tmp_path / name)


@pytest.mark.parametrize("line, complaint", [
    (["stats", "--dat=shapes"], "--dat: no such flag; did you mean --data?"),
    (["nothing"], "commands: stats"), (["Stat"], "did you mean stats?"),
    (["stats", "--image_size=abc"], "--image_size=abc: must be a whole number"),
    (["stats", "a", "b"], "b: a word too many"), (["stats", "a", "--data=b"], "a: a word too many"),
    (["stats", "--", "--epochs=3"], "--epochs: no such flag"),
    (["stats", "--data=a", "--", "--data=b"], "--data: is given twice"),
    (["stats", "--data"], "--data: needs a value"), (["stats", "--data="], "--data: needs a value"),
    (["stats", "--root", "--image-size=8"], "--root: needs a value"),
    (["stats", "--sizes"], "--sizes: needs a value"),
    (["stats", "--skip_bad", "no"], "--data=no"), (["stats", "--skip_bad=no"], "--skip_bad=no"),
    (["stats", "---data=a"], "error: ---data: no such flag; did you mean --data?"),
    (["stats", "-x"], "error: -x: no such flag"),
    (["stats", "data=shapes"], "data=shapes: did you mean --data=shapes?"),
    (["stats", "dta=shapes"], "dta=shapes: did you mean --data=shapes?"),
    (["stats", "--order=Up"], "--order=Up: must be one of up, down; did you mean up?"),
])
def test_a_mistyped_line_never_starts_work(line, complaint, capsys):
    started = []

    def stats(data: str = "a", root: str = "b", image_size: int = 1, skip_bad: bool = False,
              order: typing.Literal["up", "down"] = "up", sizes: tuple[int, ...] = ()):
        if data == "no":
            raise ValueError("data=no: is none")
        started.append(data)

    commands = {"stats": stats, "other": stats}
    with pytest.raises(SystemExit) as leave:
        globals()["data"].command_line(commands, argv=line)
    error = capsys.readouterr().err
    assert leave.value.code == 2 and not started
    assert complaint in error and error.count("\n") == 1


@pytest.mark.parametrize("line, values", [
    (["--batch-size=8"], {"batch_size": 8}), (["--batch_size", "8"], {"batch_size": 8}),
    (["--layer=a+b"], {"layers": ("a", "b")}), (["--layers", "a"], {"layers": ("a",)}),
    (["--big", "--batch_size=1"], {"big": True, "batch_size": 1}),
    (["--big", "false"], {"big": False}), (["run", "--big", "true"], {"ckpt": "run", "big": True}),
    (["--big", "run"], {"big": True, "ckpt": "run"}), (["--resume"], {"resume": True}),
    (["--resume", "--big"], {"resume": True, "big": True}), (["--resume", "x"], {"resume": "x"}),
    (["--", "run"], {"ckpt": "run"}), (["--ckpt=--x=1"], {"ckpt": "--x=1"}),
    (["--ckpt", "-1"], {"ckpt": "-1"}), (["--ckpt=-"], {"ckpt": "-"}),
    (["--ckpt=~/a"], {"ckpt": os.path.expanduser("~/a")}), (["--ckpt=~root/a"], {
        "ckpt": os.path.expanduser("~root/a")}), (["--ckpt=~"], {
        "ckpt": os.path.expanduser("~")}), (["--ckpt=a~/b"], {"ckpt": "a~/b"}),
    (["--layers=none"], {"layers": ()}), (["--layers="], {"layers": ()}),
])
def test_what_is_typed_arrives(line, values):
    def command(ckpt: str = "", batch_size: int = 0, layers: tuple[str, ...] = (),
                big: bool = False, resume: bool | str = False):
        pass

    assert data.parse({"command": command}, ["command", *line]).keywords == values
    assert data.parse({"command": command}, ["command", *line]).args == ()


def test_errors_speak_of_arguments_and_the_command_line_of_its_flags(capsys):
    def command(limit: int = 1, seed: int = 0):
        raise ValueError("limit=0, other=1: too few (x=2); give `seed=3`; give `resume`, or wait")

    with pytest.raises(SystemExit):
        data.command_line({"command": command}, argv=["command"])
    assert capsys.readouterr().err == (
        "error: --limit=0, other=1: too few (x=2); give --seed=3\n")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory"), RuntimeError("MPS backend out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_memory_that_is_not_there_is_one_line_of_any_command(error, refused):
    def command():
        raise error

    assert "out of memory" in refused({"command": command}, ["command"])


def test_a_home_folder_is_meant_from_python_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "images")
    dataset = data.load("~/images", "~/cache", val=0)
    assert dataset.train.images.shape[1:] == (3, 8, 8) and [*(tmp_path / "cache").glob("*.cache")]


def scripts():
    import deconv
    import lab.__main__
    import visualize
    return {module.__name__: module for module in (data, network, train, visualize, deconv,
                                                   lab.__main__)}


def test_every_flag_of_every_command_is_explained(capsys):
    for name, module in scripts().items():
        assert module.COMMANDS
        for command, function in module.COMMANDS.items():
            words = [command, "speednet"] if command == "summary" else [command]
            for flag, told in data.all_flags(function, words, module.MEANINGS).items():
                assert told.meaning, f"{name} {command} --{flag}"
            assert data.inspect.getdoc(function), f"{name} {command}"
    for model in network.NETWORKS:
        assert all(flag.meaning for flag in network.option_flags(model).values())


RAN_OUT = r"""
import sys
sys.path.insert(0, {folder!r})
import data
def command():
    for number in range(20_000):
        print(number, "épochs × ½ \udcff", flush=number % 100 == 0)
    with open({done!r}, "w") as file:
        assert file.fileno() > 2  # whatever else is written there would go to this file
    return data.Table(("ü", "[/x]"), [("[v1]", ":cat:")], title="[bold]×")
data.command_line({{"command": command}}, argv=["command"])
"""


@pytest.mark.parametrize("line", ["| head -1", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full",
                                  "< /dev/null > OUT"])
def test_no_kind_of_standard_output_ends_a_run(line, tmp_path):
    script = RAN_OUT.format(folder=str(Path(data.__file__).parent), done=str(tmp_path / "done"))
    ran = subprocess.run(["bash", "-c", f'"$0" -c "$1" {line}', sys.executable, script],
                         cwd=tmp_path, capture_output=True, text=True, check=False,
                         env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"})
    assert (tmp_path / "done").exists() and ran.returncode == 0 and not ran.stderr
    if "OUT" in line:
        out = (tmp_path / "OUT").read_text("ascii")
        assert "0 ?pochs ? ? ?" in out and "[/x]" in out and "[v1]" in out and ":cat:" in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_from_python_too_no_encoding_ends_what_prints(encoding, tmp_path):
    script = (f"import sys; sys.path.insert(0, {str(Path(data.__file__).parent)!r}); import train\n"
              f"train.train('lenet', data='shapes', limit=4, epochs=1, out='č')\n"
              f"train.data.Table(['–'], [['½ \\udcff']], title='č').print(); train.data.note('č')")
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                         check=False, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert ran.returncode == 0 and b"test accuracy" in ran.stdout, ran.stderr
    assert ("–" in ran.stdout.decode(encoding)) == (encoding == "utf-8")


def test_no_name_gives_orders_to_a_terminal(tmp_path, capsys, refused):
    name = "a\x1b[31m\x9b1mb"
    data.Table((name, "x"), [(name, name)], name).print()
    data.show(f"{tmp_path}/{name}")
    shown = capsys.readouterr().out + refused({"stats": data.stats}, ["stats", f"--data={name}"])
    assert not {"\x1b", "\x9b"} & {*shown} and shown.count("a\ufffd[31m\ufffd1") == 5


def test_an_empty_word_is_no_value(refused):
    for words in (["download", ""], ["", "--data=shapes"], ["download", "--data", ""]):
        said = refused(data.COMMANDS, words)
        assert re.search("a word is empty|no command ''|needs a value", said)


def test_what_only_writes_is_no_terminal():
    tee = types.SimpleNamespace(write=len, flush=list)
    assert [data.wrapped(70 * "ab ", stream) for stream in (tee, None)] == [70 * "ab "] * 2
    tee.isatty = lambda: True
    assert "\n" in data.wrapped(70 * "ab ", tee)


def test_a_table_in_markdown_means_nothing_but_its_text():
    table = data.Table(("a|b", "n"), [("<img src=x> [l](http://e) _c_", "1")])
    assert table.markdown(right=(1,)) == (
        "| a\\|b | n |\n| --- | ---: |\n"
        "| &lt;img src=x&gt; \\[l\\](http\\://e) \\_c\\_ | 1 |\n")


def test_a_table_never_breaks_inside_a_word(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    words = [f"{number:09d}" for number in range(6)]
    text = "a text that is longer than the screen is wide, and wraps where its words end"
    data.Table([f"column_{number}" for number in range(7)], [(*words, text)]).print()
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 50
    assert all(word in shown for word in [*words, *text.split()])
    assert shown.count("column_0") == shown.count(words[0]) > 1
    data.Table(("a", "b", *(f"column_{number}" for number in range(9))), [
        ("lenet", "0.3", *"123456789")], keys=2).print()
    assert re.findall(r"│ lenet │ 0\.3 │ (\d)", capsys.readouterr().out) == ["1", "4", "7"]
    data.Table([10 * letter for letter in "abcd"], [("state",) * 4], keys=3).print()
    assert capsys.readouterr().out.count("state") == 5  # no room for three in each block
    data.Table(("name",), [("x" * 200,)], title="[v1]").print()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 50


def test_a_file_system_without_locks_is_not_another_process(tmp_path, monkeypatch, capsys):
    with data.lock(tmp_path / "run"), pytest.raises(data.Busy), data.lock(tmp_path / "run"):
        raise AssertionError
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with data.lock(tmp_path / "run"):
        (tmp_path / "run" / "a").touch()
    assert "no locks" in capsys.readouterr().err


def test_a_lock_file_removed_before_it_was_locked_is_no_lock(tmp_path, monkeypatch):
    folder, take = tmp_path / "run", data.lock_file

    def late(file):  # who held it removes it after this process has opened it
        monkeypatch.setattr(data, "lock_file", take)
        shutil.rmtree(folder)
        return take(file)
    monkeypatch.setattr(data, "lock_file", late)
    with data.lock(folder):
        with pytest.raises(data.Busy), data.lock(folder):
            raise AssertionError
        assert (folder / ".lock").exists()
    assert not folder.exists()
    with data.lock(folder):
        shutil.rmtree(folder)  # which leaves nothing to clean up


def test_the_folder_is_synced_after_a_rename(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def note(number):
        synced.append(os.path.isdir(f"/proc/self/fd/{number}"))
        sync(number)
    monkeypatch.setattr(os, "fsync", note)
    data.write_atomically(tmp_path / "a", "text")
    assert synced == [False, True]


def test_names_that_are_no_text_are_written_as_they_are(tmp_path):
    data.write_atomically(tmp_path / "new" / "table.csv", os.fsdecode(b"f\xfcr"))
    assert (tmp_path / "new" / "table.csv").read_bytes() == b"f\xfcr"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 50 + "1" + "}" * 50, "{", "[]"])
def test_damaged_json_is_named(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: damaged"):
        data.read_json(tmp_path / "a.json", lambda value: value["b"])


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(OSError, match="not a regular file"):
        data.read_json(tmp_path / "a.json", dict)
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(OSError, match="not a regular file"), data.lock(tmp_path):
        pass
    with open(tmp_path / "b.json", "wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(OSError, match="too many"):
        data.read_json(tmp_path / "b.json", dict)


def test_flags_become_values_of_their_types(capsys):
    got = []

    def command(*words: str, count: int = 1, rates: tuple[float, ...] = (), big: bool = False,
                size: int | None = 3):
        got.append((words, count, rates, big, size))

    data.command_line({"command": command}, argv=["command", "1e3", "x", "--count=5",
                                                  "--rates=0.1+2", "--big", "--size=none"])
    assert got == [(("1e3", "x"), 5, (0.1, 2.0), True, None)]
    with pytest.raises(SystemExit) as leave:
        data.command_line({"command": command}, argv=["command", "--count=5", "--help"])
    assert leave.value.code == 0 and len(got) == 1 and "--count" in capsys.readouterr().out


def test_cifar10_from_its_own_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = torch.arange(3072).remainder(256).byte().view(1, -1).numpy()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3]}))
    names = ["plane", "car", "bird", "cat"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    dataset = data.load("cifar10", tmp_path, val=0)
    assert dataset.classes == tuple(names) and len(dataset.train.labels) == 5
    assert torch.equal(dataset.test.images[0].flatten(), torch.from_numpy(pixels[0]))
    assert dataset.test.labels.tolist() == [3]
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: False)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive",
                        lambda *_, **__: pytest.fail("files that somebody changed are replaced"))
    before = (folder / "data_batch_1").read_bytes()
    (folder / "test_batch").unlink()  # not all are there: the others are set aside
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive",
                        lambda *_, **__: None)
    for name in ("data_batch_1.damaged", "data_batch_1.damaged.1"):
        (folder / "data_batch_1").write_bytes(before)
        with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
            data.load("cifar10", tmp_path, val=0)
        assert (folder / name).read_bytes() == before and not (folder / "data_batch_1").exists()


def test_help_and_errors_show_how_the_second_value_is_given(capsys):
    def command(run: str, out: str):
        """A command."""
        return f"{run} {out}"

    for line, said in ((["--help"], "--out=OUT"), (["command", "x"], "needs --out=OUT"),
                       (["command"], "needs RUN"), (["command", "x", "--out=y"], "x y"),
                       (["help"], "--out=OUT"),
                       (["command", "help", "--out", "help"], "help help")):
        with contextlib.suppress(SystemExit):
            data.command_line({"command": command}, argv=line)
        assert said in "".join(capsys.readouterr())


def test_images_that_cannot_be_taken_leave_nothing_behind(tmp_path):
    write_images(tmp_path / "mixed")
    Image.new("RGB", (9, 9)).save(tmp_path / "mixed" / "train" / "cat" / "0.png")
    for root in (tmp_path / "new", tmp_path / "deep"):
        with pytest.raises(ValueError, match="image_size"):
            data.load(str(tmp_path / "mixed"), root=str(root))
        assert not root.exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="image_size"):
        data.load(str(tmp_path / "mixed"), root=str(tmp_path / "mine"))
    assert (tmp_path / "mine").exists()


def test_changed_images_take_the_place_of_the_old_ones_with_a_limit_too(tmp_path):
    write_images(tmp_path / "pets")
    for day in range(3):
        for path in (tmp_path / "pets").rglob("*.png"):
            os.utime(path, ns=(0, day))
        data.load(str(tmp_path / "pets"), root=str(tmp_path / "root"), limit=4)
    assert len([*(tmp_path / "root").glob("*.cache")]) == 2
