# SPDX-License-Identifier: Apache-2.0
"""Disk images in and out of a repository, as a user sees it."""
import filecmp
import functools
import json
import os
import pathlib
import random
import re
import subprocess
import tempfile
import time

import pytest

from .conftest import Failed, Repository

MIB = 1 << 20


@functools.lru_cache(None)
def made_disk(mib, seed):
    """Each disk is made once for all tests: that takes longer than most of what they do with it."""
    rng = random.Random(seed)
    file = tempfile.NamedTemporaryFile(prefix='vmmig-disk.')  # pylint: disable=consider-using-with
    for at in range(0, mib * MIB, 64 << 10):
        kind = rng.randrange(8)
        file.seek(at)
        if kind < 5:
            words = [rng.randbytes(rng.randrange(3, 12)) for _ in range(400)]
            file.write(b''.join(rng.choices(words, k=10000))[:64 << 10].ljust(64 << 10, b'.'))
        elif kind == 5:
            file.write(rng.randbytes(64 << 10))
        elif kind == 6:
            file.write(bytes(64 << 10))
    file.truncate(mib * MIB)
    return file


def disk(path, mib, seed=1):
    """A disk as disks are: text-like blocks, some random ones, holes and written zeros."""
    subprocess.run(['cp', '--sparse=auto', made_disk(mib, seed).name, path], check=True)
    return path


def same(a, b):
    return filecmp.cmp(a, b, shallow=False)


@pytest.fixture
def raw(tmp_path):
    return disk(tmp_path / 'disk.raw', 32)


def test_raw_goes_in_and_comes_out_with_its_holes(repository, raw, tmp_path):
    report, = repository.run('import', raw, 'debian12')
    assert report['size'] == 32 * MIB
    assert report['zero'] > 0
    out = tmp_path / 'out.raw'
    repository.run('export', 'debian12', out)
    assert same(raw, out)
    assert os.stat(out).st_blocks <= os.stat(raw).st_blocks
    assert repository.names() == ['debian12']


def test_a_second_reader_reads_it(repository, raw, tmp_path):
    repository.run('import', raw, 'debian12')
    out = tmp_path / 'out.raw'
    repository.second_reader('read', 'debian12', 'disk0.raw', out)
    assert same(raw, out)


def test_sizes_that_are_no_multiple_of_anything(repository, tmp_path):
    for size in (1, 4097, 5 * MIB - 1):
        path = tmp_path / f'{size}.raw'
        path.write_bytes(random.Random(size).randbytes(size))
        repository.run('import', path, f'size-{size}')
        repository.run('export', f'size-{size}', tmp_path / f'{size}.out')
        assert same(path, tmp_path / f'{size}.out')


@pytest.mark.parametrize('form', ['qcow2', 'vmdk', 'qcow2-compressed'])
def test_other_formats_are_the_same_image(dir_repository, raw, tmp_path, form):
    path = tmp_path / f'disk.{form}'
    options = ['-c', '-O', 'qcow2'] if form == 'qcow2-compressed' else ['-O', form]
    subprocess.run(['qemu-img', 'convert', *options, raw, path], check=True)
    dir_repository.run('import', raw, 'raw')
    report, = dir_repository.run('import', path, 'other')
    assert report['new'] * 4096 < 32 * MIB / 100
    assert dir_repository.run('diff', 'raw', 'other') == []
    dir_repository.run('export', 'other', tmp_path / 'out.raw')
    assert same(raw, tmp_path / 'out.raw')


def test_an_image_upon_another_is_taken_only_when_asked(dir_repository, raw, tmp_path):
    top = tmp_path / 'top.qcow2'
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', raw, '-F', 'raw', top], check=True)
    with pytest.raises(Failed) as failed:
        dir_repository.run('import', top, 'top')
    assert failed.value.kind == 'refused'
    assert str(raw) in failed.value.message and '\n' not in failed.value.text
    dir_repository.run('import', top, 'top', 'qcow2')
    dir_repository.run('export', 'top', tmp_path / 'out.raw')
    assert same(raw, tmp_path / 'out.raw')


