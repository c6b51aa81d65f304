#!/usr/bin/env bash
# Install Debian's Chromium and a font, as root, for the tests of the page of `grappa explore`.
set -euo pipefail
if [ -n "${GRAPPA_CHROMIUM:-}" ] || type chromium >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo 'tests/browser/install.sh: apt-get needs root; install chromium and fonts-dejavu-core' >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
