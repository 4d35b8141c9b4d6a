#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# One static library out of several, with the symbols of the version script alone visible.
# Usage: make_static.sh OUTPUT MAP LIBRARY [WHAT_IT_NEEDS...]
set -eu
output=$1 map=$2 whole=$3
shift 3
object=$output.o
ld -r -o "$object" --whole-archive "$whole" --no-whole-archive --start-group "$@" --end-group
keep=
for symbol in $(sed -n 's/^ *\(vmmig_[a-z_]*\);$/\1/p' "$map"); do
    keep="$keep --keep-global-symbol=$symbol"
done
# shellcheck disable=SC2086 # a list of options
objcopy $keep "$object"
rm -f "$output"
ar rcsD "$output" "$object"
rm -f "$object"
