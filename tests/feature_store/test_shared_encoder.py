"""feature_store.shared_encoder: clips of several threads in one batch, and what each of them gets."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from feature_store.shared_encoder import SharedEncoder


class Recorder:
    """An encoder whose tokens say which clip they are of; it waits for `gate` and keeps its batches' sizes."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()

    def __call__(self, clips: Tensor, /) -> Tensor:
        assert self.gate.wait(10)
        self.sizes.append(len(clips))
        if (clips == 255).any():
            raise RuntimeError("no such clip")
        return clips.flatten(1)[:, :1].float()


def clips_of(number: int, count: int) -> Tensor:
    return torch.full((count, 2, 4, 4, 3), number, dtype=torch.uint8)


def ask_all(encoder: SharedEncoder, counts: list[int]) -> list[Tensor]:
    """What one thread for each count gets, each of its own clips; they all wait before the network is free."""
    recorder: Recorder = encoder._encoder  # type: ignore[assignment]
    with ThreadPoolExecutor(len(counts)) as threads:
        answers = []
        for number, count in enumerate(counts):
            answers.append(threads.submit(encoder, clips_of(number, count)))
            time.sleep(0.05)  # in this order
        recorder.gate.set()
        return [answer.result(10) for answer in answers]


def test_what_waits_together_is_one_batch_and_each_gets_its_own() -> None:
    recorder = Recorder()
    got = ask_all(SharedEncoder(recorder, most=8, join=True), [3, 2, 4, 2, 5])
    for number, (tokens, count) in enumerate(zip(got, [3, 2, 4, 2, 5], strict=True)):
        assert torch.equal(tokens, torch.full((count, 1), float(number)))
    # The first went alone, as the network was free; 2 + 4 + 2 fill a batch of 8, and the last is left.
    assert recorder.sizes == [3, 8, 5]


def test_without_joining_each_call_is_a_batch() -> None:
    recorder = Recorder()
    got = ask_all(SharedEncoder(recorder, most=8, join=False), [3, 2, 8])
    assert [len(tokens) for tokens in got] == [3, 2, 8]
    assert recorder.sizes == [3, 2, 8]


def test_an_error_reaches_whoever_waits_and_nobody_else() -> None:
    recorder = Recorder()
    recorder.gate.set()
    encoder = SharedEncoder(recorder, most=8, join=True)
    with pytest.raises(RuntimeError, match="no such clip"):
        encoder(clips_of(255, 2))
    assert encoder(clips_of(7, 1)).tolist() == [[7.0]]


def test_times_are_of_the_clock_that_was_started() -> None:
    recorder = Recorder()
    recorder.gate.set()
    encoder = SharedEncoder(recorder, most=8, join=True)
    time.sleep(0.3)
    encoder.start_clock()
    time.sleep(0.1)
    encoder(clips_of(1, 1))
    time.sleep(0.02)  # until the clock is set, after the answer
    assert 0.1 <= encoder.waiting_s < 0.3
    assert 0 < encoder.working_s < 0.1
