"""Real launchers on this machine: `make test-cluster`; one alone: `python -m tests.cluster.check_slurm`."""
