# SPDX-License-Identifier: Apache-2.0
"""Test hosts and test guests. README.md is the manual."""
from .console import Console, Line, Tick, Timeline
from .guests import BareGuest, Guest, accelerator, huge_pages
from .hosts import Host, Lab
from .qmp import Qmp, QmpError

__all__ = ['BareGuest', 'Console', 'Guest', 'Host', 'Lab', 'Line', 'Qmp', 'QmpError', 'Tick', 'Timeline',
           'accelerator', 'huge_pages']
