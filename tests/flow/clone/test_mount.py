# SPDX-License-Identifier: Apache-2.0
"""The mount as whoever reads it sees it: right data, or an error, or a wait; never anything else."""
import concurrent.futures
import errno
import filecmp
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import threading
import time

import pytest

from .conftest import Failed, build, eventually, leases, mount_tool, repo_tool, store

MIB = 1 << 20
CHUNK = 64 << 10


@pytest.fixture
def raw(tmp_path):
    """Random data, holes, and an odd size."""
    path = tmp_path / 'disk.raw'
    rng = random.Random(1)
    with open(path, 'wb') as f:
        f.write(rng.randbytes(5 * MIB))
        f.seek(9 * MIB)
        f.write(rng.randbytes(3 * MIB + 777))
        f.truncate(16 * MIB)
    return path


def test_an_image_is_plain_files(url, raw, mounts):
    store(url, 'web1@monday', disk0_raw=raw, memory_raw=raw)
    store(url, 'group/a:b', disk0_raw=raw)
    m = mounts(url)
    assert sorted(os.listdir(m.path)) == ['group%2Fa:b', 'web1@monday']
    assert sorted(os.listdir(f'{m.path}/web1@monday')) == ['disk0.raw', 'memory.raw']
    assert os.path.getsize(m.file('group/a:b')) == 16 * MIB
    for path in (m.file('group/a:b'), m.file('web1@monday'), m.file('web1@monday', 'memory.raw')):
        assert filecmp.cmp(path, raw, shallow=False)
    for missing in ('nobody', 'web1', 'group', 'a%', 'group%2fa:b', 'x' * 200):
        assert not os.path.exists(f'{m.path}/{missing}')


def test_reads_anywhere(url, raw, mounts):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url)
    rng = random.Random(2)
    with open(m.file('a'), 'rb') as got, open(raw, 'rb') as want:
        for _ in range(300):
            at, n = rng.randrange(16 * MIB + 10), rng.randrange(1, 300000)
            assert os.pread(got.fileno(), n, at) == os.pread(want.fileno(), n, at), (at, n)


def test_opening_for_writing_works_and_writing_does_not(url, raw, mounts):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url)
    with open(m.file('a'), 'r+b', buffering=0) as f:
        with pytest.raises(OSError) as failed:
            f.write(b'x')
        assert failed.value.errno == errno.EROFS
        with mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE) as mine:
            mine[:5] = b'mine!'
    for how in (lambda: os.truncate(m.file('a'), 0), lambda: os.unlink(m.file('a')),
                lambda: open(m.file('a'), 'wb'), lambda: open(m.file('a', 'new'), 'wb'),
                lambda: os.mkdir(f'{m.path}/new')):
        with pytest.raises(OSError):
            how()
    assert filecmp.cmp(m.file('a'), raw, shallow=False)


def read_on(path, ended):
    with open(path, 'rb', buffering=0) as file:
        while not ended.is_set():
            os.pread(file.fileno(), MIB, 0)


def write_on(path):
    with open(path, 'r+b', buffering=0) as file:
        for _ in range(300):
            with pytest.raises(OSError) as failed:
                os.pwrite(file.fileno(), bytes(256 << 10), 0)
            assert failed.value.errno == errno.EROFS


def test_a_refused_write_beside_readers(url, raw, mounts):
    """What was written is forgotten by the kernel, for which that waits until nobody reads those pages: the holder does
    not, on whom the readers wait."""
    store(url, 'a', disk0_raw=raw)
    m = mounts(url)
    ended = multiprocessing.Event()
    processes = [multiprocessing.Process(target=read_on, args=(m.file('a'), ended), daemon=True) for _ in range(3)]
    processes.append(multiprocessing.Process(target=write_on, args=(m.file('a'),), daemon=True))
    for process in processes:
        process.start()
    processes[-1].join(60)
    ended.set()
    for process in processes:
        process.join(10)
    exits = [process.exitcode for process in processes]
    if None in exits:  # a holder that waits for itself cannot even be killed
        subprocess.run(['umount', '-f', m.path], check=False)
    assert exits == [0, 0, 0, 0] and m.status()['pid'] == m.process.pid
    with open(raw, 'rb') as want, open(m.file('a'), 'rb') as got:
        eventually('what the image has', lambda: os.pread(got.fileno(), MIB, 0) == os.pread(want.fileno(), MIB, 0))


