# SPDX-License-Identifier: Apache-2.0
"""`vmmig repo` and `vmmig image` as their user types them: with --repo on both stores, and through an agent."""
import array
import contextlib
import filecmp
import grp
import json
import os
import pathlib
import pty
import random
import re
import select
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest
from agents import eventually

from .conftest import ROOT, Repository, build, fault_build
from .objects import objects
from .test_damage import records
from .test_repository import MIB, broken_qcow2, disk

MANUAL = pathlib.Path(ROOT, 'docs/vmmig.1.md').read_text(encoding='utf-8')
LEFT = {'image list': 'an image', 'image show': 'image show'}


class Way:
    """A way to a repository: the words that go with each command."""

    def __init__(self, words, url):
        self.words = words
        self.url = url

    def argv(self, *words, faults=False):
        vmmig = os.path.join(fault_build() if faults else build(), 'tools/vmmig')
        return [vmmig, *map(str, words[:2]), *self.words, *map(str, words[2:])]

    def try_run(self, *words, faults=None, **options):
        env = dict(os.environ, **({'VMMIG_FAULTS': faults} if faults else {}))
        return subprocess.run(self.argv(*words, faults=bool(faults)), stdin=subprocess.DEVNULL, env=env,
                              capture_output=True, text=True, timeout=120, check=False, **options)

    def run(self, *words):
        """The object that the command prints with --json."""
        done = self.try_run(*words, '--json')
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ''
        return json.loads(done.stdout)

    def text(self, *words):
        done = self.try_run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refuses(self, status, match, *words, **options):
        """One clear line, the right exit status, and the same in JSON."""
        done = self.try_run(*words, **options)
        assert done.returncode == status, (done.stdout, done.stderr)
        assert done.stdout == ''
        assert done.stderr.startswith('vmmig: ') and done.stderr.count('\n') == 1, done.stderr
        assert re.search(match, done.stderr), done.stderr
        as_json = self.try_run(*words, '--json', **options)
        assert as_json.returncode == status and as_json.stderr == ''
        assert set(json.loads(as_json.stdout)) == {'error'}

    def names(self):
        return sorted(i['image'] for i in self.run('image', 'list')['images'])


class Agent:
    """A vmmigd that keeps a repository and no VMs."""

    def __init__(self, folder, url, impatient=False, **options):
        self.folder = folder
        self.program = f'{fault_build() if impatient else build()}/agent/vmmigd'
        self.env = dict(os.environ, VMMIG_PATIENCE='60') if impatient else None  # minutes become seconds
        self.socket = f'{folder}/run/control.sock'
        lines = {'state-dir': f'{folder}/state', 'runtime-dir': f'{folder}/run', 'log-dir': f'{folder}/log',
                 'listen': 'none', 'insecure-plain': 'yes', 'repository': url, **options}
        pathlib.Path(folder, 'conf').write_text(''.join(f'{k} = {v}\n' for k, v in lines.items()))

    def __enter__(self):
        self.log = open(f'{self.folder}/err', 'wb')  # pylint: disable=consider-using-with
        self.process = subprocess.Popen([self.program, '--config', f'{self.folder}/conf'], env=self.env,
                                        stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 20
        while b'msg="ready"' not in (text := pathlib.Path(self.folder, 'err').read_bytes()):
            assert self.process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.01)
        return self

    def __exit__(self, *exc):
        self.process.terminate()
        status = self.process.wait(30)
        self.log.close()
        assert status == 0


@pytest.fixture(params=['dir', 'rados', 'agent'])
def way(request, tmp_path):
    """An empty repository."""
    url = request.getfixturevalue('ceph_url') if request.param == 'rados' else f'dir:{tmp_path}/repo'
    if request.param != 'agent':
        made = Way(['--repo', url], url)
        made.run('repo', 'init')
        yield made
        return
    folder = tmp_path / 'agent'
    folder.mkdir()
    with Agent(folder, url) as agent:
        made = Way(['--socket', agent.socket], url)
        made.run('repo', 'init')
        yield made


@pytest.fixture
def dir_way(tmp_path):
    made = Way(['--repo', f'dir:{tmp_path}/repo'], f'dir:{tmp_path}/repo')
    made.run('repo', 'init')
    return made


@pytest.fixture
def raw(tmp_path):
    return disk(tmp_path / 'disk.raw', 16)


def documented(heading):
    """The fields that the manual lists under that heading."""
    text = re.search(rf'^{re.escape(heading)}[^\n]*\n:   (.*?)\n\n', MANUAL, re.M | re.S).group(1)
    return set(re.findall(r'[a-z][a-z_]+', re.sub(r'\([^)]*\)', '', text)))


