"""vlm_dist.demo.world: real files with the time lines they claim, the same for the same seed, broken where they say."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from feature_store.config import DecodeConfig
from feature_store.decode import DecodeError, SecondsReader
from vlm_dist.demo.scene import OBJECTS, PLACES, TOOLS, Scene, Shot
from vlm_dist.demo.world import LABELLED_EVERY, STEPS, World, narrate, plan_recipes, render_world

SMALL = DecodeConfig(fps=16, size=64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return render_world(tmp_path_factory.mktemp("world"), videos=10, seed=3)


def read_clips(world: World) -> list[dict[str, object]]:
    return [json.loads(line) for line in world.clips.read_text().splitlines()]


def test_every_whole_video_has_the_length_of_its_time_line(world: World) -> None:
    recipes = {recipe.video_id: recipe for recipe in plan_recipes(10, 3)}
    assert sorted(recipes) == sorted([*world.train, *world.test])
    for video_id, recipe in recipes.items():
        with av.open(str(world.videos / f"{video_id}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 64, 64)
            assert stream.average_rate == 16
            assert stream.frames == round(recipe.duration * 16)
        assert 18 <= recipe.duration <= 30
    assert world.seconds == pytest.approx(sum(recipe.duration for recipe in recipes.values()))


def test_broken_files_are_broken_as_they_say(world: World) -> None:
    reasons = dict(world.broken)
    twice = [video_id for video_id, reason in reasons.items() if reason == "duplicate"]
    for video_id in twice:
        assert len(list(world.videos.rglob(f"{video_id}.mp4"))) == 2
        del reasons[video_id]
    for video_id, reason in reasons.items():
        with pytest.raises(DecodeError) as caught:
            list(SecondsReader(world.videos / f"{video_id}.mp4", SMALL))
        assert caught.value.reason == reason
    assert {"truncated", "empty_file", "not_a_video", "no_video_stream"} == set(reasons.values())


def test_captions_and_annotations(world: World) -> None:
    captions = json.loads(world.captions.read_text())
    database = json.loads(world.annotations.read_text())["database"]
    assert sorted(captions) == sorted([*world.train, *world.test])
    for video_id, said in captions.items():
        assert len(said["start"]) == len(said["end"]) == len(said["text"]) >= STEPS
        assert all(start < end for start, end in zip(said["start"], said["end"], strict=True)), video_id
        assert said["start"] == sorted(said["start"])
    labelled = world.train[::LABELLED_EVERY]
    assert sorted(database) == sorted([*labelled, *world.test])
    for video_id, video in database.items():
        assert video["subset"] == ("testing" if video_id in world.test else "training")
        assert len(video["annotation"]) == STEPS
        for step in video["annotation"]:
            assert 0 < step["segment"][0] < step["segment"][1] < video["duration"]
            assert list(TOOLS)[int(step["id"]) - 1] == step["label"].split()[0]


def test_clips_say_what_the_steps_are(world: World) -> None:
    clips = read_clips(world)
    database = json.loads(world.annotations.read_text())["database"]
    assert len(clips) == STEPS * len(database)
    for clip in clips:
        assert clip["split"] == ("test" if clip["video_id"] in world.test else "train")
        steps = {tuple(step["segment"]): step["label"] for step in database[clip["video_id"]]["annotation"]}
        verb, tool = steps[clip["start"], clip["end"]].split(" with the ")
        assert str(clip["text"]).startswith(f"{verb} the ")
        assert f" with the {tool} on the " in str(clip["text"])


@pytest.mark.parametrize("seed", range(3))
def test_enough_distinct_held_out_captions(seed: int) -> None:
    recipes = plan_recipes(92, seed)
    test = [step.caption for recipe in recipes for step in recipe.steps if recipe.subset == "test"]
    train = {step.caption for recipe in recipes for step in recipe.steps if recipe.subset == "train"}
    assert len(set(test)) == len(test) == 140
    assert len(train) > 140
    assert {step.verb for recipe in recipes for step in recipe.steps} == set(TOOLS)


def test_the_speaker_is_late_or_early_but_near() -> None:
    offsets = []
    for recipe in plan_recipes(40, 0):
        said = narrate(recipe, np.random.default_rng(recipe.seed))
        for step in recipe.steps:
            nearest = min((abs(start - step.start), start - step.start) for start in said["start"])
            offsets.append(nearest[1])
            assert any(step.verb in str(text) and step.object in str(text) for text in said["text"])
    assert max(map(abs, offsets)) <= 0.71
    assert min(offsets) < -0.3
    assert max(offsets) > 0.3


def test_the_same_seed_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    again = render_world(tmp_path, videos=10, seed=3)
    for path in sorted(world.videos.parent.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(world.videos.parent)).read_bytes(), path.name
    assert (again.train, again.test, again.broken) == (world.train, world.test, world.broken)
    other = plan_recipes(10, 4)
    assert [recipe.steps for recipe in other] != [recipe.steps for recipe in plan_recipes(10, 3)]


@pytest.mark.parametrize("verb", list(TOOLS))
def test_pictures_show_place_object_and_moving_tool(verb: str) -> None:
    rng = np.random.default_rng(0)
    scene = Scene([Shot(1.0, 3.0, verb, "tomato")], "blue cloth", 4.0, rng)
    idle, act, later = (scene.picture(t).astype(int) for t in (0.5, 1.5, 1.8))
    assert np.abs(idle.mean(axis=(0, 1)) - PLACES["blue cloth"]).max() < 40
    red = np.abs(act - OBJECTS["tomato"][0]).max(axis=-1) < 45
    assert red.sum() > 25
    assert (np.abs(act - idle).max(axis=-1) > 60).sum() > red.sum()  # the vegetable and a tool
    assert (np.abs(act - later).max(axis=-1) > 60).sum() > 20  # it moves
