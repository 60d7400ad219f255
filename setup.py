import json
import re
import shutil
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r"^__version__ = '(.+)'$", (HERE / 'diffseg' / '__init__.py').read_text(), re.M).group(1)

MM = [
    'mmsegmentation==1.2.2',
    'mmengine==0.10.7',
    'mmcv-lite==2.1.0',
    'ftfy',  # mmsegmentation imports it without requiring it
    'regex',  # likewise
    'setuptools<82',  # mmengine resolves `mmseg::` config paths with pkg_resources
    'scipy',  # .mat annotations of PF-Pascal and CUB; mmsegmentation requires it as well
]
TEXT = ['protobuf', 'sentencepiece']  # tokenizers that are published as SentencePiece models alone (PixArt, HunyuanDiT)
ONEDL = ['onedl-mmsegmentation>=1.4.2', 'onedl-mmengine>=0.10.12', 'onedl-mmcv>=2.3.6', 'scipy']


def write_model_index(folder: Path) -> None:
    """Describe all configs in model-index.yml and a metafile.yml in each of their folders, as mmseg does.

    mmengine needs them to inherit `diffseg::...`, and `mim search` lists them. The content is JSON, which is YAML.
    """
    metafiles = []
    for configs in sorted({path.parent for path in (folder / 'configs').rglob('*.py')}):
        name = configs.relative_to(folder / 'configs').as_posix()
        models = [path for path in sorted(configs.glob('*.py')) if not path.stem.startswith('_')]
        if name.startswith('_base_') or not models:
            continue
        prefix = name.replace('/', '-') + '_' if '/' in name else ''  # names of toy configs are short
        content = {
            'Collections': [{'Name': name}],
            'Models': [
                {
                    'Name': prefix + path.stem,
                    'In Collection': name,
                    'Config': path.relative_to(folder).as_posix(),
                    'Metadata': {'Training Data': path.stem.rpartition('_')[2]},
                }
                for path in models
            ],
        }
        (configs / 'metafile.yml').write_text(json.dumps(content, indent=1))
        metafiles.append((configs / 'metafile.yml').relative_to(folder).as_posix())
    (folder / 'model-index.yml').write_text(json.dumps({'Import': metafiles}, indent=1))


class BuildWithMim(build_py):
    """Add configs and tools where mmengine and `mim` look for those of an installed package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, 'diffseg', '.mim')
            shutil.copytree(HERE / 'configs', target / 'configs', ignore=shutil.ignore_patterns('__pycache__'))
            shutil.copytree(HERE / 'tools', target / 'tools', ignore=shutil.ignore_patterns('__pycache__', 'toy'))
            write_model_index(target)


# no build/ is left behind, and no stale copy in it can slip into a wheel
with tempfile.TemporaryDirectory() as build_base:
    setup(
        name='diffseg',
        version=VERSION,
        description='Diffusion model activations as features for mmsegmentation',
        long_description=(HERE / 'README.md').read_text(),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        license_files=['LICENSE'],
        packages=find_packages(include=['diffseg', 'diffseg.*']),
        package_data={'diffseg.web': ['static/*']},
        cmdclass={'build_py': BuildWithMim},
        python_requires='>=3.11',
        install_requires=[
            'torch>=2.6',
            'diffusers>=0.42,<0.43',
            'transformers>=5,<6',
            'accelerate',
            'filelock',
            'fsspec',
            'numpy',
            'pillow',
            'safetensors',
            'tqdm',
        ],
        extras_require={
            'mm': MM,
            'onedl': ONEDL,
            'xformers': ['xformers'],
            'demo': [*MM, 'matplotlib', 'psutil'],
            'lora': ['peft'],
            'quantization': ['torchao'],
            'ray': ['ray[data]'],
            'text': TEXT,
            'dev': [
                *MM,
                *TEXT,
                'httpx2',  # of FastAPI's test client
                'hypothesis',
                'ipykernel',
                'matplotlib',
                'nbclient',
                'peft',
                'playwright',
                'pytest',
                'pytest-xdist',
                'ruff',
                'setuptools>=70.1',
            ],
            'web': ['fastapi', 'uvicorn'],
            'docs': ['furo', 'myst-nb', 'sphinx', 'sphinx-copybutton'],
        },
        options={'build': {'build_base': build_base}},
    )
