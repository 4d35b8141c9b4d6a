#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""What sampling and the bound on scatter cost and win, on a disk and the memory of two guests booted from it.

usage: repo_dedup.py [--inputs DIR] [--work DIR]

DIR as for repo_peers.py. Three repositories of the same files: as always; with a footer cache of a sixth of the packs;
and without the bound on scatter. For each: what is stored, all metadata included, against all unique pages in LZ4
blocks of 64 KiB without any; pages that the index's sampling missed; pages that were stored again for the bound; and
for the second memory how many records a MiB of it refers to, and how many bytes are read per byte restored.
"""
import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import lz4.block

import repo_peers

PAGE, ZEROS = 4096, bytes(4096)
FOOTER_BYTES = 44  # of a page, in the cache
NO_BOUND = 1 << 20


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


def one(paths, cache_bytes, records_max, work):
    """Import all into a new repository: totals."""
    build = pathlib.Path(os.environ.get('VMMIG_BUILD', repo_peers.ROOT / 'build'))
    env = dict(os.environ, VMMIG_TUNE=f'{cache_bytes} {records_max}')
    with tempfile.TemporaryDirectory(dir=work) as folder:
        def run(*words):
            out = subprocess.run([build / 'tests/unit/repo/repo_tool', f'dir:{folder}/repo', *map(str, words)],
                                 check=True, stdout=subprocess.PIPE, env=env, text=True).stdout
            return json.loads(out) if out else None
        run('init')
        imports = [run('import', path, path.stem, 'raw') for path in paths]
        stat = run('stat')
        maps = os.stat(f'{folder}/repo/maps/data.mdb')
        return {'stored': stat['pack_bytes'] + stat['tree_bytes'] + min(maps.st_size, maps.st_blocks * 512),
                'new': sum(i['new'] for i in imports), 'again': sum(i['again'] for i in imports),
                'scatter': run('scatter', paths[-1].stem)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('--inputs', type=pathlib.Path)
    parser.add_argument('--work', default='/var/tmp')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        paths = repo_peers.make_inputs(args.inputs or pathlib.Path(folder, 'inputs'))
        unique, hand = by_hand(paths)
        print(f'{unique} unique pages; in LZ4 blocks without metadata {hand / 1e6:.1f} MB')
        print(f'{"":24} {"stored MB":>10} {"ratio":>6} {"missed":>8} {"again":>8} {"records/MiB p50":>16} {"p90":>4} '
              f'{"most":>5} {"read/byte":>10}')
        for name, tuning in (('as always', (0, 0)), ('a sixth of the footers', (unique * FOOTER_BYTES // 6, 0)),
                             ('no bound on scatter', (0, NO_BOUND))):
            r = one(paths, *tuning, args.work)
            s = r['scatter']
            print(f'{name:24} {r["stored"] / 1e6:10.1f} {r["stored"] / hand:6.3f} {r["new"] - r["again"] - unique:8} '
                  f'{r["again"]:8} {s["median"]:16} {s["p90"]:4} {s["most"]:5} {s["read"] / s["data"]:10.3f}', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
