# SPDX-License-Identifier: Apache-2.0
"""vmmig and vmmigd as their user types them: answers, one-line errors, exit statuses, Ctrl-C, restarts.

Two agents of this host talk over loopback. The guests are QEMUs that stay in their firmware. What a migration
does to a guest is the matter of test_migrate.py.
"""
import fcntl
import json
import os
import pathlib
import pwd
import re
import signal
import socket
import struct
import subprocess
import time

import pytest
from lab.guests import ROOT, built
from terminal import in_terminal, until_closed

QEMU = 'qemu-system-x86_64'
MACHINE = ['-machine', 'pc,accel=tcg', '-nodefaults', '-display', 'none']
MANUAL = pathlib.Path(ROOT, 'docs/vmmig.1.md').read_text(encoding='utf-8')


def eventually(what, condition, timeout=20):
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f'{what}: not within {timeout} s'
        time.sleep(0.01)
    return found


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Agent:
    """One vmmigd with folders of its own below `folder`."""

    def __init__(self, folder, name, **options):
        self.folder = folder / name
        self.folder.mkdir(mode=0o755)
        self.socket = str(self.folder / 'run/control.sock')
        self.port = free_port()
        self.process = None
        self.log_path = self.folder / 'vmmigd.log'
        self.config = self.folder / 'vmmigd.conf'
        lines = {'host': name, 'state-dir': self.folder / 'state', 'runtime-dir': self.folder / 'run',
                 'log-dir': self.folder / 'log', 'listen': f'127.0.0.1:{self.port}',
                 'insecure-plain': 'yes', 'vm-user': 'root', **options}
        self.config.write_text(''.join(f'{key} = {value}\n' for key, value in lines.items()))

    def start(self):
        with open(self.log_path, 'ab') as log:
            self.process = subprocess.Popen([built('agent/vmmigd'), '--config', self.config],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually('vmmigd answers', lambda: self.process.poll() is not None
                   or self.run('list').returncode == 0)
        assert self.process.poll() is None, self.log()
        return self

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(30)

    def log(self):
        return self.log_path.read_text(encoding='utf-8', errors='replace')

    def argv(self, *words):
        return [built('tools/vmmig'), '--socket', self.socket, *map(str, words)]

    def run(self, *words, **options):
        return subprocess.run(self.argv(*words), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=60, check=False, **options)

    def ok(self, *words, **options):
        done = self.run(*words, **options)
        assert done.returncode == 0, done
        assert not done.stderr, done
        return done.stdout

    def json(self, *words, status=0):
        done = self.run(*words, '--json')
        assert done.returncode == status, done
        assert not done.stderr, done
        return json.loads(done.stdout)

    def boot(self, name, memory=64):
        """Starts a VM; returns its process."""
        return json.loads(self.ok('--json', 'run', name, '--', QEMU, *MACHINE, '-m', memory))['pid']

    def vm(self, name):
        return self.json('status', name)

    def clean(self):
        """Ends every VM, and forgets it."""
        for vm in self.json('list')['vms']:
            if vm['state'] == 'arriving':
                self.run('cancel', vm['vm'])
                continue
            if vm['presence'] != 'ended' and vm['pid']:  # 0 would be this test's own process group
                os.kill(vm['pid'], signal.SIGKILL)
            self.run('detach', vm['vm'])


def public_folder(tmp_path_factory, name):
    """A folder that other users can look into, so that the socket's own mode is what keeps them off."""
    folder = tmp_path_factory.mktemp(name)
    for path in (folder, folder.parent, folder.parent.parent):
        os.chmod(path, 0o755)
    return folder


@pytest.fixture(scope='module')
def agents(tmp_path_factory):
    folder = public_folder(tmp_path_factory, 'cli')
    pair = [Agent(folder, 'h1'), Agent(folder, 'h2')]
    try:
        for agent in pair:
            agent.start()
        yield pair
    finally:
        for agent in pair:
            if agent.process and agent.process.poll() is None:
                agent.clean()
                assert agent.stop() == 0, agent.log()


@pytest.fixture
def h1(agents):
    yield agents[0]
    for agent in agents:
        agent.clean()


@pytest.fixture
def h2(agents):
    return agents[1]


# ---- what is asked for

def test_a_vm_is_started_listed_and_forgotten(h1):
    said = h1.ok('run', 'web1', '--', QEMU, *MACHINE, '-m', '64')
    pid = int(re.fullmatch(r'web1: started \(process (\d+)\)\n', said)[1])
    assert re.search(rf'^web1 +running +{pid}$', h1.ok('list'), re.M)
    vm = h1.vm('web1')
    assert vm['pid'] == pid and vm['origin'] == 'run' and vm['presence'] == 'present'
    assert vm['argv'][0] == QEMU and vm['job'] is None and vm['handover'] is None
    assert 'argv' not in h1.json('list')['vms'][0]
    assert h1.ok('detach', 'web1') == f'web1: detached (process {pid})\n'
    assert h1.ok('list') == 'no VMs here\n'
    os.kill(pid, 0)  # it runs on
    qmp = h1.folder / 'run/web1.qmp'
    assert h1.ok('attach', 'again', '--qmp', qmp) == f'again: attached (process {pid})\n'
    os.kill(pid, signal.SIGKILL)
    eventually('the end is seen', lambda: h1.vm('again')['presence'] == 'ended')
    assert h1.vm('again')['state'] == 'ended'


def test_relative_paths_are_the_users(h1, tmp_path):
    (tmp_path / 'disk.raw').write_bytes(bytes(1 << 20))
    h1.ok('run', 'web1', '--', QEMU, *MACHINE, '-m', '64', '-drive',
          'if=virtio,format=raw,file=disk.raw', cwd=tmp_path)
    assert os.readlink(f'/proc/{h1.vm("web1")["pid"]}/cwd') == str(tmp_path)


def test_the_command_line_may_follow_without_dashes(h1):
    h1.ok('run', 'web1', QEMU, *MACHINE, '-m', '64', '-name', 'a b')
    assert h1.vm('web1')['argv'][-1] == 'a b'


def test_a_vm_that_ended_says_what_it_said_last(h1):
    pid = h1.boot('web1')
    with open(h1.folder / 'log/web1.log', 'a', encoding='ascii') as log:
        log.write('qemu: \x1b[31mthe end\n')
    os.kill(pid, signal.SIGKILL)
    eventually('the end is seen', lambda: h1.vm('web1')['presence'] == 'ended')
    assert h1.vm('web1')['detail'].endswith('the end')
    assert '\x1b' not in h1.ok('list')
    h1.boot('web1')  # the name is free again


def test_vms_outlive_the_agent(h1):
    pid = h1.boot('web1')
    assert h1.stop() == 0
    h1.start()
    assert h1.vm('web1')['pid'] == pid and h1.vm('web1')['state'] == 'running'
    h1.stop(signal.SIGKILL)
    h1.start()
    assert h1.vm('web1')['state'] == 'running'
    h1.stop(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    h1.start()
    assert h1.vm('web1')['state'] == 'ended'


def test_a_vmm_that_hangs_does_not_take_the_agent_along(h1):
    pid = h1.boot('web1')
    os.kill(pid, signal.SIGSTOP)
    try:
        assert h1.vm('web1')['state'] == 'unreachable'
        assert 'unreachable' in h1.ok('list')
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually('it answers again', lambda: h1.vm('web1')['state'] == 'running')


@pytest.mark.skipif(os.geteuid() != 0, reason='needs root to become somebody else')
def test_vms_run_as_their_own_user(tmp_path_factory):
    agent = Agent(public_folder(tmp_path_factory, 'user'), 'h4', **{'vm-user': 'nobody', 'listen': 'none'}).start()
    try:
        pid = agent.boot('web1')
        assert os.stat(f'/proc/{pid}').st_uid == pwd.getpwnam('nobody').pw_uid
        agent.clean()
    finally:
        agent.stop()


def writable_cgroup():
    """A fresh cgroup below one that can be written; None if there is none."""
    for top in ('/sys/fs/cgroup/memory', '/sys/fs/cgroup'):
        path = f'{top}/vmmig-test-cli-{os.getpid()}'
        try:
            os.mkdir(path)
        except OSError:
            continue
        if os.path.exists(f'{path}/cgroup.procs'):
            return path
        os.rmdir(path)
    return None


def test_each_vm_has_a_cgroup_of_its_own(tmp_path):
    cgroup = writable_cgroup()
    if not cgroup:
        pytest.skip('no cgroup can be made here')
    agent = Agent(tmp_path, 'h6', **{'vm-cgroup': cgroup, 'listen': 'none'}).start()
    try:
        pid = agent.boot('web1')
        with open(f'{cgroup}/web1/cgroup.procs', encoding='ascii') as file:
            assert file.read().split() == [str(pid)]
        agent.stop(signal.SIGKILL)
        os.kill(pid, 0)
        agent.start()
        os.kill(pid, signal.SIGKILL)
        eventually('its cgroup is gone', lambda: not os.path.exists(f'{cgroup}/web1'))
    finally:
        agent.clean()
        agent.stop()
        os.rmdir(cgroup)


def test_the_supervisor_is_told_when_it_is_ready(tmp_path):
    agent = Agent(tmp_path, 'h5', listen='none')
    path = str(tmp_path / 'notify')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(path)
        notified.settimeout(20)
        process = subprocess.Popen([built('agent/vmmigd'), '--config', agent.config], stderr=subprocess.DEVNULL,
                                   env={**os.environ, 'NOTIFY_SOCKET': path})
        try:
            assert notified.recv(100) == b'READY=1'
            assert agent.run('list').returncode == 0  # it is ready indeed
            process.send_signal(signal.SIGHUP)  # ignored, with a line in the log
            assert agent.run('list').returncode == 0
            process.send_signal(signal.SIGTERM)
            assert notified.recv(100) == b'STOPPING=1'
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_status_of_the_agent(h1, h2):
    about = h1.json('status')
    assert about['host'] == 'h1' and about['pid'] == h1.process.pid
    assert about['listen'] == f'127.0.0.1:{h1.port}'
    assert 0 < about['rss_anon_bytes'] < 100 << 20
    assert h2.json('version')['agent'].startswith('vmmig ')


# ---- send

def test_send_prints_progress_and_a_summary(h1, h2):
    h1.boot('web1')
    done = h1.run('send', 'web1', '--to', f'127.0.0.1:{h2.port}')
    assert done.returncode == 0, done
    assert re.match(rf'web1 runs at 127.0.0.1:{h2.port} now\n  total time     \d+', done.stdout)
    for word in ('guest\'s pause', 'on the wire', 'saved'):
        assert word in done.stdout
    for line in done.stderr.splitlines():  # plain lines, since this is no terminal
        assert re.match('(preparing|copying|paused|deciding|finishing)', line), line
    assert '\r' not in done.stderr
    assert h2.vm('web1')['origin'] == 'received'
    gone = h1.run('status', 'web1')
    assert gone.stderr == f'vmmig: VM web1 is not here any more: it was sent to 127.0.0.1:{h2.port}\n'
    assert gone.returncode == 3


def test_send_as_json_is_one_object(h1, h2):
    h1.boot('web1')
    job = h1.json('send', 'web1', '--to', f'127.0.0.1:{h2.port}')
    assert job['state'] == 'done' and job['error'] is None and job['vm'] == 'web1'
    assert job['pause_ms'] > 0 and job['elapsed_ms'] >= job['pause_ms']
    assert job['resent_bytes'] == 0 and job['wire_bytes'] > 0
    assert sum(p['pages'] for p in job['pages'].values()) >= (64 << 20) // 4096
    assert h1.json('jobs')['jobs'][0]['job'] == job['job']
    assert h1.json('watch', 'web1')['job'] == job['job']  # the last one, since none runs


def test_send_in_the_background(h1, h2):
    h1.boot('web1')
    said = h1.ok('send', 'web1', '--to', f'127.0.0.1:{h2.port}', '--background')
    assert said == (f'web1: send to 127.0.0.1:{h2.port} has begun; `vmmig watch web1` follows it\n')
    assert h1.run('watch', 'web1').returncode == 0
    assert h2.vm('web1')['state'] == 'running'


def test_a_vm_on_its_way_is_seen_at_both_ends(h1, h2):
    h1.boot('web1')
    h1.ok('send', 'web1', '--to', f'127.0.0.1:{h2.port}', '--max-bandwidth', '64KiB', '--background')
    eventually('the destination has begun', lambda: h2.json('list')['vms'])
    vm = h2.vm('web1')
    assert (vm['state'], vm['origin']) == ('arriving', 'received')
    assert vm['job']['kind'] == 'receive' and vm['job']['state'] == 'running'
    assert vm['handover']['state'] and not vm['handover']['in_doubt']
    assert 'arriving' in h2.ok('list') and 'arriving' in h2.ok('status', 'web1')
    assert h1.vm('web1')['handover']['attempt'] == vm['handover']['attempt']
    assert h2.run('run', 'web1', '--', QEMU).returncode == 4  # the name is taken while it comes
    assert h1.run('resolve', 'web1', '--gone').returncode == 5  # nothing is in doubt
    h1.ok('cancel', 'web1')
    assert h1.run('watch', 'web1').returncode == 14
    eventually('the destination is clean', lambda: not h2.json('list')['vms'])
    assert h1.vm('web1')['state'] == 'running'


def test_the_agents_limit_of_the_bandwidth_holds_besides(tmp_path_factory, h1, h2):
    """What the user allows is more."""
    slow = Agent(public_folder(tmp_path_factory, 'slow'), 'h3', **{'max-bandwidth': '64KiB'}).start()
    try:
        slow.boot('web1')
        slow.ok('send', 'web1', '--to', f'127.0.0.1:{h2.port}', '--max-bandwidth', '10gbit', '--background')
        eventually('it goes', lambda: slow.vm('web1')['job']['wire_bytes'])
        began, sent = time.monotonic(), slow.vm('web1')['job']['wire_bytes']
        time.sleep(2)
        assert slow.vm('web1')['job']['wire_bytes'] - sent < 3 * 65536 * (time.monotonic() - began)
        slow.ok('cancel', 'web1')
        slow.run('watch', 'web1')
        eventually('the destination is clean', lambda: not h2.json('list')['vms'])
    finally:
        slow.clean()
        slow.stop()


def test_a_failed_send_is_a_line_and_a_status(h1):
    h1.boot('web1')
    port = free_port()
    done = h1.run('send', 'web1', '--to', f'127.0.0.1:{port}')
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1] == (
        f'vmmig: nobody listens at 127.0.0.1 port {port}; is vmmigd running there?')
    job = h1.json('send', 'web1', '--to', f'127.0.0.1:{port}', status=6)
    assert job['state'] == 'failed' and job['error']['kind'] == 'unreachable'
    assert h1.vm('web1')['state'] == 'running'


def test_a_send_to_a_host_that_has_a_vm_of_that_name(h1, h2):
    """It is refused, and leaves alone what the other VM needs: an agent that starts anew finds it by its socket."""
    h1.boot('web1')
    other = h2.boot('web1')
    done = h1.run('send', 'web1', '--to', f'127.0.0.1:{h2.port}')
    assert done.returncode == 4, done
    assert done.stderr.splitlines()[-1] == 'vmmig: the peer: a VM named web1 is here already'
    assert h1.vm('web1')['state'] == 'running'
    h2.stop()
    h2.start()
    assert h2.vm('web1')['pid'] == other
    assert eventually('it is found', lambda: h2.vm('web1')['state'] == 'running')


class SlowPeer:
    """A port that takes connections and says nothing: a send to it stays in its beginning."""

    def __enter__(self):
        self.listener = socket.create_server(('127.0.0.1', 0))
        return f'127.0.0.1:{self.listener.getsockname()[1]}'

    def __exit__(self, *exception):
        self.listener.close()


def job_of(agent, name):
    return agent.vm(name)['job']


def runs(agent, name):
    """Its job does; the last one of a VM of that name is told, too."""
    job = job_of(agent, name)
    return job and job['state'] == 'running'


def test_a_second_send_is_a_conflict_and_cancel_ends_the_first(h1):
    h1.boot('web1')
    with SlowPeer() as peer:
        h1.ok('send', 'web1', '--to', peer, '--background')
        done = h1.run('send', 'web1', '--to', peer)
        assert done.returncode == 4
        assert done.stderr == ('vmmig: web1: send is under way; wait for it, or say '
                               '`vmmig cancel web1`\n')
        assert h1.run('detach', 'web1').returncode == 4
        assert f'send to {peer}: preparing' in h1.ok('list')
        assert h1.ok('cancel', 'web1') == 'web1: send is being cancelled\n'
        done = h1.run('watch', 'web1')
        assert done.returncode == 14, done
        assert h1.vm('web1')['state'] == 'running'


def test_the_first_interrupt_leaves_the_job(h1):
    h1.boot('web1')
    with SlowPeer() as peer, subprocess.Popen(
            h1.argv('send', 'web1', '--to', peer), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True) as command:
        eventually('the job runs', lambda: runs(h1, 'web1'))
        command.send_signal(signal.SIGINT)
        _, stderr = command.communicate(timeout=20)
        assert command.returncode == 130
        assert ('vmmig: the job goes on in the background; Ctrl-C again cancels it now, `vmmig cancel web1` later'
                in stderr.splitlines())
        assert job_of(h1, 'web1')['state'] == 'running'
        h1.ok('cancel', 'web1')
        h1.run('watch', 'web1')


def test_the_second_interrupt_cancels(h1):
    h1.boot('web1')
    with SlowPeer() as peer, subprocess.Popen(
            h1.argv('send', 'web1', '--to', peer), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True) as command:
        eventually('the job runs', lambda: runs(h1, 'web1'))
        command.send_signal(signal.SIGINT)
        while 'goes on in the background' not in command.stderr.readline():
            pass
        command.send_signal(signal.SIGINT)
        _, stderr = command.communicate(timeout=20)
        assert command.returncode == 14, stderr
        assert 'vmmig: cancelling' in stderr
        assert job_of(h1, 'web1')['state'] == 'cancelled'


def test_an_agent_that_dies_is_said(h1):
    h1.boot('web1')
    with SlowPeer() as peer, subprocess.Popen(
            h1.argv('send', 'web1', '--to', peer), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True) as command:
        eventually('the job runs', lambda: runs(h1, 'web1'))
        h1.stop(signal.SIGKILL)
        _, stderr = command.communicate(timeout=20)
        assert command.returncode == 6
        assert stderr.splitlines()[-1] == (
            'vmmig: web1: the job\'s end was not seen, ask `vmmig status web1`: '
            'the agent closed the connection')
    h1.start()
    assert h1.vm('web1')['state'] == 'running'


def test_an_agent_stops_while_a_job_runs(h1):
    pid = h1.boot('web1')
    with SlowPeer() as peer:
        h1.ok('send', 'web1', '--to', peer, '--background')
        assert h1.stop() == 0
    os.kill(pid, 0)
    h1.start()
    assert h1.vm('web1')['state'] == 'running'


def test_the_progress_line_of_a_terminal(h1, h2):
    """It is cut where the line ends, and wiped at the end."""
    h1.boot('web1', memory=256)
    command, terminal = in_terminal(60, h1.argv('send', 'web1', '--to', f'127.0.0.1:{h2.port}', '--max-bandwidth', '256KiB'))
    text = until_closed(terminal)
    assert command.wait(20) == 0
    assert text.count('\x1b[K') > 3
    assert re.search(r'\r(copying|paused) round \d+, ', text)
    for line in text.split('\r'):
        assert len(line.split('\n')[0].replace('\x1b[K', '')) < 60
    assert text.rsplit('\x1b[K', 1)[1].startswith('web1 runs at')


# ---- bad input

BAD_INPUT = [
    ([], 2, 'a command is missing; see vmmig --help'),
    (['lst'], 2, "there is no command 'lst'; did you mean 'list'?"),
    (['pki'], 2, 'pki needs one of: init, issue, revoke'),
    (['list', '--jsn'], 2, 'there is no option --jsn; did you mean --json?'),
    (['list', '-j'], 2, 'there is no option -j; options begin with --'),
    (['list', 'x'], 2, "unexpected argument 'x'; usage: vmmig list"),
    (['status', 'nobody'], 3, 'there is no VM named nobody here'),
    (['status', 'a/b'], 2, "'a/b': not a VM name: 1 to 64 of A-Z a-z 0-9 . _ -, not beginning with . or -"),
    (['detach', 'nobody'], 3, 'there is no VM named nobody here'),
    (['cancel', 'nobody'], 3, 'there is no VM named nobody here'),
    (['watch', 'nobody'], 3, 'no job of VM nobody is known'),
    (['attach', 'web9'], 2, '--qmp PATH or --socket PATH is required'),
    (['attach', 'web9', '--qmp', '/nonexistent'], 3, '--qmp /nonexistent: No such file or directory'),
    (['run', 'web9', '--'], 2, 'usage: vmmig run NAME -- VMM [ARGUMENT]...'),
    (['run', '../x', '--', QEMU], 2,
     "'../x': not a VM name: 1 to 64 of A-Z a-z 0-9 . _ -, not beginning with . or -"),
    (['run', 'web9', '--', '/bin/sh'], 5,
     "/bin/sh is not among the binaries that may be run as a VM (`vmm` and `attach-vmm` in the agent's "
     "configuration)"),
    (['send', 'nobody', '--to', 'h2'], 3, 'there is no VM named nobody here'),
    (['send', 'web9'], 2, '--to HOST[:PORT] is required'),
    (['send', 'web9', '--to'], 2, '--to needs a value: --to HOST[:PORT]'),
    (['send', 'web9', '--to', 'a b'], 2, '--to a b: not an address: HOST, HOST:PORT or [IPV6]:PORT expected'),
    (['send', 'web9', '--to', 'h2', '--downtime-limit', '0'], 2, '--downtime-limit 0: at least 1 is allowed'),
    (['send', 'web9', '--to', 'h2', '--max-bandwidth', '100Mb'], 2,
     '--max-bandwidth 100Mb: a rate in bytes a second is expected, as 100M, 1G, 64MiB or 1gbit'),
    (['send', 'web9', '--to', 'h2', '--max-bandwidth', '1'], 2, '--max-bandwidth 1: at least 65536 is allowed'),
    (['send', 'web9', '--to', 'h2', '--compress', 'gzip'], 2,
     '--compress gzip: one of auto|none|lz4|zstd is expected'),
    (['send', 'web9', '--to', 'h2', '--connections', '99'], 2, '--connections 99: at most 8 is allowed'),
    (['resolve', 'web9', '--gone'], 3, "no hand-over of VM 'web9' is unfinished"),
    (['resolve', 'web9'], 2, 'one of --here and --gone is required'),
    (['resolve', 'web9', '--here', '--gone'], 2, 'one of --here and --gone is required'),
    (['resolve', 'web9', '--here'], 2,
     '--here needs --i-fenced HOST: if that host still runs the VM, two copies would run'),
]


@pytest.mark.parametrize('words,status,message', BAD_INPUT, ids=[' '.join(row[0]) or 'nothing' for row in BAD_INPUT])
def test_bad_input_gets_one_clear_line(h1, words, status, message):
    done = h1.run(*words)
    assert (done.returncode, done.stderr, done.stdout) == (status, f'vmmig: {message}\n', '')
    if '--' not in words:
        said = h1.run(*words, '--json')
        assert said.returncode == status and not said.stderr
        assert json.loads(said.stdout)['error']['message'] == message


@pytest.mark.parametrize('greeting, status, said', [
    (b'', 10, 'does not greet: not QMP, or another client holds this monitor'), (b'HTTP/1.1 400 Bad Request\r\n\r\n', 9, 'QMP: '),
    (b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 1, "micro": 9}}, "capabilities": []}}\r\n',
     5, 'QEMU 7.1.9 is too old: vmmig needs 7.2 or later'),
], ids=['silent', 'http', 'old'])
def test_a_socket_that_is_no_qmp_of_ours(h1, tmp_path, greeting, status, said):
    """Somebody listens there, and says nothing, or something else; or it is a QEMU that is too old."""
    path = str(tmp_path / 'qmp')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        command = subprocess.Popen(h1.argv('attach', 'web9', '--qmp', path), stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        connection = listener.accept()[0]
        connection.sendall(greeting)
        if b'"QMP"' in greeting and connection.recv(4096):
            connection.sendall(b'{"return": {}, "id": 1}\r\n')
        _, stderr = command.communicate(timeout=30)
        connection.close()
    assert command.returncode == status, stderr
    assert stderr.count('\n') == 1 and path in stderr and said in stderr, stderr
    assert h1.run('status', 'web9').returncode == 3


def test_a_file_that_is_no_qmp(h1, tmp_path):
    (tmp_path / 'qmp').write_text('')
    done = h1.run('attach', 'web9', '--qmp', tmp_path / 'qmp')
    assert done.returncode == 6 and re.fullmatch(r'vmmig: .*/qmp: Connection refused\n', done.stderr), done


def test_a_qemu_that_cannot_start(h1):
    done = h1.run('run', 'web9', '--', QEMU, '-machine', 'nonsense')
    assert done.returncode == 13, done
    assert done.stderr.count('\n') == 1
    assert h1.run('status', 'web9').returncode == 3
    assert not (h1.folder / 'run/web9.qmp').exists()


def test_a_name_is_taken_once(h1):
    h1.boot('web1')
    done = h1.run('run', 'web1', '--', QEMU)
    assert (done.returncode, done.stderr) == (4, 'vmmig: a VM named web1 is here already\n')
    done = h1.run('attach', 'web2', '--qmp', h1.folder / 'run/web1.qmp')
    assert done.returncode == 10, done
    assert re.fullmatch('vmmig: .*web1.qmp does not greet: not QMP, or another client holds this monitor\n', done.stderr), done


def test_no_agent_answers(tmp_path):
    def vmmig(path, *words):
        return subprocess.run([built('tools/vmmig'), '--socket', path, *words], capture_output=True,
                              text=True, check=False)
    done = vmmig('/nonexistent.sock', 'list')
    assert (done.returncode, done.stderr) == (
        6, 'vmmig: no agent answers on /nonexistent.sock; start vmmigd or pass --socket\n')
    done = vmmig('/' + 'x' * 200, 'list')
    assert (done.returncode, done.stderr) == (2, 'vmmig: --socket: the path of a socket has at most 107 bytes\n')
    path = str(tmp_path / 'other.sock')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        command = subprocess.Popen([built('tools/vmmig'), '--socket', path, 'list'],
                                   stderr=subprocess.PIPE, text=True)
        connection = listener.accept()[0]
        connection.sendall(b'220 smtp ready\r\n')
        assert command.communicate(timeout=20)[1].endswith('a frame does not begin with its magic\n')
        assert command.returncode == 9
        connection.close()


# ---- the socket

def frame(kind, payload=b''):
    return struct.pack('<4sIHH', b'VMMG', len(payload), kind, 0) + payload


HELLO = frame(1, b'\x08\x01\x10\x01')  # versions 1 to 1


def talk(agent, data):
    """Sends bytes to the control socket; returns all that comes back until it closes."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(20)
        s.connect(agent.socket)
        try:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
        except BrokenPipeError:
            pass
        answer = b''
        try:
            while piece := s.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
        return answer


def kinds(answer):
    """Types of the frames in an answer."""
    found = []
    while answer:
        magic, length, kind, _ = struct.unpack_from('<4sIHH', answer)
        assert magic == b'VMMG'
        found.append(kind)
        answer = answer[12 + length:]
    return found


@pytest.mark.parametrize('data,expected', [
    pytest.param(HELLO + frame(12), [2, 41], id='list'),
    pytest.param(HELLO + frame(12) + frame(15), [2, 41, 42], id='one after the other'),
    pytest.param(frame(12), [3], id='no hello'),
    pytest.param(frame(1, b'\x08\x09\x10\x09'), [3], id='versions 9 to 9'),
    pytest.param(HELLO + HELLO, [2, 3], id='two hellos'),
    pytest.param(HELLO + frame(999) + frame(12), [2, 3, 41], id='unknown: told so, and it goes on'),
    pytest.param(HELLO + frame(41), [2, 3], id='an answer is not a request'),
    pytest.param(HELLO + frame(13, b'\x0a\x03a/b') + frame(12), [2, 3], id='a name that is none'),
    pytest.param(HELLO + frame(13, b'\xff\xff') + frame(12), [2, 3], id='malformed'),
    pytest.param(HELLO + b'GET / HTTP/1.1\r\n\r\n', [2, 3], id='another protocol'),
    pytest.param(HELLO + struct.pack('<4sIHH', b'VMMG', 0xffffffff, 12, 0), [2, 3], id='a huge length'),
    pytest.param(HELLO + frame(12)[:-3], [2, 3], id='cut off'),
    pytest.param(b'\x00' * 4096, [3], id='zeroes'),
    pytest.param(b'', [], id='nothing'),
])
def test_hostile_bytes_are_answered_and_the_agent_goes_on(h1, data, expected):
    assert kinds(talk(h1, data)) == expected
    assert h1.run('list').returncode == 0


def test_hello_comes_first(h1):
    assert b'HELLO is expected first, not LIST' in talk(h1, frame(12))


@pytest.mark.skipif(os.geteuid() != 0, reason='needs root to become somebody else')
def test_clients_are_bounded(tmp_path_factory):
    """Four places are root's alone, whom the others cannot keep from deciding about a VM."""
    folder = public_folder(tmp_path_factory, 'small')
    agent = Agent(folder, 'small', **{'max-clients': '2', 'listen': 'none', 'control-group': 'daemon'}).start()
    mate = other_user(1)  # daemon's gid on Debian
    try:
        held = []

        def hold(count):
            for _ in range(count):
                s = socket.socket(socket.AF_UNIX)
                s.connect(agent.socket)
                s.sendall(HELLO)
                assert s.recv(12)  # WELCOME: it has its place
                held.append(s)
        hold(2)
        done = agent.run('list', **mate)
        assert done.returncode == 4
        assert 'the agent talks to 2 clients already (max-clients); try again' in done.stderr
        assert agent.run('list').returncode == 0
        hold(4)
        assert 'the agent talks to 6 clients already' in agent.run('list').stderr
        held.pop().close()
        eventually('a place is free', lambda: agent.run('list').returncode == 0)
        assert agent.stop() == 0  # also with a client that stays
    finally:
        agent.process.kill()


def other_user(*groups):
    """subprocess options to be somebody else."""
    nobody = pwd.getpwnam('nobody')
    return {'user': nobody.pw_uid, 'group': nobody.pw_gid, 'extra_groups': list(groups)}


@pytest.mark.skipif(os.geteuid() != 0, reason='needs root to become somebody else')
def test_who_may_drive_the_agent(h1):
    done = h1.run('list', **other_user())
    assert done.returncode == 7
    assert done.stderr.startswith('vmmig: ') and done.stderr.count('\n') == 1
    # The file's mode is the first gate; the credentials are the second one, on their own.
    assert os.stat(h1.socket).st_mode & 0o777 == 0o600
    os.chmod(h1.socket, 0o666)
    done = h1.run('list', **other_user())
    assert done.returncode == 7
    assert 'may not drive this agent' in done.stderr
    os.chmod(h1.socket, 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason='needs root to become somebody else')
def test_members_of_the_group_may(tmp_path_factory):
    folder = public_folder(tmp_path_factory, 'group')
    agent = Agent(folder, 'h3', **{'control-group': 'daemon', 'listen': 'none'}).start()
    try:
        assert os.stat(agent.socket).st_mode & 0o777 == 0o660
        assert agent.run('list', **other_user(1)).returncode == 0  # daemon's gid on Debian
        assert agent.run('list', **other_user()).returncode == 7
    finally:
        agent.stop()


def test_two_agents_cannot_share_a_state_or_a_socket(h1, tmp_path):
    done = subprocess.run([built('agent/vmmigd'), '--config', h1.config], capture_output=True, text=True,
                          check=False, timeout=20)
    assert (done.returncode, done.stderr) == (4, f'vmmigd: another agent uses {h1.folder}/state\n')
    other = Agent(tmp_path, 'other', **{'control-socket': h1.socket})
    done = subprocess.run([built('agent/vmmigd'), '--config', other.config], capture_output=True, text=True,
                          check=False, timeout=20)
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == f'vmmigd: another agent answers on {h1.socket}'
    assert h1.run('list').returncode == 0


def test_an_agent_waits_for_what_a_killed_one_left(tmp_path):
    """A child that was about to become a VMM holds the lock until it sees that its agent is dead."""
    agent = Agent(tmp_path, 'again')
    (agent.folder / 'state').mkdir(mode=0o700)
    path = agent.folder / 'state/lock'
    with open(path, 'w', encoding='ascii') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with subprocess.Popen([built('agent/vmmigd'), '--config', agent.config]) as process:
            eventually('it waits', lambda: str(path) in map(os.path.realpath, pathlib.Path(
                f'/proc/{process.pid}/fd').iterdir()))
            held.close()
            eventually('it runs', lambda: process.poll() is not None or agent.run('list').returncode == 0)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


@pytest.mark.parametrize('text,message', [
    ('hots = x\n', 'there is no option hots; did you mean host?'),
    ('max-jobs = 0\n', 'max-jobs 0: at least 1 is allowed'),
    ('control-group\n', '`key = value` is expected'),
    ('control-group = nobodies\n', 'control-group nobodies: there is no group named nobodies'),
    ('publish-group = nobodies\n', 'publish-group nobodies: there is no group named nobodies'),
    ('vm-user = nobodyy\n', 'vm-user nobodyy: there is no user named nobodyy'),
])
def test_a_bad_configuration(tmp_path, text, message):
    path = tmp_path / 'vmmigd.conf'
    path.write_text(text)
    done = subprocess.run([built('agent/vmmigd'), '--config', path, '--check'], capture_output=True, text=True,
                          check=False)
    assert (done.returncode, done.stderr) == (2, f'vmmigd: {path}:1: {message}\n')


def test_the_doctor_knows_every_vm(h1):
    assert 'no VMs here' in h1.ok('doctor') or h1.json('doctor')['findings']
    h1.boot('patient')
    finding, = h1.json('doctor', 'patient')['findings']
    assert (finding['owner'], finding['owner_host'], finding['why']) == ('here', 'h1', 'it was started here')
    assert finding['record'] is None and finding['vmm_runs']
    os.kill(h1.vm('patient')['pid'], signal.SIGKILL)
    eventually('its end', lambda: h1.vm('patient')['presence'] == 'ended')
    finding, = h1.json('doctor', 'patient')['findings']
    assert finding['owner'] == 'nobody' and not finding['vmm_runs']
    assert 'nobody owns it' in h1.ok('doctor', 'patient')
    assert h1.run('doctor', 'nobody').returncode == 3


# ---- the manual

def keys_of(value):
    """All keys of an object, in it and below."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    return set(value) | set().union(*map(keys_of, value.values())) if value else set()


def test_every_json_field_is_in_the_manual(h1, h2):
    h1.boot('web1')
    fields = keys_of(h1.json('status')) | keys_of(h1.json('version')) | keys_of(h1.vm('web1'))
    fields |= keys_of(h1.json('send', 'web1', '--to', f'127.0.0.1:{h2.port}'))
    fields |= keys_of(h1.json('doctor'))
    fields |= keys_of(h1.json('jobs')) | keys_of(h2.json('list')) | keys_of(h1.json('status', 'x', status=3))
    output = MANUAL.split('## Output')[1]
    missing = {field for field in fields if not re.search(rf'\b{field}\b', output)}
    assert not missing
    assert len(fields) > 40
