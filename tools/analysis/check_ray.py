"""Show what `tools/extract_features.py --engine ray` does when processes die and files are damaged.

    python tools/toy/make_data.py work_dirs/ray --train 500 --test 0
    python tools/analysis/check_ray.py work_dirs/ray/toy/real/train --out work_dirs/ray/check

A cluster of two nodes runs on this machine, each with one CPU, that is with one actor of one thread. Its input is
`--images` pictures in tar files of `--per-shard` each; the pictures are repeated under other names. The checks:

* **killed**: an actor is killed (SIGKILL) when a few shards are written, and later a node with all its processes, so
  that nowhere is a CPU left for its actor. One tar file is cut in the middle, and five images in others.
* **resumed**: the driver is killed, and started again.
* **actors**: images per second of one actor, of two, and of one and two again, while the last three quarters of the
  shards are written. An ensemble of eight lets most of the time be that of the actors.
* **memory**: the largest proportional set size of all processes together, the object store included, and that of the
  driver, while the first 500 of 5000 images are written, and the next ones.

Each check writes its result to OUT/results.json, and is not repeated if it is there.
"""

import argparse
import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from diffseg.benchmarking import table_head
from diffseg.diffusion.images import list_images
from diffseg.feature_shards import list_features

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

TOOL = Path(__file__).parents[1] / 'extract_features.py'
LAYERS = ['down-level1-repeat1-vit-out', 'up-level1-repeat0-res-out']
STORE = 2**28  # bytes of the object store of a node
POLL = 0.2  # seconds
ACTOR = 'ray::MapWorker'
CUT = 5  # images that are damaged
ENSEMBLE = 8
MEMORY = 500, 1000, 2000, 3000, 4000, 5000  # images after which peaks begin anew


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pictures', type=Path, help='a folder of pictures')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--model', default='demo/tiny-sd')
    parser.add_argument('--images', type=int, default=2000)
    parser.add_argument('--per-shard', type=int, default=125)
    parser.add_argument('--checks', nargs='+', choices=CHECKS, default=list(CHECKS))
    return parser.parse_args(argv)


def save_shards(pictures: Path, folder: Path, count: int, per_shard: int) -> list[str]:
    """Write tar files of pictures, unless they are there; returns the names of the images."""
    files = list_images([pictures])
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, per_shard):
        path = folder / f'{start // per_shard:05}.tar'
        members = {f'{i:06}.png': files[i % len(files)] for i in range(start, start + per_shard)}
        names += [f'{path.name}/{name}' for name in members]
        if not path.exists():
            with tarfile.open(path.with_suffix('.partial'), 'w') as archive:
                for name, file in members.items():
                    archive.add(file, name)
            path.with_suffix('.partial').rename(path)
    return names


