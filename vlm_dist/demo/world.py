"""A small world of narrated cooking videos for the demo: real H.264 files with time lines, speech, steps and clips.

Each video is a recipe at one place: steps of a few seconds (a verb with its tool, done to a vegetable) with stretches
in between in which nothing of note happens. The speaker is late or early, hums and haws, and rolls captions over, as
speech recognition writes them down. Some files are broken on purpose. Everything follows from the seed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_dist.demo.render import FPS, write_audio, write_video
from vlm_dist.demo.scene import OBJECTS, PLACES, TOOLS, Scene, Shot

TEST_SHARE = 0.3
LABELLED_EVERY = 6  # narration is everywhere, but only some training videos have step annotations, as in life
STEPS = 5
_STEP_S = (2.6, 3.6)
_INTRO_S = (1.5, 2.5)
_GAP_S = (0.8, 2.0)
_OFFSET_S = 0.7  # how late or early the speaker is, at most

_FILLER = (
    "so now", "okay and then you just", "what i like to do is", "alright next", "and you want to", "go ahead and",
    "um so here we", "and as you can see we", "the next thing is to", "and now",
)  # fmt: skip
_PHRASES = (
    "{verb} the {object} with the {tool} on the {place}",
    "{verb} the {object} with the {tool} here on the {place}",
    "take the {tool} and {verb} the {object} on the {place}",
    "{verb} this {object} with the {tool}",
)
_CHAT = (
    "hey guys welcome back to my channel", "thanks for watching and please subscribe", "let me know in the comments",
    "this one is my favorite recipe", "it only takes a little bit of time", "you can find the link below",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A step of a recipe, in seconds from the video's start."""

    start: float
    end: float
    verb: str
    object: str
    place: str

    @property
    def label(self) -> str:
        """The step's class in the segmentation task."""
        return f"{self.verb} with the {TOOLS[self.verb]}"

    @property
    def caption(self) -> str:
        """What is seen."""
        return f"{self.verb} the {self.object} with the {TOOLS[self.verb]} on the {self.place}"


@dataclass(frozen=True)
class Recipe:
    """One video's time line."""

    video_id: str
    subset: str
    place: str
    duration: float
    steps: tuple[Step, ...]
    seed: tuple[int, int]


@dataclass(frozen=True)
class World:
    """Where the rendered corpus lies, and what a report needs to know about it."""

    videos: Path
    """Folder of the video files, broken ones included."""
    captions: Path
    """Narration in HowTo100M's raw_caption form: {id: {"start", "end", "text"}}."""
    annotations: Path
    """Steps in COIN's form: {"database": {id: {"subset", "duration", "annotation"}}}."""
    clips: Path
    """Retrieval clips, JSONL: {"video_id", "start", "end", "text", "split"}."""
    train: tuple[str, ...]
    test: tuple[str, ...]
    broken: dict[str, str]
    """Id of each file that is broken on purpose → the reason that extraction must record."""
    seconds: float
    """Length of all whole videos together."""


def render_world(out: Path, *, videos: int, seed: int) -> World:
    """Render a corpus of whole videos and five broken ones.

    Args:
        out: Folder to write to; made where it is missing.
        videos: Whole videos; 30 % of them are the test split. A sixth of the others has annotations and clips.
        seed: Decides recipes, looks and speech.
    """
    recipes = plan_recipes(videos, seed)
    folder = out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    captions: dict[str, dict[str, list[Any]]] = {}
    for recipe in recipes:
        rng = np.random.default_rng((*recipe.seed, 1))
        write_video(folder / f"{recipe.video_id}.mp4", Scene(_shots(recipe), recipe.place, recipe.duration, rng))
        captions[recipe.video_id] = narrate(recipe, np.random.default_rng((*recipe.seed, 2)))
    broken = _break_some(folder, recipes[0].video_id)
    _write_json(out / "raw_caption.json", captions)
    train = [recipe for recipe in recipes if recipe.subset == "train"]
    test = [recipe for recipe in recipes if recipe.subset == "test"]
    labelled = [*train[::LABELLED_EVERY], *test]
    _write_json(out / "COIN.json", {"database": {recipe.video_id: _annotation(recipe) for recipe in labelled}})
    with (out / "clips.jsonl").open("w") as file:
        for recipe in labelled:
            for step in recipe.steps:
                clip = {"video_id": recipe.video_id, "start": step.start, "end": step.end, "text": step.caption}
                file.write(json.dumps({**clip, "split": recipe.subset}) + "\n")
    return World(
        videos=folder,
        captions=out / "raw_caption.json",
        annotations=out / "COIN.json",
        clips=out / "clips.jsonl",
        train=tuple(recipe.video_id for recipe in train),
        test=tuple(recipe.video_id for recipe in test),
        broken=broken,
        seconds=sum(recipe.duration for recipe in recipes),
    )


