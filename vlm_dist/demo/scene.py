"""What the demo's videos show: a place, a vegetable on it, and a tool that moves in its own way (before rendering)."""

from dataclasses import dataclass

import numpy as np

SIZE = 64
Colour = tuple[int, int, int]

PLACES: dict[str, Colour] = {
    "wooden board": (150, 105, 60),
    "steel counter": (150, 155, 165),
    "blue cloth": (50, 75, 165),
    "green mat": (60, 120, 75),
    "dark stove": (40, 40, 46),
}
# Colour and half width, half height of each vegetable.
OBJECTS: dict[str, tuple[Colour, int, int]] = {
    "tomato": ((215, 30, 25), 9, 9),
    "lemon": ((245, 225, 40), 8, 6),
    "carrot": ((250, 130, 15), 15, 4),
    "cucumber": ((30, 175, 50), 16, 5),
    "aubergine": ((95, 20, 120), 7, 13),
    "cabbage": ((160, 230, 110), 13, 12),
}
TOOLS: dict[str, str] = {
    "chop": "knife",
    "stir": "spoon",
    "salt": "shaker",
    "rinse": "jug",
    "flatten": "rolling pin",
    "heat": "burner",
}


@dataclass(frozen=True)
class Shot:
    """From `start` to `end` (seconds), `verb` is done to `object`."""

    start: float
    end: float
    verb: str
    object: str


class Scene:
    """A video as a function of time: `picture(t)` is uint8 (64, 64, 3)."""

    def __init__(self, shots: list[Shot], place: str, duration: float, rng: np.random.Generator) -> None:
        self.shots = shots
        self.duration = duration
        self._rng = rng
        tint = np.array(PLACES[place]) * rng.uniform(0.85, 1.15) + rng.normal(0, 6, 3)
        grain = rng.normal(0, 6, (SIZE // 4, SIZE // 4, 1)).repeat(4, 0).repeat(4, 1)
        self._ground = np.clip(tint + grain, 0, 255).astype(np.uint8)
        self._looks = [self._look(shot) for shot in shots]
        self._noise = rng.normal(0, 4, (7, SIZE, SIZE, 1)).astype(np.int16)

    def _look(self, shot: Shot) -> tuple[Colour, float, float, float, float, float]:
        """Colour, centre, half sizes and phase of a shot's vegetable, a little different every time."""
        colour, rx, ry = OBJECTS[shot.object]
        r, g, b = (int(np.clip(c + self._rng.normal(0, 8), 0, 255)) for c in colour)
        x, y = self._rng.uniform(26, 38), self._rng.uniform(34, 44)
        size = self._rng.uniform(0.9, 1.15)
        return (r, g, b), x, y, rx * size, ry * size, self._rng.uniform(0, 1)

    def picture(self, t: float) -> np.ndarray:
        """The frame at `t` seconds."""
        image = self._ground.copy()
        for shot, look in zip(self.shots, self._looks, strict=True):
            if shot.start <= t < shot.end:
                self._act(image, shot.verb, t - shot.start, look)
        noisy = image + self._noise[int(t * 97) % len(self._noise)]
        return np.clip(noisy, 0, 255).astype(np.uint8)

    def _act(
        self, image: np.ndarray, verb: str, t: float, look: tuple[Colour, float, float, float, float, float]
    ) -> None:
        colour, x, y, rx, ry, phase = look
        turn = 2 * np.pi * (t + phase)
        if verb == "push":
            x += 14 * np.cos(turn * 0.6)
        _ellipse(image, colour, x, y, rx, ry)
        if verb == "chop":
            top = y - 14 + 10 * abs(np.sin(turn * 1.2))
            _box(image, (225, 230, 235), x + 4 * np.sin(turn * 0.4), top, 3, 12)
            _box(image, (25, 20, 20), x + 4 * np.sin(turn * 0.4), top - 14, 3, 5)
        elif verb == "stir":
            sx, sy = x + 15 * np.cos(turn * 0.9), y + 11 * np.sin(turn * 0.9)
            _ellipse(image, (95, 55, 20), sx, sy, 5, 5)
            for k in range(1, 7):
                _box(image, (95, 55, 20), sx + 3 * k, sy - 5 * k, 2, 3)
        elif verb == "push":
            _ellipse(image, (235, 185, 150), x + rx + 6, y, 7, 7)
            _box(image, (235, 185, 150), x + rx + 20, y, 12, 4)
        elif verb == "salt":
            _box(image, (250, 250, 250), x, 8 + 3 * np.sin(turn * 2), 6, 7)
            for k in range(14):
                fall = (t * 1.3 + k * 0.37 + phase) % 1
                _box(image, (255, 255, 255), x - 12 + (k * 7) % 25, 16 + fall * (y - 12), 1, 1)
        elif verb == "rinse":
            _box(image, (20, 170, 200), x - 14, 9, 9, 8)
            _box(image, (110, 215, 245), x - 3 + 1.5 * np.sin(turn * 3), y / 2 + 6, 3.5, y / 2 - 4)
            _ellipse(image, (110, 215, 245), x, y + ry + 3, 12 + 4 * np.sin(turn * 1.5), 3)
        elif verb == "flatten":
            level = y + 13 * np.sin(turn * 0.7)
            _box(image, (230, 200, 150), x, level, 22, 4)
            _box(image, (130, 60, 30), x, level, 30, 1.5)
        elif verb == "heat":
            for k in range(6):
                high = 6 + 5 * np.sin(turn * 2.5 + k * 2.1)
                _ellipse(image, (255, 110 + 20 * (k % 3), 0), 9 + 9 * k, 62 - high / 2, 5, high)
            _ellipse(image, (255, 240, 120), x, 62, 14, 4 + 2 * np.sin(turn * 4))


def _window(center: float, half: float) -> slice:
    return slice(max(0, round(center - half)), max(0, min(SIZE, round(center + half) + 1)))


def _box(image: np.ndarray, colour: Colour, x: float, y: float, rx: float, ry: float) -> None:
    image[_window(y, ry), _window(x, rx)] = colour


def _ellipse(image: np.ndarray, colour: Colour, x: float, y: float, rx: float, ry: float) -> None:
    rows, columns = _window(y, ry), _window(x, rx)
    part = image[rows, columns]
    dy = (np.arange(rows.start, rows.start + part.shape[0]) - y)[:, None] / max(ry, 0.5)
    dx = (np.arange(columns.start, columns.start + part.shape[1]) - x)[None] / max(rx, 0.5)
    part[dx * dx + dy * dy <= 1] = colour