def test_a_lease_while_a_file_is_open_and_no_longer(url, raw, mounts):
    store(url, 'a', disk0_raw=raw, memory_raw=raw)
    m = mounts(url)
    os.listdir(f'{m.path}/a')
    os.stat(m.file('a'))
    assert leases(url) == []
    with open(m.file('a'), 'rb'), open(m.file('a', 'memory.raw'), 'rb') as second:
        assert leases(url) == ['a']
        with mmap.mmap(second.fileno(), 0, prot=mmap.PROT_READ):
            second.close()
            assert leases(url) == ['a']
    eventually('no lease', lambda: leases(url) == [])


def test_deleted_and_collected_under_a_reader(url, raw, mounts):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url)
    with open(m.file('a'), 'rb') as f:
        repo_tool(url, 'delete', 'a')
        repo_tool(url, 'collect', 1000)
        # Also for a fetcher that never saw the image by its name.
        os.kill(m.status()['fetcher_pid'], signal.SIGKILL)
        with open(raw, 'rb') as want:
            assert f.read() == want.read()
    eventually('no lease', lambda: leases(url) == [])
    eventually('the name is gone', lambda: not os.path.exists(m.file('a')))
    assert repo_tool(url, 'collect', 1000)[0]['packs'] > 0


def test_a_name_that_got_another_image(url, raw, tmp_path, mounts):
    store(url, 'a', disk0_raw=raw)
    other = tmp_path / 'other.raw'
    other.write_bytes(random.Random(3).randbytes(MIB))
    m = mounts(url)
    with open(m.file('a'), 'rb') as former:
        repo_tool(url, 'delete', 'a')
        store(url, 'a', disk0_raw=other)
        eventually('the new one', lambda: os.path.getsize(m.file('a')) == MIB)
        assert filecmp.cmp(m.file('a'), other, shallow=False)
        with open(raw, 'rb') as want:
            assert former.read() == want.read()


def test_fetchers_die_as_often_as_they_like(url, raw, mounts):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url)
    ended, killed = threading.Event(), []

    def killer():
        """One after the other, when it has brought something."""
        while not ended.is_set():
            seen = m.status()
            if seen.get('fetcher_pid') and seen['fetched_bytes'] > (killed or [-1])[-1]:
                os.kill(seen['fetcher_pid'], signal.SIGKILL)
                killed.append(seen['fetched_bytes'])
            ended.wait(.02)
    thread = threading.Thread(target=killer)
    thread.start()
    try:
        with open(m.file('a'), 'rb') as file:
            file.read(MIB)
            eventually('one has died', lambda: killed)
        assert filecmp.cmp(m.file('a'), raw, shallow=False)
    finally:
        ended.set()
        thread.join()
    assert m.status()['fetcher_starts'] > 1 and m.status()['failed_reads'] == 0


@pytest.mark.parametrize('fault', ['mount.fetch=crash@20', 'mount.fetched=crash@20', 'mount.leased=crash@2'])
def test_a_fetcher_that_dies_at_any_step(url, raw, mounts, fault):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url, faults=fault)
    for _ in range(2):
        filecmp.clear_cache()
        assert filecmp.cmp(m.file('a'), raw, shallow=False)
        eventually('no lease', lambda: leases(url) == [])
    assert m.status()['fetcher_starts'] > 1
    # What it leased and could not tell is dropped by the next one.
    eventually('no lease', lambda: leases(url) == [])