def plan_recipes(videos: int, seed: int) -> list[Recipe]:
    """Time lines of all videos. Within a split, no step is repeated at a place until all others were used there."""
    num_test = round(videos * TEST_SHARE)
    decks: dict[tuple[str, str], list[tuple[str, str]]] = {}
    recipes: list[Recipe] = []
    for number in range(videos):
        rng = np.random.default_rng((seed, number))
        subset = "test" if number >= videos - num_test else "train"
        place = list(PLACES)[number % len(PLACES)]
        deck = decks.setdefault((subset, place), [])
        if len(deck) < STEPS:
            pairs = [(verb, thing) for verb in TOOLS for thing in OBJECTS]
            deck[:0] = [pairs[k] for k in rng.permutation(len(pairs))]
        at, steps = rng.uniform(*_INTRO_S), []
        for _ in range(STEPS):
            verb, thing = deck.pop()
            end = at + rng.uniform(*_STEP_S)
            steps.append(Step(round(at, 2), round(end, 2), verb, thing, place))
            at = end + rng.uniform(*_GAP_S)
        duration = round(at * FPS) / FPS
        recipes.append(Recipe(f"cooking_{number:04d}", subset, place, duration, tuple(steps), (seed, number)))
    return recipes


def narrate(recipe: Recipe, rng: np.random.Generator) -> dict[str, list[Any]]:
    """What is said: about every step, up to 0.7 s early or late, between chat; a quarter of the captions roll over."""
    said: list[tuple[float, float, str]] = [(0.1, max(0.6, recipe.steps[0].start - 0.2), _pick(rng, _CHAT))]
    for step in recipe.steps:
        phrase = _pick(rng, _PHRASES).format(
            verb=step.verb, object=step.object, tool=TOOLS[step.verb], place=step.place
        )
        start = max(0.0, step.start + rng.uniform(-_OFFSET_S, _OFFSET_S))
        end = min(recipe.duration, start + (step.end - step.start) * rng.uniform(0.8, 1.0))
        said.append((start, end, f"{_pick(rng, _FILLER)} {phrase}"))
    if rng.random() < 0.5:
        said.append((recipe.duration - 1.0, recipe.duration, _pick(rng, _CHAT)))
    starts, ends, texts = [], [], []
    for start, end, text in said:
        if texts and rng.random() < 0.25:
            text = " ".join([*texts[-1].split()[-3:], text])
        starts.append(round(start, 2))
        ends.append(round(end, 2))
        texts.append(text)
    return {"start": starts, "end": ends, "text": texts}


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]


def _shots(recipe: Recipe) -> list[Shot]:
    return [Shot(step.start, step.end, step.verb, step.object) for step in recipe.steps]


def _annotation(recipe: Recipe) -> dict[str, object]:
    labels = {verb: number for number, verb in enumerate(TOOLS, start=1)}
    steps = [
        {"id": str(labels[step.verb]), "label": step.label, "segment": [step.start, step.end]} for step in recipe.steps
    ]
    subset = {"train": "training", "test": "testing"}[recipe.subset]
    return {"subset": subset, "duration": recipe.duration, "annotation": steps}


def _break_some(folder: Path, whole: str) -> dict[str, str]:
    """Files as one meets them in any download: cut off, empty, not a video, without a picture, twice there."""
    data = (folder / f"{whole}.mp4").read_bytes()
    (folder / "download_broke_off.mp4").write_bytes(data[: len(data) // 2])
    (folder / "disk_was_full.mp4").touch()
    (folder / "error_page.mp4").write_text("<html><body>404: this video is not available any more</body></html>\n")
    write_audio(folder / "only_sound.mp4", seconds=4)
    (folder / "again").mkdir(exist_ok=True)
    (folder / "again" / f"{whole}.mp4").write_bytes(data)
    return {
        "download_broke_off": "truncated",
        "disk_was_full": "empty_file",
        "error_page": "not_a_video",
        "only_sound": "no_video_stream",
        whole: "duplicate",
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1))
