#!/usr/bin/env bash
# Install the Debian packages of the throw-away cluster, as root; none of their services is started.
set -euo pipefail
programs=(slurmctld slurmd sbatch slurmdbd munged mariadbd)
if PATH=$PATH:/usr/sbin:/sbin type "${programs[@]}" >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo 'tests/cluster/install.sh: apt-get needs root; install slurm-wlm, slurmdbd, munge and mariadb-server' >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # at this run level the packages' scripts start nothing
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client slurmdbd munge mariadb-server
