#!/usr/bin/env bash
# Makes autograder.zip, ready to upload, of the committed course: bash docs/teaching/gradescope/make_zip.sh
set -euo pipefail
course=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
to=$PWD/autograder.zip
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/course"
git -C "$course" archive HEAD | tar -x -C "$work/course"
rm -rf "$work/course/notebooks" "$work/course/benchmarks"
cp "$course"/docs/teaching/gradescope/{setup.sh,run_autograder} "$work"
chmod +x "$work"/{setup.sh,run_autograder}
rm -f "$to"
python3 -c "import shutil, sys; shutil.make_archive(sys.argv[1], 'zip', sys.argv[2])" "${to%.zip}" "$work"
echo "$to"
