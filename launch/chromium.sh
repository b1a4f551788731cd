#!/usr/bin/env bash
# bash launch/chromium.sh: the browser that tests the report. Does nothing where there is one; never fails: without it
# those tests are skipped, and say so.
set -uo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" > /dev/null && exit 0
done
why=
if [ "$(id -u)" != 0 ]; then
    why="only root can install it"
elif ! command -v apt-get > /dev/null; then
    why="there is no apt-get to install it with"
elif ! { timeout 300 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 900 apt-get install -y -qq --no-install-recommends chromium; } \
    > /dev/null 2>&1; then
    why="apt-get could not install it"
fi
[ -z "$why" ] || echo "no Chromium here, and $why: the tests of the report in a browser will be skipped" >&2
exit 0
