"""Files of image memory: what they are refused for, and the limit of a store's folder."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.image_memory import pictures
from helpers.tiny import make_model
from modeling_visualchat import image_memory_folder_visualchat
from modeling_visualchat.image_memory_folder_visualchat import ImageMemoryFolder
from modeling_visualchat.image_memory_visualchat import ImageMemory, ImageMemoryStore


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def damage(path: Path, kind: str) -> None:
    tensors, metadata = load_file(path), metadata_of(path)
    if kind in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[: 100 if kind == "truncated" else 0])
    elif kind == "flipped":
        content = bytearray(path.read_bytes())
        content[-40::2] = bytes(byte ^ 1 for byte in content[-40::2])
        path.write_bytes(content)
    elif kind == "other tensors":
        save_file({"weight": torch.zeros(1)}, path)
    elif kind == "without a checksum":
        del metadata["checksum"]
        save_file(tensors, path, metadata)
    else:
        changed = {
            "NaN": lambda one: one * torch.nan,
            "zeros": torch.zeros_like,
            "fewer tokens": lambda one: one[:, :, 1:].contiguous(),
            "another dtype": lambda one: one.to(torch.float16),
        }[kind]
        save_file({name: changed(one) for name, one in tensors.items()}, path, metadata)


DAMAGES = {
    "truncated": "not a whole safetensors file",
    "empty": "not a whole safetensors file",
    "flipped": "does not match its own checksum",
    "NaN": "does not match its own checksum",
    "zeros": "does not match its own checksum",
    "fewer tokens": "does not match its own checksum",
    "another dtype": "does not match its own checksum",
    "other tensors": "holds weight, which is not an image memory",
    "without a checksum": "has no checksum, as earlier versions wrote it",
}


class TestChecks:
    @pytest.fixture
    def path(self, mmca, tmp_path) -> Path:
        """A file that a store wrote of the first picture."""
        ImageMemoryStore(mmca, 2**30, tmp_path).get(pictures(1))
        (path,) = tmp_path.iterdir()
        return path

    def assert_written_anew(self, mmca, path: Path, caplog, reason: str):
        expected = mmca.encode_images(pictures(1))
        caplog.clear()
        store = ImageMemoryStore(mmca, 2**30, path.parent)
        assert torch.equal(store.get(pictures(1))[0].keys, expected.keys)
        assert (store.hits, store.misses) == (0, 1)
        assert caplog.text.count(str(path)) == 1 and reason in caplog.text
        again = ImageMemoryStore(mmca, 2**30, path.parent)
        assert torch.equal(again.get(pictures(1))[0].values, expected.values)
        assert (again.hits, again.misses) == (1, 0)

    @pytest.mark.parametrize(("kind", "reason"), DAMAGES.items())
    def test_a_damaged_file_is_a_miss_and_is_written_anew(self, mmca, path, caplog, kind, reason):
        damage(path, kind)
        with pytest.raises(ValueError, match=f"{path.name}.* {reason}"):
            ImageMemory.load(path)
        self.assert_written_anew(mmca, path, caplog, reason)

    def test_a_file_of_another_image(self, mmca, path, caplog):
        album = pictures(2)
        ImageMemoryStore(mmca, 2**30, path.parent).get(album)
        (other,) = set(path.parent.iterdir()) - {path}
        other.replace(path)
        assert len(ImageMemory.load(path)) == 1
        self.assert_written_anew(mmca, path, caplog, "is the memory of another image")

    def test_a_file_that_is_whole_but_of_another_shape_or_other_weights(self, mmca, path, caplog):
        memory = ImageMemory.load(path)
        short = ImageMemory(memory.keys[:, :, 1:], memory.values[:, :, 1:], memory.fingerprint)
        short.save(path, image=path.stem)
        self.assert_written_anew(mmca, path, caplog, "has keys of the shape (3, 1, 4, 2, 16)")
        with pytest.raises(ValueError, match=r"keys of the shape \(3, 1, 4, 2, 16\).*\(3, 1, 5, 2, 16\)"):
            mmca(torch.full((1, 4), mmca.config.image_token_id), image_memory=short)
        ImageMemory(memory.keys, memory.values, "f" * 64).save(path, image=path.stem)
        self.assert_written_anew(mmca, path, caplog, "was made with other weights")

    def test_a_bad_file_that_cannot_be_replaced_is_logged_once(self, mmca, path, caplog, monkeypatch):
        damage(path, "flipped")
        monkeypatch.setattr(ImageMemoryStore, "_write", lambda *arguments: None)
        store = ImageMemoryStore(mmca, 0, path.parent)
        for _ in range(3):
            store.get(pictures(1))
        assert (store.hits, store.misses) == (0, 3)
        assert caplog.text.count("does not match its own checksum") == 1

    def test_a_file_that_vanishes_while_it_is_looked_for(self, mmca, path, monkeypatch, caplog):
        """Another process has deleted it."""
        load = ImageMemory.load
        monkeypatch.setattr(ImageMemory, "load", lambda name, *arguments, **settings: (name.unlink(), load(name)))
        store = ImageMemoryStore(mmca, 0, path.parent)
        store.get(pictures(1))
        assert (store.hits, store.misses) == (0, 1) and path.exists()
        assert not caplog.text

    def test_what_is_loaded_does_not_change_with_the_file(self, path):
        memory = ImageMemory.load(path)
        keys = memory.keys.clone()
        with path.open("r+b") as file:
            file.seek(-memory.nbytes, os.SEEK_END)
            file.write(bytes(memory.nbytes))
        assert torch.equal(memory.keys, keys)

    def test_a_file_that_cannot_be_written_leaves_nothing_behind(self, path, monkeypatch):
        memory = ImageMemory.load(path)

        def fail(tensors, name, metadata):
            Path(name).write_bytes(b"begun")
            raise OSError("No space left on device")

        monkeypatch.setattr("modeling_visualchat.image_memory_visualchat.save_file", fail)
        before = path.read_bytes()
        with pytest.raises(OSError, match="No space left"):
            memory.save(path)
        assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before


class TestFolder:
    @pytest.fixture
    def file_bytes(self, mmca, tmp_path_factory) -> int:
        """Of one picture's file."""
        folder = tmp_path_factory.mktemp("measured")
        ImageMemoryStore(mmca, 0, folder).get(pictures(1))
        return next(folder.iterdir()).stat().st_size

    def make_store(self, model, folder: Path, limit: int) -> ImageMemoryStore:
        """A store that keeps nothing in memory."""
        return ImageMemoryStore(model, 0, folder, limit)

    @pytest.fixture
    def known(self, mmca, tmp_path, tmp_path_factory):
        """For each of the first pictures, whether the folder has its file."""
        names = []
        for picture in pictures(5):
            folder = tmp_path_factory.mktemp("one")
            ImageMemoryStore(mmca, 0, folder).get(picture[None])
            names += [path.name for path in folder.iterdir()]
        return lambda: [(tmp_path / name).exists() for name in names]

    def nbytes(self, folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    def test_what_was_used_least_recently_is_deleted(self, mmca, tmp_path, file_bytes, known):
        album, limit = pictures(5), 3 * file_bytes + 2000
        store = self.make_store(mmca, tmp_path, limit)
        store.get(album[:3])
        store.get(album[:1])  # picture 1 is now the oldest
        store.get(album[3:4])
        assert known() == [True, False, True, True, False]
        store.get(album[4:])
        assert known() == [True, False, False, True, True]
        assert self.nbytes(tmp_path) <= limit

    def test_what_is_used_from_memory_counts_as_used(self, mmca, tmp_path, file_bytes, known):
        album = pictures(4)
        store = ImageMemoryStore(mmca, 2**30, tmp_path, 3 * file_bytes + 2000)
        store.get(album[:3])
        store.get(album[:1])
        store.get(album[3:])
        assert known()[:4] == [True, False, True, True]

    def test_the_next_process_goes_on_where_the_last_one_ended(self, mmca, tmp_path, file_bytes):
        album = pictures(4)
        self.make_store(mmca, tmp_path, 2**30).get(album)
        for age, path in enumerate(sorted(tmp_path.glob("*.safetensors"))):
            os.utime(path, (1e9 + age, 1e9 + age))
        oldest_two = sorted(tmp_path.glob("*.safetensors"))[:2]
        self.make_store(mmca, tmp_path, 3 * file_bytes + 2000).get(pictures(1, seed=7))
        assert not any(path.exists() for path in oldest_two)
        assert len(list(tmp_path.glob("*.safetensors"))) == 3

    def test_what_exceeds_the_limit_alone_is_not_written(self, mmca, tmp_path, file_bytes):
        kept = tmp_path / "kept"
        self.make_store(mmca, kept, 2**30).get(pictures(1))
        self.make_store(mmca, kept, file_bytes - 1).get(pictures(2))
        assert len(list(kept.iterdir())) == 1

    def test_other_files_are_neither_counted_nor_deleted(self, mmca, tmp_path, file_bytes):
        folder = tmp_path / "memories"
        folder.mkdir()
        others = [
            "notes.txt",
            "model.safetensors",
            "a" * 16 + "-" + "b" * 64 + ".safetensors.txt",
            "my.safetensors.1-2.part",
        ]
        for name in others:
            (folder / name).write_bytes(bytes(10 * file_bytes))
            os.utime(folder / name, (1, 1))
        target = tmp_path / "elsewhere.safetensors"
        target.write_bytes(b"mine")
        link = folder / f"{16 * 'a'}-{64 * 'c'}.safetensors"
        link.symlink_to(target)
        store = self.make_store(mmca, folder, 2 * file_bytes + 2000)
        store.get(pictures(5))
        assert {path.name for path in folder.iterdir()} > {*others, link.name}
        assert len(list(folder.iterdir())) == len(others) + 1 + 2 and target.exists()

    def test_only_what_a_dead_process_has_begun_is_deleted(self, mmca, tmp_path):
        self.make_store(mmca, tmp_path, 2**30).get(pictures(1))
        (path,) = tmp_path.iterdir()
        begun, dead = (tmp_path / f"{path.name}.{name}.part" for name in ("0a1b-2c", "123-456"))
        for one in (begun, dead):
            one.write_bytes(b"begun")
        two_hours_ago = time.time() - 7200
        os.utime(dead, (two_hours_ago, two_hours_ago))
        self.make_store(mmca, tmp_path, 2**30).get(pictures(1, seed=1))
        assert begun.exists() and not dead.exists()

    def test_the_folder_is_read_seldom(self, mmca, tmp_path, file_bytes, monkeypatch):
        scans, scan = [], ImageMemoryFolder._scan
        monkeypatch.setattr(ImageMemoryFolder, "_scan", lambda self: (scans.append(1), scan(self)))
        monkeypatch.setattr(image_memory_folder_visualchat, "SCAN_SECONDS", 3600.0)
        store = self.make_store(mmca, tmp_path, 4 * file_bytes)
        for seed in range(20):
            store.get(pictures(2, seed=seed))
        assert len(scans) == 1
        assert self.nbytes(tmp_path) <= 4 * file_bytes

    def test_a_file_that_another_process_has_used_or_deleted(self, mmca, tmp_path, file_bytes, known):
        album, limit = pictures(5), 3 * file_bytes + 2000
        store = self.make_store(mmca, tmp_path, limit)
        store.get(album[:1])
        (first,) = tmp_path.iterdir()
        store.get(album[1:2])
        (second,) = set(tmp_path.iterdir()) - {first}
        store.get(album[2:3])
        os.utime(first, (time.time() + 5,) * 2)
        second.unlink()
        store.get(album[3:4])  # the second has gone: there is room
        assert known() == [True, False, True, True, False]
        store.get(album[4:])
        assert known() == [True, False, False, True, True]

    def test_several_stores_share_a_folder(self, tmp_path, file_bytes, monkeypatch):
        """As several processes do, each with a list of its own."""
        monkeypatch.setattr(image_memory_folder_visualchat, "SCAN_SECONDS", 0.0)
        limit, errors = 4 * file_bytes, []
        models = [make_model(image_number_keys=True) for _ in range(3)]
        expected = models[0].encode_images(pictures(6))

        def ask(model, first):
            try:
                store = self.make_store(model, tmp_path, limit)
                for k in range(first, first + 24):
                    (memory,) = store.get(pictures(6)[[k % 6]])
                    torch.testing.assert_close(memory.keys, expected.keys[:, [k % 6]], atol=1e-5, rtol=1e-5)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(model, 2 * k)) for k, model in enumerate(models)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        self.make_store(models[0], tmp_path, limit).get(pictures(1, seed=9))
        assert 0 < self.nbytes(tmp_path) <= limit
        assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir() if path.is_file())
