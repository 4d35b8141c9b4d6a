# SPDX-License-Identifier: Apache-2.0
"""Test hosts: namespaces on one machine, joined by a switch over links that have a rate and can be cut.

    with Lab(hosts=2, rate='1gbit') as lab:
        h1, h2 = lab.hosts
        agent = h1.popen(['vmmigd', ...])
        h1.cut()            # packets vanish silently, both ways
        h1.heal()

A host is a network, mount and UTS namespace. Its name (h1, h2 ...) is known to all hosts by /etc/hosts.
/run, /var/lib and /etc/vmmig are its own; the rest of the file system is the machine's, lab.shared in
particular being storage that all hosts see under one path. host.path() gives the path by which the
test itself reaches a file in a host's own folders, Unix sockets included.

Each host has a bridge br0 with its address; its ports are eth0, the link to the switch, and the taps of
the host's guests. "observer" is one more station, at the switch itself.
"""
import contextlib
import os
import re
import subprocess
import sys
import tempfile

from . import delay, keeper
from .console import Collector

OWN_FOLDERS = {'/run': 'run', '/var/lib': 'lib', '/etc/vmmig': 'etc-vmmig'}
SUBNET = '10.77.0.'
OBSERVER_ADDRESS = SUBNET + '254'
LOG_TAIL = 4000


