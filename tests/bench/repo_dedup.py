#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""What sampling and the bound on scatter cost and win, on a disk and the memory of two guests booted from it.

usage: repo_dedup.py [--inputs DIR] [--work DIR] [--page FILE]
(DIR as for repo_peers.py)

The files are a Debian disk, and the memory of two guests booted from it.
Three repositories of the same files: as always; with a footer cache of a sixth of the packs;
and without the bound on scatter. For each: what is stored, all metadata included, against all unique pages in LZ4
blocks of 64 KiB without any; pages that the index's sampling missed; pages that were stored again for the bound; and
for the second memory how many records a MiB of it refers to, and how many bytes are read per byte restored. Then, as
always: the first file imported again, five times, against what SHA-256 alone takes in CPU time, in turn; and everything after a collection that repacks (gc --repack).

--page writes it as a page for docs/bench.
"""
import argparse
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import lz4.block

import bench_page
import repo_peers

PAGE, ZEROS = 4096, bytes(4096)
FOOTER_BYTES = 42  # of a page in the cache, at least: so the cache has a sixth of the pages at most
NO_BOUND = 1 << 20
AGAIN = 5
HASHED = 256 << 20


def by_hand(paths):
    """Unique pages, in the order in which they come, in LZ4 blocks of sixteen: how many, and bytes."""
    seen, block, total = set(), bytearray(), 0
    for path in paths:
        with open(path, 'rb') as f:
            while mib := f.read(1 << 20):
                for at in range(0, len(mib), PAGE):
                    page = mib[at:at + PAGE]
                    if page == ZEROS or (identity := hashlib.sha256(page).digest()) in seen:
                        continue
                    seen.add(identity)
                    block += page
                    if len(block) == 16 * PAGE:
                        total += min(len(block), len(lz4.block.compress(bytes(block), store_size=False)))
                        block.clear()
    return len(seen), total


def sha256_rate(path):
    """Bytes per second of CPU time, over data that is in memory."""
    with open(path, 'rb') as f:
        data = f.read(HASHED)
    began = time.thread_time()
    hashlib.sha256(data).digest()
    return len(data) / (time.thread_time() - began)


class Repository:
    def __init__(self, folder, cache_bytes=0, records_max=0):
        self.url, self.folder = f'dir:{folder}/repo', folder
        self.env = dict(os.environ, VMMIG_TUNE=f'{cache_bytes} {records_max}')
        self.run('init')

    def run(self, *words):
        build = pathlib.Path(os.environ.get('VMMIG_BUILD', repo_peers.ROOT / 'build'))
        out = subprocess.run([build / 'tests/unit/repo/repo_tool', self.url, *map(str, words)], check=True,
                             stdout=subprocess.PIPE, env=self.env, text=True).stdout
        return json.loads(out) if out else None

    def stored(self):
        stat, maps = self.run('stat'), os.stat(f'{self.folder}/repo/maps/data.mdb')
        return stat['pack_bytes'] + stat['tree_bytes'] + min(maps.st_size, maps.st_blocks * 512)


def one(paths, cache_bytes, records_max, work):
    """Import all into a new repository: totals."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        repo = Repository(folder, cache_bytes, records_max)
        imports = [repo.run('import', path, path.stem, 'raw') for path in paths]
        return {'stored': repo.stored(), 'new': sum(i['new'] for i in imports), 'again': sum(i['again'] for i in imports),
                'scatter': repo.run('scatter', paths[-1].stem)}


def later(paths, hand, work):
    """What is said of a second import, and of repacking."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        repo = Repository(folder)
        first, *_ = [repo.run('import', path, path.stem, 'raw') for path in paths]
        data = (first['shared'] + first['new']) * PAGE
        before, shares, rates = repo.stored(), [], []
        for i in range(AGAIN):
            rate = sha256_rate(paths[0])
            again = repo.run('import', paths[0], f'again{i}', 'raw')
            shares.append(again['stored'] / first['stored'])
            rates.append((data / again['cpu'], rate, data / again['seconds']))
        new = (repo.stored() - before) / AGAIN
        for i in range(AGAIN):
            repo.run('delete', f'again{i}')
        repo.run('collect', 30000, 'recompress')
        repo.run('collect', 30000)
        cpu, sha, wall = (statistics.median(column) / 1e6 for column in zip(*rates))
        yield (f'The first file again: {max(shares):.4%} of what it took in new packs and trees, {new / first["stored"]:.3%} '
               f'with the maps; {wall:.0f} MB/s of its data on {os.cpu_count()} cores. Per second of CPU time {cpu:.0f} MB, SHA-256 '
               f'alone {sha:.0f} MB: {cpu / sha:.2f} of that.')
        yield f'After gc --repack: {repo.stored() / 1e6:.1f} MB, {repo.stored() / hand:.3f}.'


HEAD = ['', 'stored, MB', 'ratio', 'missed pages', 'stored again', 'records per MiB: median', 'p90', 'most',
        'bytes read per byte restored']


def row(name, r, unique, hand):
    s = r['scatter']
    return [name, f'{r["stored"] / 1e6:.1f}', f'{r["stored"] / hand:.3f}', str(r['new'] - r['again'] - unique),
            str(r['again']), str(s['median']), str(s['p90']), str(s['most']), f'{s["read"] / s["data"]:.3f}']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('--inputs', type=pathlib.Path)
    parser.add_argument('--work', default='/var/tmp')
    parser.add_argument('--page', type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        paths = repo_peers.make_inputs(args.inputs or pathlib.Path(folder, 'inputs'))
        unique, hand = by_hand(paths)
        said = [f'{unique} unique pages; in LZ4 blocks of 64 KiB, without metadata, {hand / 1e6:.1f} MB.']
        print(said[0], *HEAD, sep='; ', flush=True)
        rows = []
        for name, tuning in (('as always', (0, 0)), ('a sixth of the footers', (unique * FOOTER_BYTES // 6, 0)),
                             ('no bound on scatter', (0, NO_BOUND))):
            rows.append(row(name, one(paths, *tuning, args.work), unique, hand))
            print(*rows[-1], sep='; ', flush=True)
        for text in later(paths, hand, args.work):
            said.append(text)
            print(text, flush=True)
    if args.page:
        bench_page.write(args.page, __file__, 'What deduplication wins and costs', __doc__.split('\n\n')[2], said[0],
                         bench_page.table(HEAD, rows), *said[1:])
    return 0


if __name__ == '__main__':
    sys.exit(main())
