# SPDX-License-Identifier: Apache-2.0
"""A send that cannot be: one clear line, the exit status of its kind, nothing left at the other host, and a guest that
runs on. What the command itself is told wrongly is the matter of test_cli.py."""
import contextlib
import mmap
import os
import re
import shutil
import socket
import struct
import subprocess
import sys

import pytest
from agents import PKI, Cluster, eventually
from lab import BareGuest, huge_pages, judge
from lab.guests import QEMU, ROOT, built

# An agent that is none: takes connections at a port, with the certificate files that it is given or without TLS, and
# answers the preamble and what follows with these bytes (hexadecimal).
PEER = r'''
import socket, ssl, sys, threading
port, certificate, answer = int(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
if certificate:
    context.load_cert_chain(certificate + '.crt', certificate + '.key')
listener = socket.create_server(('', port))
print('listening', flush=True)
def serve(connection):
    try:
        if certificate:
            connection = context.wrap_socket(connection, server_side=True)
            connection.recv(8)
        if answer:
            connection.sendall(answer)
        while connection.recv(65536):
            pass
    except OSError:
        pass
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
'''
# What the following begin with: hosts of the cluster, which are told the folder of their certificate, and a name.
HOST = r'''
import collections, os, socket, ssl, struct, sys
folder, name = sys.argv[1:3]
context = ssl.create_default_context(cafile=folder + '/ca.crt')
context.load_cert_chain(folder + '/host.crt', folder + '/host.key')
'''
# A host of the cluster that talks nonsense to an agent.
CLIENT = HOST + r'''
said = bytes.fromhex(sys.argv[3])
connection = context.wrap_socket(socket.create_connection((name, 16550)), server_hostname=name)
connection.sendall(b'VMMG\x01\x01\0\0' + said)
connection.settimeout(20)
answered = connection.recv(8)
assert answered == b'VMMG\x01\0\0\0', answered
try:
    while connection.recv(4096):
        pass
except ConnectionError:
    pass
print('dropped')
'''
# A host that connects to an agent and falls silent: at once, after TLS, and after it was let in. Prints what becomes of
# its three connections.
SILENT = HOST + r'''
connections = [socket.create_connection((name, 16550)) for _ in range(3)]
for number in (1, 2):
    connections[number] = context.wrap_socket(connections[number], server_hostname=name)
connections[2].sendall(b'VMMG\x01\x01\0\0')
for connection in connections:
    connection.settimeout(30)
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    print('dropped')
'''
# Somebody with several addresses who connects as often as he can, and says nothing.
MUTE = r'''
import socket, sys, time
name, *addresses = sys.argv[1:]
kept = [socket.create_connection((name, 16550), source_address=(address, 0)) for _ in range(32) for address in addresses]
print('connected', flush=True)
time.sleep(60)
'''
# A host of the cluster that asks for many migrations and follows none up. Prints how often it got which message.
ASKER = HOST + r'''
hello, prepare, count = *map(bytes.fromhex, sys.argv[3:5]), int(sys.argv[5])
connection = context.wrap_socket(socket.create_connection((name, 16550)), server_hostname=name)
connection.settimeout(60)
stream = connection.makefile('rb')
def say(kind, body):
    connection.sendall(struct.pack('<4sIHH', b'VMMG', len(body), kind, 0) + body)
connection.sendall(b'VMMG\x01\x01\0\0')
assert len(stream.read(8)) == 8
say(1, hello)
head, message, rest = prepare[:2], prepare[18:19], prepare[20:]
assert head == b'\x0a\x10' and message == b'\x10'
answers = {}
for number in range(count):
    attempt = os.urandom(16)
    answers[attempt] = None
    say(4, head + attempt + message + b'\0' + rest)
while None in answers.values():
    _, size, kind, _ = struct.unpack('<4sIHH', stream.read(12))
    body = stream.read(size)
    if kind == 4 and body[2:18] in answers:
        assert body[18] == 0x10
        answers[body[2:18]] = body[19]
print(*(f'{number}:{times}' for number, times in sorted(collections.Counter(answers.values()).items())))
'''
# Between an agent, whose certificate it has, and the one at `name`: passes everything on. What that one says of data
# channels, an answer (1) to each and then acknowledgements (2), it has as the lie wants it.
LIAR = HOST + r'''
import asyncio, xxhash
own, port, lie = sys.argv[3], int(sys.argv[4]), sys.argv[5]
server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server.load_cert_chain(own + '.crt', own + '.key')
def message(kind, applied):
    head = struct.pack('<4sHHQII', b'VMGA', kind, 0, applied, 0, 0)
    return head + struct.pack('<Q', xxhash.xxh3_64_intdigest(b'', seed=xxhash.xxh3_64_intdigest(head)))
LIES = {
    'ahead': lambda kind, applied, said: message(1, 1000) if kind == 1 else said,
    'beyond': lambda kind, applied, said: message(2, applied + 1000) if kind == 2 else said,
    'back': lambda kind, applied, said: said + message(2, 0) if kind == 2 and applied else said,
    'answers-twice': lambda kind, applied, said: said * 2 if kind == 1 else said,
    'unknown-kind': lambda kind, applied, said: said + message(77, 0),
    'garbage': lambda kind, applied, said: said + bytes(range(64)),
}
async def read_message(reader):
    said = await reader.readexactly(32)
    _, kind, _, applied, length, _, _ = struct.unpack('<4sHHQIIQ', said)
    return LIES[lie](kind, applied, said + await reader.readexactly(length))
async def pass_on(read, reader, writer):
    try:
        while data := await read(reader):
            writer.write(data)
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    writer.close()
async def some(reader):
    return await reader.read(65536)
async def serve(reader, writer):
    preamble = await reader.readexactly(8)
    from_there, there = await asyncio.open_connection(name, 16550, ssl=context, server_hostname=name)
    there.write(preamble)
    writer.write(await from_there.readexactly(8))
    is_channel = preamble[5] == 2
    await asyncio.gather(pass_on(some, reader, there),
                         pass_on(read_message if is_channel else some, from_there, writer))
async def main():
    listener = await asyncio.start_server(serve, '', port, ssl=server)
    print('listening', flush=True)
    await listener.serve_forever()
asyncio.run(main())
'''
MAP_HUGETLB = 0x40000
SOCKETS = ('web1.qmp', 'web1.judge')
WELCOME, FRAME = '564d4d4701000000', '564d4d47'


