# SPDX-License-Identifier: Apache-2.0
"""A full cluster and a full disk: writers fail at once and leave nothing, readers go on, delete and gc free space."""
import os
import random
import subprocess

import pytest

from .test_commands import Agent, Way
from .test_repository import MIB, same

FULL = 11


class Ratio:
    """OSDs beyond the ratio at which the cluster takes no more."""

    def __init__(self, request, _folder):
        self.ceph, self.url = request.getfixturevalue('ceph'), request.getfixturevalue('ceph_url')
        self.ratio = self.ceph.command('osd dump')['full_ratio']

    def fill(self):
        self.ceph.set_full(True)

    def free(self):
        self.ceph.set_full(False, self.ratio)

    def end(self):
        self.free()


class Quota:
    """A pool that has used up its quota."""

    def __init__(self, request, _folder):
        self.ceph = request.getfixturevalue('ceph')
        self.ceph.create_pool('small')
        self.url = f'rados:small?conf={self.ceph.conf}'

    def fill(self):
        self.ceph.rados.wait_for_latest_osdmap()
        with self.ceph.rados.open_ioctx('small') as io:
            io.write_full('else', b'something')
        self.ceph.set_quota('small', 1)

    def free(self):
        self.ceph.set_quota('small', 0)

    def end(self):
        self.ceph.delete_pool('small')


class Disk:
    """A file system on which not a block is left."""

    def __init__(self, _request, folder):
        if os.geteuid() != 0:
            pytest.skip('mounting a small file system needs root')
        self.folder = folder / 'small'
        self.folder.mkdir()
        image = folder / 'small.img'
        with open(image, 'wb') as f:
            f.truncate(96 * MIB)
        subprocess.run(['mkfs.ext4', '-q', '-m', '0', image], check=True)
        subprocess.run(['mount', '-o', 'loop', image, self.folder], check=True)
        self.url = f'dir:{self.folder}/repo'

    def fill(self):
        """To the last byte, by somebody else."""
        with open(self.folder / 'filler', 'wb', buffering=0) as f:
            for size in (MIB, 4096, 1):
                try:
                    while True:
                        f.write(bytes(size))
                except OSError:
                    pass

    def free(self):
        (self.folder / 'filler').unlink()

    def end(self):
        subprocess.run(['umount', self.folder], check=True)


PLACES = [Disk, Ratio, Quota]


@pytest.fixture
def place(request, tmp_path):
    made = request.param(request, tmp_path)
    yield made
    made.end()


@pytest.fixture
def way(request, place, tmp_path):
    """An empty repository there."""
    if request.param == 'direct':
        made = Way(['--repo', place.url], place.url)
        made.run('repo', 'init')
        yield made
        return
    folder = tmp_path / 'agent'
    folder.mkdir()
    with Agent(folder, place.url) as agent:
        made = Way(['--socket', agent.socket], place.url)
        made.run('repo', 'init')
        yield made


def noise(path, seed, mib=12):
    path.write_bytes(random.Random(seed).randbytes(mib * MIB))
    return path


@pytest.mark.parametrize('place, way', [
    (Disk, 'direct'), (Disk, 'agent'), (Ratio, 'agent'), (Quota, 'direct'),
    pytest.param(Ratio, 'direct', marks=pytest.mark.full), pytest.param(Quota, 'agent', marks=pytest.mark.full)],
    indirect=True)
def test_full(way, place, tmp_path):
    kept, gone, more = (noise(tmp_path / name, i) for i, name in enumerate(('kept', 'gone', 'more')))
    way.run('image', 'import', kept, 'kept')
    way.run('image', 'import', gone, 'gone')
    before = way.run('repo', 'stat')
    place.fill()
    for _ in range(6):  # of which none uses up what deleting needs
        way.refuses(FULL, 'No space|quota|full', 'image', 'import', more, 'more')
    assert way.names() == ['gone', 'kept']
    way.run('image', 'export', 'kept', tmp_path / 'out')
    assert same(kept, tmp_path / 'out')
    assert way.run('repo', 'scrub')['findings'] == []
    way.run('image', 'delete', 'gone')
    report = way.run('repo', 'gc')
    assert report['packs_removed'] > 0 and report['bytes_freed'] >= 12 * MIB, report
    after = way.run('repo', 'stat')
    assert before['pack_bytes'] - after['pack_bytes'] >= 12 * MIB
    assert way.names() == ['kept']
    way.run('image', 'export', 'kept', tmp_path / 'again')
    assert same(kept, tmp_path / 'again')
    if isinstance(place, Disk):  # what was freed is there for the next writer, but for the ballast
        way.run('image', 'import', noise(tmp_path / 'fits', 4, 4), 'fits')


@pytest.mark.parametrize('place', PLACES, indirect=True)
def test_no_repository_is_made_where_nothing_fits(place):
    place.fill()
    way = Way(['--repo', place.url], place.url)
    way.refuses(FULL, 'No space|quota|full', 'repo', 'init')
    way.refuses(3, 'repository', 'image', 'list')
    place.free()
    way.run('repo', 'init')
    assert way.names() == []
