#!/usr/bin/env bash
# zig as a C++ compiler, asked to compile to /dev/null, leaves an object in the current folder.
#
# `g++ -c x.cpp -o /dev/null` is how one asks whether a file compiles and keeps nothing. The driver
# of ziglang 0.15.2 takes the same words, exits with 0, does not write to /dev/null, and creates x.o
# beside whatever else is in the current folder. With any other name after -o the object goes there.
# A check of a cross-compiler that runs in a source tree so litters it, and what globs *.o next may
# link a file for another processor.
#
# Seen with ziglang 0.15.2 on Linux x86-64, Python 3.11:
#   to /dev/null: exit 0, files: x.cpp x.o
#   to other.o: exit 0, files: other.o x.cpp
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check ziglang==0.15.2 2>/dev/null
mkdir "$folder/work"
cd "$folder/work"
export ZIG_GLOBAL_CACHE_DIR="$folder/cache" ZIG_LOCAL_CACHE_DIR="$folder/cache"
echo 'int x;' >x.cpp

compile_to() {
  "$folder/venv/bin/python" -m ziglang c++ -target aarch64-linux-gnu -c x.cpp -o "$1"
  echo "to $1: exit $?, files: $(ls | xargs)"
}
first=$(compile_to /dev/null)
rm -f x.o
second=$(compile_to other.o)
printf '%s\n%s\n' "$first" "$second"
[ "$first" = "to /dev/null: exit 0, files: x.cpp x.o" ]
[ "$second" = "to other.o: exit 0, files: other.o x.cpp" ]
