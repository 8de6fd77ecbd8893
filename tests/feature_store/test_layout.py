"""feature_store.layout: creating, opening and refusing; the metadata as other Zarr readers see it."""

import json
from pathlib import Path

import pytest
import zarr

from feature_store.layout import create_store, default_rows_per_shard, group_json, open_store
from feature_store.migrate import migrate_store
from feature_store.verify import verify_store
from tests.feature_store.store_tools import F, flip_bit, provenance
from vlm_dist.errors import StoreError


def test_create_open_and_create_again(tmp_path: Path) -> None:
    made = create_store(tmp_path / "a" / "store", provenance(), 512)
    assert create_store(tmp_path / "a" / "store", provenance()) == made == open_store(tmp_path / "a" / "store")
    assert (made.feature_dim, made.rows_per_shard, made.chunks_per_shard) == (F, 512, 2)
    array = zarr.open_group(made.root, mode="r")["features"]
    assert (array.shape, array.chunks, array.shards) == ((0, F), (256, F), (512, F))


@pytest.mark.parametrize(("width", "rows"), [(512, 65536), (1024, 32768), (32, 1048576), (300, 111616)])
def test_default_shard_is_at_most_64_mib_in_whole_chunks(width: int, rows: int) -> None:
    assert default_rows_per_shard(width) == rows
    assert rows % 256 == 0
    assert rows * width * 2 <= 64 << 20 < (rows + 256) * width * 2


def test_another_provenance_is_refused_by_field(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    with pytest.raises(StoreError, match=r"fps is 30\.0, not 16\.0; normalised is True, not False"):
        create_store(tmp_path, provenance(fps=16, normalised=False))
    with pytest.raises(StoreError, match="rows_per_shard is 512, not 1024"):
        create_store(tmp_path, provenance(), 1024)
    with pytest.raises(StoreError, match="multiple of 256"):
        create_store(tmp_path / "x", provenance(), 1000)


def test_folders_that_are_no_stores(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is nothing"):
        open_store(tmp_path / "gone")
    with pytest.raises(StoreError, match="not a feature store"):
        open_store(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"not empty \(thesis\.tex"):
        create_store(tmp_path, provenance())
    with pytest.raises(StoreError, match="is a file"):
        create_store(tmp_path / "thesis.tex", provenance())
    zarr.create_group(tmp_path / "other", attributes={"mine": 1})
    with pytest.raises(StoreError, match="not one that vlm-dist wrote"):
        open_store(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "thesis.tex"]


@pytest.mark.parametrize(("version", "advice"), [(99, "that made it"), (0, "that made it"), (1, "store migrate")])
def test_another_schema_version_says_what_to_do(tmp_path: Path, version: int, advice: str) -> None:
    create_store(tmp_path, provenance())
    path = tmp_path / "zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["vlm_dist"] = {"schema_version": version, "unheard": "of"}
    if version == 1:  # of which this vlm-dist knows how it is checked
        path.write_bytes(group_json(group["attributes"]["vlm_dist"]))
    else:
        path.write_text(json.dumps(group))
    with pytest.raises(StoreError, match=f"schema version {version}, and this vlm-dist reads version 2: .*{advice}"):
        open_store(tmp_path)


@pytest.mark.parametrize("version", [1, 3, 99])
def test_a_schema_version_that_was_edited_is_mended_as_is_said(tmp_path: Path, version: int) -> None:
    create_store(tmp_path, provenance())
    path = tmp_path / "zarr.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"schema_version": 2', b'"schema_version": %d' % version))
    for look in (open_store, migrate_store, lambda root: verify_store(root, deep=True)):
        with pytest.raises(StoreError, match="verify --repair` makes it anew") as told:
            look(tmp_path)
        assert "store migrate" not in str(told.value), "which could not do it"
        assert ("a newer version made it; open it with the vlm-dist" in str(told.value)) == (version > 2)
    verify_store(tmp_path, repair=True)
    assert path.read_bytes() == whole


def test_a_newer_store_is_left_to_its_version(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_bytes(group_json({"schema_version": 99}))
    for look in (open_store, migrate_store, lambda root: verify_store(root, repair=True)):
        with pytest.raises(StoreError, match=r"a newer version made it; open it with the vlm-dist that made it$"):
            look(tmp_path)


def test_damaged_attributes_are_noticed(tmp_path: Path) -> None:
    create_store(tmp_path, provenance())
    flip_bit(tmp_path / "zarr.json", (tmp_path / "zarr.json").read_bytes().index(b'"window": 30') + 10)
    with pytest.raises(StoreError, match="damaged"):
        open_store(tmp_path)


def test_a_creation_that_was_killed_is_finished(tmp_path: Path) -> None:
    create_store(tmp_path, provenance(), 512)
    (tmp_path / "features" / "zarr.json").unlink()
    (tmp_path / "index" / "zarr.json").unlink()
    create_store(tmp_path, provenance(), 512)
    assert (tmp_path / "features" / "zarr.json").exists()
    (tmp_path / "zarr.json").unlink()
    assert create_store(tmp_path, provenance(), 512).rows_per_shard == 512
