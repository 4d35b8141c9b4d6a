# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at best, all cores together: memcpy, LZ4, SHA-256, the cipher of TLS (AES-256-GCM) and TCP
over loopback by tests/bench/limits.c, the disk by dd of random bytes past the page cache, a Ceph cluster on these cores
by `rados bench` with objects of 4 MiB."""
import json
import os
import re
import subprocess
import tempfile

from cluster import CephCluster
from lab.guests import built

SIZE_MIB = 512
BENCH_S = 5


def machine():
    """{name: bytes a second}, all cores together."""
    said = json.loads(subprocess.run([built('tests/bench/limits')], check=True, capture_output=True, text=True).stdout)
    del said['cores']
    return said


def rate(argv):
    """MB/s, as dd says it."""
    said = subprocess.run(argv, check=True, capture_output=True, text=True,
                          env={'LC_ALL': 'C', 'PATH': '/bin:/usr/bin'})
    return SIZE_MIB * 1.048576 / float(re.search(r', ([\d.]+) s,', said.stderr).group(1))


def disk(folder):
    with tempfile.NamedTemporaryFile(dir='/dev/shm') as source, tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(SIZE_MIB // 4):
            source.write(os.urandom(4 << 20))
        source.flush()
        write = rate(['dd', f'if={source.name}', f'of={file.name}', 'bs=4M', 'oflag=direct', 'conv=fdatasync,notrunc'])
        read = rate(['dd', f'if={file.name}', 'of=/dev/null', 'bs=4M', 'iflag=direct'])
    return {'disk_write': write * 1e6, 'disk_read': read * 1e6}


def cluster():
    found = {}
    with tempfile.TemporaryDirectory(dir='/var/tmp') as folder, CephCluster(folder) as ceph:
        ceph.create_pool('bench')
        for name, words in (('cluster_write', ['write', '--no-cleanup']), ('cluster_read', ['seq'])):
            said = subprocess.run(['rados', '-c', ceph.conf, '-p', 'bench', 'bench', str(BENCH_S), *words], check=True,
                                  capture_output=True, text=True).stdout
            found[name] = float(re.search(r'Bandwidth \(MB/sec\):\s+([\d.]+)', said).group(1)) * (1 << 20)
    return found


def run(results, quick, inputs):
    inputs.mkdir(parents=True, exist_ok=True)
    rounds = 2 if quick else 5
    found = [{**machine(), **disk(inputs)} for _ in range(rounds)]
    for name in found[0]:
        results.add('limits', 'machine', f'{name}_MBps', [run[name] / 1e6 for run in found])
    for name, value in cluster().items():
        results.add('limits', 'machine', f'{name}_MBps', [value / 1e6])