def test_fetchers_are_upgraded_under_readers(url, raw, mounts):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url)
    with open(m.file('a'), 'rb') as f:
        first = m.status()['fetcher_pid']
        got = f.read(MIB)
        mount_tool('refresh', m.socket)
        eventually('another fetcher', lambda: m.status()['fetcher_pid'] not in (0, first))
        got += f.read()
        eventually('the old one ended', lambda: not os.path.exists(f'/proc/{first}'))
        for _ in range(50):  # its successor is there: it gets no other
            assert m.status()['fetchers'] == 1 and m.status()['fetcher_starts'] == 2
            time.sleep(.02)
        assert leases(url) == ['a']
    with open(raw, 'rb') as want:
        assert got == want.read()


def read_now(file, at):
    """A chunk, or the number of the error; a read that does not end fails the test, and ends when the fetcher goes on."""
    got = []

    def read():
        try:
            got.append(os.pread(file.fileno(), CHUNK, at))
        except OSError as error:
            got.append(error.errno)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(30)
    assert got, 'the read does not end'
    return got[0]


@pytest.mark.parametrize('name', ['disk0.raw', 'vm.json'])
def test_without_the_store_disks_fail_and_memory_waits(url, raw, mounts, name):
    """As disks does what else an image has: an agent that reads a definition goes on."""
    store(url, 'a', memory_raw=raw, **{name.replace('.', '_'): raw})
    m = mounts(url, options=['--read-timeout', '1500'])
    with open(m.file('a', 'memory.raw'), 'rb') as memory, open(m.file('a', name), 'rb') as disk:
        fetcher = m.status()['fetcher_pid']
        os.kill(fetcher, signal.SIGSTOP)  # as a store that does not answer
        try:
            got = []
            thread = threading.Thread(target=lambda: got.append(os.pread(memory.fileno(), MIB, 0)))
            thread.start()
            assert read_now(disk, 0) == errno.EIO
            assert not got and thread.is_alive()
        finally:
            os.kill(fetcher, signal.SIGCONT)
        thread.join(20)
        with open(raw, 'rb') as want:
            assert got == [want.read(MIB)]
            assert os.pread(disk.fileno(), MIB, 0) == got[0]


WAITING = 200  # more than the kernel has under way by default, and than some guests with KVM's page faults


def test_reads_that_wait_hold_up_no_others(url, raw, tmp_path, mounts):
    large, content = tmp_path / 'large.raw', raw.read_bytes()
    with open(large, 'wb') as file:
        file.truncate(WAITING * 4 * CHUNK)
    store(url, 'a', disk0_raw=raw, memory_raw=large)
    m = mounts(url, options=['--read-timeout', '1500'])
    with open(m.file('a', 'memory.raw'), 'rb', buffering=0) as memory, open(m.file('a'), 'rb', buffering=0) as disk:
        for file in (memory, disk):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(disk.fileno(), CHUNK, 0) == content[:CHUNK]
        fetcher, before = m.status()['fetcher_pid'], m.status()['waits']
        os.kill(fetcher, signal.SIGSTOP)  # as a store that does not answer
        try:
            threads = [threading.Thread(target=os.pread, args=(memory.fileno(), 4096, i * 4 * CHUNK))
                       for i in range(WAITING)]
            for thread in threads:
                thread.start()
            eventually('all wait', lambda: m.status()['waits'] - before >= WAITING)
            os.posix_fadvise(disk.fileno(), 0, CHUNK, os.POSIX_FADV_DONTNEED)
            reads = m.status()['reads']
            assert read_now(disk, 0) == content[:CHUNK]
            assert m.status()['reads'] > reads  # it was not the kernel's
            assert read_now(disk, 3 * MIB) == errno.EIO
            assert all(thread.is_alive() for thread in threads)
        finally:
            os.kill(fetcher, signal.SIGCONT)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