@pytest.fixture(scope='module')
def cluster():
    with Cluster(start=False) as made:
        for agent in made.agents:
            agent.options = {'connect-timeout': '1500'}
            agent.start()
        yield made


@pytest.fixture(scope='module')
def guest(cluster):
    """One for all: whatever is refused, it runs on. Its disk is in a folder of its host's own."""
    disk = '/run/vmlab/web1.raw'
    with open(cluster.hosts[0].path(disk), 'wb') as file:
        file.truncate(1 << 20)
    vm = BareGuest('web1', mem_mib=64, dirty_mib=4, options=[
        '-drive', f'if=none,id=disk0,format=raw,cache=none,file={disk}', '-device', 'virtio-blk-pci,drive=disk0'])
    console = cluster.console(vm.name)
    a1, _ = cluster.agents
    a1.host.popen(vm.argv(), name=vm.name)
    console.wait_for('ready')
    a1.vmmig('attach', vm.name, '--qmp', vm.qmp_path)
    return console


def nothing_left(cluster, vm='web1', but=()):
    """But the tests' own disk; `but` are sockets of the user's own that his QEMU leaves where it ends badly."""
    _, a2 = cluster.agents
    eventually('nothing left', lambda: not [what for what in judge.leftovers(a2.host, vm, [a2.process.pid])
                                            if not what.endswith(('web1.raw', *but))])
    for path in but:
        os.unlink(a2.host.path(f'/run/vmlab/{path}'))


def refused(cluster, console, to, status, pattern, *options, vm='web1', but=()):
    a1, _ = cluster.agents
    mark = console.mark()
    done = a1.vmmig('send', vm, '--to', to, *options, check=False)
    complaints = [line for line in done.stderr.splitlines() if line.startswith('vmmig: ')]
    assert len(complaints) == 1 and done.stderr.splitlines()[-1] == complaints[0], done.stderr
    assert re.search(pattern, complaints[0]), complaints[0]
    assert done.returncode == status, done
    console.wait_ticks(2)
    assert console.check(after=mark) == ['h1']
    assert a1.json('status', vm)['state'] == 'running'
    nothing_left(cluster, vm, but)


def listen(cluster, port, certificate='', answer=''):
    peer = cluster.hosts[1].popen([sys.executable, '-c', PEER, port, certificate, answer], stdout=subprocess.PIPE)
    assert peer.stdout.readline() == b'listening\n'
    return peer


# ---- no way there

@pytest.mark.parametrize('to, pattern', [
    ('nowhere.invalid', 'host nowhere.invalid is unknown'),
    ('192.0.2.7', 'no route to 192.0.2.7'),
    ('h2:1', 'nobody listens at h2 port 1; is vmmigd running there'),
], ids=['unknown-host', 'no-route', 'closed-port'])
def test_hosts_that_cannot_be_reached(cluster, guest, to, pattern):
    refused(cluster, guest, to, 6, pattern)


