"""Heads that turn the activations of a distilled network into those of its teacher at any timestep (CleanDIFT)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.models.activations import SwiGLU
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffseg.diffusion.trajectories import Activations
from diffseg.files import whole_file

LAST_TIMESTEP = 999
METADATA = 'timestep_heads'  # the key of a file's metadata under which the options of its heads are


class HeadBlock(nn.Module):
    """x + W swiglu(norm(x)), where the scale of the norm depends on the timestep. W is zero at first.

    Args:
        channels: Of the map, and of the hidden layer.
        width: Of the embedding of the timestep.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.scale = nn.Linear(width, channels, bias=False)
        self.up = SwiGLU(channels, channels, bias=False)
        self.down = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply to cells x (N, h*w, C), with embeddings (N, width)."""
        scale = 1 + self.scale(embedding).unsqueeze(1)  # (N, 1, C)
        return x + self.down(self.up(F.rms_norm(x, x.shape[-1:]) * scale))


class TimestepHeads(nn.Module):
    """Turn activations of a clean latent into those of the noised latent at any timestep (arXiv 2412.03439, section 3).

    Each activation has a stack of residual blocks, AdaRMSNorm -> SwiGLU -> linear, that see one cell at a time and the
    timestep as random Fourier features of t / 999 behind a small network. As the linear layers are zero at first, so
    is the change of the activations.

    Args:
        channels: Of each activation, by name.
        depth: Number of blocks for each activation.
        width: Of the embedding of the timestep.
    """

    def __init__(self, channels: Mapping[str, int], depth: int = 3, width: int = 256):
        super().__init__()
        self.options = {'channels': dict(channels), 'depth': depth, 'width': width}
        self.fourier = GaussianFourierProjection(width // 2, set_W_to_weight=False, log=False)
        self.mapping = TimestepEmbedding(width, width)
        self.heads = nn.ModuleDict(
            {name: nn.ModuleList(HeadBlock(c, width) for _ in range(depth)) for name, c in channels.items()}
        )

    def forward(self, maps: Mapping[str, Tensor], timesteps: Tensor) -> Activations:
        """Apply to maps of any of the names.

        Args:
            maps: With shapes (N, C, h, w).
            timesteps: Of the teacher, one for each map of a name, with shape (N,).

        Returns:
            The maps that the teacher has at these timesteps, up to a factor for each cell if the heads were trained on
            cosines.

        Raises:
            ValueError: There is no head for a map.
        """
        if unknown := [name for name in maps if name not in self.heads]:
            raise ValueError(f'there are no heads for {", ".join(unknown)}; there are for {", ".join(self.heads)}')
        embedding = self.embed(timesteps)
        return {name: self.apply_head(name, x, embedding) for name, x in maps.items()}

    def embed(self, timesteps: Tensor) -> Tensor:
        """Embeddings (N, width) of timesteps (N,)."""
        return self.mapping(self.fourier(timesteps.float() / LAST_TIMESTEP))

    def apply_head(self, name: str, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply the head of one name to maps (N, C, h, w), with embeddings (N, width)."""
        cells = x.flatten(2).transpose(1, 2)  # (N, h*w, C)
        for block in self.heads[name]:
            cells = block(cells, embedding)
        return cells.transpose(1, 2).unflatten(2, x.shape[2:])  # (N, C, h, w)

    def at(self, activations: Mapping[str, Tensor], timesteps: Sequence[float]) -> Activations:
        """What the teacher has at some timesteps, from what a `DiffusionExtractor` of the student returns.

        Args:
            activations: With shapes (B, 1, C, h, w).
            timesteps: Of the teacher, T of them.

        Returns:
            {name: (B, T, C, h, w)}.

        Raises:
            ValueError: The activations are of several timesteps, or there is no head for one of them.
        """
        if wrong := {name: x.shape[1] for name, x in activations.items() if x.shape[1] != 1}:
            raise ValueError(f'activations of several timesteps ({wrong}); read the student at its one timestep')
        t = len(timesteps)
        batch = len(next(iter(activations.values())))
        device = next(iter(activations.values())).device
        maps = {name: x.expand(-1, t, -1, -1, -1).flatten(0, 1) for name, x in activations.items()}  # (B*T, C, h, w)
        applied = self(maps, torch.tensor(timesteps, dtype=torch.float32, device=device).repeat(batch))
        return {name: x.unflatten(0, (batch, t)) for name, x in applied.items()}

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file, with further entries of its metadata."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        with whole_file(path) as partial:
            save_file(tensors, partial, {METADATA: json.dumps(self.options), **(metadata or {})})

    @classmethod
    def load(cls, path: str | Path) -> 'TimestepHeads':
        """Read a file of `save`, in evaluation mode.

        Raises:
            OSError: The file does not exist or is damaged.
            ValueError: The file holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f'no heads at {path}')
        try:
            with safe_open(path, 'pt') as file:
                options = (file.metadata() or {}).get(METADATA)
            state = load_file(path)
        except SafetensorError as error:
            raise OSError(f'cannot read {path}: {error}') from error
        if options is None:
            raise ValueError(f'{path} holds no heads; tools/distill.py writes them to heads.safetensors')
        heads = cls(**json.loads(options))
        heads.load_state_dict(state)
        return heads.eval()