def test_the_cache_has_a_limit(url, tmp_path, mounts):
    path = tmp_path / 'large.raw'
    path.write_bytes(random.Random(4).randbytes(12 * MIB))
    store(url, 'a', disk0_raw=path)
    m = mounts(url, options=['--cache-size', '4M'])
    assert filecmp.cmp(m.file('a'), path, shallow=False)
    status = m.status()
    assert status['cache_used'] <= 4 * MIB and status['evicted'] > 0
    # What the kernel has forgotten too is fetched again.
    with open(m.file('a'), 'rb') as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open(path, 'rb') as want:
            assert f.read() == want.read()


@pytest.fixture
def small_cache(tmp_path):
    """The folder of the first mount's cache, a file system of 8 MiB."""
    cache = tmp_path / 'mount' / 'cache'
    cache.mkdir(parents=True)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8M', 'none', cache], check=True)
    yield cache
    subprocess.run(['umount', '-l', cache], check=True)


def test_a_full_file_system_below_the_cache(url, tmp_path, small_cache, mounts):
    """What was read goes from the cache, and the reading goes on."""
    path = tmp_path / 'large.raw'
    path.write_bytes(random.Random(6).randbytes(20 * MIB))
    store(url, 'a', memory_raw=path)
    m = mounts(url)
    subprocess.run(['cmp', m.file('a', 'memory.raw'), path], check=True, timeout=60)
    assert 0 < m.status()['cache_used'] <= 8 * MIB and m.status()['evicted'] > 0
    assert 'file system is full' in m.log()


def test_others_fill_the_file_system_below_the_cache(url, raw, small_cache, mounts):
    """Memory waits until there is room again; the state says why."""
    store(url, 'a', memory_raw=raw)
    m = mounts(url)
    with open(m.file('a', 'memory.raw'), 'rb', buffering=0) as f:
        subprocess.run(['dd', 'if=/dev/zero', f'of={small_cache}/of-others', 'bs=64k'], capture_output=True, check=False)
        got = []
        thread = threading.Thread(target=lambda: got.append(os.pread(f.fileno(), MIB, 0)))
        thread.start()
        eventually('it is told', lambda: m.status()['cache_full'])
        assert not got and m.status()['failed_reads'] == 0
        (small_cache / 'of-others').unlink()
        thread.join(20)
        assert got == [raw.read_bytes()[:MIB]] and not m.status()['cache_full']


def working_sets(url):
    return [i['name'] for i in repo_tool(url, 'list') if i['name'].endswith('+ws')]


def recorded(url, path, mounts, image='t:web@0123456789abcdef'):
    """A template's version of that memory, all of which is its working set."""
    store(url, image, memory_raw=path, device_state=path)
    m = mounts(url, name='first', options=['--record', '600000'])
    with open(m.file(image, 'device.state'), 'rb'):
        assert filecmp.cmp(m.file(image, 'memory.raw'), path, shallow=False)
        mount_tool('record', m.socket, image)
    eventually('the working set', lambda: working_sets(url) == [f'{image}+ws'])
    m.stop()
    return image