def run(argv, **options):
    """Runs a short command. Returns its output, or raises with what it said."""
    done = subprocess.run([*map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          stdin=subprocess.DEVNULL, check=False, **options)
    if done.returncode:
        raise RuntimeError(f'{" ".join(map(str, argv))}: exit status {done.returncode}: {done.stdout}')
    return done.stdout


def inside(pid, argv):
    """The command line that runs argv in the namespaces of pid. nsenter becomes argv: the pid is its own."""
    return ['nsenter', f'--target={pid}', '--mount', '--net', '--uts', '--wd=/', '--', *map(str, argv)]


def set_rate(pid, interface, rate):
    """Limits what an interface sends: '100mbit', '10gbit', None for no limit, 'cut' for nothing at all.

    With a rate, 20 ms of traffic may queue, and 1 ms of it (two full TCP segments at least) leaves
    at once. A cut link drops silently: the sender's kernel is told that the packet went out."""
    qdisc = ['noqueue']
    if rate == 'cut':
        qdisc = ['blackhole']
    elif rate:
        number, unit = re.fullmatch(r'(\d+)([kmg])bit', rate).groups()
        per_millisecond = int(number) * {'k': 1, 'm': 10**3, 'g': 10**6}[unit] // 8
        qdisc = ['tbf', 'rate', rate, 'burst', max(per_millisecond, 2 * 65536), 'latency', '20ms']
    run(inside(pid, ['tc', 'qdisc', 'replace', 'dev', interface, 'root', *qdisc]))


class Host:
    """One test host. Lab makes them."""

    def __init__(self, lab, number, pid):
        self.lab, self.number, self.pid = lab, number, pid
        self.name = f'h{number}'
        self.address = f'{SUBNET}{number}'
        self.folder = os.path.join(lab.folder, self.name)
        self.rate = None
        self._started = []
        self._taps = set()
        self._make_folders()

    def _make_folders(self):
        """/etc is an overlay, so that the real one stays visible and is not changed."""
        upper, work = os.path.join(self.folder, 'etc'), os.path.join(self.folder, 'etc-work')
        for path in (os.path.join(upper, 'vmmig'), work, *map(self.path, OWN_FOLDERS),
                     self.path('/run/vmmig'), self.path('/run/vmlab'), self.path('/var/lib/vmmig')):
            os.makedirs(path, exist_ok=True)
        os.chmod(self.path('/run/vmlab'), 0o1777)  # a guest's sockets, whoever its QEMU runs as
        with open(os.path.join(upper, 'hosts'), 'w', encoding='ascii') as file:
            file.write(f'127.0.0.1 localhost\n{OBSERVER_ADDRESS} observer\n')
            file.writelines(f'{SUBNET}{i} h{i}\n' for i in range(1, self.lab.count + 1))
        self.run(['mount', '-t', 'overlay', 'vmlab', '/etc', '-o',
                  f'lowerdir=/etc,upperdir={upper},workdir={work}'])
        for path in OWN_FOLDERS:
            self.run(['mount', '--bind', self.path(path), path])
        self.run(['hostname', self.name])

    def path(self, path):
        """Where the test finds a file that this host knows as path."""
        for own, folder in OWN_FOLDERS.items():
            if path == own or path.startswith(own + '/'):
                return os.path.join(self.folder, folder) + path[len(own):]
        return path

    # -- processes

    def run(self, argv, **options):
        """Runs a short command in the host. Returns its output, or raises with what it said."""
        return run(inside(self.pid, argv), **options)

    def popen(self, argv, name=None, cgroup=None, **options):
        """Starts a process in the host and returns its Popen, with .log, the file that gets its output
        unless options say otherwise. cgroup names one of lab.cgroup() to start it in."""
        name = name or os.path.basename(str(argv[0]))
        path = os.path.join(self.lab.folder, 'logs', f'{self.name}-{name}-{len(self._started)}.log')
        entered = inside(self.pid, argv)
        if cgroup:
            entered = ['sh', '-c', 'echo $$ >"$0" && exec "$@"',
                       os.path.join(self.lab.cgroup(cgroup), 'cgroup.procs'), *entered]
        with open(path, 'wb') as log:
            options = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log, **options}
            process = subprocess.Popen(entered, **options)
        process.log = path
        self._started.append(process)
        return process

    def processes(self):
        """{pid: argv} of all that runs in the host."""
        found = {}
        for pid in keeper.processes({keeper.namespace(self.pid)}) - {self.pid}:
            try:
                with open(f'/proc/{pid}/cmdline', 'rb') as file:
                    argv = file.read().decode(errors='replace').split('\0')[:-1]
            except OSError:
                continue
            if argv:
                found[pid] = argv
        return found

    def crash(self):
        """Kills all processes of the host at once, as when its power goes. Its folders stay."""
        keeper.kill_all({keeper.namespace(self.pid)}, spared={self.pid})
        self.reap()

    def reap(self):
        for process in self._started:
            process.poll()

    # -- network

    def connect(self, rate):
        """Plugs the host into the switch. Lab calls it once."""
        port = f'p{self.number}'
        self.lab.run_at_switch(['ip', 'link', 'add', port, 'type', 'veth', 'peer', 'name', 'eth0',
                                'netns', self.pid])
        self.lab.run_at_switch(['ip', 'link', 'set', port, 'master', 'switch', 'up'])
        self.run(['ip', 'link', 'set', 'lo', 'up'])
        self.run(['ip', 'link', 'add', 'br0', 'type', 'bridge'])
        self.run(['ip', 'link', 'set', 'eth0', 'master', 'br0', 'up'])
        self.run(['ip', 'address', 'add', f'{self.address}/24', 'dev', 'br0'])
        self.run(['ip', 'link', 'set', 'br0', 'up'])
        self.set_rate(rate)

    def add_tap(self, name='tap0', user=0):
        """Makes a tap on the host's bridge, for QEMU's -netdev tap,ifname=NAME,script=no,downscript=no; of whom, if it is
        not root who runs that."""
        if name not in self._taps:
            self.run(['ip', 'tuntap', 'add', 'dev', name, 'mode', 'tap', 'user', user])
            self.run(['ip', 'link', 'set', name, 'master', 'br0', 'up'])
            self._taps.add(name)
        return name

    def set_rate(self, rate):
        """Sets the rate of the link ('100mbit', '1gbit', None). It holds for what the host sends, and, where
        more than two hosts could send to one, for what it is sent as well."""
        self.rate = rate
        set_rate(self.pid, 'eth0', rate)
        set_rate(self.lab.switch_pid, f'p{self.number}', rate if self.lab.count > 2 else None)

    @contextlib.contextmanager
    def far(self, milliseconds):
        """As long as it is entered, all that the host sends and is sent arrives so much later."""
        port, near, switch = f'p{self.number}', f'd{self.number}', self.lab.run_at_switch
        switch(['ip', 'link', 'add', near, 'arp', 'off', 'promisc', 'on', 'type', 'veth', 'peer', 'name', f'{near}s'])
        for words in (f'{port} nomaster arp off promisc on', f'{near} up', f'{near}s master switch up'):
            switch(['ip', 'link', 'set', *words.split()])
        try:
            with subprocess.Popen(inside(self.lab.switch_pid, [sys.executable, delay.__file__, port, near, milliseconds]),
                                  stdout=subprocess.PIPE, text=True) as line:
                try:
                    if line.stdout.readline() != 'ready\n':
                        raise RuntimeError('the long link is not there')
                    yield
                finally:
                    line.kill()
        finally:
            switch(['ip', 'link', 'del', near])
            switch(['ip', 'link', 'set', port, 'master', 'switch', 'arp', 'on', 'promisc', 'off'])

    def cut(self, direction='both'):
        """From now on packets vanish without a trace: those the host sends ('out'), those sent to it
        ('in'), or both. No process is told: connections notice by their own timeouts only."""
        if direction in ('out', 'both'):
            set_rate(self.pid, 'eth0', 'cut')
        if direction in ('in', 'both'):
            set_rate(self.lab.switch_pid, f'p{self.number}', 'cut')

    def heal(self):
        """Ends a cut."""
        self.set_rate(self.rate)

    def link_down(self):
        """Takes the network away so that the host notices: sending fails with "Network is unreachable"."""
        self.run(['ip', 'link', 'set', 'br0', 'down'])

    def link_up(self):
        self.run(['ip', 'link', 'set', 'br0', 'up'])

    def bytes_sent(self):
        """Bytes that left for the switch so far, those of the taps included. Of a large TCP packet, cut into
        segments only on a real wire, the headers are counted once."""
        with open(f'/proc/{self.pid}/net/dev', encoding='ascii') as file:
            return int(re.search(r'eth0:\s*(.*)', file.read()).group(1).split()[8])