def test_a_host_that_does_not_answer(cluster, guest):
    cluster.hosts[1].cut()
    try:
        refused(cluster, guest, 'h2', 10, 'h2')
    finally:
        cluster.hosts[1].heal()


# ---- no agent of the cluster there

@pytest.fixture(scope='module')
def certificates(cluster):
    """Where h2 finds the files of certificates: another cluster's, one that has expired, another host's, its own."""
    folder = os.path.join(cluster.folder, 'others')
    os.mkdir(folder)

    def openssl(*words):
        subprocess.run(['openssl', *words], check=True, capture_output=True, cwd=folder)

    def pki(*words):
        subprocess.run([built('tools/vmmig'), 'pki', *words], check=True, capture_output=True)

    pki('init', f'{folder}/stranger')
    pki('issue', f'{folder}/stranger', 'h2', '--ip', cluster.hosts[1].address)
    ca = os.path.join(cluster.folder, 'pki')
    openssl('req', '-newkey', 'rsa:2048', '-nodes', '-keyout', 'expired.key', '-subj', '/CN=h2', '-out', 'request')
    with open(f'{folder}/ext', 'w', encoding='ascii') as file:
        file.write('subjectAltName=DNS:h2\nextendedKeyUsage=serverAuth,clientAuth\n')
    openssl('x509', '-req', '-in', 'request', '-CA', f'{ca}/ca.crt', '-CAkey', f'{ca}/ca.key', '-days', '-1',
            '-extfile', 'ext', '-out', 'expired.crt')
    pki('issue', ca, 'h7', '--ip', '192.0.2.7')
    pki('issue', f'{folder}/stranger', 'soon', '--days', '20')
    return {'stranger': f'{folder}/stranger/h2', 'expired': f'{folder}/expired', 'other-name': f'{ca}/h7',
            'soon': f'{folder}/stranger/soon', 'own': f'{PKI}/host'}


@pytest.mark.parametrize('which, status, pattern, answer', [
    ('stranger', 7, 'the certificate of h2 is of another CA', ''),
    ('expired', 7, 'the certificate of h2 has expired', ''),
    ('other-name', 7, 'the certificate of h2 is for h7, 192.0.2.7, not for h2; dial a name that it has', ''),
    ('own', 8, 'speaks version 2 of the protocol and this side version 1', '564d4d4702010000'),
    ('own', 9, 'is no vmmig agent', '00' * 64),
    ('own', 9, ':7000: the other side does not speak .* a frame is too long', WELCOME + FRAME + 'ffffffff' + '01000000'),
    ('own', 9, ':7000: the peer sent a message of unknown type', WELCOME + FRAME + '00000000' + 'ff7f0000'),
    ('own', 10, ':7000: no answer within the time limit', WELCOME),
    ('', 7, 'h2 does not speak TLS', '485454502f312e3120343030' * 40),
    ('', 10, ':7000: no answer within the time limit', ''),
], ids=['another-cluster', 'expired', 'other-name', 'other-version', 'zeros', 'huge-length', 'wrong-order',
        'nothing-more', 'no-tls', 'nothing'])
def test_peers_that_are_none(cluster, guest, certificates, which, status, pattern, answer):
    peer = listen(cluster, 7000, certificates[which] if which else '', answer)
    try:
        refused(cluster, guest, 'h2:7000', status, pattern)
    finally:
        peer.kill()
        peer.wait()


@pytest.mark.parametrize('which, pattern, told', [
    ('stranger', "does not accept this host's certificate", 'None'),
    ('soon', "does not accept this host's certificate", "this host's certificate ends on 20"),
    ('expired', "does not accept this host's certificate", "this host's certificate has expired on 20")])
def test_a_certificate_of_our_own_that_the_peer_refuses(cluster, guest, certificates, which, pattern, told):
    a1, _ = cluster.agents
    kept = {name: open(a1.host.path(f'{PKI}/host.{name}'), 'rb').read() for name in ('crt', 'key')}
    a1.stop()
    for name in kept:
        shutil.copy(f'{certificates[which]}.{name}', a1.host.path(f'{PKI}/host.{name}'))
    a1.start()
    try:
        refused(cluster, guest, 'h2', 7, pattern)
        assert str(a1.json('status')['certificate']).startswith(told)
        assert told == 'None' or re.search(f'level=warn msg="the certificate of this host" complaint="{told}', a1.log())
    finally:
        a1.stop()
        for name, content in kept.items():
            with open(a1.host.path(f'{PKI}/host.{name}'), 'wb') as file:
                file.write(content)
        a1.start()