def test_a_raw_disk_that_poses_as_qcow2(dir_repository, raw, tmp_path):
    """What a guest wrote into its raw disk does not open files of the host."""
    evil = tmp_path / 'evil.raw'
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', raw, '-F', 'raw', evil, '64M'],
                   check=True)
    with pytest.raises(Failed) as failed:
        dir_repository.run('import', evil, 'evil')
    assert failed.value.kind == 'refused'
    dir_repository.run('import', evil, 'evil', 'raw')
    dir_repository.run('export', 'evil', tmp_path / 'out.raw')
    assert same(evil, tmp_path / 'out.raw')


def broken_qcow2(tmp_path, raw, how):
    path = tmp_path / 'broken.qcow2'
    subprocess.run(['qemu-img', 'convert', '-O', 'qcow2', raw, path], check=True)
    if how == 'truncated':
        os.truncate(path, 300)
    elif how == 'cut':
        os.truncate(path, os.path.getsize(path) // 2)
    elif how == 'looping':
        subprocess.run(['qemu-img', 'rebase', '-u', '-f', 'qcow2', '-b', path, '-F', 'qcow2', path],
                       check=True)
    return path


@pytest.mark.parametrize('how', ['truncated', 'cut', 'looping'])
def test_a_broken_qcow2_is_one_clear_line(dir_repository, raw, tmp_path, how):
    path = broken_qcow2(tmp_path, raw, how)
    with pytest.raises(Failed) as failed:
        dir_repository.run('import', path, 'broken', 'qcow2')
    assert '\n' not in failed.value.text and 'broken.qcow2' in failed.value.text
    assert dir_repository.names() == []


def test_a_file_upon_a_broken_qcow2_is_one_clear_line(dir_repository, raw, tmp_path):
    """QEMU would read what the base lacks as zeros, though the file itself is sound."""
    base, top = broken_qcow2(tmp_path, raw, 'cut'), tmp_path / 'top.qcow2'
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', top, '64M'], check=True)
    with pytest.raises(Failed) as failed:
        dir_repository.run('import', top, 'top', 'qcow2')
    assert failed.value.kind == 'corrupt' and '\n' not in failed.value.text
    assert 'broken.qcow2' in failed.value.message
    assert dir_repository.names() == []


@pytest.mark.parametrize('words, kind', [
    (['import', '/nonexistent', 'a'], 'not-found'),
    (['import', '/etc', 'a', 'raw'], 'usage'),
    (['import', '/dev/null', 'a', 'raw'], 'usage'),
    (['import', '{raw}', '../a'], 'usage'),
    (['import', '{raw}', 'a', 'raw', 'nobody'], 'not-found'),
    (['export', 'nobody', '{raw}.out'], 'not-found'),
    (['export', 'there', '{raw}'], 'conflict'),
    (['export', 'there', '/nonexistent/x'], 'not-found'),
    (['import', '{raw}', 'there'], 'conflict'),
    (['delete', 'nobody'], 'not-found'),
    (['show', 'nobody'], 'not-found'),
])
def test_bad_input_is_one_clear_line(dir_repository, raw, words, kind):
    dir_repository.run('import', raw, 'there')
    with pytest.raises(Failed) as failed:
        dir_repository.run(*[word.format(raw=raw) for word in words])
    assert failed.value.kind == kind and '\n' not in failed.value.text
    assert dir_repository.names() == ['there']


def test_a_version_shares_with_its_parent(repository, raw, tmp_path):
    repository.run('import', raw, 'monday')
    with open(raw, 'r+b') as f:
        f.seek(10 * MIB)
        f.write(os.urandom(4096))
    report, = repository.run('import', raw, 'tuesday', '-', 'monday')
    assert report['new'] == 1
    diff = repository.run('diff', 'monday', 'tuesday')
    assert diff == [{'file': 'disk0.raw', 'offset': 10 * MIB, 'len': 4096}]
    repository.run('delete', 'monday')
    repository.run('export', 'tuesday', tmp_path / 'out.raw')
    assert same(raw, tmp_path / 'out.raw')
    show, = repository.run('show', 'tuesday')
    assert show['parent'] == 'monday' and show['shared'] == 0


CRASH_POINTS = ['repo.register', 'repo.pack', 'repo.pack-stored', 'repo.tree', 'repo.tree-stored',
                'repo.commit', 'repo.committed']


@pytest.mark.parametrize('point', CRASH_POINTS)
def test_an_import_killed_at_any_point(repository, raw, tmp_path, point):
    repository.run('import', disk(tmp_path / 'old.raw', 8, seed=2), 'old')
    with pytest.raises(Failed) as failed:
        repository.run('import', raw, 'new', faults=f'{point}=crash')
    assert failed.value.status == -9
    committed = point == 'repo.committed'
    assert repository.names() == (['new', 'old'] if committed else ['old'])
    repository.second_reader('check')
    if not committed:
        repository.run('import', raw, 'new')
    repository.run('export', 'new', tmp_path / 'out.raw')
    assert same(raw, tmp_path / 'out.raw')


def test_a_delete_killed_deletes_nothing_or_all(repository, raw):
    repository.run('import', raw, 'a')
    with pytest.raises(Failed):
        repository.run('delete', 'a', faults='repo.delete=crash')
    assert repository.names() == ['a']
    with pytest.raises(Failed):
        repository.run('delete', 'a', faults='repo.deleted=crash')
    assert repository.names() == []


def test_repacking_as_users_and_a_second_reader_see_it(repository, raw, tmp_path):
    """Before, between (recipes lead through forwardings, by a killed collection) and after."""
    mixed = tmp_path / 'mixed.raw'
    first, second = raw.read_bytes(), disk(tmp_path / 'other.raw', 32, seed=2).read_bytes()
    mixed.write_bytes(b''.join((second if i % 2 else first)[i * MIB:i * MIB + MIB]
                               for i in range(32)))
    repository.run('import', raw, 'old')
    repository.run('import', mixed, 'mixed')
    repository.run('delete', 'old')
    repository.run('collect')
    before, = repository.run('stat')
    with pytest.raises(Failed):
        repository.run('collect', 1000, 'recompress', faults='repo.collect-deleted=crash')
    repository.second_reader('check')
    repository.run('export', 'mixed', tmp_path / 'between.raw')
    assert same(mixed, tmp_path / 'between.raw')
    done, = repository.run('collect', 1000, 'recompress')
    assert done['settled'] == 1
    repository.run('collect', 1000)
    after, = repository.run('stat')
    assert after['pack_bytes'] < before['pack_bytes'] * 0.8
    repository.second_reader('check')
    repository.run('export', 'mixed', tmp_path / 'after.raw')
    assert same(mixed, tmp_path / 'after.raw')
    again, = repository.run('import', mixed, 'again')
    assert again['new'] == 0


COLLECT_POINTS = ['repo.collect-listed', 'repo.collect-made', 'repo.collect-published',
                  'repo.collect-raised', 'repo.collect-marked', 'repo.collect-claimed',
                  'repo.collect-removed', 'repo.collect-deleted']


@pytest.mark.parametrize('point', COLLECT_POINTS)
def test_a_collection_killed_at_any_point(repository, raw, tmp_path, point):
    repository.run('import', raw, 'kept')
    repository.run('import', disk(tmp_path / 'old.raw', 24, seed=2), 'old')
    repository.run('import', disk(tmp_path / 'later.raw', 8, seed=3), 'later')
    repository.run('delete', 'old')
    before, = repository.run('stat')
    with pytest.raises(Failed) as failed:
        repository.run('collect', faults=f'{point}=crash')
    assert failed.value.status == -9
    repository.second_reader('check')
    repository.run('import', raw, 'new')  # beside a list that may be open
    repository.run('delete', 'later')  # which does not know of it
    done, = repository.run('collect', 1000)
    assert done['adopted'] == (point not in COLLECT_POINTS[:2])
    after, = repository.run('stat')
    assert after['packs'] < before['packs']
    again, = repository.run('collect', 1000)
    assert again['condemned'] == 0, again
    repository.run('delete', 'kept')
    repository.run('export', 'new', tmp_path / 'out.raw')
    assert same(raw, tmp_path / 'out.raw')
    repository.run('delete', 'new')
    repository.run('collect', 1000)
    empty, = repository.run('stat')
    assert empty['packs'] + empty['trees'] == 0


def test_a_killed_import_leaves_nothing_once_collected(repository, raw):
    with pytest.raises(Failed):
        repository.run('import', raw, 'new', faults='repo.commit=crash')
    stat, = repository.run('stat')
    assert stat['packs'] > 0
    collected, = repository.run('collect', 1)
    assert collected['fenced'] == 1 and collected['packs'] == stat['packs']
    stat, = repository.run('stat')
    assert stat['packs'] + stat['trees'] == 0


def test_a_second_import_finds_what_the_first_one_scattered(dir_repository, tmp_path):
    """Single new pages are gathered into records of their own, and few of them are in the index: they are found by what lay
    beside them."""
    path, rng = tmp_path / 'scattered.raw', random.Random(3)
    with open(path, 'wb') as f:
        for _ in range(128):
            f.write(rng.randbytes(MIB // 2) + bytes(MIB // 4) + rng.randbytes(4096) + bytes(MIB // 4 - 4096))
    first, = dir_repository.run('import', path, 'first', 'raw')
    again, = dir_repository.run('import', path, 'again', 'raw')
    print(first, again)
    assert first['new'] == 128 * 129
    assert again['new'] < first['new'] / 1000 and again['stored'] < first['stored'] / 1000


def anonymous_peak(process):
    """MiB of memory that is the process's own, at most, until it ends; looked at every ms or so."""
    peak = 0
    while process.poll() is None:
        found = re.search(r'RssAnon:\s+(\d+)', pathlib.Path(f'/proc/{process.pid}/status').read_text())
        peak = max(peak, int(found[1]) if found else 0)
        time.sleep(0.001)
    return peak / 1024


def demanding(path, seed, changed):
    """What takes an importer the most memory: many new pages that compress well fill the footer cache and the index's
    updates, then pages that do not compress fill packs as fast as they are read. `changed`: one page in so many is
    another than with the same seed and 0."""
    rng = random.Random(seed)
    with open(path, 'wb') as f:
        for mib in range(900):
            fresh = 380 if mib < 800 else 4096
            random_bytes, block = rng.randbytes(256 * fresh), bytearray(MIB)
            for page in range(256):
                block[page * 4096:page * 4096 + fresh] = random_bytes[page * fresh:(page + 1) * fresh]
                if changed and page % changed == 0:
                    block[page * 4096] ^= 1
            f.write(block)


def test_memory_is_bounded(repository, tmp_path):
    """What repo/repo.h promises, for much new data, and for as much of which most is shared."""
    peaks = []
    for changed in (0, 10):
        path = tmp_path / f'{changed}.raw'
        demanding(path, 1, changed)
        with repository.start('import', path, f'image-{changed}', 'raw') as process:
            peaks.append(anonymous_peak(process))
            assert process.returncode == 0, process.stderr.read()
            done = json.loads(process.stdout.read())
        os.unlink(path)
        print(f'RssAnon at most {peaks[-1]:.1f} MiB;', done)
        assert done['shared' if changed else 'new'] > 150000  # pages, or the test is none
    assert max(peaks) <= 64, peaks
