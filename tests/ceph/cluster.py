#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A real Ceph cluster on loopback for tests: one monitor, one manager, three bluestore OSDs, cephx.

As a command it runs another command beside a cluster and ends it afterwards:

    tests/ceph/cluster.py [--osds N] [--folder DIR] -- COMMAND...

with VMMIG_TEST_CEPH_CONF naming the cluster's ceph.conf, and a pool "images". In Python:

    with CephCluster(folder) as ceph:
        ceph.create_pool("images")
        ceph.create_user("client.vmmig", "images")

It needs Debian's ceph-mon, ceph-mgr, ceph-osd, ceph-common and python3-rados; `missing()` names what is
not there. The daemons are children of this process and die with it.
"""
import argparse
import concurrent.futures
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid

TOOLS = ["ceph-mon", "ceph-mgr", "ceph-osd", "ceph-authtool", "monmaptool"]
PR_SET_PDEATHSIG = 1
CLONE_NEWNET = 0x40000000

CONF = """[global]
fsid = {fsid}
mon host = [v2:{address}:{port}]
ms bind ipv4 = true
public addr = {address}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {dir}/keyring
run dir = {dir}/run
admin socket = {dir}/run/$name.$pid.asok
log file = {dir}/log/$name.log
mon data = {dir}/mon
mgr data = {dir}/mgr
osd data = {dir}/osd$id
mon allow pool size one = true
mon allow pool delete = true
mon warn on insecure global id reclaim allowed = false
auth allow insecure global id reclaim = false
mon osd min down reporters = 1
mon osd down out interval = 3600
osd heartbeat grace = 6
osd heartbeat interval = 2
mon data avail warn = 5
osd pool default size = 2
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class load list = *
osd objectstore = bluestore
osd memory target = 939524096
osd op num shards = 2
bluestore block size = {osd_size}
bluestore fsck on mount = false
mgr initial modules =
"""


def missing():
    """What is not installed, as a list of names; empty if a cluster can be started."""
    names = [tool for tool in TOOLS if not shutil.which(tool)]
    try:
        import rados  # noqa: F401
    except ImportError:
        names.append("python3-rados")
    return names


def _die_with_parent():
    """With the thread that started it, that is: the kernel takes that for the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _enter_network(pid):
    """This thread, and what it starts, is in the network of that process."""
    with open(f"/proc/{pid}/ns/net", encoding="ascii") as network:
        if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network of process {pid}")


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class CephCluster:
    def __init__(self, folder, osds=3, osd_size=6 << 30, network_of=None, address="127.0.0.1"):
        """network_of: a process in whose network namespace it is, and can be reached, at that address."""
        self.address = address
        self.dir = os.path.abspath(folder)
        self.n_osds = osds
        self.osd_size = osd_size
        self.conf = os.path.join(self.dir, "ceph.conf")
        self.keyring = os.path.join(self.dir, "keyring")
        self.daemons = {}
        enter = (lambda: _enter_network(network_of)) if network_of else None
        self.starter = concurrent.futures.ThreadPoolExecutor(1, initializer=enter)  # lives as long as they do
        self.maker = concurrent.futures.ThreadPoolExecutor(1, initializer=enter)  # its threads are where it is
        self.rados = None

    def __enter__(self):
        try:
            self.maker.submit(self.start).result()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc):
        self.stop()

    # -- starting

    def start(self):
        import rados
        for sub in ["mon", "mgr", "run", "log"] + [f"osd{i}" for i in range(self.n_osds)]:
            os.makedirs(os.path.join(self.dir, sub), exist_ok=True)
        fsid, port = str(uuid.uuid4()), _free_port()
        with open(self.conf, "w") as f:
            f.write(CONF.format(fsid=fsid, address=self.address, port=port, dir=self.dir, osd_size=self.osd_size))
        self._make_monitor(fsid, port)
        self.rados = rados.Rados(conffile=self.conf, rados_id="admin")
        self.rados.connect(timeout=30)
        self._start("mgr.a", ["ceph-mgr", "-i", "a"])
        for i in range(self.n_osds):
            self._make_osd(i)
        self._wait("all OSDs up", self._osds_up)
        self._wait("the manager", lambda: self.command("mgr stat")["available"])

    def _make_monitor(self, fsid, port):
        authtool = ["ceph-authtool", self.keyring, "--gen-key"]
        self._run("ceph-authtool", "--create-keyring", self.keyring, "--gen-key", "-n", "mon.",
                  "--cap", "mon", "allow *")
        self._run(*authtool, "-n", "client.admin", "--cap", "mon", "allow *", "--cap", "osd",
                  "allow *", "--cap", "mgr", "allow *")
        self._run(*authtool, "-n", "mgr.a", "--cap", "mon", "allow profile mgr", "--cap", "osd",
                  "allow *")
        monmap = os.path.join(self.dir, "monmap")
        self._run("monmaptool", "--create", "--addv", "a", f"[v2:{self.address}:{port}]", "--fsid", fsid,
                  monmap)
        self._run("ceph-mon", "-c", self.conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring",
                  self.keyring)
        self.start_monitor()

    def start_monitor(self):
        self._start("mon.a", ["ceph-mon", "-i", "a"])

    def _make_osd(self, i):
        osd_uuid = str(uuid.uuid4())
        key = self._run("ceph-authtool", "--gen-print-key").strip()
        self.command("osd new", inbuf=json.dumps({"cephx_secret": key}).encode(), uuid=osd_uuid,
                     id=i)
        with open(os.path.join(self.dir, f"osd{i}", "keyring"), "w") as f:
            f.write(f"[osd.{i}]\n\tkey = {key}\n")
        self._run("ceph-osd", "-c", self.conf, "-i", str(i), "--mkfs", "--osd-uuid", osd_uuid,
                  "--keyring", os.path.join(self.dir, f"osd{i}", "keyring"))
        self.start_osd(i)

    def start_osd(self, i):
        self._start(f"osd.{i}", ["ceph-osd", "-i", str(i), "--keyring",
                                 os.path.join(self.dir, f"osd{i}", "keyring")])

    def _osds_up(self):
        stat = self.command("osd stat")
        return stat["num_up_osds"] == self.n_osds == stat["num_in_osds"]

    def wait_osds(self, up):
        self._wait(f"{up} OSDs up", lambda: self.command("osd stat")["num_up_osds"] == up)

    def wait_clean(self):
        """Until every placement group is active and clean."""
        def clean():
            states = self.command("pg stat")["pg_summary"]["num_pg_by_state"]
            return all(s["name"] == "active+clean" for s in states)
        self._wait("clean placement groups", clean)

    def _start(self, name, argv):
        with open(os.path.join(self.dir, "log", name + ".stderr"), "ab") as log:
            self.daemons[name] = self.starter.submit(
                subprocess.Popen, argv + ["-c", self.conf, "-f"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=_die_with_parent).result()

    def kill(self, name):
        """kill -9, as a crash of osd.N, mon.a or mgr.a."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def stop(self):
        if self.rados:
            self.rados.shutdown()
            self.rados = None
        while self.daemons:
            self.kill(next(iter(self.daemons)))
        self.starter.shutdown()
        self.maker.shutdown()

    # -- using

    def command(self, prefix, inbuf=b"", **args):
        """A monitor command; its answer, decoded from JSON."""
        text = json.dumps(dict(args, prefix=prefix, format="json"))
        status, out, message = self.rados.mon_command(text, inbuf, timeout=30)
        if status:
            raise RuntimeError(f"ceph {prefix}: {message} ({status})")
        return json.loads(out) if out.strip() else None

    def create_pool(self, name, **args):
        self.command("osd pool create", pool=name, **args)
        self.command("osd pool application enable", pool=name, app="vmmig")

    def delete_pool(self, name):
        self.command("osd pool delete", pool=name, pool2=name,
                     yes_i_really_really_mean_it=True)

    def create_user(self, entity, osd_caps):
        """A user with read access to the monitors and these rights on OSDs; returns the path of a conf file
        that a client of this user can name."""
        caps = ["mon", "allow r", "osd", osd_caps]
        key = self.command("auth get-or-create", entity=entity, caps=caps)[0]["key"]
        keyring = os.path.join(self.dir, entity + ".keyring")
        with open(keyring, "w") as f:
            f.write(f"[{entity}]\n\tkey = {key}\n")
        conf = os.path.join(self.dir, entity + ".conf")
        with open(self.conf) as original, open(conf, "w") as f:
            f.write(original.read().replace(f"keyring = {self.keyring}", f"keyring = {keyring}"))
        return conf

    def set_full(self, full, ratio=0.95):
        """Make the cluster full (writes get ENOSPC), or no longer."""
        for name, value in (('nearfull', 0.85), ('backfillfull', 0.9), ('full', ratio)):
            self.command(f"osd set-{name}-ratio", ratio=0.0001 if full else value)
        self._wait("full OSDs" if full else "OSDs that are not full", lambda: full == any(
            "full" in osd["state"] and "nearfull" not in osd["state"]
            for osd in self.command("osd dump")["osds"]))

    def set_quota(self, pool, size):
        """Let the pool hold no more than so many bytes, and wait until it is full because of that; 0: no quota."""
        self.command("osd pool set-quota", pool=pool, field="max_bytes", val=str(size))
        self._wait(f"pool {pool} to be {'full' if size else 'writable'}", lambda: any(
            p["pool_name"] == pool and ("full_quota" in p["flags_names"]) == bool(size)
            for p in self.command("osd dump")["pools"]))

    # -- helpers

    def _run(self, *argv):
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    def _wait(self, what, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while not condition():
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{name} ended with status {daemon.returncode}; see "
                                       f"{self.dir}/log")
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {seconds} s for {what}; see {self.dir}/log")
            time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description="run a command beside a Ceph cluster")
    parser.add_argument("--osds", type=int, default=3)
    parser.add_argument("--folder", help="an empty folder to keep; default: a temporary one")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    lacking = missing()
    if lacking:
        sys.exit(f"no Ceph cluster: {', '.join(lacking)} not installed")
    folder = args.folder or tempfile.mkdtemp(prefix="vmmig-ceph.", dir="/var/tmp")
    try:
        with CephCluster(folder, args.osds) as ceph:
            ceph.create_pool("images")
            env = dict(os.environ, VMMIG_TEST_CEPH_CONF=ceph.conf)
            sys.exit(subprocess.run(args.command, env=env).returncode)
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