@pytest.mark.parametrize('which, pattern', [
    (0, f'this host has no certificates; `vmmig pki init` and `vmmig pki issue` make them: cannot read {PKI}/ca.crt'),
    (1, 'h2 has no certificates yet; `vmmig pki issue` makes them')], ids=['source', 'destination'])
def test_a_host_without_certificates_works_alone(cluster, guest, which, pattern):
    """Until they are there; its agent need not be started again then."""
    agent = cluster.agents[which]
    here = agent.host.path(PKI)
    agent.stop()
    os.rename(here, f'{here}.aside')
    try:
        agent.start()
        assert re.search('level=warn msg="no VM is sent to another host, and none is taken.*vmmig pki issue', agent.log())
        told = agent.json('status')
        assert told['certificate_ends'] is None and told['certificate'] == agent.json('doctor')['certificate']
        assert told['certificate'].startswith('this host has no certificates; `vmmig pki init` and')
        assert told['certificate'] in agent.vmmig('status').stdout and told['certificate'] in agent.vmmig('doctor').stdout
        agent.vmmig('repo', 'init')
        agent.vmmig('image', 'import', built('tests/guest/bare/bare_pc.bin'), 'guest')
        assert [image['image'] for image in agent.json('image', 'list')['images']] == ['guest']
        refused(cluster, guest, 'h2', 7, pattern)
    finally:
        os.rename(f'{here}.aside', here)
    assert agent.json('status')['certificate'] is None and agent.json('doctor')['certificate'] is None
    test_a_destination_without_the_disk(cluster, guest)


@pytest.mark.parametrize('which, stolen, pattern', [
    (0, 'h2', rf'the certificate of h2 was revoked \({PKI}/ca.crl\); '),
    (1, 'h1', "h2 does not accept this host's certificate: it was revoked")], ids=['destination', 'source'])
def test_a_host_whose_certificate_was_revoked(cluster, guest, certificates, which, stolen, pattern):
    """It gets nothing from the moment that the list says so."""
    agent = cluster.agents[which]
    pki = os.path.join(cluster.folder, 'pki')

    def revoke(host):
        subprocess.run([built('tools/vmmig'), 'pki', 'revoke', pki, host], check=True, capture_output=True)
        shutil.copy(f'{pki}/ca.crl', agent.host.path(f'{PKI}/ca.crl.new'))
        os.rename(agent.host.path(f'{PKI}/ca.crl.new'), agent.host.path(f'{PKI}/ca.crl'))

    revoke('h7')
    restart(agent, crl=f'{PKI}/ca.crl')
    try:
        test_a_destination_without_the_disk(cluster, guest)
        revoke(stolen)
        refused(cluster, guest, 'h2', 7, pattern)
    finally:
        os.unlink(f'{pki}/ca.crl')
        restart(agent)


@pytest.mark.parametrize('lie, pattern', [
    ('ahead', r'the receiver of channel \d is at frame 1000, but 0 is sent'),
    ('beyond', r'the receiver acknowledges frame 1\d\d\d of channel \d, but \d+ is sent'),
    ('back', r'the receiver acknowledges frame 0 of channel \d, but \d+ is sent and \d+ was acknowledged'),
    ('answers-twice', 'the receiver answers what was not asked'),
    ('unknown-kind', 'an acknowledgement has the unknown kind 77'),
    ('garbage', 'no acknowledgement where one should begin'),
], ids=['ahead', 'beyond', 'back', 'answers-twice', 'unknown-kind', 'garbage'])
def test_a_receiver_that_lies(cluster, guest, certificates, disk, lie, pattern):
    """On the data channels; all else that it says is right."""
    h1, h2 = cluster.hosts
    liar = h2.popen([sys.executable, '-c', LIAR, h1.path(PKI), 'h2', certificates['own'], 7000, lie],
                    stdout=subprocess.PIPE)
    assert liar.stdout.readline() == b'listening\n'
    try:
        refused(cluster, guest, 'h2:7000', 9, pattern, '--assume-shared')
    finally:
        liar.kill()
        liar.wait()


def message(name):
    """One of those that the fuzzer begins with, as it comes over the connection."""
    with open(os.path.join(ROOT, 'tests/fuzz/corpus-peer', name), 'rb') as file:
        kind, body = file.read(1)[0], file.read()
    return FRAME + struct.pack('<IHH', len(body), kind, 0).hex() + body.hex()


