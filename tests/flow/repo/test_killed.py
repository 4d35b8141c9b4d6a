# SPDX-License-Identifier: Apache-2.0
"""kill -9 at every named fault point of repo/: the repository opens, committed images verify, nothing else is visible,
and a following collection leaves nothing that is not needed. The points are listed from the sources, so that a new
one is tested as well, or fails here because no operation passes it."""
import glob
import os
import re
import signal

import pytest
from agents import eventually

from .conftest import ROOT, Failed, Repository
from .objects import objects
from .test_repository import MIB, disk, same

POINTS = sorted({point for path in glob.glob(os.path.join(ROOT, 'repo', '*.c'))
                 for point in re.findall(r'FAULT\("(repo\.[^"]+)"\)', open(path).read())})


@pytest.fixture(params=['dir', pytest.param('rados', marks=pytest.mark.full)])
def repository(request, tmp_path):
    url = f'dir:{tmp_path}/repo' if request.param == 'dir' else request.getfixturevalue('ceph_url')
    repository = Repository(url)
    repository.run('init')
    return repository


class Scene:
    """A repository whose operations pass every point; `armed` is killed at one."""

    def __init__(self, repository, folder, point):
        self.repository = repository
        self.point = point
        self.killed = 0
        self.files = {}
        self.leased = None
        first, second = disk(folder / 'first.raw', 8), disk(folder / 'second.raw', 8, seed=2)
        mixed = folder / 'mixed.raw'
        a, b = first.read_bytes(), second.read_bytes()
        mixed.write_bytes(b''.join((b if i % 2 else a)[i * MIB:i * MIB + MIB] for i in range(8)))
        self.source = {'first': first, 'second': second, 'mixed': mixed}

    def armed(self, *words):
        """True if it ended, False if it was killed."""
        try:
            self.repository.run(*words, faults=f'{self.point}=crash')
            return True
        except Failed as failed:
            assert failed.status == -signal.SIGKILL, failed
            self.killed += 1
            return False

    def put(self, name, source, *parent):
        committed = self.armed('import', self.source[source], name, 'raw', *parent)
        if committed or name in self.repository.names():
            self.files[name] = self.source[source]

    def delete(self, name):
        if self.armed('delete', name) or name not in self.repository.names():
            self.files.pop(name)

    def check(self, folder):
        """What a user sees: the committed images, whole, and nothing else."""
        assert self.repository.names() == sorted(self.files)
        out = folder / 'out.raw'
        for name, source in self.files.items():
            self.repository.run('export', name, out)
            assert same(source, out), name
            out.unlink()
        lines = self.repository.run('scrub')
        assert len(lines) == 1, lines


    def lease(self, name):
        """As a clone holds what it reads."""
        if name in self.files:
            self.repository.run('lease', name, 'clone')
            self.leased = self.files[name]

    def end_lease(self, folder):
        if self.leased:
            out = folder / 'leased.raw'
            self.repository.run('unlease', 'clone', out)
            assert same(self.leased, out), 'what is leased'

    def bear(self):
        """A child of an image, whatever was left behind by who was killed."""
        for name in sorted(self.files)[-1:]:
            self.repository.run('import', self.source['mixed'], f'{name}-child', 'raw', name)
            self.files[f'{name}-child'] = self.source['mixed']


def damage(url):
    """One record of the first pack, so that there is something to heal."""
    store = objects(url)
    pack = store.names('pack.')[0]
    data = bytearray(store.read(pack))
    data[32 + 8] ^= 1
    store.write(pack, bytes(data))


def catalogue_keys(store):
    return [key for shard in range(256) for key in store.pairs(f'cat.{shard:02x}')]


def writers(url):
    return [key for key in catalogue_keys(objects(url)) if key.startswith('w:')]


def acknowledge(scene):
    """An import that meets a collection, which it answers."""
    words = ('import', scene.source['second'], 'late')
    late = scene.repository.start(*words, faults=f'repo.register=delay:2000,{scene.point}=crash')
    with late:
        eventually('the registration of the import', lambda: writers(scene.repository.url))
        scene.repository.run('collect', 20000)
        late.communicate(timeout=60)
    scene.killed += late.returncode == -signal.SIGKILL
    if 'late' in scene.repository.names():
        scene.files['late'] = scene.source['second']


def play(scene, folder):
    repository = scene.repository
    for step in (lambda: scene.put('first', 'first'),
                 lambda: scene.put('again', 'first', 'first'),
                 lambda: scene.put('mixed', 'mixed'),
                 lambda: scene.lease('mixed'),
                 lambda: 'first' in scene.files and scene.delete('first'),
                 lambda: 'again' in scene.files and scene.delete('again'),
                 lambda: acknowledge(scene),
                 lambda: scene.armed('collect', 1),
                 lambda: scene.armed('collect', 1, 'recompress', 1),
                 lambda: scene.armed('collect', 1)):
        step()
        if scene.killed:
            return
    scene.check(folder)
    damage(repository.url)
    repository.run('scrub')
    scene.armed('scrub')
    if 'mixed' in scene.files and not scene.killed:
        scene.put('heals', 'mixed')
    if 'late' in scene.files and not scene.killed:
        scene.put('heals-too', 'second')
    for name, source in (('healed', 'mixed'), ('healed-too', 'second')):
        repository.run('import', scene.source[source], name)
        scene.files[name] = scene.source[source]


def left_over(url):
    """Everything on the store that only what is stored, or what is at work, needs."""
    store = objects(url)
    rest = store.names('pack.') + store.names('tree.')
    rest += [key for key in catalogue_keys(store) if key[:2] in ('w:', 'p:', 'f:', 'l:')]
    rest += [key for name in ['quarantine'] + [f'scrub.{i:02x}' for i in range(256)]
             for key in store.pairs(name)]
    return rest


def test_what_a_dead_writer_pinned_is_let_go(repository, tmp_path):
    """The child was committed, and stored nothing: no list is open that would take the pin away."""
    raw = disk(tmp_path / 'raw', 8)
    repository.run('import', raw, 'parent')
    with pytest.raises(Failed) as killed:
        repository.run('import', raw, 'child', 'raw', 'parent', faults='repo.committed=crash')
    assert killed.value.status == -signal.SIGKILL
    assert repository.names() == ['child', 'parent']
    assert [key for key in catalogue_keys(objects(repository.url)) if key.startswith('p:')]
    repository.run('delete', 'parent')
    repository.run('delete', 'child')
    repository.run('collect', 1)
    assert left_over(repository.url) == []


@pytest.mark.parametrize('point', POINTS)
def test_killed(repository, tmp_path, monkeypatch, point):
    if point == 'repo.index-split':
        monkeypatch.setenv('VMMIG_TUNE', '0 0 8')  # shards so small that they are split
    scene = Scene(repository, tmp_path, point)
    play(scene, tmp_path)
    assert scene.killed == 1, f'no operation passes {point}'
    scene.check(tmp_path)
    scene.bear()
    repository.second_reader('check')
    for _ in range(2):
        repository.run('collect', 1)
    collected, = repository.run('collect', 1)
    assert collected['condemned'] == 0 and collected['fenced'] == 0, collected
    scene.check(tmp_path)
    scene.end_lease(tmp_path)
    for name in list(scene.files):
        repository.run('delete', name)
    repository.run('collect', 1)
    assert left_over(repository.url) == []
