"""S3D on a GPU as CUDA graphs: a batch is one launch, however busy the process's threads are (frames → features)."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from collections.abc import Sequence

import torch
from torch import Tensor

from feature_store.config import DecodeConfig
from feature_store.s3d_fused import FusedS3D
from vlm_dist.errors import ConfigError

_TOLERANCE = 0.5  # rounding is up to 0.2 where weights tell clips badly apart
_FEWEST = 8  # clips; a batch is filled up to a power of two of them


class GraphedEncoder:
    """A ClipEncoder that records its network for some sizes of batches, and plays the smallest that holds a batch.

    Launched one by one, the network's 200 kernels take longer than they run, as soon as a dozen Python threads (one for
    each video in work) want the interpreter too.

    Args:
        network: Compiled or not; on a GPU.
        cfg: Shape of a clip.
        most: Clips of the largest batch.

    Raises:
        ConfigError: torch cannot compile it here.
    """

    @torch.inference_mode()
    def __init__(self, network: FusedS3D, cfg: DecodeConfig, most: int) -> None:
        self.device = network.device
        self._network = network  # graphs know where its weights lie, and do not keep them
        shape = (most, cfg.fps, cfg.size, cfg.size, 3)
        self._clips = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.device)
        for size in sizes(most):
            clips = self._clips[:size]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, and lets cuDNN choose, before anything is recorded
                    _tried(network, clips)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool, stream):
                tokens = network(clips)
            self._graphs[size] = graph, tokens
        self._check()

    @torch.inference_mode()
    def __call__(self, clips: Tensor, /) -> Tensor:
        """Tokens (B, F) float32 of clips, uint8 (B, T, H, W, 3), B <= most; by one thread at a time."""
        graph, tokens = next(self._graphs[size] for size in sorted(self._graphs) if size >= len(clips))
        self._clips[: len(clips)].copy_(clips)  # what is left of earlier clips does no harm
        graph.replay()
        return tokens[: len(clips)].clone()

    def _check(self) -> None:
        """Compare with the network as PyTorch runs it: what a compiler breaks must not become features."""
        for size in self._graphs:
            clips = noise_and_black(self._clips[:size].shape).to(self.device)
            expected = torch.cat([self._network.eager(part) for part in clips.split(_FEWEST)])
            if not expected.isfinite().all():
                raise ConfigError(
                    f"S3D gives numbers that are not finite in {self._network.dtype}: its weights are damaged, or too "
                    "large for this precision; extract in another (--set extract.precision=bfloat16)"
                )
            if not (error := largest_error(expected, self(clips))) < _TOLERANCE:
                way = "extract.compile=false" if self._network.compiled else "extract.gpus_per_worker=0"
                raise ConfigError(
                    f"batches of {size} clips give other features than PyTorch's own on this machine (by {error:.2g} "
                    f"of the distance of noise and black): extract without what makes them so (--set {way})"
                )


def noise_and_black(shape: Sequence[int]) -> Tensor:
    """Clips, uint8, of which every other one, in random pairs, is black: one that is in another's place tells."""
    clips = torch.randint(256, tuple(shape), dtype=torch.uint8)
    first_black = torch.rand(len(clips) // 2) < 0.5
    clips[0 : 2 * len(first_black) : 2][first_black] = 0
    clips[1 : 2 * len(first_black) : 2][~first_black] = 0
    return clips


def largest_error(expected: Tensor, got: Tensor) -> float:
    """Of any token (B, F), as a share of the largest distance of two of them; of a single one, of its length."""
    apart = torch.cdist(expected, expected).max() if len(expected) > 1 else expected.norm()
    return float((got - expected).norm(dim=1).max() / apart)


def sizes(most: int) -> list[int]:
    """Numbers of clips that are recorded, largest first: its memory holds what the others need."""
    powers = (1 << k for k in range(most.bit_length()))
    return sorted({most, *(power for power in powers if power >= _FEWEST)}, reverse=True)


def _tried(network: FusedS3D, clips: Tensor) -> None:
    try:
        network(clips)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        if not network.compiled:
            raise
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"torch.compile fails on this machine ({type(error).__name__}: {reason}); extract without it "
            "(--set extract.compile=false)"
        ) from error
