"""Write neck and head of a trained segmentor as safetensors with a model card, to share them.

    python tools/convert/publish.py work_dirs/CONFIG/iter_300.pth published/horse-parts --license apache-2.0
    hf upload USER/horse-parts published/horse-parts      # to the Hugging Face hub, after `hf auth login`

OUT gets config.json, model.safetensors and README.md, which is to be read and completed before it is shared. The frozen
network is not copied: whoever loads the folder needs it from its own source, and its fingerprint is compared.

    segmentor = diffseg.DiffusionSegmentor.from_pretrained('published/horse-parts')    # or 'USER/horse-parts'
    mask = segmentor.segment('picture.jpg')
"""

import argparse
import sys
from collections.abc import Sequence

from diffseg.publishing import publish


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='of a segmentor, written by tools/train.py')
    parser.add_argument('out', help='folder to write to')
    parser.add_argument('--license', help="of neck and head, such as apache-2.0; the frozen network's may restrict it")
    parser.add_argument(
        '--base-model',
        nargs='+',
        metavar='MODEL',
        help='preset or hub id of the frozen network, where the config names a local copy; one for each member of an '
        'ensemble',
    )
    parser.add_argument(
        '--results', help='JSON file of tools/test.py with the figures (default: that of the newest test of CHECKPOINT)'
    )
    args = parser.parse_args(argv)
    try:
        files = publish(
            args.checkpoint, args.out, base_model=args.base_model, license=args.license, results=args.results
        )
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for path in files:
        print(f'{path}: {path.stat().st_size / 1e6:.2f} MB')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
