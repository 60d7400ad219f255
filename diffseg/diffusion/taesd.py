"""Tiny autoencoders (TAESD, github.com/madebyollin/taesd) in the files of their authors.

An encoder and a decoder are two files there, `taesd_encoder.safetensors` and `taesd_decoder.safetensors` (or `.pth`),
each the state of a sequence of layers:

    diffusers' AutoencoderTiny     authors' files
    encoder.layers.{k}             {k}       of the encoder
    decoder.layers.{k}             {k + 1}   of the decoder, which begins with a layer without weights
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

ENCODER, DECODER = 'encoder', 'decoder'
SUFFIXES = ('.safetensors', '.pth')  # the first one is preferred


def find_encoder(folder: Path) -> Path:
    """The encoder's file in a folder of the authors' files.

    Raises:
        FileNotFoundError: There is none.
        ValueError: There are several encoders.
    """
    files = {path.stem: path for suffix in reversed(SUFFIXES) for path in sorted(folder.glob(f'*_{ENCODER}{suffix}'))}
    if not files:
        names = ', '.join(sorted(path.name for path in folder.iterdir())) or 'nothing'
        raise FileNotFoundError(
            f'{folder} holds no AutoencoderTiny: expected config.json with its weights, as diffusers saves it, or '
            f'taesd_encoder.safetensors; it holds: {names}'
        )
    if len(files) > 1:
        names = ', '.join(sorted(path.name for path in files.values()))
        raise ValueError(f'{folder} holds several encoders: {names}; give the file of one of them as the vae')
    return next(iter(files.values()))


def decoder_of(encoder: Path) -> Path:
    """The decoder's file beside an encoder's.

    Raises:
        FileNotFoundError: There is none.
    """
    path = encoder.with_name(encoder.name.replace(ENCODER, DECODER))
    if path == encoder or not path.is_file():
        raise FileNotFoundError(f'no decoder beside {encoder}; to generate images, put {path.name} there')
    return path


def has_published_names(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is one of the authors' files."""
    return bool(state) and all(key.split('.')[0].isdigit() for key in state)


def convert_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an encoder's file in diffusers' names.

    Raises:
        ValueError: They are those of a decoder.
    """
    if '0.weight' not in state:
        raise ValueError('the layer 0 has no weight, as in a decoder; give the file of the encoder')
    return {f'{ENCODER}.layers.{name}': x for name, x in state.items()}


def convert_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a decoder's file in diffusers' names.

    Raises:
        ValueError: They are those of an encoder.
    """
    if '0.weight' in state:
        raise ValueError('the layer 0 has a weight, as in an encoder')
    layers = {name: name.split('.', 1) for name in state}
    return {f'{DECODER}.layers.{int(k) - 1}.{rest}': state[name] for name, (k, rest) in layers.items()}


def latent_channels(state: Mapping[str, Tensor]) -> int:
    """Channels of the latents of an encoder, in diffusers' names; 4 if it has no such tensors."""
    biases = {int(name.split('.')[2]): x for name, x in state.items() if name.startswith(f'{ENCODER}.layers.')}
    return biases[max(biases)].shape[0] if biases else 4
