# SPDX-License-Identifier: Apache-2.0
"""What is damaged or lost is found, named with the images it touches, and never returned as data."""
import os
import random
import re
import struct
import time

import pytest

from .conftest import Failed
from .objects import objects
from .test_repository import MIB, disk, same


@pytest.fixture
def raw(tmp_path):
    return disk(tmp_path / 'disk.raw', 12)


@pytest.fixture
def other(tmp_path):
    path = tmp_path / 'other.raw'
    path.write_bytes(random.Random(5).randbytes(4 * MIB))
    return path


def scrub(repository, *words):
    """(findings, images touched, report)"""
    lines = repository.run('scrub', *words)
    return ([line['damage'] for line in lines if 'damage' in line],
            sorted(line['image'] for line in lines if 'image' in line), lines[-1])


def two_images(repository, raw, other):
    """`a` and `b` share nothing; the packs and trees of a."""
    repository.run('import', raw, 'a')
    store = objects(repository.url)
    names = store.names('pack.') + store.names('tree.')
    repository.run('import', other, 'b')
    return store, names


def fails_and_leaves_nothing(repository, image, out):
    with pytest.raises(Failed) as failed:
        repository.run('export', image, out)
    assert failed.value.kind == 'corrupt' and '\n' not in failed.value.text, failed.value.text
    assert '; "vmmig repo scrub" names all that is damaged' in failed.value.text
    assert not out.exists()


def flip(store, name, at):
    data = bytearray(store.read(name))
    data[at] ^= 0x10
    store.write(name, bytes(data))


def records(data):
    """(offset, length, pages) of the records in a pack, and where its footer begins."""
    n_records, n_pages = struct.unpack_from('<II', data, len(data) - 32)
    footer = len(data) - (12 * n_records + 32 * n_pages + 32)
    entries = [struct.unpack_from('<IIBBH', data, footer + 12 * i) for i in range(n_records)]
    return [(8 * offset, length, pages) for offset, length, pages, _, _ in entries], footer