def test_a_look_at_a_template_is_not_its_first_use(url, raw, tmp_path, mounts):
    """That is a VMM's, which has its memory and its device state open, and lasts."""
    image, other = 't:web@0123456789abcdef', 't:web@0123456789abcde0'
    (tmp_path / 'state').write_bytes(b'state')
    store(url, image, device_state=tmp_path / 'state', memory_raw=raw, disk0_raw=raw)
    store(url, other, device_state=tmp_path / 'state', memory_raw=raw)
    m = mounts(url, options=['--record', '600000'])
    memory, state = m.file(image, 'memory.raw'), m.file(image, 'device.state')

    def nothing_is_recorded(of=image, by=m):
        eventually('nothing is open', lambda: by.status()['open_files'] == 0)
        with pytest.raises(Failed) as failed:
            mount_tool('record', by.socket, of)
        assert failed.value.kind == 'not-found'
    for path in (m.file(image), memory, state):
        shutil.copy(path, tmp_path / 'copy')
        nothing_is_recorded()
    with open(state, 'rb') as first, open(memory, 'rb') as second:  # as a clone that failed
        first.read()
        second.read(100)
    nothing_is_recorded()
    assert os.path.getsize(m.file(other, 'memory.raw')) == 16 * MIB  # what was said to fetchers before is done
    assert working_sets(url) == []
    m.stop()
    m = mounts(url, name='second', options=['--record', '300'])
    with open(m.file(other, 'device.state'), 'rb') as look:  # for longer than that
        assert look.read() == b'state'
        with open(m.file(image, 'device.state'), 'rb') as first, open(m.file(image, 'memory.raw'), 'rb') as second:
            first.read()
            second.read(3 * MIB)
            eventually('the working set', lambda: working_sets(url) == [f'{image}+ws'])
    nothing_is_recorded(other, m)
    assert working_sets(url) == [f'{image}+ws']


def test_a_working_set_larger_than_the_cache(url, tmp_path, mounts):
    """What was read ahead is dropped again while the same is being fetched, and the fetcher says so late."""
    path = tmp_path / 'memory.raw'
    content = random.Random(5).randbytes(8 * MIB)
    path.write_bytes(content)
    image = recorded(url, path, mounts)
    m = mounts(url, faults='mount.fetched=delay:1500@*,mount.ahead=delay:300@*', options=['--cache-size', '1M'])
    chunks = range(3, 24, 4)

    def read(fd, chunk):
        os.posix_fadvise(fd, chunk * CHUNK, CHUNK, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, 4096, chunk * CHUNK) == content[chunk * CHUNK:chunk * CHUNK + 4096]
    with open(m.file(image, 'memory.raw'), 'rb', buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        with concurrent.futures.ThreadPoolExecutor(len(chunks)) as pool:
            assert all(pool.map(read, [f.fileno()] * len(chunks), chunks))
        eventually('what is read ahead', lambda: m.status()['prefetched_bytes'] == 8 * MIB)
        eventually('the fetched', lambda: m.status()['fetched_bytes'] >= len(chunks) * CHUNK)
        assert m.status()['evicted'] > 0
        assert [chunk for chunk in chunks if not read(f.fileno(), chunk)] == []
        eventually('within its limit', lambda: m.status()['cache_used'] <= MIB)

def working_set(entries):
    """The file "hot" of a working set: (file, chunk, data) of each."""
    head = b'VMMIGWS1' + struct.pack('<II', len(entries), 0)
    head += b''.join(struct.pack('<II', file, chunk) for file, chunk, _ in entries)
    head += bytes(-len(head) % 4096 + 2048)
    return head + b''.join(data.ljust(CHUNK, b'\0') for _, _, data in entries)


@pytest.mark.parametrize('what', ['other', 'zeros', 'behind the end', 'in a hole'])
def test_a_working_set_is_believed_only_where_the_image_says_the_same(url, raw, tmp_path, mounts, what):
    image, content = 't:web@0123456789abcdef', raw.read_bytes()
    true = [(0, chunk, content[chunk * CHUNK:(chunk + 1) * CHUNK]) for chunk in range(4)]
    false = {'other': (0, 5, content[4 * CHUNK:5 * CHUNK]), 'zeros': (0, 5, b''),
             'behind the end': (1, 0, b'short' + b'x' * 5000), 'in a hole': (0, 100, b'x' * CHUNK)}[what]
    (tmp_path / 'hot').write_bytes(working_set([*true, false]))
    (tmp_path / 'short').write_bytes(b'short')
    store(url, image, memory_raw=raw, short=tmp_path / 'short')
    store(url, f'{image}+ws', hot=tmp_path / 'hot')
    m = mounts(url)
    assert filecmp.cmp(m.file(image, 'memory.raw'), raw, shallow=False)
    with open(m.file(image, 'short'), 'rb') as f:
        assert f.read() == b'short'
    eventually('it is told', lambda: 'working set of t:web@' in m.log())
    assert m.status()['prefetched_bytes'] == 4 * CHUNK


def test_a_fetcher_dies_while_it_looks_for_leases_of_an_earlier_mount(url, raw, mounts):
    """The next one is told which leases are held by then."""
    store(url, 'a', disk0_raw=raw)
    store(url, 'b', disk0_raw=raw)
    m = mounts(url)
    os.open(m.file('a'), os.O_RDONLY)
    m.process.kill()
    m.process.wait(20)
    subprocess.run(['umount', '-l', m.path], check=True)
    m.start(faults='mount.keeping=delay:4000')
    with open(m.file('b'), 'rb') as f:
        assert sorted(leases(url)) == ['a', 'b']
        os.kill(m.status()['fetcher_pid'], signal.SIGKILL)
        eventually('the earlier lease is dropped', lambda: 'a' not in leases(url))
        assert leases(url) == ['b']
        assert f.read() == raw.read_bytes()


def test_a_lease_that_came_too_late_is_dropped(url, raw, mounts):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url, faults='mount.leased=delay:1500', options=['--read-timeout', '500'])
    with pytest.raises(OSError) as failed:
        os.open(m.file('a'), os.O_RDONLY)
    assert failed.value.errno == errno.EIO
    assert leases(url) == ['a']
    eventually('no lease', lambda: leases(url) == [])


