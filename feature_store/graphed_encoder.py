"""S3D on a GPU as CUDA graphs: a batch is one launch, however busy the process's threads are (frames → features)."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
import torch
from torch import Tensor

from feature_store.config import DecodeConfig
from feature_store.s3d_fused import FusedS3D
from vlm_dist.errors import ConfigError

_TOLERANCE = 0.5  # rounding is up to 0.2 where weights tell clips badly apart; a mixed-up clip is 1 or more
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
        """Compare with the network as PyTorch runs it: what a compiler breaks must not become features.

        The first clip of a batch is noise, the last is black: their distance is what an error is measured by.
        """
        for size in self._graphs:
            clips = torch.randint(256, self._clips[:size].shape, dtype=torch.uint8, device=self.device)
            clips[-1] = 0
            ends = [0, size - 1]
            expected, got = torch.cat([self._network.eager(clips[k : k + 1]) for k in ends]), self(clips)[ends]
            between = (expected[0] - expected[1]).norm() if size > 1 else expected[0].norm()
            error = float((got - expected).norm(dim=1).max() / between)
            if expected.isfinite().all() and not error < _TOLERANCE:
                raise ConfigError(
                    f"what torch.compile made of S3D errs by {100 * error:.3g} % of the distance of two clips on this "
                    "machine; extract without it (--set extract.compile=false)"
                )


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