def test_every_command_and_its_fields(way, raw, tmp_path):
    qcow2 = tmp_path / 'disk.qcow2'
    subprocess.run(['qemu-img', 'convert', '-O', 'qcow2', raw, qcow2], check=True)
    first = way.run('image', 'import', raw, 'debian12')
    assert set(first) == documented('image import')
    assert first['size'] == 16 * MIB and first['new_bytes'] > 0 and first['zero_bytes'] > 0
    again = way.run('image', 'import', qcow2, 'debian12@2', '--parent', 'debian12')
    assert again['new_bytes'] == 0 and again['stored_bytes'] < 0.01 * first['stored_bytes']
    listed = way.run('image', 'list')['images']
    assert set(listed[0]) == documented('an image') | {'parent'}
    assert [i['image'] for i in sorted(listed, key=lambda i: i['image'])] == ['debian12', 'debian12@2']
    shown = way.run('image', 'show', 'debian12@2')
    assert documented('image show') - {'those', 'of', 'an', 'image', 'and'} <= set(shown)
    assert shown['parent'] == 'debian12' and shown['virtual_bytes'] == 16 * MIB
    assert shown['unique_bytes'] == 0 and shown['shared_bytes'] == shown['stored_bytes'] > 0
    assert [s['image'] for s in shown['sharers']] == ['debian12']
    out = tmp_path / 'out.raw'
    exported = way.run('image', 'export', 'debian12@2', out)
    assert set(exported) == documented('image export')
    assert filecmp.cmp(raw, out, shallow=False) and out.stat().st_mode & 0o777 == 0o600
    with open(raw, 'r+b') as f:
        f.seek(5 * MIB)
        f.write(b'changed')
    way.run('image', 'import', raw, 'changed')
    differing = way.run('image', 'diff', 'debian12', 'changed')
    assert set(differing) == documented('image diff')
    assert differing['differences'] == [{'file': 'disk0.raw', 'offset': 5 * MIB, 'len': 4096}]
    stat = way.run('repo', 'stat')
    assert set(stat) == documented('repo stat')
    assert stat['images'] == 3 and stat['image_bytes'] == 48 * MIB and stat['url'] == way.url
    scrubbed = way.run('repo', 'scrub')
    assert set(scrubbed) == documented('repo scrub') | {'findings'}
    assert scrubbed['packs'] == stat['packs'] and scrubbed['findings'] == []
    rebuilt = way.run('repo', 'rebuild-index')
    assert set(rebuilt) == documented('repo rebuild-index')
    for name in ('debian12', 'debian12@2', 'changed'):
        assert set(way.run('image', 'delete', name)) == documented('image delete')
    collected = way.run('repo', 'gc')
    assert set(collected) == documented('repo gc')
    assert collected['packs_removed'] + collected['trees_removed'] == stat['packs'] + stat['trees']
    assert way.names() == []


def test_text_is_for_people(way, raw, tmp_path):
    assert way.text('image', 'list') == 'no images\n'
    done, *amounts = way.text('image', 'import', raw, 'a').splitlines()
    assert done.startswith('a: imported in ') and re.match('  size  +16.0 MiB$', amounts[0])
    assert way.text('image', 'list').splitlines()[1].endswith('  a')
    assert 'virtual    16.0 MiB' in way.text('image', 'show', 'a')
    assert way.text('image', 'diff', 'a', 'a') == '0 bytes differ\n'
    assert 'images     1, 16.0 MiB' in way.text('repo', 'stat')
    assert 'exported to ' in way.text('image', 'export', 'a', tmp_path / 'out')
    assert way.text('image', 'delete', 'a') == 'a: deleted; `vmmig repo gc` frees its space\n'
    assert re.search(r'packs removed +[1-9]', way.text('repo', 'gc'))