KEPT = 128  # images of which the holder remembers what it has, if nobody uses them


def test_an_answer_about_an_image_that_was_long_forgotten(url, raw, tmp_path, mounts):
    """A read was given up, its image deleted, and so many others looked at that nothing reminds of it: then its data
    comes."""
    small = tmp_path / 'small.raw'
    small.write_bytes(random.Random(5).randbytes(CHUNK))
    names = [f'other{i}' for i in range(KEPT + 2)]
    store(url, ','.join(names), disk0_raw=small)
    store(url, 'a', disk0_raw=raw)
    m = mounts(url, options=['--read-timeout', '1000'])
    with open(m.file('a'), 'rb', buffering=0) as f:
        former = m.status()['fetcher_pid']
        os.kill(former, signal.SIGSTOP)
        with pytest.raises(OSError):
            os.pread(f.fileno(), CHUNK, 0)
    mount_tool('refresh', m.socket)
    eventually('another fetcher', lambda: m.status()['fetcher_pid'] not in (0, former))
    repo_tool(url, 'delete', 'a')
    eventually('nothing of that name', lambda: not os.path.exists(m.file('a')))
    for name in names:
        assert os.path.getsize(m.file(name)) == CHUNK
    assert m.status()['fetched_bytes'] == 0
    os.kill(former, signal.SIGCONT)
    eventually('the answer', lambda: m.status()['fetched_bytes'] > 0)
    eventually('the end of who gave it', lambda: not os.path.exists(f'/proc/{former}'))
    assert filecmp.cmp(m.file(names[0]), small, shallow=False)
    assert m.status()['pid'] == m.process.pid


def resident(m):
    with open(f'/proc/{m.process.pid}/status', encoding='ascii') as file:
        line, = [line for line in file if line.startswith('VmRSS:')]
    return int(line.split()[1]) << 10


def test_folders_that_are_open_take_room_once(url, tmp_path, mounts):
    small = tmp_path / 'small.raw'
    small.write_bytes(bytes(4096))
    names = [f'{i:0120}' for i in range(200)]
    store(url, ','.join(names), disk0_raw=small)
    m = mounts(url)
    assert sorted(os.listdir(m.path)) == names
    before, opened = resident(m), []
    try:
        while len(opened) < 700:  # 17 MB, if each had its own
            opened.append(os.open(m.path, os.O_RDONLY | os.O_DIRECTORY))
        assert sorted(os.listdir(opened[-1])) == names
        assert resident(m) - before < 6 * MIB
    finally:
        for fd in opened:
            os.close(fd)
    store(url, 'another', disk0_raw=small)
    assert sorted(os.listdir(m.path)) == [*names, 'another']