@pytest.mark.parametrize('said, why', [
    ('00' * 4096, 'a frame does not begin'),
    (FRAME + 'ffffffff' + '01000000' + '00' * 4096, 'a frame is too long'),
    (FRAME + '00000000ff7f0000', 'unknown type'),
    (FRAME + '04000000' + '01000000' + 'ffffffff', 'malformed: hello'),
    (message('prepare'), 'first message is not its greeting'), (message('hello-ok'), 'first message is not its greeting'), (message('hello') * 2, 'greeted twice'),
    (message('hello-from-the-future'), 'upgrade the older one'),
    (message('hello') + message('prepare-no-cpus'), 'malformed'), (message('hello') + message('hello-ok'), 'greeted twice'),
], ids=['zeros', 'huge-length', 'unknown-type', 'no-message', 'prepare-first', 'answer-first', 'hello-twice',
        'other-version', 'malformed-prepare', 'answer-unasked'])
def test_an_agent_drops_a_host_that_talks_nonsense(cluster, guest, said, why):
    h1, _ = cluster.hosts
    log = len(cluster.agents[1].log())
    assert h1.run([sys.executable, '-c', CLIENT, PKI, 'h2', said]) == 'dropped\n'
    eventually('it says why', lambda: re.search(why, cluster.agents[1].log()[log:]))
    for agent in cluster.agents:
        assert agent.vmmig('list').returncode == 0
    assert judge.rss_anon(cluster.agents[1].process.pid) < 100 << 20


def test_an_agent_drops_a_host_that_says_nothing(cluster, guest):
    h1, _ = cluster.hosts
    log = len(cluster.agents[1].log())
    assert h1.run([sys.executable, '-c', SILENT, PKI, 'h2']) == 'dropped\n' * 3
    assert cluster.agents[1].log()[log:].count('no answer within the time limit') == 3
    assert cluster.agents[1].vmmig('list').returncode == 0


def test_those_who_say_nothing_do_not_keep_hosts_out(cluster, guest):
    """With five addresses, in more connections than there are places for strangers."""
    h1, _ = cluster.hosts
    addresses = [f'10.77.0.{number}' for number in range(101, 106)]
    for address in addresses:
        h1.run(['ip', 'addr', 'add', f'{address}/24', 'dev', 'br0'])
    try:
        mute = h1.popen([sys.executable, '-c', MUTE, 'h2', *addresses], stdout=subprocess.PIPE)
        assert mute.stdout.readline() == b'connected\n'
        refused(cluster, guest, 'h2', 3, 'the peer: .*cannot look at')  # by a host that it has reached
        assert mute.poll() is None
    finally:
        for address in addresses:
            h1.run(['ip', 'addr', 'del', f'{address}/24', 'dev', 'br0'])
    mute.kill()
    mute.wait()


def test_a_host_that_asks_for_too_much(cluster, guest):
    """64 of its attempts are begun, which fail; the others are refused (6), and have no record."""
    h1, _ = cluster.hosts
    _, a2 = cluster.agents

    def said(name):
        with open(os.path.join(ROOT, 'tests/fuzz/corpus-peer', name), 'rb') as file:
            return file.read()[1:].hex()

    def without_journal():
        a2.stop()
        shutil.rmtree(a2.host.path('/var/lib/vmmig/journal'))
        a2.start()
    without_journal()  # an attempt that another test saw fail may not be forgotten yet, and counts
    log = len(a2.log())
    assert h1.run([sys.executable, '-c', ASKER, PKI, 'h2', said('hello'), said('prepare'), 70]) == '6:6 10:64\n'
    assert '64 migrations from h1 are not finished here' in a2.log()[log:]
    begun = re.findall(r'journalled.* attempt=(\S+) record=PREPARING', a2.log()[log:])
    assert len(set(begun)) == 64
    without_journal()


# ---- a destination that cannot take it

def restart(agent, **options):
    agent.stop()
    agent.options = {'connect-timeout': '1500', **options}
    agent.start()


def test_a_destination_without_the_disk(cluster, guest):
    refused(cluster, guest, 'h2', 3, 'the peer: disk disk0: cannot look at /run/vmlab/web1.raw')


def test_a_destination_with_another_disk_of_that_name(cluster, guest, disk):
    refused(cluster, guest, 'h2', 5, '/run/vmlab/web1.raw')


