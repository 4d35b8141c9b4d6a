# SPDX-License-Identifier: Apache-2.0
"""A command as its user sees it: in a terminal."""
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios


def in_terminal(columns, argv):
    """Starts the command in a terminal of its own. Returns it, and the other end of the terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    command = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    return command, master


def until_closed(master):
    """What the command wrote until it ended."""
    text = b''
    while select.select([master], [], [], 20)[0]:
        try:
            text += os.read(master, 65536)
        except OSError:  # the other end is closed
            break
    os.close(master)
    return text.decode()