def damage(folder: Path, names: Sequence[str]) -> tuple[set[str], set[str]]:
    """Cut a tar file in its middle, and images in others; returns the images that are left, and what is damaged."""
    shards = sorted(folder.glob('*.tar'))
    cut = shards[len(shards) // 2]
    with tarfile.open(cut) as archive:
        members = archive.getmembers()
    middle = members[len(members) // 2]
    with cut.open('r+b') as file:
        file.truncate(middle.offset_data + 100)
    lost = {f'{cut.name}/{member.name}' for member in members[len(members) // 2 :]}
    generator = random.Random(0)
    damaged = generator.sample([name for name in names if not name.startswith(cut.name)], CUT)
    for name in damaged:
        shard, _, member = name.partition('/')
        with tarfile.open(folder / shard) as archive:
            info = archive.getmember(member)
        with (folder / shard).open('r+b') as file:
            file.seek(info.offset_data + info.size // 2)
            file.write(generator.randbytes(info.size - info.size // 2))
    return set(names) - lost - set(damaged), {cut.name, *damaged}


@contextlib.contextmanager
def two_nodes() -> Iterator['Cluster']:
    """A cluster of two nodes with a CPU each; drivers connect to the first one.

    As on machines with many CPUs, the processes that read and write stay between tasks.
    """
    from ray.cluster_utils import Cluster

    options = {'num_cpus': 1, 'object_store_memory': STORE, 'include_dashboard': False}
    head = {**options, '_system_config': {'num_workers_soft_limit': 4}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**options)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def processes(cluster: 'Cluster', node: int) -> list[psutil.Process]:
    """The raylet of a node, and all that it started."""
    nodes = [cluster.head_node, *cluster.worker_nodes]
    raylet = psutil.Process(nodes[node].all_processes['raylet'][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def actors(cluster: 'Cluster', node: int) -> list[psutil.Process]:
    """Actors of a node that have an extractor."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in processes(cluster, node) if ''.join(p.cmdline()).startswith(ACTOR)]
    return []


class Run:
    """A run of the tool in a process of its own, with its output in a file."""

    def __init__(self, args: argparse.Namespace, cluster: 'Cluster', source: Path, out: Path, *options: str):
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.log = out.with_suffix('.log')
        command = [sys.executable, TOOL, source, '--engine', 'ray', '--address', cluster.address, '--out', out]
        settings = ['--model', args.model, '--layers', *LAYERS, '--timesteps', '50', '--device', 'cpu', *options]
        self.start = time.monotonic()
        with self.log.open('a') as log:
            self.process = subprocess.Popen([*map(str, command), *settings], stdout=log, stderr=subprocess.STDOUT)

    def shards(self) -> list[Path]:
        """What has been written."""
        return list(self.out.glob('features-*.tar'))

    def wait_for_shards(self, count: int) -> None:
        """Wait until so many are written.

        Raises:
            RuntimeError: The run has ended before.
        """
        while len(self.shards()) < count:
            if self.process.poll() is not None:
                raise RuntimeError(f'the run ended with status {self.process.returncode}: see {self.log}')
            time.sleep(POLL)

    def bad(self) -> set[str]:
        """What is listed as failed."""
        return {match[1] for match in re.finditer(r'^failed: (\S+): ', self.log.read_text(), re.M)}


def remove(out: Path) -> None:
    """Delete what a run wrote, and its output."""
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix('.log').unlink(missing_ok=True)


def check_killed(args: argparse.Namespace) -> dict[str, Any]:
    source = args.out / 'damaged'
    shutil.rmtree(source, ignore_errors=True)
    remove(args.out / 'killed')
    names = save_shards(args.pictures, source, args.images, args.per_shard)
    expected, damaged = damage(source, names)
    with two_nodes() as cluster:
        run = Run(args, cluster, source, args.out / 'killed')
        run.wait_for_shards(2)
        victim = actors(cluster, 0)[0]
        victim.kill()
        run.wait_for_shards(5)
        node = processes(cluster, 1)
        had_actor = bool(actors(cluster, 1))
        for process in node:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        status = run.process.wait()
    there = list_features(run.out)  # an error if one is there twice
    return {
        'images': len(names),
        'usable': len(expected),
        'there': len(there),
        'the same': there.keys() == expected,
        'damaged': len(damaged),
        'listed': len(run.bad()),
        'the same ones': run.bad() == damaged,
        'status': status,
        'killed': f'an actor, then a node with {"its actor" if had_actor else "no actor"}',
    }


def check_resumed(args: argparse.Namespace) -> dict[str, Any]:
    source = args.out / f'images{args.images}'
    names = save_shards(args.pictures, source, args.images, args.per_shard)
    remove(args.out / 'resumed')
    with two_nodes() as cluster:
        run = Run(args, cluster, source, args.out / 'resumed')
        run.wait_for_shards(len(names) // args.per_shard // 2)
        run.process.kill()
        run.process.wait()
        while any(actors(cluster, node) for node in (0, 1)):  # Ray ends them
            time.sleep(POLL)
        before = {path: path.stat().st_mtime_ns for path in run.shards()}
        held = list_features(run.out)
        run = Run(args, cluster, source, args.out / 'resumed')
        status = run.process.wait()
    untouched = all(path.stat().st_mtime_ns == time_written for path, time_written in before.items())
    there = list_features(run.out)
    written = re.search(r'^(\d+) written, (\d+) already there', run.log.read_text(), re.M)
    return {
        'images': len(names),
        'when killed': len(held),
        'then written': int(written[1]),
        'there': len(there),
        'the same': there.keys() == set(names) and untouched,
        'status': status,
    }


def check_actors(args: argparse.Namespace) -> dict[str, Any]:
    source = args.out / f'images{args.images}'
    save_shards(args.pictures, source, args.images, args.per_shard)
    rates: dict[int, list[float]] = {1: [], 2: []}
    with two_nodes() as cluster:
        for count in (1, 2, 1, 2):
            out = args.out / f'actors{count}'
            remove(out)
            run = Run(args, cluster, source, out, '--actors', str(count), '--ensemble', str(ENSEMBLE))
            if run.process.wait():
                raise RuntimeError(f'the run failed: see {run.log}')
            times = sorted(path.stat().st_mtime for path in run.shards())
            times = times[len(times) // 4 :]  # the first are late: processes that write start with them
            rates[count].append(args.per_shard * (len(times) - 1) / (times[-1] - times[0]))
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {'one': rates[1], 'two': rates[2], 'ratios': ratios}


def check_memory(args: argparse.Namespace) -> dict[str, Any]:
    source, out = args.out / f'images{MEMORY[-1]}', args.out / 'memory'
    save_shards(args.pictures, source, MEMORY[-1], args.per_shard)
    remove(out)
    peaks = {count: {'driver': 0, 'all': 0, 'processes': 0} for count in MEMORY}
    with two_nodes() as cluster:
        run = Run(args, cluster, source, out)
        while run.process.poll() is None:
            written = args.per_shard * len(run.shards())
            peak = peaks[next(count for count in MEMORY if written <= count)]
            with contextlib.suppress(psutil.NoSuchProcess):
                everyone = [psutil.Process(run.process.pid), *processes(cluster, 0), *processes(cluster, 1)]
                sizes = [each.memory_full_info().pss for each in everyone]
                peak['driver'] = max(peak['driver'], sizes[0])
                peak['all'], peak['processes'] = max((peak['all'], peak['processes']), (sum(sizes), len(sizes)))
            time.sleep(1)
    if run.process.returncode:
        raise RuntimeError(f'the run failed: see {run.log}')
    return peaks


CHECKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    'killed': check_killed,
    'resumed': check_resumed,
    'actors': check_actors,
    'memory': check_memory,
}


def print_results(results: dict[str, dict[str, Any]]) -> None:
    def table(names: Sequence[str], *rows: Sequence[Any]) -> None:
        lines = [f'| {" | ".join(map(str, row))} |' for row in rows]
        print('\n'.join([table_head(names), *lines]), end='\n\n')

    if killed := results.get('killed'):
        table(
            ['killed', 'images', 'usable', 'there, each once', 'damaged', 'listed', 'exit status'],
            [
                killed['killed'],
                killed['images'],
                killed['usable'],
                f'{killed["there"]}, {"the same" if killed["the same"] else "NOT THE SAME"}',
                killed['damaged'],
                f'{killed["listed"]}, {"the same" if killed["the same ones"] else "NOT THE SAME"}',
                killed['status'],
            ],
        )
    if resumed := results.get('resumed'):
        table(
            [
                'killed',
                'images',
                'there when it was killed',
                'written by the second run',
                'there, each once',
                'exit status',
            ],
            [
                'the driver',
                resumed['images'],
                resumed['when killed'],
                resumed['then written'],
                f'{resumed["there"]}, {"the first ones untouched" if resumed["the same"] else "NOT THE SAME"}',
                resumed['status'],
            ],
        )
    if rates := results.get('actors'):
        rows = [[*(f'{rate:.1f}' for rate in pair[:2]), f'{pair[2]:.2f}'] for pair in zip(*rates.values(), strict=True)]
        table(['images/s, one actor', 'images/s, two actors', 'ratio'], *rows)
    if peaks := results.get('memory'):
        rows = [[n, f'{p["driver"] / 1e6:.0f}', f'{p["all"] / 1e6:.0f}', p['processes']] for n, p in peaks.items()]
        table(['images written, up to', 'driver, MB', 'all processes, MB', 'processes then'], *rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / 'results.json'
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in args.checks:
        if name not in results:
            results[name] = json.loads(json.dumps(CHECKS[name](args)))
            path.write_text(json.dumps(results, indent=2))
    print_results({name: results[name] for name in args.checks})
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
