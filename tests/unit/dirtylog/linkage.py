#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""libvmmig-attach as a VMM's author sees it: its header compiles as C and as C++ without warnings, both forms of the
library link, and neither shows a symbol that is not in the version script.

usage: linkage.py SOURCE_ROOT SHARED_LIBRARY STATIC_LIBRARY
"""
import os
import re
import subprocess
import sys
import tempfile

PROGRAM = r'''
#include <vmmig-attach.h>
#include <stdio.h>
int main(void)
{
    struct vmmig_error error;
    struct vmmig_attach *attach = NULL;
    struct vmmig_config config = {VMMIG_CONFIG_SIZE};
    if (vmmig_create(&config, &attach, &error) == 0)
        return 1;
    puts(error.text);
    return vmmig_tracking_name(VMMIG_TRACKING_RING)[0] != 'r';
}
'''


def run(*argv):
    done = subprocess.run(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f'{" ".join(argv)}:\n{done.stdout}'
    return done.stdout


def public_symbols(root):
    with open(os.path.join(root, 'dirtylog/vmmig-attach.map'), encoding='ascii') as file:
        listed = set(re.findall(r'^ *(vmmig_\w+);$', file.read(), re.M))
    with open(os.path.join(root, 'dirtylog/vmmig-attach.h'), encoding='utf-8') as file:
        declared = set(re.findall(r'^VMMIG_PUBLIC [^;]*?\b(vmmig_\w+)\(', file.read(), re.M))
    assert listed == declared, f'in the header and not in the version script, or the reverse: {listed ^ declared}'
    return listed


def symbols_of(*nm):
    return {line.split()[-1].split('@')[0] for line in run('nm', '--defined-only', *nm).splitlines()
            if re.search(r' [A-Z] ', line) and ' A ' not in line}


def main():
    root, shared, static = sys.argv[1:]
    wanted = public_symbols(root)
    assert symbols_of('-D', shared) == wanted, symbols_of('-D', shared) ^ wanted
    assert symbols_of('-g', static) == wanted, symbols_of('-g', static) ^ wanted
    flags = ['-Wall', '-Wextra', '-Werror', '-Wno-missing-field-initializers', '-I', os.path.join(root, 'dirtylog')]
    sanitizers = [] if '__asan' not in run('nm', '-D', shared) else ['-fsanitize=address,undefined']
    with tempfile.TemporaryDirectory() as folder:
        for compiler, language, standard in (('cc', 'c', 'c99'), ('c++', 'c++', 'c++11')):
            source = os.path.join(folder, f'program.{language}')
            with open(source, 'w', encoding='ascii') as file:
                file.write(PROGRAM)
            for form in (shared, static):
                if sanitizers:
                    continue  # the runtime of another compiler is none of this test's business
                program = os.path.join(folder, 'program')
                run(compiler, '-x', language, f'-std={standard}', *flags, source, '-x', 'none', '-o', program, form,
                    f'-Wl,-rpath,{os.path.dirname(os.path.abspath(shared))}', '-lprotobuf-c', '-pthread')
                assert re.search(r'config\.callbacks\.\w+ is missing', run(program))


if __name__ == '__main__':
    main()
