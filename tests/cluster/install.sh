#!/usr/bin/env bash
# Install the Debian packages of the throw-away cluster, as root; none of their services is started.
set -euo pipefail
if [ "$(id -u)" != 0 ]; then
    echo "install.sh: run it as root (it calls apt-get)" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # with this run level the packages' scripts start nothing
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client slurmdbd munge mariadb-server
