#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Help and manuals agree with the programs.

usage: help.py VMMIG VMMIGD DOCS VMMIG.1 VMMIGD.8

Every help text goes to standard output, fits 80 columns and ends with status 0; what is wrong with a
command line goes to standard error, with status 2. The manual pages in DOCS are what the programs
print, and name every command and option. Those for man(1) are flawless roff and say the same.
"""
import pathlib
import re
import subprocess
import sys

vmmig, vmmigd, docs, *pages = sys.argv[1:6]
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


def check_page(path, manual):
    """What `man` shows, word for word, but for the title above and below each page and the heads of the table."""
    done = subprocess.run(['mandoc', '-T', 'lint', '-W', 'warning', path], capture_output=True, text=True)
    complaints = [line for line in done.stdout.splitlines() if 'missing date' not in line]  # it is of a version, not of a day
    assert not complaints, complaints
    shown = re.sub('.\b', '', output('mandoc', '-T', 'ascii', '-O', 'width=200', path)).strip().splitlines()[1:-1]
    title, body = re.fullmatch(r'<!--.*?-->\s*# (.*?)\n(.*)', manual, re.DOTALL).groups()
    name, what = re.fullmatch(r'(\w+)\(\d\): (.*)', title).groups()
    synopsis, body = body.strip().split('\n\n', 1)
    body = re.sub(r'^\| status .*\n\|---.*\n', '', body, flags=re.MULTILINE)
    body = re.sub(r'^(#+|:  ) |^\|| \|(?= |$)', ' ', body, flags=re.MULTILINE)
    expected = f'NAME {name} - {what} SYNOPSIS {synopsis} DESCRIPTION {body}'.replace('`', '').lower().split()
    told = ' '.join(shown).lower().split()
    for number, (is_, should) in enumerate(zip(told, expected)):
        assert is_ == should, (path, told[number - 5:number + 5], expected[number - 5:number + 5])
    assert len(told) == len(expected) > 500, (path, len(told), len(expected))


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
    for path, said in zip(pages, (manual, page), strict=True):
        check_page(path, said)
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
