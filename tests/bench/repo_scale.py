#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""How a repository in a folder behaves as it grows: look-ups, memory and collection at several sizes.

usage: repo_scale.py [--work DIR] [--json FILE] [--share GIB] [GIB...]      (64 256 1024)

For each size tests/bench/repo_scale makes a repository of footers, keys and recipes without payload, imports one more
image of which nothing is new, 4 MiB here and 4 MiB there, and deletes an image of 16 GiB and collects. A TiB takes some
14 GB of disk. Memory is RssAnon, looked at every few milliseconds: pages of the LMDB file are the page cache's.
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_BASE, LIMIT_PER_TIB = 64, 64


def anonymous_kib(pid):
    try:
        status = pathlib.Path(f'/proc/{pid}/status').read_text(encoding='ascii')
    except OSError:
        return 0
    found = re.search(r'RssAnon:\s+(\d+)', status)
    return int(found.group(1)) if found else 0


def run(*words):
    """What the program printed, with the most anonymous memory seen."""
    program = pathlib.Path(os.environ.get('VMMIG_BUILD', ROOT / 'build')) / 'tests/bench/repo_scale'
    with subprocess.Popen([program, *map(str, words)], stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_kib(process.pid))
            time.sleep(0.005)
        out = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f'{words}: status {process.returncode}')
    return {**json.loads(out), 'anon_mib': peak / 1024}


def one_size(gib, share, work):
    folder = pathlib.Path(tempfile.mkdtemp(prefix='vmmig-scale.', dir=work))
    try:
        result = {'gib': gib, 'make': run('make', folder / 'repo', gib)}
        result['share'] = run('share', folder / 'repo', share)
        result['collect'] = run('collect', folder / 'repo')
        du = subprocess.run(['du', '-s', '-B1', folder], check=True, stdout=subprocess.PIPE, text=True).stdout
        result['disk_bytes'] = int(du.split()[0])
    finally:
        shutil.rmtree(folder)
    return result


HEAD = (f'{"TiB":>6} {"disk GB":>8} {"look-ups: pages/s":>18} {"found":>7} {"MiB":>6} {"of at most":>10} '
        f'{"collection s":>13} {"s per TiB":>10} {"MiB":>6}')


def row(r):
    tib, share, collect = r['gib'] / 1024, r['share'], r['collect']
    return (f'{tib:6.2f} {r["disk_bytes"] / 1e9:8.1f} {share["pages"] / share["seconds"]:18.0f} '
            f'{share["shared"] / share["pages"]:7.2%} {share["anon_mib"]:6.0f} {LIMIT_BASE + LIMIT_PER_TIB * tib:10.0f} '
            f'{collect["seconds"]:13.1f} {collect["seconds"] / tib:10.1f} {collect["anon_mib"]:6.0f}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('sizes', nargs='*', type=int, metavar='GIB')
    parser.add_argument('--work', default='/var/tmp')
    parser.add_argument('--share', type=int, default=8, metavar='GIB')
    parser.add_argument('--json', type=pathlib.Path)
    args = parser.parse_args()
    results = []
    print(HEAD, flush=True)
    for gib in args.sizes or (64, 256, 1024):
        results.append(one_size(gib, args.share, args.work))
        print(row(results[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