def test_a_flipped_byte_in_a_record_and_how_it_is_healed(repository, raw, other, tmp_path):
    store, names = two_images(repository, raw, other)
    pack = names[0]
    places, _ = records(store.read(pack))
    offset, length, _ = places[len(places) // 2]
    flip(store, pack, offset + length // 2)
    fails_and_leaves_nothing(repository, 'a', tmp_path / 'out.raw')
    found, touched, report = scrub(repository)
    assert found == [f'{pack.replace(".", " ")}, record at {offset}: its checksum is wrong']
    assert touched == ['a'] and report['damaged'] == 1
    assert list(store.pairs('quarantine')) == [pack]
    fails_and_leaves_nothing(repository, 'a', tmp_path / 'out.raw')
    repository.run('export', 'b', tmp_path / 'b.raw')
    assert same(other, tmp_path / 'b.raw')
    # Nobody shares it: the next writer of those pages stores them anew, which heals the record.
    again, = repository.run('import', raw, 'again')
    assert 0 < again['new'] <= 16
    repository.run('export', 'a', tmp_path / 'a.raw')
    assert same(raw, tmp_path / 'a.raw')
    found, touched, report = scrub(repository)
    assert (found, touched, report['healed']) == ([], [], 1)
    repository.second_reader('check')
    # Repacking takes the pack away for good.
    repository.run('collect', 1000, 'repack')
    repository.run('collect', 1000)
    assert pack not in store.names('pack.') and not store.pairs('quarantine')
    found, touched, report = scrub(repository)
    assert (found, touched, report['healed']) == ([], [], 0)
    repository.run('export', 'a', tmp_path / 'a2.raw')
    assert same(raw, tmp_path / 'a2.raw')


def test_what_healed_a_record_is_damaged_in_turn(repository, raw, other, tmp_path):
    store, names = two_images(repository, raw, other)
    places, _ = records(store.read(names[0]))
    flip(store, names[0], places[3][0] + 20)
    for number in range(3):
        found, touched, report = scrub(repository)
        assert len(found) == 1 + number and 'a' in touched and report['healed'] == 0, found
        fails_and_leaves_nothing(repository, 'a', tmp_path / 'out.raw')
        before = store.names('pack.')
        repository.run('import', raw, f'again-{number}')
        repository.run('export', 'a', tmp_path / f'{number}.raw')
        assert same(raw, tmp_path / f'{number}.raw')
        assert scrub(repository)[1] == []
        healed, = set(store.names('pack.')) - set(before)
        flip(store, healed, records(store.read(healed))[0][0][0] + 20)


def test_a_scrub_heals_with_what_is_stored_elsewhere(repository, raw, tmp_path):
    """Stored twice at the same time, so that neither import knew of the other."""
    repository.run('import', raw, 'a')
    store = objects(repository.url)
    mine = store.names('pack.')
    saved = {f'index.{i:06x}': store.pairs(f'index.{i:06x}') for i in range(16)}
    for name in saved:
        store.remove_map(name)
    repository.run('import', raw, 'b')
    assert len(store.names('pack.')) == 2 * len(mine)
    places, _ = records(store.read(mine[0]))
    for offset, length, _ in places[:3]:
        flip(store, mine[0], offset + length - 1)
    found, touched, report = scrub(repository)
    assert len(found) == 3 and touched == ['a']
    found, touched, report = scrub(repository, 0, 'heal')
    assert (found, touched, report['healed']) == ([], [], 3)
    repository.run('export', 'a', tmp_path / 'a.raw')
    assert same(raw, tmp_path / 'a.raw')


def test_a_record_that_is_not_what_its_identity_says(repository, raw, other, tmp_path):
    """All checksums are right, as a host with a bad memory would leave it: a scrub alone can tell."""
    import xxhash
    store, names = two_images(repository, raw, other)
    pack = names[0]
    data = bytearray(store.read(pack))
    places, footer = records(data)
    data[footer + 12 * len(places) + 8] ^= 1
    data[-8:] = struct.pack('<Q', xxhash.xxh3_64_intdigest(bytes(data[footer:-8]), seed=int(pack[5:], 16)))
    store.write(pack, bytes(data))
    found, touched, report = scrub(repository)
    assert found == [f'{pack.replace(".", " ")}, record at 32: its pages are not those that the footer names']
    assert touched == ['a']
    fails_and_leaves_nothing(repository, 'a', tmp_path / 'out.raw')


@pytest.mark.parametrize('where', ['header', 'footer', 'trailer'])
def test_a_flipped_byte_around_the_records(repository, raw, other, tmp_path, where):
    store, names = two_images(repository, raw, other)
    pack = names[0]
    size = len(store.read(pack))
    flip(store, pack, {'header': 3, 'footer': size - 300, 'trailer': size - 14}[where])
    found, touched, report = scrub(repository)
    assert len(found) == 1 and pack[5:] in found[0] and touched == ['a'], found
    # Every record is whole, and says so itself: the image can be read, and be stored again.
    repository.run('export', 'a', tmp_path / 'a.raw')
    assert same(raw, tmp_path / 'a.raw')
    again, = repository.run('import', raw, 'again')
    assert again['new'] > 0
    # Repacking saves what the pack holds.
    repository.run('delete', 'again')
    repository.run('collect', 1000, 'repack')
    repository.run('collect', 1000)
    assert pack not in store.names('pack.')
    assert scrub(repository)[:2] == ([], [])
    repository.run('export', 'a', tmp_path / 'a2.raw')
    assert same(raw, tmp_path / 'a2.raw')


def test_a_truncated_pack(repository, raw, other, tmp_path):
    store, names = two_images(repository, raw, other)
    pack = names[0]
    data = store.read(pack)
    store.write(pack, data[:len(data) // 2])
    fails_and_leaves_nothing(repository, 'a', tmp_path / 'out.raw')
    found, touched, report = scrub(repository)
    assert len(found) == 1 and pack[5:] in found[0] and touched == ['a'], found
    fails_and_leaves_nothing(repository, 'a', tmp_path / 'out.raw')
    repository.run('export', 'b', tmp_path / 'b.raw')
    assert same(other, tmp_path / 'b.raw')
    repository.run('collect', 1000, 'repack')
    repository.run('delete', 'a')
    repository.run('collect', 1000)
    assert scrub(repository)[2]['damaged'] == 0
    repository.run('import', raw, 'a')
    repository.run('export', 'a', tmp_path / 'a.raw')
    assert same(raw, tmp_path / 'a.raw')


def test_a_lost_pack(repository, raw, other, tmp_path):
    store, names = two_images(repository, raw, other)
    store.remove(names[0])
    fails_and_leaves_nothing(repository, 'a', tmp_path / 'out.raw')
    found, touched, report = scrub(repository)
    assert found == [f'{names[0].replace(".", " ")}, which images need, is gone'] and touched == ['a']
    again, = repository.run('import', raw, 'again')
    assert again['new'] > 0
    repository.run('export', 'again', tmp_path / 'again.raw')
    assert same(raw, tmp_path / 'again.raw')
    repository.run('delete', 'a')
    repository.run('collect', 1000)
    assert scrub(repository)[:2] == ([], [])


def test_a_damaged_and_a_lost_tree(repository, raw, other, tmp_path):
    store, names = two_images(repository, raw, other)
    tree = names[-1]
    whole = store.read(tree)
    for damage in ('flip', 'remove'):
        if damage == 'flip':
            flip(store, tree, len(whole) - 5)
        else:
            store.remove(tree)
        with pytest.raises(Failed) as failed:
            repository.run('export', 'a', tmp_path / 'out.raw')
        assert tree[5:] in failed.value.text
        found, touched, report = scrub(repository)
        assert found and all(tree[5:] in line for line in found) and touched == ['a'], found
        repository.run('export', 'b', tmp_path / f'b-{damage}.raw')
        with pytest.raises(Failed) as failed:  # what it refers to is not known
            repository.run('collect')
        assert 'image a' in failed.value.text
    repository.run('delete', 'a')
    repository.run('collect', 1000)
    assert scrub(repository)[:2] == ([], [])


def test_lost_shards_of_the_index_and_its_rebuilding(repository, raw, other, tmp_path):
    store, _ = two_images(repository, raw, other)
    for i in range(16):
        store.remove_map(f'index.{i:06x}')
    repository.run('export', 'a', tmp_path / 'a.raw')
    assert same(raw, tmp_path / 'a.raw')
    assert scrub(repository)[:2] == ([], [])
    rebuilt, = repository.run('rebuild-index')
    assert rebuilt['packs'] == len(store.names('pack.'))
    again, = repository.run('import', raw, 'again')
    assert again['new'] == 0 and again['stored'] < 2 * MIB // 1000


def test_a_stale_recipe(repository, raw, other, tmp_path):
    """The catalogue's entry of an image comes back, as from an old backup, after its packs were collected."""
    store, _ = two_images(repository, raw, other)
    entry = entry_of(store, 'a')
    repository.run('delete', 'a')
    repository.run('collect', 1000)
    store.set(entry[0], 'n:a', entry[1])
    with pytest.raises(Failed):
        repository.run('export', 'a', tmp_path / 'out.raw')
    assert not (tmp_path / 'out.raw').exists()
    found, touched, report = scrub(repository)
    assert found and touched == ['a']
    repository.run('export', 'b', tmp_path / 'b.raw')
    assert same(other, tmp_path / 'b.raw')
    repository.run('delete', 'a')
    repository.run('collect', 1000)
    assert scrub(repository)[:2] == ([], [])


def entry_of(store, name):
    (found,) = [(f'cat.{shard:02x}', value) for shard in range(256)
                for key, value in store.pairs(f'cat.{shard:02x}').items() if key == f'n:{name}']
    return found


# The version, the size of the file, its root's offset and checksum, the image's own checksum.
@pytest.mark.parametrize('at', [0, 46, 58, 70, -1])
def test_a_damaged_entry_of_the_catalogue(dir_repository, raw, other, tmp_path, at):
    """Neither a smaller file nor zeros are what the image was; the others go on."""
    repository = dir_repository
    store, _ = two_images(repository, raw, other)
    shard, value = entry_of(store, 'a')
    repository.run('import', raw, 'same')  # whose nodes are those of a
    damaged = bytearray(value)
    damaged[at] ^= 0x40
    store.set(shard, 'n:a', bytes(damaged))
    says = "the catalogue's entry of image a is damaged; deleting the image removes it"
    with pytest.raises(Failed) as failed:
        repository.run('export', 'a', tmp_path / 'out.raw')
    assert failed.value.text == f'corrupt: {says}'
    assert not (tmp_path / 'out.raw').exists()
    found, touched, report = scrub(repository)
    assert found == [says]
    assert touched == ['a'] and report['damaged'] == report['touched'] == 1
    for name, source in ('b', other), ('same', raw):
        repository.run('export', name, tmp_path / name)
        assert same(source, tmp_path / name)
    with pytest.raises(Failed) as failed:  # what it refers to is not known
        repository.run('collect')
    assert failed.value.kind == 'corrupt' and 'image a is damaged' in failed.value.text
    assert repository.run('stat')[0]['images'] == 2
    repository.run('delete', 'a')
    repository.run('collect', 1000)
    assert scrub(repository)[:2] == ([], [])


def test_a_damaged_lease(dir_repository, raw, other):
    repository = dir_repository
    store, _ = two_images(repository, raw, other)
    repository.run('lease', 'a', 'web1')
    (shard, key, value), = [(f'cat.{shard:02x}', key, value) for shard in range(256)
                            for key, value in store.pairs(f'cat.{shard:02x}').items() if key[:2] == 'l:']
    store.set(shard, key, value[:-1] + bytes([value[-1] ^ 1]))
    found, touched, _ = scrub(repository)
    assert len(found) == 1 and key in found[0] and 'web1' in found[0] and touched == []
    with pytest.raises(Failed) as failed:
        repository.run('collect')
    assert 'web1' in failed.value.text


def test_a_registration_that_nobody_wrote_is_fenced(dir_repository, raw, other):
    """Neither its key nor its name is what vmmig makes of them: it is erased by what was read."""
    repository = dir_repository
    store, _ = two_images(repository, raw, other)
    store.set('cat.00', 'w:00000000000000AB', struct.pack('<QQ', 0, 0) + b'name\0and more')
    repository.run('delete', 'a')
    collected, = repository.run('collect', 1)
    assert collected['fenced'] == 1
    assert not [key for key in store.pairs('cat.00') if key[:2] == 'w:']
    assert scrub(repository)[:2] == ([], [])


def test_keys_that_vmmig_cannot_have_written(repository, raw, other, tmp_path):
    """Too long for where keys are kept: the map is named, and nothing is removed."""
    store, _ = two_images(repository, raw, other)
    store.set('condemned.00', 'a' * 400, b'c')
    store.set('cat.00', 'f:' + 'a' * 400, b'x')
    for _ in range(2):
        with pytest.raises(Failed) as failed:
            repository.run('collect', 1)
        assert failed.value.status == 12 and re.search('map (condemned|cat).00 ', failed.value.text)
    repository.run('export', 'b', tmp_path / 'b.raw')
    assert same(other, tmp_path / 'b.raw')


def test_a_stray_file_among_the_packs(dir_repository, raw, other):
    store, names = two_images(dir_repository, raw, other)
    before, = dir_repository.run('stat')
    folder = os.path.dirname(store.path(names[0]))
    for name in ('pack.x y', 'pack.0000000000000001.old', 'notes'):
        with open(os.path.join(folder, name), 'wb') as f:
            f.write(b'x')
    after, = dir_repository.run('stat')
    assert after['packs'] == before['packs']
    assert scrub(dir_repository)[:2] == ([], [])
    dir_repository.run('rebuild-index')


def test_a_scrub_goes_on_where_one_was_killed(repository, tmp_path):
    path = tmp_path / 'random.raw'
    path.write_bytes(random.Random(3).randbytes(16 * MIB))
    repository.run('import', path, 'a')
    small = tmp_path / 'small.raw'
    for i in range(66):  # scrubs remember packs by 64
        small.write_bytes(random.Random(100 + i).randbytes(4096))
        repository.run('import', small, f'small-{i}')
    packs = repository.run('stat')[0]['packs']
    # Killed when it has remembered some packs, and is about to remember the others.
    with pytest.raises(Failed) as killed:
        repository.run('scrub', 3600, faults='repo.scrub-remember=crash@2')
    assert killed.value.status == -9
    first = scrub(repository, 3600)[2]
    assert first['skipped'] == 64 and first['packs'] == packs - 64
    second = scrub(repository, 3600)[2]
    assert second['packs'] == 0 and second['skipped'] == packs and second['oldest'] < 3600
    # A pack that was never verified is read, the others not.
    path.write_bytes(random.Random(4).randbytes(8 * MIB))
    repository.run('import', path, 'b')
    third = scrub(repository, 3600)[2]
    assert third['packs'] == repository.run('stat')[0]['packs'] - packs > 0
    # So is what was verified at a time that is still to come, by a clock that was wrong.
    store = objects(repository.url)
    for name in (f'scrub.{i:02x}' for i in range(256)):
        for key in store.pairs(name):
            store.set(name, key, struct.pack('<Q', int(time.time()) + 10 * 365 * 86400))
    fourth = scrub(repository, 3600)[2]
    assert fourth['packs'] == repository.run('stat')[0]['packs'] and fourth['skipped'] == 0
