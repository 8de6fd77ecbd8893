"""Which videos train: eligibility, held-out share, lists that never train, and statistics."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from tests.vlm_dist.data.corpus import Corpus, random_corpus
from vlm_dist.data.config import SplitConfig
from vlm_dist.data.splits import read_id_list, split_videos
from vlm_dist.data.stats import corpus_stats
from vlm_dist.errors import ConfigError, TaskDataError


def first(corpus: Corpus, videos: int) -> Corpus:
    """The store as it was with fewer videos."""
    return dataclasses.replace(
        corpus, n_rows=corpus.n_rows[:videos], clip_ptr=corpus.clip_ptr[: videos + 1], ids=corpus.ids[:videos]
    )


def test_videos_without_features_or_captions_take_no_part():
    corpus = random_corpus(60)
    corpus.n_rows[[3, 5]] = 0
    moved = corpus.clip_ptr.copy()
    moved[8] = moved[7]  # video 7 loses its captions to video 8
    corpus.clip_ptr = moved
    split = split_videos(corpus, SplitConfig(validation_share=0.2), {})
    assert (split.without_features, split.without_captions) == (2, 1)
    both = np.concatenate([split.train, split.validation])
    assert sorted(both.tolist()) == [i for i in range(60) if i not in (3, 5, 7)]
    assert split.train.dtype == split.validation.dtype == np.int64


def test_known_ids_never_train_and_are_counted():
    corpus = random_corpus(60)
    known = {"coin": {"video3", "video4", "absent"}, "msrvtt": {"video4", "video9"}, "none": set()}
    split = split_videos(corpus, SplitConfig(), known)
    assert split.excluded == {"coin": 2, "msrvtt": 2, "none": 0}
    assert not np.isin([3, 4, 9], np.concatenate([split.train, split.validation])).any()


def test_held_out_videos_are_a_share_and_do_not_move_when_videos_are_added():
    corpus = random_corpus(2000, most_captions=3)
    cfg = SplitConfig(validation_share=0.1)
    whole = split_videos(corpus, cfg, {})
    assert 150 <= len(whole.validation) <= 250
    part = split_videos(first(corpus, 1200), cfg, {})
    assert part.validation.tolist() == [row for row in whole.validation if row < 1200]


def test_held_out_videos_are_limited_and_what_trained_stays_in_training():
    corpus = random_corpus(2000, most_captions=3)
    cfg = SplitConfig(validation_share=0.1, validation_videos=60)
    whole, part = split_videos(corpus, cfg, {}), split_videos(first(corpus, 1000), cfg, {})
    assert 40 <= len(whole.validation) <= 85
    assert set(part.train) <= set(whole.train)


def test_small_and_empty_corpora():
    corpus = random_corpus(4)
    assert len(split_videos(corpus, SplitConfig(), {}).validation) == 1
    assert len(split_videos(corpus, SplitConfig(validation_videos=0), {}).validation) == 0
    assert len(split_videos(first(corpus, 1), SplitConfig(), {}).train) in (0, 1)
    everything = {"all of it": set(corpus.ids)}
    with pytest.raises(ConfigError, match=r"of 4 in the store, 0 have no features.*4 on the list all of it"):
        split_videos(corpus, SplitConfig(), everything)
    corpus.n_rows[:] = 0
    with pytest.raises(ConfigError, match="4 have no features"):
        split_videos(corpus, SplitConfig(), {})


def test_id_lists_of_every_form(tmp_path):
    def written(name: str, text: str):
        (tmp_path / name).write_text(text)
        return read_id_list(tmp_path / name)

    assert written("a.lst", "x1\n\n x2 \n") == {"x1", "x2"}
    assert written("a.txt", "x1") == {"x1"}
    assert written("a.csv", "key,video_id\nk,x1\nk2,x2\n") == {"x1", "x2"}
    assert written("b.csv", "video_id;split\nx1;train\nx2;test\n") == {"x2"}
    rows = [{"video_id": "x1", "split": "train"}, {"video_id": "x2", "split": "val"}, {"video_id": "x3"}]
    assert written("a.jsonl", "\n".join(map(json.dumps, rows))) == {"x2", "x3"}
    coin = {"database": {"x1": {"subset": "training"}, "x2": {"subset": "testing"}}}
    assert written("COIN.json", json.dumps(coin)) == {"x2"}
    (tmp_path / "COIN.json.gz").write_bytes(gzip.compress(json.dumps(coin).encode()))
    assert read_id_list(tmp_path / "COIN.json.gz") == {"x2"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"name\nx\n", "video_id"),
        ("a.jsonl", b"{not json", "line 1: not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1: not a JSON object"),
        ("a.json", b"[]", "no videos under the key"),
        ("a.lst", b"\n\n", "no video id"),
        ("a.lst", b"\xff\xfe\x00", "no UTF-8 text"),
        ("a.json.gz", b"no gzip", "not readable as JSON"),
        ("a.pkl", b"x", "the ending '.pkl' is not known"),
    ],
)
def test_bad_id_lists_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskDataError, match=message) as refused:
        read_id_list(tmp_path / name)
    assert name in str(refused.value)


def test_absent_list_is_refused(tmp_path):
    with pytest.raises(TaskDataError, match="is not there"):
        read_id_list(tmp_path / "none.lst")


def test_real_lists(shared):
    coin = read_id_list(shared / "data" / "coin" / "COIN.json.gz")
    with gzip.open(shared / "data" / "coin" / "COIN.json.gz") as file:
        videos = json.load(file)["database"]
    assert len(coin) > 2000
    assert {videos[name]["subset"] for name in coin} == {"testing"}
    assert {video["subset"] for name, video in videos.items() if name not in coin} == {"training"}
    assert len(read_id_list(shared / "data" / "msrvtt" / "MSRVTT_JSFUSION_test.csv")) == 1000


def test_statistics_by_hand():
    corpus = Corpus(
        n_rows=np.array([10, 100, 30], np.uint32),
        clip_ptr=np.array([0, 2, 3, 5], np.uint64),
        clip_ntok=np.array([4, 5, 41, 2, 8], np.uint16),
        clip_start_ms=np.zeros(5),
        clip_end_ms=np.zeros(5),
        tokens=np.zeros(60),
    )
    stats = corpus_stats(corpus, np.array([0, 2]))
    assert (stats["videos"], stats["clips"], stats["tokens"]) == (2, 4, 19)
    assert stats["seconds_per_video"] == 20
    assert stats["clips_per_video"] == 2
    assert stats["tokens_per_video"] == 9.5
    assert stats["tokens_per_second"] == pytest.approx(19 / 40)
    assert stats["hours"] == pytest.approx(40 / 3600)
    assert (stats["seconds_per_video_paper"], stats["clips_per_video_paper"]) == (390, 110)
    with pytest.raises(ConfigError, match="at least one video"):
        corpus_stats(corpus, np.empty(0, np.int64))
