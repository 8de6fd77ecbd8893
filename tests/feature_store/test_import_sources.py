"""Every form that features may come in: .npy folders, .npz, pickles, shards of the reference."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from feature_store.import_arrays import import_arrays
from feature_store.import_sources import ArraySources
from feature_store.info import failures
from feature_store.layout import open_store
from tests.feature_store.import_tools import ARRAYS, CFG, F, assert_holds, npy_folder
from vlm_dist.errors import ConfigError, StoreError


def shard_folder(folder: Path, meta: bool = True) -> Path:
    """ARRAYS as two shards of the reference, with the text files that stand beside them."""
    folder.mkdir()
    ids = list(ARRAYS)
    for number, part in enumerate((ids[:4], ids[4:])):
        lengths = [len(ARRAYS[video_id]) for video_id in part]
        np.save(folder / f"train_{number}_data.npy", np.concatenate([ARRAYS[i] for i in part]).astype(np.float16))
        np.save(folder / f"train_{number}_starts.npy", np.cumsum([0, *lengths]))
        np.save(folder / f"raw_caption_dedup.bert-base-uncased.train_{number}.startends_data.npy", np.zeros((4, 2)))
        np.save(folder / f"raw_caption_dedup.bert-base-uncased.train_{number}.startends_starts.npy", np.arange(5))
    if meta:
        (folder / "train_meta.pkl").write_bytes(pickle.dumps({0: ids[:4], 1: ids[4:]}))
    return folder


def test_a_folder_of_npy(tmp_path: Path) -> None:
    sources = ArraySources([npy_folder(tmp_path / "in")])
    seen: list[int] = []
    state = import_arrays(tmp_path / "store", sources, CFG, on_progress=lambda state: seen.append(state.ok))
    assert (state.videos, state.ok, state.failed, state.rows) == (6, 6, 0, sum(map(len, ARRAYS.values())))
    assert state.bytes_read == sum(rows.nbytes for rows in ARRAYS.values())
    assert seen == [1, 2, 3, 4, 5, 6]
    assert_holds(tmp_path / "store", ARRAYS)
    provenance = open_store(tmp_path / "store").provenance
    assert (provenance.extractor, provenance.weights, provenance.weights_sha256) == ("imported", "unknown", "")
    assert (provenance.normalised, provenance.feature_dim, provenance.layer) == (True, F, "unknown")
    assert provenance.window / provenance.fps == 1


def test_npz_by_id_and_one_for_each_video(tmp_path: Path) -> None:
    several = {i: ARRAYS[i] for i in ("v0", "v1", "v2", "v3")}
    np.savez(tmp_path / "several.npz", **several)  # type: ignore[arg-type]
    (tmp_path / "single").mkdir()
    np.savez_compressed(tmp_path / "single" / "v4.npz", features=ARRAYS["v4"])
    np.savez(tmp_path / "single" / "v5.npz", ARRAYS["v5"])
    (tmp_path / "single" / "broken.npz").write_bytes((tmp_path / "several.npz").read_bytes()[:200])
    sources = ArraySources([tmp_path / "several.npz", tmp_path / "single"])
    assert import_arrays(tmp_path / "store", sources, CFG).reasons == {"corrupt": 1}
    assert_holds(tmp_path / "store", ARRAYS)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_of_arrays(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "features.pickle"
    odd = {"listed": [[1.0] * F], "objects": np.array([{}], object), "nan": np.full((2, F), np.nan)}
    file.write_bytes(pickle.dumps({**ARRAYS, **odd}, protocol))
    with pytest.raises(ConfigError, match="--allow-pickle"):
        ArraySources([file])
    state = import_arrays(tmp_path / "store", ArraySources([file], allow_pickle=True), CFG)
    assert state.reasons == {"bad_dtype": 2, "not_finite": 1}
    assert_holds(tmp_path / "store", ARRAYS)
    assert str(file) in failures(tmp_path / "store")[0].message


def test_a_pickle_that_is_no_dict_of_ids(tmp_path: Path) -> None:
    file = tmp_path / "features.pickle"
    for content, words in (
        ([1], "holds a list"),
        ({1.5: 2}, "the keys must be video ids"),
        ({"1": 2, 1: 2}, "several keys that are the video id '1'"),
    ):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(StoreError, match=words):
            ArraySources([file], allow_pickle=True)


def test_shards_of_the_reference_with_their_meta_file(tmp_path: Path) -> None:
    folder = shard_folder(tmp_path / "shards")
    with pytest.raises(ConfigError, match=r"train_meta.pkl is a pickle"):
        ArraySources([folder])
    sources = ArraySources([folder], allow_pickle=True)
    assert [video.video_id for video in sources.videos] == list(ARRAYS)
    import_arrays(tmp_path / "store", sources, CFG)
    assert_holds(tmp_path / "store", ARRAYS)
    one = ArraySources([folder / "train_1_data.npy"], allow_pickle=True)
    assert [video.video_id for video in one.videos] == list(ARRAYS)[4:]


def test_shards_with_a_list_of_ids(tmp_path: Path) -> None:
    folder, ids = shard_folder(tmp_path / "shards", meta=False), tmp_path / "train.lst"
    with pytest.raises(ConfigError, match=r"nothing says which videos it holds.*--ids"):
        ArraySources([folder])
    ids.write_text("\n".join(ARRAYS) + "\n")
    import_arrays(tmp_path / "store", ArraySources([folder], ids_file=ids), CFG)
    assert_holds(tmp_path / "store", ARRAYS)
    ids.write_text("\n".join(list(ARRAYS)[1:]))  # every video would get the features of its neighbour
    with pytest.raises(StoreError, match=r"5 ids.*hold 6 videos.*do not belong together"):
        ArraySources([folder], ids_file=ids)


def test_a_shard_that_is_cut_short_loses_only_what_is_gone(tmp_path: Path) -> None:
    folder = shard_folder(tmp_path / "shards")
    data = folder / "train_1_data.npy"
    data.write_bytes(data.read_bytes()[:-2])
    state = import_arrays(tmp_path / "store", ArraySources([folder], allow_pickle=True), CFG)
    assert state.reasons == {"truncated": 1}
    assert_holds(tmp_path / "store", {i: rows for i, rows in ARRAYS.items() if i != "v5"})
    np.save(folder / "train_0_starts.npy", np.array([0, 5, 3]))
    with pytest.raises(StoreError, match="ascending"):
        ArraySources([folder], allow_pickle=True)
    np.save(folder / "train_0_starts.npy", np.array([0, 5]))
    with pytest.raises(StoreError, match=r"holds 1 videos and .*train_meta.pkl names 4"):
        ArraySources([folder], allow_pickle=True)


def test_the_recorded_shards_of_the_reference(shared: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.lst"
    ids.write_text("a\nb\nc\n")
    import_arrays(tmp_path / "store", ArraySources([shared / "golden" / "shards"], ids_file=ids), CFG)
    data = np.load(shared / "golden" / "shards" / "train_0_data.npy")
    starts = np.load(shared / "golden" / "shards" / "train_0_starts.npy")
    assert_holds(tmp_path / "store", {i: data[starts[k] : starts[k + 1]] for k, i in enumerate("abc")})
    assert open_store(tmp_path / "store").provenance.layer == "video_embedding"


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    for path, words in (("absent", "no such file"), ("empty", "holds no features"), ("a.txt", "'.txt' is not known")):
        with pytest.raises(ConfigError, match=words):
            ArraySources([tmp_path / path])


def test_ids_that_no_store_can_take_are_listed(tmp_path: Path) -> None:
    good, long = np.eye(3, 8, dtype=np.float32), "x" * 1001
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"a": good, long: good, "odd\udcff": good}))
    sources = ArraySources([tmp_path / "a.pickle"], allow_pickle=True)
    assert [video.video_id for video in sources.videos] == ["a"]
    told = "\n".join(sources.refused)
    for wrong in ("has 1,001 bytes", "is not UTF-8"):
        assert wrong in told
    assert r"odd\udcff" in told
    (tmp_path / "b.pickle").write_bytes(pickle.dumps({long: good}))
    with pytest.raises(StoreError, match="no array has an id that a store can take"):
        ArraySources([tmp_path / "b.pickle"], allow_pickle=True)


def test_addresses_are_no_folders() -> None:
    with pytest.raises(ConfigError, match="copy the bucket's here first"):
        ArraySources([Path("s3://bucket/features")])
