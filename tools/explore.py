"""Serve a page on this machine on which pictures are matched, looked at and segmented with diffusion features.

    python tools/explore.py PICTURES --model demo/tiny-sd
    python tools/explore.py PICTURES --model sd15 --layers practical --timesteps 50 --size 512 --no-browser

PICTURES is a folder; those directly in it are shown. Features are extracted in the background and kept, with the
strokes, in PICTURES/.diffseg; exports go to PICTURES/exports. Nothing else is written, and nothing is loaded from other
hosts.

On another machine: start it there with --no-browser, and forward its port with `ssh -L 8765:127.0.0.1:8765 MACHINE`.
--host with an address that others can reach needs a token, in --token or in the environment as DIFFSEG_TOKEN.
"""

import argparse
import os
import socket
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import diffseg  # noqa: F401  registers its parts and lets checkpoints be read
from diffseg.command_line import add_dtype_argument, parse_size, parse_timestep
from diffseg.devices import default_device
from diffseg.web.guard import check_host, is_loopback

PORT = 8765


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pictures', type=Path, metavar='PICTURES', help='folder of pictures')
    parser.add_argument('--model', required=True, help='preset, hub id, diffusers folder or checkpoint file')
    parser.add_argument(
        '--layers', nargs='+', help='layer names, aliases, patterns or set names (default: recommended)'
    )
    parser.add_argument('--timesteps', nargs='+', type=parse_timestep, help='(default: recommended)')
    parser.add_argument(
        '--size',
        help="network's input, S or HxW, aspect not kept; 'own' for that of each picture (default: the model's)",
    )
    parser.add_argument('--trajectory', default='noise', choices=('noise', 'clean', 'inversion'))
    parser.add_argument('--prompt', default='')
    parser.add_argument('--ensemble', type=int, default=1, help='noises averaged')
    add_dtype_argument(parser)
    parser.add_argument('--device', default=default_device())
    parser.add_argument('--cache', type=Path, help='folder of activations (default: PICTURES/.diffseg/features)')
    parser.add_argument('--search', type=Path, help='folder that tools/search.py wrote, to see its heat map')
    parser.add_argument('--config', type=Path, help='of a trained model outside of PICTURES, for the view Predict')
    parser.add_argument('--checkpoint', type=Path, help='its checkpoint')
    parser.add_argument('--memory-gb', type=float, default=2, help='of features (default: %(default)s)')
    parser.add_argument('--max-upload-mb', type=float, default=50, help='of a picture (default: %(default)s)')
    parser.add_argument('--max-pixels', type=float, default=50, help='of a picture, in millions (default: %(default)s)')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at (default: %(default)s)')
    parser.add_argument('--port', type=int, help=f'0 for any free one (default: {PORT}, or any if it is taken)')
    parser.add_argument('--token', default=os.environ.get('DIFFSEG_TOKEN'), help='needed with another --host')
    parser.add_argument('--no-browser', action='store_true', help='do not open a browser')
    return parser.parse_args(argv)


def bind(host: str, port: int | None) -> socket.socket:
    """A socket at the port, or at any free one if the default is taken."""
    from diffseg.web.server import listen

    try:
        return listen(host, PORT if port is None else port)
    except OSError as error:
        if port is None:
            return listen(host)
        raise OSError(f'{host}, port {port}: {error.strerror}; choose another --port, or none') from error


def run(args: argparse.Namespace) -> None:
    check_host(args.host, args.token)  # before the model is loaded
    try:
        from diffseg.web.server import create_app, make_server
    except ImportError as error:
        raise ValueError(f"{error}; install the explorer's requirements with: pip install 'diffseg[web]'") from error
    from diffseg.web.pictures import PictureFolder
    from diffseg.web.session import Session, recommended

    folder = PictureFolder(args.pictures, int(args.max_upload_mb * 1e6), int(args.max_pixels * 1e6))
    print(f'{len(folder.pictures)} pictures in {folder.path}; loading {args.model}', flush=True)
    session = Session(
        folder,
        backbone_config(args, *recommended(args.model)),
        args.device,
        args.search,
        int(args.memory_gb * 1e9),
        [path for path in (args.config, args.checkpoint) if path is not None],
    )
    try:
        with bind(args.host, args.port) as connection:
            port = connection.getsockname()[1]
            name = args.host if is_loopback(args.host) else socket.gethostname()
            name = args.host if args.host not in ('0.0.0.0', '::') else name
            address = f'http://{f"[{name}]" if ":" in name else name}:{port}/'
            secret = '' if args.token is None else f'?token={args.token}'
            print(f'open {address}{secret}  (Ctrl-C ends it)', flush=True)
            if not args.no_browser:
                webbrowser.open(address + secret)
            make_server(create_app(session, args.host, args.token)).run([connection])
    finally:
        session.close()


def backbone_config(args: argparse.Namespace, layers: list[str], timesteps: list[int]) -> dict:
    """Config of the backbone, without layers and timesteps where they are the recommended ones."""
    from diffseg.diffusion.layer_sets import expand
    from diffseg.inspection import available_sites

    available, native = available_sites(args.model)
    size = {None: native, 'own': None}[args.size] if args.size in (None, 'own') else parse_size(args.size)
    config = {
        'model': args.model,
        'layers': expand(args.layers or layers, available),
        'timesteps': args.timesteps or timesteps,
        'input_size': size,
        'interpolation': 'bicubic',
        'trajectory': args.trajectory,
        'prompt': args.prompt,
        'ensemble': args.ensemble,
        'dtype': args.dtype,
        'device': args.device,
    }
    return config if args.cache is None else {**config, 'cache': str(args.cache)}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
