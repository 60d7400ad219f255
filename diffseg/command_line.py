"""Arguments that several tools share."""

import argparse
from typing import TYPE_CHECKING, Any

from diffseg.devices import DTYPES, default_device
from diffseg.diffusion.schedules import Timestep
from diffseg.diffusion.schedules import parse_timestep as read_timestep

if TYPE_CHECKING:
    from diffseg.models import CorrespondenceModel


def parse_size(text: str) -> tuple[int, int]:
    """Turn '512' into (512, 512) and '512x768', height and width, into (512, 768)."""
    height, _, width = text.partition('x')
    return int(height), int(width or height)


def add_vae_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--vae`, which is `Weights.vae`."""
    parser.add_argument(
        '--vae', help="AutoencoderTiny in place of the model's VAE: hub id such as madebyollin/taesd, folder or file"
    )


def add_transformer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--discard` and `--embedded-guidance`, options of `DiffusionExtractor` for transformers."""
    parser.add_argument(
        '--discard',
        type=int,
        nargs='+',
        default=(),
        help='channels that are zero before the modulation of `-mod` activations (DiTF)',
    )
    parser.add_argument(
        '--embedded-guidance', type=float, help="for networks that read it, as Flux-dev (default: their pipeline's)"
    )


def parse_timestep(text: str) -> Timestep:
    """Turn '261' into an index, and '0.26' into a share of noise, which rectified flow has."""
    try:
        return read_timestep(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no timestep; write an index such as 261, or for rectified flow a sigma such as 0.26'
        ) from None


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, for `choose_dtype`."""
    parser.add_argument(
        '--dtype',
        choices=('auto', *DTYPES),
        default='auto',
        help="to compute in; 'auto' is the device's fastest, float32 for small networks (default: %(default)s)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model that matches images, see `matcher_of`."""
    parser.add_argument('--config', help='of a CorrespondenceModel')
    parser.add_argument('--checkpoint', help='of that model (default: none, as for zero-shot configs)')
    parser.add_argument('--category', help="of the objects, where the config's prompt names it")
    parser.add_argument('--model', help='preset, hub id, diffusers folder or checkpoint file, instead of a config')
    add_vae_argument(parser)
    parser.add_argument('--layers', nargs='+', help='layer names, aliases, patterns or set names')
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep)
    parser.add_argument('--trajectory', default='noise', choices=('noise', 'clean', 'inversion'))
    parser.add_argument('--prompt', default='')
    parser.add_argument('--ensemble', type=int, default=1, help='noises averaged')
    add_transformer_arguments(parser)
    parser.add_argument(
        '--size', nargs='+', type=int, help='resize to S x S or H x W (default: the size of each image)'
    )
    add_dtype_argument(parser)
    parser.add_argument('--device', default=default_device())


def check_model_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a message if the model options are inconsistent; `size` becomes a pair."""
    if (args.config is None) == (args.model is None):
        parser.error('give either --config or --model')
    if args.model is not None and (not args.layers or not args.timesteps):
        parser.error('--model needs --layers and --timesteps')
    for name in ('vae', 'discard', 'embedded_guidance') if args.model is None else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f'--{name.replace("_", "-")} goes with --model; a config has {name}= in its backbone')
    if args.size and len(args.size) > 2:
        parser.error('--size takes one number or two')
    args.size = tuple(args.size * 2)[:2] if args.size else None


def matcher_of(args: argparse.Namespace) -> tuple['CorrespondenceModel', list[dict[str, Any]]]:
    """The model of checked options, and the pipeline that prepares its images. Raises what `load_matcher` does."""
    from diffseg.apis import load_matcher, zero_shot_matcher  # import mmseg, which other tools do without

    if args.config is not None:
        return load_matcher(args.config, args.checkpoint, args.category)
    names = ('vae', 'size', 'trajectory', 'prompt', 'ensemble', 'discard', 'embedded_guidance', 'dtype', 'device')
    options = {name: getattr(args, name) for name in names}
    return zero_shot_matcher(args.model, args.layers, args.timesteps, **options)