def test_foreign_files_in_the_cache_are_told_and_left(url, raw, tmp_path, mounts):
    store(url, 'a', disk0_raw=raw)
    cache = tmp_path / 'mount' / 'cache'
    cache.mkdir(parents=True)
    (cache / 'vmmig-000001').write_bytes(b'wrong' * 1000)
    m = mounts(url)
    assert 'vmmig-000001' in m.log() and 'not the cache' in m.log()
    assert filecmp.cmp(m.file('a'), raw, shallow=False)
    assert os.listdir(cache) == ['vmmig-000001']


def test_it_stops_when_nobody_uses_it(url, raw, mounts):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url)
    with open(m.file('a'), 'rb'):
        with pytest.raises(Failed) as failed:
            mount_tool('stop', m.socket)
        assert failed.value.kind == 'conflict'
    eventually('nothing is open', lambda: m.status()['open_files'] == 0)
    mount_tool('stop', m.socket)
    m.process.wait(20)
    assert not os.path.ismount(m.path) and not os.path.exists(m.socket)
    assert leases(url) == []


def test_leases_of_a_holder_that_was_killed(url, raw, mounts):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url)
    os.open(m.file('a'), os.O_RDONLY)
    m.process.send_signal(signal.SIGKILL)
    m.process.wait(20)
    assert leases(url) == ['a']
    subprocess.run(['umount', '-l', m.path], check=True)
    m.start()
    eventually('no lease', lambda: leases(url) == [])


def test_a_second_holder_of_the_same_owner(url, raw, mounts):
    """It drops what a dead one left, and nothing that is another living one's."""
    store(url, 'a', disk0_raw=raw)
    store(url, 'b', disk0_raw=raw)
    living = mounts(url, name='living')
    dead = mounts(url, name='dead')
    with open(living.file('a'), 'rb') as f:
        os.open(dead.file('b'), os.O_RDONLY)
        dead.process.kill()
        dead.process.wait(20)
        assert sorted(leases(url)) == ['a', 'b']
        mounts(url, name='third')
        eventually('the dead one is swept', lambda: 'b' not in leases(url))
        assert leases(url) == ['a']
        assert f.read() == raw.read_bytes()


def test_a_second_holder_at_the_same_place(url, raw, mounts, tmp_path):
    store(url, 'a', disk0_raw=raw)
    m = mounts(url)
    done = subprocess.run([os.path.join(build(), 'snapshot/vmmig-mount'), '--mount', m.path, '--repository', url,
                           '--cache', m.cache, '--control', tmp_path / 's2', '--fetcher', '/bin/true', '--owner', 'x'],
                          capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode and 'already' in done.stderr and done.stderr.count('\n') == 1, done
    assert filecmp.cmp(m.file('a'), raw, shallow=False)


@pytest.mark.parametrize('words, status', [
    (['--cache-size', '12Q'], 2),
    (['--group', 'no-such-group'], 3),
    (['--mount', '/nonexistent'], 3),
    (['--cache', '/dev/null/x'], 16),
])
def test_bad_input_is_one_clear_line(url, mounts, words, status):
    m = mounts(url, start=False)
    given = {'--mount': m.path, '--repository': url, '--cache': m.cache, '--control': m.socket,
             '--fetcher': '/bin/true', '--owner': 'x', **dict([words])}
    done = subprocess.run([os.path.join(build(), 'snapshot/vmmig-mount'), *sum(map(list, given.items()), [])],
                          capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == status, done
    assert done.stderr.count('\n') == 1, done.stderr
    assert not os.path.exists(m.socket) and not os.path.ismount(m.path)