def test_progress_on_a_terminal(way, tmp_path):
    source = disk(tmp_path / 'large.raw', 512)  # seconds of work: the bar is drawn anew several times
    ours, theirs = pty.openpty()
    with subprocess.Popen(way.argv('image', 'import', source, 'large'), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        seen = b''
        while select.select([ours], [], [], 60)[0]:
            try:
                seen += os.read(ours, 4096)
            except OSError:
                break
        assert process.wait(60) == 0
    os.close(ours)
    assert re.search(rb'\rimport large \[#+ *\] +\d+% of 512 MiB', seen), seen
    assert re.search(rb'/s, [0-9.]+:1, [0-9.]+ MiB stored', seen), seen


BAD_NAMES = ['', '.hidden', 'a//b', 'a b', 'x' * 129, '-x/', 'naïve']


def test_bad_names(way, raw):
    for name in BAD_NAMES:
        if name and not name.startswith('-'):
            way.refuses(2, 'name', 'image', 'import', raw, name)
    assert way.names() == []


def test_bad_input_leaves_nothing(way, raw, tmp_path):
    way.run('image', 'import', raw, 'taken')
    stored = way.run('repo', 'stat')
    way.refuses(4, 'taken', 'image', 'import', raw, 'taken')
    way.refuses(3, 'missing', 'image', 'import', tmp_path / 'missing.raw', 'a')
    way.refuses(3, 'gone', 'image', 'import', raw, 'a', '--parent', 'gone')
    way.refuses(3, 'gone', 'image', 'export', 'gone', tmp_path / 'out')
    way.refuses(3, 'memory', 'image', 'export', 'taken', tmp_path / 'out', '--file', 'memory.raw')
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'there').write_bytes(b'mine')
    way.refuses(4, 'there', 'image', 'export', 'taken', tmp_path / 'there')
    assert (tmp_path / 'there').read_bytes() == b'mine'
    for verb in ('show', 'delete'):
        way.refuses(3, 'gone', 'image', verb, 'gone')
    way.refuses(3, 'gone', 'image', 'diff', 'taken', 'gone')
    way.refuses(4, 'already', 'repo', 'init')
    empty = tmp_path / 'empty'
    empty.touch()
    way.refuses(2, 'empty', 'image', 'import', empty, 'a')
    used = tmp_path / 'used.qcow2'
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', used, '1M'], check=True)
    with subprocess.Popen(['qemu-io', used], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        owner.stdin.write(b'length\n')
        owner.stdin.flush()
        owner.stdout.readline()
        way.refuses(4, 'is in use', 'image', 'import', used, 'a')
        owner.stdin.close()
    for how in ('truncated', 'cut', 'looping'):
        way.refuses(12, 'broken.qcow2', 'image', 'import', broken_qcow2(tmp_path, raw, how), 'a')
    assert way.names() == ['taken']
    assert way.run('repo', 'stat')['packs'] == stored['packs']


def test_urls_that_make_no_sense(raw):
    for url in ('nonsense', 'dir:', 'dir:relative', 'rados:', 'rados:a/b/c', 'rados:p?x=y', 'http://x/', 's3:x'):
        Way(['--repo', url], url).refuses(2, '.', 'image', 'import', raw, 'a')


def test_a_repository_that_is_not_there(tmp_path, raw):
    url = f'dir:{tmp_path}/nowhere'
    Way(['--repo', url], url).refuses(3, 'nowhere', 'image', 'import', raw, 'a')
    assert not (tmp_path / 'nowhere').exists()


def test_a_folder_of_somebody_elses_becomes_no_repository(tmp_path):
    """One that is empty does."""
    url = f'dir:{tmp_path}/place'
    way = Way(['--repo', url], url)
    (tmp_path / 'place').mkdir()
    (tmp_path / 'place' / 'passwd').touch()
    way.refuses(4, 'is not empty and holds no repository', 'repo', 'init')
    assert os.listdir(tmp_path / 'place') == ['passwd']
    (tmp_path / 'place' / 'passwd').unlink()
    way.run('repo', 'init')


def test_pools_and_rights(ceph, raw, tmp_path):
    """Least caps: a namespace of one pool. Others, and a user without any, get one line."""
    missing = f'rados:nopool?conf={ceph.conf}'
    Way(['--repo', missing], missing).refuses(3, 'nopool', 'repo', 'init')

    def user(name, caps):
        conf = ceph.create_user(f'client.{name}', caps)
        return lambda space: Way(['--repo', (url := f'rados:images/{space}?conf={conf}&id={name}')], url)

    tenant = user('tenant', 'allow rw pool=images namespace=tenant')
    way = tenant('tenant')
    way.run('repo', 'init')
    way.run('image', 'import', raw, 'mine')
    way.run('image', 'export', 'mine', tmp_path / 'out')
    way.run('image', 'delete', 'mine')
    way.run('repo', 'gc')
    way.run('repo', 'scrub')
    tenant('other').refuses(7, 'permi|allow|denied', 'image', 'list')
    tenant('other').refuses(7, 'permi|allow|denied', 'repo', 'init')
    nobody = user('capless', 'allow r pool=nothing')
    nobody('tenant').refuses(7, 'permi|allow|denied', 'image', 'import', raw, 'a')
    no_keyring = f'rados:images/tenant?conf={ceph.conf}&id=stranger'
    Way(['--repo', no_keyring], no_keyring).refuses(7, 'stranger|key|permi|denied', 'image', 'list')


def test_another_version(dir_way, raw):
    url = dir_way.url
    change = ('import lmdb,sys\nenv=lmdb.open(sys.argv[1],max_dbs=64)\n'
              'with env.begin(write=True) as t:\n'
              '    found=[(k,v) for k,v in t.cursor() if k.endswith(b"format") and v==b"1"]\n'
              '    assert found\n    [t.put(k,b"2") for k,v in found]\n')
    folder = pathlib.Path(url.removeprefix('dir:'))
    envs = [p.parent for p in folder.rglob('data.mdb')]
    assert len(envs) == 1
    subprocess.run(['/usr/bin/python3', '-c', change, envs[0]], check=True)
    for words in (('image', 'list'), ('image', 'import', raw, 'a'), ('repo', 'gc')):
        dir_way.refuses(8, 'format "2"', *words)


def test_a_full_disk_of_the_export(dir_way, tmp_path):
    source = tmp_path / 'random.raw'
    source.write_bytes(random.Random(5).randbytes(8 * MIB))
    dir_way.run('image', 'import', source, 'a')
    small = tmp_path / 'small'
    small.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', small], check=True)
    try:
        dir_way.refuses(11, 'No space', 'image', 'export', 'a', small / 'out')
        assert not list(small.iterdir())
    finally:
        subprocess.run(['umount', small], check=True)


def test_an_export_where_no_file_can_be_without_a_name(dir_way, tmp_path):
    """As on NFS: the file has its name from the beginning, and is gone if nothing comes of it."""
    source, disk, folder = tmp_path / 'random.raw', tmp_path / 'disk', tmp_path / 'mounted'
    source.write_bytes(random.Random(6).randbytes(MIB))
    dir_way.run('image', 'import', source, 'a')
    folder.mkdir()
    with open(disk, 'wb') as file:
        file.truncate(16 * MIB)
    subprocess.run(['mkfs.ext4', '-q', disk], check=True)
    subprocess.run(['fuse2fs', '-o', 'rw', disk, folder], check=True, capture_output=True)
    try:
        with pytest.raises(OSError):
            os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
        dir_way.refuses(3, 'gone', 'image', 'export', 'gone', folder / 'out')
        assert not (folder / 'out').exists()
        dir_way.run('image', 'export', 'a', folder / 'out')
        assert (folder / 'out').read_bytes() == source.read_bytes()
    finally:
        subprocess.run(['umount', folder], check=True)


def test_ctrl_c_without_an_agent_cancels(dir_way, tmp_path):
    source = disk(tmp_path / 'large.raw', 512)
    with subprocess.Popen(dir_way.argv('image', 'import', source, 'large'), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        packs = pathlib.Path(dir_way.url.removeprefix('dir:'))
        while not [p for p in packs.rglob('*') if p.is_file() and p.stat().st_size > 4 * MIB and
                   p.name != 'data.mdb' and 'ballast' not in str(p)]:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 14 and errors == f'vmmig: cannot import {source}: cancelled on request\n'
    assert dir_way.names() == []
    dir_way.run('repo', 'gc')
    assert dir_way.run('repo', 'stat')['packs'] == 0


def test_a_job_of_the_agent_outlives_its_command(tmp_path):
    source = disk(tmp_path / 'large.raw', 512)
    qcow2 = tmp_path / 'large.qcow2'
    subprocess.run(['qemu-img', 'convert', '-O', 'qcow2', source, qcow2], check=True)
    folder = tmp_path / 'agent'
    folder.mkdir()
    with Agent(folder, f'dir:{tmp_path}/repo') as agent:
        way = Way(['--socket', agent.socket], f'dir:{tmp_path}/repo')
        way.run('repo', 'init')

        def jobs():
            done = subprocess.run([f'{build()}/tools/vmmig', 'jobs', '--json', '--socket', agent.socket],
                                  capture_output=True, check=True)
            return json.loads(done.stdout)['jobs']

        def leave(path, name):
            with subprocess.Popen(way.argv('image', 'import', path, name), stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                while not [j for j in jobs() if j['peer'] == name]:
                    assert process.poll() is None
                process.kill()
            return next(j for j in jobs() if j['peer'] == name)

        job = leave(qcow2, 'survivor')
        assert job['kind'] == 'import' and job['vm'] is None
        while next(j for j in jobs() if j['job'] == job['job'])['state'] == 'running':
            time.sleep(0.05)
        assert way.names() == ['survivor']
        job = leave(source, 'doomed')
        cancelled = subprocess.run([f'{build()}/tools/vmmig', 'cancel', job['job'], '--socket', agent.socket],
                                   capture_output=True, text=True, check=False)
        assert cancelled.returncode == 0, cancelled.stderr
        while next(j for j in jobs() if j['job'] == job['job'])['state'] == 'running':
            time.sleep(0.05)
        assert next(j for j in jobs() if j['job'] == job['job'])['state'] == 'cancelled'
        assert way.names() == ['survivor']


def opens_below(pid, folder):
    """Does that process hold a file open there?"""
    fds = f'/proc/{pid}/fd'
    return any(os.readlink(f'{fds}/{fd}').startswith(f'{folder}/') for fd in os.listdir(fds))


def test_an_export_that_is_killed_leaves_nothing(tmp_path, raw):
    out = tmp_path / 'exports'
    out.mkdir()
    with Agent(tmp_path, f'dir:{tmp_path}/repo') as agent:
        way = Way(['--socket', agent.socket], '')
        way.run('repo', 'init')
        way.run('image', 'import', raw, 'a')
        agent.process.send_signal(signal.SIGSTOP)  # the export cannot end
        with subprocess.Popen(way.argv('image', 'export', 'a', out / 'a.raw'), stderr=subprocess.DEVNULL) as client:
            eventually('the target of the export', lambda: opens_below(client.pid, out))
            client.kill()
        agent.process.send_signal(signal.SIGCONT)
        assert not list(out.iterdir())
        way.run('image', 'export', 'a', out / 'a.raw')
        assert filecmp.cmp(raw, out / 'a.raw', shallow=False)


def test_a_group_member_gets_no_file_of_others(tmp_path, raw):
    """The agent is root, its client is not: nothing is opened with the agent's rights."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent != pathlib.Path('/'):
            parent.chmod(parent.stat().st_mode | 0o755)
    folder = tmp_path / 'agent'
    folder.mkdir()
    secret = tmp_path / 'secret.raw'
    secret.write_bytes(b'secret' * 10000)
    secret.chmod(0o600)
    top = tmp_path / 'top.qcow2'
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', secret, '-F', 'raw', top], check=True)
    top.chmod(0o644)
    group = grp.getgrnam('nogroup')
    with Agent(folder, f'dir:{tmp_path}/repo', **{'control-group': 'nogroup'}) as agent:
        way = Way(['--socket', agent.socket], '')
        way.run('repo', 'init')
        as_nobody = {'user': 65534, 'group': group.gr_gid, 'extra_groups': []}
        way.refuses(7, 'secret', 'image', 'import', secret, 'a', **as_nobody)
        way.refuses(7, 'secret', 'image', 'import', secret, 'a', '--format', 'raw', **as_nobody)
        done = way.try_run('image', 'import', top, 'a', '--format', 'qcow2', **as_nobody)
        assert done.returncode and 'secret' in done.stderr
        done = way.try_run('image', 'export', 'a', '/etc/vmmig-test', **as_nobody)
        assert done.returncode == 7
        way.refuses(7, 'only root', 'repo', 'copy', f'dir:{tmp_path}/elsewhere', **as_nobody)
        # A descriptor that cannot be read does not become one that can.
        assert send_import(agent.socket, os.open(secret, os.O_PATH)) == 'system'
        assert way.names() == []
        raw.chmod(0o644)
        assert way.try_run('image', 'import', raw, 'open', **as_nobody).returncode == 0
        assert way.names() == ['open']


def test_templates_are_made_by_those_who_may_alone(tmp_path, raw):
    folder = tmp_path / 'agent'
    folder.mkdir()
    group, publishers = (grp.getgrnam(name).gr_gid for name in ('nogroup', 'daemon'))
    version = 't:web@0123456789abcdef0123456789abcdef'
    with Agent(folder, f'dir:{tmp_path}/repo', **{'control-group': 'nogroup', 'publish-group': 'daemon'}) as agent:
        for parent in (folder, *folder.parents):
            if parent.stat().st_uid == os.getuid() and parent != pathlib.Path('/'):
                parent.chmod(parent.stat().st_mode | 0o755)
        way = Way(['--socket', agent.socket], '')
        way.run('repo', 'init')
        way.run('image', 'import', raw, 'a')
        raw.chmod(0o644)
        member = {'user': 65534, 'group': group, 'extra_groups': []}
        for words in (['publish', 'a', 'web:v1'], ['delete', 'web:v1']):
            way.refuses(7, 'group daemon', 'template', *words, **member)
        publisher = dict(member, extra_groups=[publishers])
        way.refuses(5, 'snapshot of a running VM', 'template', 'publish', 'a', 'web:v1', **publisher)
        way.refuses(3, 'no template web:v1', 'template', 'delete', 'web:v1', **publisher)
        # Nor by the images that they consist of.
        for image in (version, f'{version}+ws', 't:web:v1'):
            for who in (member, {}):
                way.refuses(5, 'template publish', 'image', 'import', raw, image, **who)
                way.refuses(5, 'template delete', 'image', 'delete', image, **who)
        assert way.names() == ['a']


def varint(n):
    out = b''
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(kind, fields):
    body = b''.join(varint(number << 3 | 2) + varint(len(v)) + v if isinstance(v, bytes) else
                    varint(number << 3) + varint(v) for number, v in fields)
    return b'VMMG' + len(body).to_bytes(4, 'little') + kind.to_bytes(2, 'little') + b'\0\0' + body


def send_import(path, fd):
    """IMAGE_IMPORT with that descriptor; the kind of the error with which its job ended."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        s.sendall(message(1, [(1, 1), (2, 1), (3, b'test')]))
        s.recv(4096)
        s.sendmsg([message(100, [(1, 7), (2, b'stolen'), (6, b'x')])],
                  [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [fd]))])
        s.recv(4096)
    os.close(fd)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done = subprocess.run([f'{build()}/tools/vmmig', 'jobs', '--json', '--socket', path],
                              capture_output=True, check=True)
        job = next(j for j in json.loads(done.stdout)['jobs'] if j['peer'] == 'stolen')
        if job['state'] != 'running':
            return job['error'] and job['error']['kind']
        time.sleep(0.02)
    return 'still running'


def serve_nothing(server):
    """Until the other end gives up."""
    with contextlib.suppress(ConnectionResetError):
        while server.recv(4096):
            pass


def serve_garbage(server):
    server.sendall(b'\xff' * 4096)
    serve_nothing(server)


def negotiate(server, size):
    """As an NBD server that knows no more than it must."""
    server.sendall(b'NBDMAGICIHAVEOPT' + struct.pack('>H', 1))
    server.recv(4, socket.MSG_WAITALL)
    while True:
        _, option, length = struct.unpack('>8sII', server.recv(16, socket.MSG_WAITALL))
        server.recv(length, socket.MSG_WAITALL)
        answers = [(3, struct.pack('>HQH', 0, size, 1)), (1, b'')] if option == 7 else [(1 << 31 | 1, b'')]
        for kind, body in answers:
            server.sendall(struct.pack('>QIII', 0x3e889045565a9, option, kind, len(body)) + body)
        if option == 7:
            return


def serve_no_command(server):
    negotiate(server, 1 << 20)
    serve_nothing(server)


def serve_too_much(server):
    negotiate(server, (1 << 63) - 1)
    serve_nothing(server)


@pytest.mark.parametrize('serve, kind', [(serve_nothing, 'timeout'), (serve_garbage, 'failed'),
                                         (serve_no_command, 'timeout'), (serve_too_much, 'refused')])
def test_a_socket_that_serves_no_disk(tmp_path, serve, kind):
    """It comes from a client, who may be anybody: the import fails, and the agent's job with it."""
    with Agent(tmp_path, f'dir:{tmp_path}/repo', impatient=True) as agent:
        way = Way(['--socket', agent.socket], '')
        way.run('repo', 'init')
        ours, theirs = socket.socketpair()
        server = threading.Thread(target=serve, args=[ours])
        server.start()
        assert send_import(agent.socket, theirs.detach()) == kind
        server.join(10)
        assert not server.is_alive()
        assert way.names() == []


def servers_of(path):
    """The processes that were given that file, as far as they live."""
    found = []
    for process in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if os.fsencode(path) in (process / 'cmdline').read_bytes().split(b'\0'):
                found.append(process.name)
    return found


@pytest.mark.parametrize('how', ['no agent', 'no repository', 'a name that is taken', 'a job that is refused'])
def test_a_failed_import_leaves_no_process(how, dir_way, raw, tmp_path):
    """Nobody spoke with the qemu-nbd that was to serve the image: it ends all the same."""
    image = tmp_path / 'disk.qcow2'
    subprocess.run(['qemu-img', 'convert', '-O', 'qcow2', raw, image], check=True)
    if how == 'no agent':
        Way(['--socket', f'{tmp_path}/nobody'], '').refuses(6, 'nobody', 'image', 'import', image, 'a')
    elif how == 'no repository':
        Way(['--repo', f'dir:{tmp_path}/nowhere'], '').refuses(3, 'nowhere', 'image', 'import', image, 'a')
    elif how == 'a name that is taken':
        dir_way.run('image', 'import', image, 'taken')
        dir_way.refuses(4, 'taken', 'image', 'import', image, 'taken')
    else:
        folder = tmp_path / 'agent'
        folder.mkdir()
        with Agent(folder, f'dir:{tmp_path}/nowhere') as agent:
            Way(['--socket', agent.socket], '').refuses(3, 'repository', 'image', 'import', image, 'a')
    eventually('the qemu-nbd of the import ends', lambda: not servers_of(str(image)))


@pytest.mark.parametrize('pair', ['dir-dir', 'dir-rados', 'rados-dir'])
def test_copy_to_another_store(pair, tmp_path, request, raw):
    urls = {'dir': f'dir:{tmp_path}/a', 'rados': None}
    if 'rados' in pair:
        urls['rados'] = request.getfixturevalue('ceph_url')
    source, target = pair.split('-')
    a = Way(['--repo', urls[source]], urls[source])
    url = f'dir:{tmp_path}/b' if target == source else urls[target]
    b = Way(['--repo', url], url)
    a.run('repo', 'init')
    a.refuses(3, re.escape(f'cannot copy before "vmmig repo init --repo {url}": '), 'repo', 'copy', url)
    b.run('repo', 'init')
    other = disk(tmp_path / 'other.raw', 8, seed=9)
    a.run('image', 'import', raw, 'first')
    a.run('image', 'import', other, 'second', '--file', 'memory.raw', '--parent', 'first')
    report = a.run('repo', 'copy', url)
    assert set(report) == documented('repo copy')
    assert report['images'] == 2 and report['bytes_read'] > 0
    assert {(i['image'], i['parent'], i['created'], str(i['files'])) for i in a.run('image', 'list')['images']} == \
        {(i['image'], i['parent'], i['created'], str(i['files'])) for i in b.run('image', 'list')['images']}
    for name, path in (('first', raw), ('second', other)):
        b.run('image', 'export', name, tmp_path / f'{name}.out')
        assert filecmp.cmp(path, tmp_path / f'{name}.out', shallow=False)
    # What is there is neither read nor stored again: not as an image, and not as pages.
    assert a.run('repo', 'copy', url)['images_present'] == 2
    a.run('image', 'import', raw, 'third')
    report = a.run('repo', 'copy', url, 'third')
    assert report['images'] == 1 and report['bytes_read'] == 0 and report['stored_bytes'] < 50000
    # Another image of that name stops it before anything is copied.
    a.run('image', 'import', other, 'clash')
    a.run('image', 'import', other, 'aaa')
    b.run('image', 'import', raw, 'clash')
    a.refuses(4, 'clash', 'repo', 'copy', url)
    assert 'aaa' not in b.names()
    a.refuses(4, 'repository that is to be copied', 'repo', 'copy', a.url)


def test_damage_and_how_it_is_mended(way, raw, tmp_path):
    """Each says what is damaged, what that touches, and what to do; it is done, and mended."""
    way.run('image', 'import', raw, 'a')
    store = objects(way.url)
    pack = store.names('pack.')[0]
    data = bytearray(store.read(pack))
    data[5000] ^= 1
    store.write(pack, bytes(data))
    what = rf'pack {pack[5:]}, record at \d+: its checksum is wrong'
    way.refuses(12, what + '; "vmmig repo scrub" names all that is damaged$', 'image', 'export', 'a', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    done = way.try_run('repo', 'scrub')
    assert done.returncode == 12 and done.stderr == ''
    assert re.match(f'damaged: {what}\nimage touched: a\nto mend it, import the same content again', done.stdout), done.stdout
    way.text('image', 'import', raw, 'again')
    way.run('image', 'export', 'a', tmp_path / 'out')
    assert filecmp.cmp(raw, tmp_path / 'out', shallow=False)
    assert way.run('repo', 'scrub')['findings'] == []


def test_an_entry_whose_key_is_damaged(way, raw, tmp_path):
    """It may be all that names an image's data: gc removes nothing, the others go on, and deleting it is what is told."""
    way.run('image', 'import', raw, 'a')
    way.run('image', 'import', raw, 'web1')
    way.run('image', 'import', disk(tmp_path / 'other.raw', 8, seed=3), 'garbage')
    way.run('image', 'delete', 'garbage')
    store = objects(way.url)
    value = next(store.pairs(f'cat.{shard:02x}')['n:web1'] for shard in range(256)
                 if 'n:web1' in store.pairs(f'cat.{shard:02x}'))
    way.run('image', 'delete', 'web1')
    for damaged in ('we\x7f1', '../x', 'a b', 'web3', 'x' * 200):
        shown = damaged.replace('\x7f', '?')
        says = f"the catalogue's entry of image {re.escape(shown)} is damaged; deleting the image removes it"
        store.set('cat.07', f'n:{damaged}', value)
        packs = len(store.names('pack.'))
        way.refuses(12, f'{says}; nothing is removed before that', 'repo', 'gc')
        assert len(store.names('pack.')) == packs
        for words, tells in ((('image', 'list'), says), (('repo', 'scrub'), says),
                             (('repo', 'stat'), '1 entries of the catalogue: "vmmig repo scrub" names them')):
            done = way.try_run(*words)
            assert done.returncode == 12 and re.search(f'damaged: {tells}', done.stdout), (words, done)
        way.run('image', 'export', 'a', tmp_path / 'out.raw')
        (tmp_path / 'out.raw').unlink()
        way.run('image', 'delete', shown)
        way.refuses(3 if damaged == 'web3' else 2, '.', 'image', 'delete', shown)
        assert way.names() == ['a']
    assert way.run('repo', 'gc')['packs_removed'] > 0
    assert way.run('repo', 'scrub')['findings'] == []


def test_leases_are_told_and_a_damaged_one_goes(way, raw):
    """Who keeps what is deleted from being freed, since when; of a lease that cannot be read, what to do."""
    way.run('image', 'import', raw, 'a')
    assert way.run('repo', 'stat')['oldest_lease'] is None
    Repository(way.url).run('lease', 'a', 'clone of web1')
    Repository(way.url).run('lease', 'a', 'web2')
    stat = way.run('repo', 'stat')
    assert stat['leases'] == 2 and stat['oldest_lease']['image'] == 'a'
    assert stat['oldest_lease']['holder'] in ('clone of web1', 'web2')
    assert abs(time.mktime(time.strptime(stat['oldest_lease']['taken'], '%Y-%m-%dT%H:%M:%SZ')) - time.timezone -
               time.time()) < 3600
    assert re.search(r'leases +2, the oldest of a by .*, since 20', way.text('repo', 'stat'))
    way.run('image', 'delete', 'a')
    store = objects(way.url)
    keys = [(shard, key, value) for shard in range(256) for key, value in store.pairs(f'cat.{shard:02x}').items()
            if key.startswith('l:')]
    for shard, key, value in keys:
        store.set(f'cat.{shard:02x}', key, value[:-1] + bytes([value[-1] ^ 1]))
    assert len(store.names('pack.')) > 0
    for _, key, _ in sorted(keys, key=lambda k: k[1]):
        says = f'lease {key} of (clone of web1|web2) is damaged; deleting the image {key} removes it'
        way.refuses(12, says, 'repo', 'gc')
        done = way.try_run('repo', 'scrub')
        assert done.returncode == 12 and re.search(f'damaged: {says}', done.stdout), done
        way.run('image', 'delete', key)
    assert way.run('repo', 'stat')['leases'] == 0
    way.run('repo', 'gc')
    assert store.names('pack.') == []
    assert way.run('repo', 'scrub')['findings'] == []


def test_init_over_what_a_lost_head_leaves(way, raw):
    """A new repository would give out the numbers of its packs again."""
    way.run('image', 'import', raw, 'a')
    store = objects(way.url)
    names = store.names('')
    store.remove_map('repository')
    way.refuses(5, r'there is pack\.[0-9a-f]{16}, of a repository whose head is lost', 'repo', 'init')
    assert store.names('') == [name for name in names if name != 'repository']


def test_images_are_named_whatever_is_damaged(dir_way, tmp_path):
    """More records than a scrub names."""
    rng, source = random.Random(7), tmp_path / 'many.raw'
    source.write_bytes(b''.join(rng.randbytes(32 << 10) + bytes(32 << 10) for _ in range(1040)))
    dir_way.run('image', 'import', source, 'a', '--format', 'raw')
    store, flipped = objects(dir_way.url), 0
    for pack in store.names('pack.'):
        data = bytearray(store.read(pack))
        places, _ = records(data)
        for offset, length, _ in places:
            data[offset + length - 1] ^= 1
        flipped += len(places)
        store.write(pack, bytes(data))
    assert flipped > 1000
    done = dir_way.try_run('repo', 'scrub', '--json')
    assert done.returncode == 12, done.stderr
    found = json.loads(done.stdout)
    assert found['damaged'] == flipped and [f['what'] for f in found['findings'] if f['kind'] == 'image'] == ['a']


def test_a_copy_never_spreads_damage(dir_way, raw, tmp_path):
    dir_way.run('image', 'import', raw, 'a')
    target = Way(['--repo', f'dir:{tmp_path}/b'], f'dir:{tmp_path}/b')
    target.run('repo', 'init')
    folder = pathlib.Path(dir_way.url.removeprefix('dir:'))
    pack = max((p for p in folder.rglob('*') if p.is_file() and 'pack' in str(p.relative_to(folder))),
               key=lambda p: p.stat().st_size)
    with open(pack, 'r+b') as f:
        f.seek(pack.stat().st_size // 3)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))
    dir_way.refuses(12, '.', 'repo', 'copy', target.url)
    assert target.names() == []
    done = dir_way.try_run('repo', 'scrub', '--json')
    assert done.returncode == 12
    found = json.loads(done.stdout)
    assert found['damaged'] == 1 and {'kind': 'image', 'what': 'a'} in found['findings']
