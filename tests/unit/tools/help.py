#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Help and manuals agree with the programs.

usage: help.py VMMIG VMMIGD DOCS

Every help text goes to standard output, fits 80 columns and ends with status 0; what is wrong with a
command line goes to standard error, with status 2. The manual pages in DOCS are what the programs
print, and name every command and option.
"""
import pathlib
import re
import subprocess
import sys

vmmig, vmmigd, docs = sys.argv[1:4]
docs = pathlib.Path(docs)


def output(*argv):
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, (argv, done)
    assert not done.stderr, (argv, done.stderr)
    return done.stdout


def check_width(text, what):
    for line in text.splitlines():
        assert len(line) <= 80, f'{what}: longer than 80 columns: {line}'
        assert line == line.rstrip(), f'{what}: blanks at the end: {line!r}'


def check_error(*argv):
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2, (argv, done)
    assert not done.stdout, (argv, done.stdout)
    assert done.stderr.count('\n') == 1, (argv, done.stderr)


def commands(usage):
    """The commands that the usage lists."""
    found = re.findall(r'^  ([a-z]+(?: [a-z-]+)?)  ', usage, re.M)
    assert len(found) > 10, found
    return found


def check_manual(program, name):
    manual = output(program, '--manual')
    stored = (docs / name).read_text()
    assert manual == stored, f'docs/{name} is not current: {program} --manual > docs/{name}'
    check_width('\n'.join(l for l in manual.splitlines() if not l.startswith('|')), name)
    return manual


def main():
    usage = output(vmmig, '--help')
    check_width(usage, 'vmmig --help')
    assert output(vmmig, 'help') == usage
    manual = check_manual(vmmig, 'vmmig.1.md')
    for command in commands(usage):
        text = output(vmmig, *command.split(), '--help')
        check_width(text, f'vmmig {command} --help')
        assert output(vmmig, 'help', *command.split()) == text
        assert f'### vmmig {command}\n' in manual, command
        for option in re.findall(r'^  (--[a-z-]+)', text, re.M):
            assert f'`{option}' in manual, (command, option)
    daemon = output(vmmigd, '--help')
    check_width(daemon, 'vmmigd --help')
    page = check_manual(vmmigd, 'vmmigd.8.md')
    sample = output(vmmigd, '--sample-config')
    for key in re.findall(r'^  ((?:--)?[a-z][a-z-]+)', daemon, re.M):
        assert f'`{key}' in page, key
        if not key.startswith('--'):
            assert f'\n#{key} ' in sample, key
    check_error(vmmig)
    check_error(vmmig, 'lst')
    check_error(vmmig, 'send', 'web1')
    check_error(vmmigd, '--nonsense')
    check_error(vmmigd, 'start')


main()