class Lab:
    """A set of hosts. Use it in a with statement; whatever ends the test, nothing of it remains.

    folder   everything it wrote: logs/, shared/, and each host's own folders under the host's name
    shared   storage that all hosts see under this path (on a disk, so O_DIRECT works)

    active   all labs that are open now
    failed   set when a test failed in it; with VMLAB_KEEP=1 in the environment its folder then stays"""

    active = set()

    def __init__(self, hosts=2, rate=None):
        self.count = hosts
        self.failed = False
        self.folder = tempfile.mkdtemp(prefix=f'vmlab-{os.getpid()}-', dir='/var/tmp')
        os.chmod(self.folder, 0o755)
        self.shared = os.path.join(self.folder, 'shared')
        os.mkdir(self.shared)
        os.chmod(self.shared, 0o1777)
        os.mkdir(os.path.join(self.folder, 'logs'))
        self._keeper = subprocess.Popen(
            [sys.executable, keeper.__file__, self.folder, str(hosts + 1)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.collector = Collector()
        Lab.active.add(self)
        try:
            pids = [int(pid) for pid in self._keeper.stdout.readline().split()]
            if not pids:
                raise RuntimeError('no namespaces: root is needed')
            self.switch_pid = pids.pop()
            self._make_switch()
            self.hosts = [Host(self, number, pid) for number, pid in enumerate(pids, 1)]
            for host in self.hosts:
                host.connect(rate)
        except BaseException:
            self.close()
            raise

    def _make_switch(self):
        for argv in (['ip', 'link', 'add', 'switch', 'type', 'bridge', 'forward_delay', '0'],
                     ['ip', 'address', 'add', f'{OBSERVER_ADDRESS}/24', 'dev', 'switch'],
                     ['ip', 'link', 'set', 'switch', 'up']):
            self.run_at_switch(argv)

    def run_at_switch(self, argv):
        """Runs a short command in the switch's network namespace, as the observer."""
        return run(inside(self.switch_pid, argv))

    def console(self, name):
        """The console of the guest of that name: listens in every host. See console.py."""
        return self.collector.console(name, {host.name: host.path(f'/run/vmlab/{name}.console')
                                             for host in self.hosts})

    def udp(self, port):
        """What is sent to the observer's UDP port, each datagram a line. See console.py."""
        return self.collector.udp(self.switch_pid, OBSERVER_ADDRESS, port)

    def cgroup(self, name):
        """The folder of a memory cgroup of the lab's, made if need be."""
        base = '/sys/fs/cgroup'
        unified = os.path.exists(f'{base}/cgroup.controllers')
        top = os.path.join(base if unified else f'{base}/memory', os.path.basename(self.folder))
        path = os.path.join(top, name)
        os.makedirs(path, exist_ok=True)
        if unified:
            for parent in (base, top):
                with open(f'{parent}/cgroup.subtree_control', 'w', encoding='ascii') as file:
                    file.write('+memory')
        return path

    def logs(self):
        """{file name: its last lines} of all processes that the hosts started."""
        found = {}
        for name in sorted(os.listdir(os.path.join(self.folder, 'logs'))):
            with open(os.path.join(self.folder, 'logs', name), 'rb') as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL))
                found[name] = file.read().decode(errors='replace')
        return found

    def report(self):
        """Logs and consoles, for the reader of a failed test."""
        parts = [f'---- {name}\n{text}' for name, text in self.logs().items() if text]
        parts += [f'---- {timeline}\n' + timeline.tail() for timeline in self.collector.timelines()]
        return '\n'.join(parts)

    def close(self):
        """Ends all that runs in the hosts and removes everything. Can be called twice."""
        if self not in Lab.active:
            return
        Lab.active.remove(self)
        self.collector.close()
        if self.failed and os.environ.get('VMLAB_KEEP'):
            with open(os.path.join(self.folder, 'keep'), 'w', encoding='ascii'):
                pass
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        status = self._keeper.wait()
        for host in getattr(self, 'hosts', []):
            host.reap()
        if status:
            raise RuntimeError(f'the lab was not cleared away: see {self.folder}')

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        if kind:
            self.failed = True
            print(self.report(), file=sys.stderr)
        self.close()