def test_a_check_moves_nothing(cluster, guest, disk):
    """It is refused as a send would be, says so of one that would not, and leaves nothing there."""
    a1, a2 = cluster.agents
    refused(cluster, guest, 'h2', 5, '/run/vmlab/web1.raw', '--check')
    mark = guest.mark()
    done = a1.vmmig('send', 'web1', '--to', 'h2', '--check', '--assume-shared')
    assert re.fullmatch(r'web1 can be sent to h2; nothing was moved\n  total time +\d.*\n', done.stdout), done.stdout
    job = a1.json('send', 'web1', '--to', 'h2', '--check', '--assume-shared')
    assert (job['kind'], job['state'], job['wire_bytes'], job['pause_ms']) == ('check', 'done', 0, None)
    guest.wait_ticks(2)
    assert guest.check(after=mark) == ['h1']
    told = a1.json('status', 'web1')
    assert told['state'] == 'running' and (told['handover'] is None or told['handover']['settled'])
    assert [finding['owner'] for finding in a1.json('doctor', 'web1')['findings']] == ['here']
    eventually('nothing there', lambda: a2.json('list')['vms'] == [])
    nothing_left(cluster)
    refused(cluster, guest, 'h2', 2, 'leave one of them out', '--check', '--dest-qmp', '/run/x')


def test_a_destination_without_the_binary(cluster, guest):
    _, a2 = cluster.agents
    restart(a2, vmm='/usr/lib/nowhere/qemu-system-x86_64')
    try:
        refused(cluster, guest, 'h2', 3, 'the peer: cannot run /usr/lib/nowhere/qemu-system-x86_64', '--assume-shared')
    finally:
        restart(a2)


def test_a_destination_that_does_not_run_such_a_binary(cluster, guest):
    _, a2 = cluster.agents
    restart(a2, vmm='/usr/bin/qemu-system-aarch64')
    try:
        refused(cluster, guest, 'h2', 5, r'the peer: qemu-system-x86_64 is not among the binaries that may be run as a '
                r'VM \(`vmm` in the agent.s configuration\)$', '--assume-shared')
    finally:
        restart(a2)


def test_a_destination_without_kvm(cluster, guest, disk):
    """Of a guest that has it, where this machine does."""
    h2 = cluster.hosts[1]
    h2.run(['mount', '--bind', '/dev/null', '/dev/kvm'])
    try:
        refused(cluster, guest, 'h2', 5, 'the peer: cannot start .*-accel kvm: failed to initialize kvm', '--assume-shared',
                but=SOCKETS)
    finally:
        h2.run(['umount', '/dev/kvm'])


@pytest.mark.parametrize('what, status, pattern', [
    ('nothing', 3, 'the peer: .*/prepared.qmp: No such file or directory'),
    ('file', 6, 'the peer: .*/prepared.qmp: Connection refused'),
    ('running', 5, "the peer: .*/prepared.qmp: the QEMU prepared for the guest is 'running': it must wait with"),
])
def test_a_prepared_destination_that_is_none(cluster, guest, disk, what, status, pattern):
    h2 = cluster.hosts[1]
    path, qemu = '/run/vmlab/prepared.qmp', None
    if what == 'file':
        h2.run(['touch', path])
    if what == 'running':
        qemu = h2.popen([QEMU, '-machine', 'none', '-display', 'none', '-qmp', f'unix:{path},server=on,wait=off'])
        eventually('its QEMU', lambda: os.path.exists(h2.path(path)))
    try:
        refused(cluster, guest, 'h2', status, pattern, '--assume-shared', '--dest-qmp', path)
        assert not qemu or qemu.poll() is None
    finally:
        if qemu:
            qemu.kill()
            qemu.wait()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(h2.path(path))


def test_a_destination_whose_vmm_dies_in_mid_copy(cluster, guest, disk):
    a1, _ = cluster.agents
    h1, h2 = cluster.hosts
    mark = guest.mark()
    h1.set_rate('10mbit')
    try:
        a1.vmmig('send', 'web1', '--to', 'h2', '--assume-shared', '--background')
        eventually('some memory', lambda: a1.json('status', 'web1')['job']['wire_bytes'] > 100000)
        pid, = [pid for pid, argv in h2.processes().items() if 'qemu-system' in argv[0]]
        os.kill(pid, 9)
        done = a1.vmmig('watch', 'web1', check=False)
    finally:
        h1.set_rate(None)
    assert done.returncode == 13, done
    assert re.fullmatch(rf"vmmig: the (peer|receiver ended channel \d): the VM's process {pid} ended",
                        done.stderr.splitlines()[-1])
    guest.wait_ticks(2)
    assert guest.check(after=mark) == ['h1']
    nothing_left(cluster, but=SOCKETS)


def test_a_destination_that_is_root_and_was_not_told_whom_vms_run_as(cluster, guest, disk):
    _, a2 = cluster.agents
    restart(a2, **{'vm-user': 'none'})
    try:
        refused(cluster, guest, 'h2', 5, 'the peer: a command line of another host .* is not run by root', '--assume-shared')
    finally:
        restart(a2)


