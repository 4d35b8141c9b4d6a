# SPDX-License-Identifier: Apache-2.0
"""Test hosts and test guests. README.md is the manual."""
from .console import Console, Line, Tick, Timeline
from .guests import BareGuest, Guest, accelerator, huge_pages
from .hosts import Host, Lab
from .linux import HEARTBEAT_PORT, LinuxGuest, check_disk, linux_guest, make_disk, make_vars
from .qmp import Qmp, QmpError
from .vmm import VmmGuest

__all__ = ['BareGuest', 'Console', 'Guest', 'HEARTBEAT_PORT', 'Host', 'Lab', 'Line', 'LinuxGuest', 'Qmp',
           'QmpError', 'Tick', 'Timeline', 'VmmGuest', 'accelerator', 'check_disk', 'huge_pages', 'linux_guest',
           'make_disk', 'make_vars']
