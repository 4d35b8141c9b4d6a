# SPDX-License-Identifier: Apache-2.0
"""The load inside the Debian guest: idle | pagecache | sqlite. Runs for ever."""
import os
import signal
import sqlite3
import sys


def idle():
    signal.pause()


def pagecache():
    """Reads every file of /usr, and forgets them all, since the next reading would come from memory."""
    for folder, _, names in os.walk('/usr'):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, 'rb') as file:
                    while file.read(1 << 20):
                        pass
    with open('/proc/sys/vm/drop_caches', 'w', encoding='ascii') as file:
        file.write('1')


def sqlite():
    """A transaction of a hundred rows of 1 KB; a new table every 64 MB."""
    database = sqlite3.connect('/var/tmp/load.db')
    database.execute('DROP TABLE IF EXISTS load')
    database.execute('CREATE TABLE load (id INTEGER PRIMARY KEY, text BLOB)')
    for _ in range(640):
        with database:
            database.executemany('INSERT INTO load (text) VALUES (?)', [(os.urandom(512) * 2,) for _ in range(100)])
    database.close()


while True:
    {'idle': idle, 'pagecache': pagecache, 'sqlite': sqlite}[sys.argv[1]]()