@pytest.fixture
def disk(cluster):
    """h2 has a disk of the guest's name, which --assume-shared takes for the guest's."""
    path = cluster.hosts[1].path('/run/vmlab/web1.raw')
    with open(path, 'wb') as file:
        file.truncate(1 << 20)
    yield
    os.unlink(path)


@contextlib.contextmanager
def other_vmm(cluster, contents):
    """h2 has another QEMU than h1, at the same place."""
    h2 = cluster.hosts[1]
    path, there = os.path.join(cluster.folder, 'qemu'), shutil.which(QEMU)
    with open(path, 'wb') as file:
        file.write(contents)
    os.chmod(path, 0o755)
    h2.run(['mount', '--bind', path, there])
    try:
        yield
    finally:
        h2.run(['umount', there])


def test_a_destination_without_the_machine_type(cluster, guest, disk):
    """Its QEMU knows a machine of another version instead."""
    machine = BareGuest('web1').qmp(cluster.hosts[0])('qom-get', path='/machine', property='type')
    machine = machine.removesuffix('-machine')
    with open(shutil.which(QEMU), 'rb') as file:
        code = file.read()
    assert machine.encode() in code
    with other_vmm(cluster, code.replace(machine.encode(), machine[:-1].encode() + b'x')):
        refused(cluster, guest, 'h2', 5, f'the peer: .*does not have the machine type {machine} ', '--assume-shared')


@pytest.mark.parametrize('what', ['model', 'feature'])
def test_a_destination_with_another_cpu(cluster, guest, disk, what):
    """Whatever its QEMU is told, it has that one."""
    argv = BareGuest('web1').argv()
    same = argv[argv.index('-cpu') + 1] if '-cpu' in argv else 'qemu64'
    other = 'max' if same == 'qemu64' else 'qemu64'
    cpu, pattern = {
        'model': (other, f"the destination's QEMU is not the same machine: the CPU model is '{other}-x86_64-cpu', not "),
        'feature': (f'{same},-cx16', "the CPU that this host offers is not the guest's: CPUID word .* is missing"),
    }[what]
    real = os.path.join(cluster.folder, 'real-qemu')
    shutil.copy(shutil.which(QEMU), real)
    firmware = '-L /usr/share/qemu -L /usr/share/seabios'  # which it looks for beside itself
    with other_vmm(cluster, f'#!/bin/sh\nexec {real} {firmware} "$@" -cpu {cpu}\n'.encode()):
        refused(cluster, guest, 'h2', 5, f'the peer: {pattern}', '--assume-shared', but=SOCKETS)


def test_a_destination_whose_vmm_ends_at_once(cluster, guest, disk):
    with other_vmm(cluster, b'#!/bin/sh\nexit 1\n'):
        refused(cluster, guest, 'h2', 5, 'the peer: cannot start .*: QEMU ended and said nothing', '--assume-shared')


def test_a_destination_where_somebody_has_the_vms_socket(cluster, guest, disk):
    """QEMU would take it away from him: another VM of that host, likely, set up alike."""
    path = '/run/vmlab/web1.judge'
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(cluster.hosts[1].path(path))
        listener.listen()
        refused(cluster, guest, 'h2', 5, f"the peer: the VM's -qmp would take the socket {path} away",
                '--assume-shared', but=('web1.judge',))  # which is his, and there


@contextlib.contextmanager
def available_memory(cluster, mib):
    """As the kernel of h2 says."""
    h2 = cluster.hosts[1]
    with open('/proc/meminfo', encoding='ascii') as file:
        said = re.sub(r'(MemAvailable:\s+)\d+', rf'\g<1>{mib << 10}', file.read())
    path = os.path.join(cluster.folder, 'meminfo')
    with open(path, 'w', encoding='ascii') as file:
        file.write(said)
    h2.run(['mount', '--bind', path, '/proc/meminfo'])
    try:
        yield
    finally:
        h2.run(['umount', '/proc/meminfo'])


def test_a_destination_with_too_little_memory(cluster, guest, disk):
    with available_memory(cluster, 20):
        refused(cluster, guest, 'h2', 11, 'the peer: the VM needs 64 MiB of memory, 20 MiB are available',
                '--assume-shared')


