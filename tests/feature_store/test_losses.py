"""feature_store.losses: which deaths end the work, which make it careful, which are a video's."""

import pytest

from feature_store.losses import DEATHS, Losses
from feature_store.plan import PlannedVideo, ShardTask
from vlm_dist.errors import ExtractionError

TASK = ShardTask(7, tuple(PlannedVideo(name, f"{name}.mp4") for name in "abcde"))


@pytest.fixture
def careful() -> Losses:
    """Two workers have died at the shard."""
    losses = Losses()
    assert [losses.count(TASK, 0, "", "gone") for _ in range(2)] == [1, 2]
    assert losses.careful(7)
    return losses


def test_who_came_further_died_of_nothing() -> None:
    losses = Losses()
    assert [losses.count(TASK, tried, "", "gone") for tried in (1, 1, 2, 2, 3)] == [0, 1, 0, 1, 0]
    assert not losses.careful(7)


def test_the_third_that_came_no_further_ends_the_work(careful: Losses) -> None:
    with pytest.raises(ExtractionError, match=f"shard 7: its worker died {DEATHS} times without .* further: gone"):
        careful.count(TASK, 0, "", "gone")


def test_a_video_at_which_two_died_is_given_up(careful: Losses) -> None:
    assert careful.count(TASK, 1, "b", "gone") == 1
    assert careful.count(TASK, 3, "d", "gone") == 1, "another, by chance"
    assert not careful.given_up(7)
    assert careful.count(TASK, 1, "b", "out of memory\nand much more") == 0
    assert careful.given_up(7) == {"b": "b.mp4: 2 workers died that had no other video in work: out of memory"}
    assert not careful.careful(7), "its other videos may be in work together again"
    assert not careful.given_up(8)


def test_three_videos_in_a_row_are_not_to_blame(careful: Losses) -> None:
    for name in "acde":
        careful.count(TASK, 0, name, "gone")
    for name in "acd":
        careful.count(TASK, 0, name, "gone")
    assert set(careful.given_up(7)) == set("acd"), "b is between them"
    with pytest.raises(ExtractionError, match="each of 3 videos in a row, so it is not the videos: gone"):
        careful.count(TASK, 0, "e", "gone")
