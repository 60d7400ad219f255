"""Fixtures that every test module may use: tiny random models and the published reference values."""

import ast
import copy
import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import isolation
import mmengine.config.utils
import mmengine.model.utils
import mmseg
import pytest
import tiny
from diffusers import UNet2DConditionModel

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / 'shared' / 'data' / 'reference'


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolation.isolated():
        yield


@pytest.fixture(scope='session', autouse=True)
def _registered() -> None:
    """All imports are done, and garbage is looked for rarely, and not among the million objects that they made.

    A network of 700 modules is 100,000 objects: looking for garbage after every 700 took a fifth of the suite's time.
    """
    isolation.import_registered()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


@pytest.fixture(scope='session', autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded prompts do not go into, nor come from, the user's cache; processes that tests start have one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DIFFSEG_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.setenv('OMP_NUM_THREADS', '1')
        yield


@pytest.fixture(scope='session', autouse=True)
def _what_takes_mmengine_longer_than_tiny_models() -> Iterator[None]:
    """In each run, it lists the environment, and searches mmcv for compiled operators once for every module.

    For every data set, it collects garbage; for every `mmseg::` in a config, it imports `pkg_resources` anew and parses
    the descriptions of all of mmseg's models; for every config, it reads all base files, each through temporary files;
    whatever it writes of a config, it lays out, which takes up to seconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.dataset.base_dataset.gc', SimpleNamespace(collect=int))
        patch.setattr('mmengine.runner.runner.collect_env', dict)
        patch.setattr(mmengine.model.utils, 'mmcv_full_available', cache(mmengine.model.utils.mmcv_full_available))
        patch.setattr(mmengine.config.config, 'is_installed', cache(mmengine.config.config.is_installed))
        patch.setattr(mmengine.config.utils, 'load', cache(mmengine.config.utils.load))
        patch.setattr(mmengine.config.config, 'FormatCode', check_syntax)
        patch.setattr(mmengine.config.Config, '_file2dict', staticmethod(read_once(mmengine.config.Config._file2dict)))
        yield


def check_syntax(code: str, style_config: dict[str, Any]) -> tuple[str, bool]:
    """Unlike `yapf`, do not lay out code, but fail alike for what is none."""
    ast.parse(code)
    return code, False


def read_once(read: Callable[..., tuple[dict, str, dict]]) -> Callable[..., tuple[dict, str, dict]]:
    """Keep what `mmengine.Config` reads of the configs of this project and of mmseg, which no test changes."""
    contents: dict[tuple, tuple[dict, str, dict]] = {}
    folders = (str(ROOT / 'configs'), str(Path(mmseg.__file__).parent))

    def read_or_copy(filename: str, *options: Any, **named: Any) -> tuple[dict, str, dict]:
        path = os.path.abspath(filename)
        if not path.startswith(folders):
            return read(filename, *options, **named)
        key = (path, *options, *named.values())
        if key not in contents:
            contents[key] = read(filename, *options, **named)
        return copy.deepcopy(contents[key])

    return read_or_copy


@pytest.fixture
def reference() -> Callable[[str], Path]:
    """`reference(name)` is the folder of one published system's values; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        if not (REFERENCE / name).is_dir():
            pytest.skip(f'reference data absent: {REFERENCE / name}')
        return REFERENCE / name

    return find


@pytest.fixture
def tiny_unet() -> Callable[..., UNet2DConditionModel]:
    """Make a tiny UNet of SD1.5's topology: `tiny_unet(seed=0, **config)`."""
    return tiny.unet


@pytest.fixture
def tiny_sdxl_unet() -> Callable[..., UNet2DConditionModel]:
    """Make a tiny UNet of SDXL's topology: `tiny_sdxl_unet(seed=0, **config)`."""
    return tiny.sdxl_unet


@pytest.fixture(scope='session')
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete diffusers folder of SD1.5's kind. Read only."""
    return tiny.save_sd15(tmp_path_factory.mktemp('models') / 'tiny-sd15')


@pytest.fixture(scope='session')
def tiny_taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `AutoencoderTiny` in diffusers' layout, that fits `tiny_pipeline`. Read only."""
    folder = tmp_path_factory.mktemp('models') / 'tiny-taesd'
    tiny.taesd(seed=7).save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def shallow_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_pipeline`, with a UNet of two levels, for fake tensors, whose operations take half a millisecond."""
    folder = tiny.save_sd15(tmp_path_factory.mktemp('models') / 'shallow-sd15')
    tiny.unet(**tiny.SHALLOW).save_pretrained(folder / 'unet')
    return folder


@pytest.fixture(scope='session')
def tiny_sdxl_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete diffusers folder of SDXL's kind. Read only."""
    return tiny.save_sdxl(tmp_path_factory.mktemp('models') / 'tiny-sdxl')


@pytest.fixture(scope='session')
def tiny_pixel_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a model of pixel space: UNet and scheduler. Read only."""
    return tiny.save_pixel(tmp_path_factory.mktemp('models') / 'tiny-adm')


@pytest.fixture(scope='session')
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`pipeline_folder(kind)` is a complete diffusers folder of one of `tiny_pipelines.KINDS`. Read only."""
    import tiny_pipelines  # many text encoders, which other tests need not import

    return cache(lambda kind: tiny_pipelines.save(kind, tmp_path_factory.mktemp('models') / f'tiny-{kind}'))
