#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""How a repository in a folder behaves as it grows: look-ups, memory and collection at several sizes.

usage: repo_scale.py [--work DIR] [--make] [--page FILE] [--share GIB] [GIB...]      (64 256 1024)

For each size tests/bench/repo_scale makes a repository of footers, keys and recipes without payload, and imports an image
of which nothing is new, 4 MiB here and 4 MiB there; an image of which all is new is imported; then one of 16 GiB is
deleted, and its space collected. A TiB takes some 14 GB of disk. Memory is RssAnon, looked at every few milliseconds: pages
of the LMDB file are the page cache's.

--page writes the table as a page for docs/bench. --make only makes the repositories, which takes most of the time, and
leaves them in the folder of --work for a later run, which uses them up.
"""
import argparse
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import bench_page

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_BASE, LIMIT_PER_TIB = 64, 64
BUILD = pathlib.Path(os.environ.get('VMMIG_BUILD', ROOT / 'build'))
SCALE = 'tests/bench/repo_scale'
NEW_MIB, HARD_MIB, FRESH = 1024, 256, 380  # of the image of new data; its end does not compress; random bytes of a page


def anonymous_kib(pid):
    try:
        status = pathlib.Path(f'/proc/{pid}/status').read_text(encoding='ascii')
    except OSError:
        return 0
    found = re.search(r'RssAnon:\s+(\d+)', status)
    return int(found.group(1)) if found else 0


def run(program, *words):
    """What it printed, with the most anonymous memory seen."""
    with subprocess.Popen([BUILD / program, *map(str, words)], stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_kib(process.pid))
            time.sleep(0.005)
        out = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f'{words}: status {process.returncode}')
    return {**json.loads(out), 'anon_mib': peak / 1024}


def write_new(path):
    """Pages that are in no repository: many that compress well, so that footers and keys are many, then some that do not."""
    rng, block = random.Random(1), bytearray(1 << 20)
    with open(path, 'wb') as f:
        for mib in range(NEW_MIB):
            fresh = FRESH if mib < NEW_MIB - HARD_MIB else 4096
            some = rng.randbytes(256 * fresh)
            for at in range(256):
                block[at * 4096:at * 4096 + fresh] = some[at * fresh:(at + 1) * fresh]
            f.write(block)


def make(gib, work):
    """The folder with the repository, if an earlier run has not made it."""
    folder = pathlib.Path(work, f'vmmig-scale.{gib}')
    if not (folder / 'made').exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        print(json.dumps(run(SCALE, 'make', folder / 'repo', gib)), file=sys.stderr, flush=True)
        (folder / 'made').touch()
    return folder


def one_size(gib, share, work):
    folder = make(gib, work)
    store, new = folder / 'repo', folder / 'new.raw'
    try:
        du = subprocess.run(['du', '-s', '-B1', folder], check=True, stdout=subprocess.PIPE, text=True).stdout
        result = {'gib': gib, 'disk_bytes': int(du.split()[0]), 'share': run(SCALE, 'share', store, share)}
        write_new(new)
        result['new'] = run('tests/unit/repo/repo_tool', f'dir:{store}', 'import', new, 'new', 'raw')
        result['collect'] = run(SCALE, 'collect', store)
    finally:
        shutil.rmtree(folder)
    return result


HEAD = ['TiB', 'disk, GB', 'looked up, pages/s', 'found', 'its memory, MiB', 'import of new data, MB/s',
        'its memory, MiB', 'of at most', 'collection, s', 's per TiB', 'its memory, MiB']


def row(r):
    tib, share, new, collect = r['gib'] / 1024, r['share'], r['new'], r['collect']
    return [f'{tib:.3g}', f'{r["disk_bytes"] / 1e9:.1f}', f'{share["pages"] / share["seconds"]:.0f}',
            f'{share["shared"] / share["pages"]:.2%}', f'{share["anon_mib"]:.0f}', f'{new["size"] / new["seconds"] / 1e6:.0f}',
            f'{new["anon_mib"]:.0f}', f'{LIMIT_BASE + LIMIT_PER_TIB * tib:.0f}', f'{collect["seconds"]:.1f}',
            f'{collect["seconds"] / tib:.1f}', f'{collect["anon_mib"]:.0f}']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('sizes', nargs='*', type=int, metavar='GIB')
    parser.add_argument('--work', default='/var/tmp')
    parser.add_argument('--share', type=int, default=8, metavar='GIB')
    parser.add_argument('--make', action='store_true')
    parser.add_argument('--page', type=pathlib.Path)
    args = parser.parse_args()
    sizes = args.sizes or (64, 256, 1024)
    if args.make:
        for gib in sizes:
            make(gib, args.work)
        return 0
    rows = []
    print(*HEAD, sep='; ', flush=True)
    for gib in sizes:
        result = one_size(gib, args.share, args.work)
        print(json.dumps(result), file=sys.stderr, flush=True)
        rows.append(row(result))
        print(*rows[-1], sep='; ', flush=True)
        if args.page:
            bench_page.write(args.page, __file__, 'How a repository in a folder grows', __doc__.split('\n\n')[2],
                             bench_page.table(HEAD, rows))
    return 0


if __name__ == '__main__':
    sys.exit(main())