def test_memory_is_promised_once(cluster, guest, disk):
    """Guests that arrive have not taken theirs yet. One that does not come needs none."""
    a1, a2 = cluster.agents
    vm = BareGuest('other1', mem_mib=64, dirty_mib=4, fill='random')
    console = cluster.boot(vm)
    with available_memory(cluster, 110):
        a1.vmmig('send', 'other1', '--to', 'h2', '--background', '--max-bandwidth', '256KiB')
        eventually('some memory', lambda: a1.json('status', 'other1')['job']['wire_bytes'] > 100000)
        done = a1.vmmig('send', 'web1', '--to', 'h2', '--assume-shared', check=False)
        assert done.returncode == 11, done
        assert re.search(r'needs 64 MiB of memory; 110 MiB are available, of which 6\d MiB are for VMs that are '
                         'arriving', done.stderr)
        a1.vmmig('cancel', 'other1')
        eventually('its end', lambda: (a1.json('status', 'other1')['handover'] or {'settled': True})['settled'])
        assert a2.vmmig('watch', 'other1', check=False).returncode != 0  # until its job there has ended, or if it has
        a1.vmmig('send', 'other1', '--to', 'h2')
    console.wait_ticks(3)
    assert console.check()[-1] == 'h2'
    a2.end('other1')


def test_a_destination_with_too_few_huge_pages(cluster):
    """The guest has taken half of the machine's, and somebody has the promise of the others, which are free until then."""
    try:
        pages = huge_pages(2 * 64)
        pages.__enter__()
    except MemoryError as why:
        pytest.skip(str(why))
    vm = BareGuest('huge1', mem_mib=64, dirty_mib=4, memory='hugetlb')
    a1, a2 = cluster.agents
    console = cluster.console(vm.name)
    try:
        process = a1.host.popen(vm.argv(), name=vm.name)
        console.wait_for('ready')
        a1.vmmig('attach', vm.name, '--qmp', vm.qmp_path)
        with mmap.mmap(-1, 64 << 20, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB):
            pages.drop_free()
            refused(cluster, console, 'h2', 11, r'the peer: the VM needs 32 huge pages of 2048 KiB, 0 are free',
                    vm=vm.name)
        a1.vmmig('detach', vm.name)
        process.kill()
        process.wait()
    finally:
        pages.__exit__()


@contextlib.contextmanager
def small_file_system(cluster, path, options):
    """h2 has a small one there. Yields a call that fills it."""
    h2 = cluster.hosts[1]
    h2.run(['mount', '-t', 'tmpfs', '-o', options, 'none', path])
    try:
        yield lambda: h2.run(['sh', '-c', f'cd {path}; (for i in $(seq 99); do true > full.$i; done) 2>/dev/null; '
                                          'cat /dev/zero > full.0 2>/dev/null; true'])
    finally:
        h2.run(['umount', '-l', path])


def test_an_agent_does_not_start_where_its_journal_has_no_room(cluster, guest):
    _, a2 = cluster.agents
    a2.stop()
    with small_file_system(cluster, '/var/lib/vmmig', 'size=1M'):
        with pytest.raises(RuntimeError, match='vmmigd: /var/lib/vmmig/journal: .*No space left on device$'):
            a2.start()
        assert a2.process.wait() == 11
    a2.start()


def test_a_destination_without_space_for_its_sockets(cluster, guest, disk):
    _, a2 = cluster.agents
    a2.stop()
    with small_file_system(cluster, '/run/vmmig', 'size=1M,nr_inodes=64') as fill:
        a2.start()
        fill()
        refused(cluster, guest, 'h2', 11, 'the peer: .*No space left on device', '--assume-shared')
        a2.stop()
    a2.start()


def test_a_destination_whose_disk_is_full(cluster, guest, disk):
    """Full before: refused. Full only when it is prepared: what it has to write has its room."""
    a1, a2 = cluster.agents
    h1, h2 = cluster.hosts
    a2.stop()
    with small_file_system(cluster, '/var/lib/vmmig', 'size=40M') as fill:
        h2.run(['mkdir', '/var/lib/vmmig/log'])
        a2.start()
        fill()
        refused(cluster, guest, 'h2', 11, 'the peer: .*No space left on device', '--assume-shared')
        h2.run(['sh', '-c', 'rm /var/lib/vmmig/full.*'])
        mark = guest.mark()
        h1.set_rate('10mbit')
        a1.vmmig('send', 'web1', '--to', 'h2', '--assume-shared', '--background')
        eventually('some memory', lambda: a1.json('status', 'web1')['job']['wire_bytes'] > 100000)
        fill()
        h1.set_rate(None)
        a1.vmmig('watch', 'web1')
        eventually('the VM at h2', lambda: a2.json('status', 'web1')['state'] == 'running')
        guest.wait_ticks(2)
        h2.run(['sh', '-c', 'rm /var/lib/vmmig/full.*'])
        a2.vmmig('send', 'web1', '--to', 'h1', '--assume-shared')
        guest.wait_ticks(2)
        assert guest.check(after=mark) == ['h1', 'h2', 'h1']
        a2.stop()
    a2.start()
